// Which of the kernels' instruction sets this processor runs.
#pragma once

namespace fd2fast {

// 1 anything, 3 and 4 the x86-64 levels of that number, 5 level 4 with bf16.
int processor_level();

// The one that is used: the processor's, or less by FD2FAST_CPU_CAPABILITY, else by ATEN_CPU_CAPABILITY (default, avx2, avx512,
// avx512_bf16). Read once; throws std::invalid_argument for another value of the former.
int level();

// Of one function built for each instruction set, the one for level().
template <typename F>
F for_level(F any, F v3, F v4, F v4_bf16) {
    const int found = level();
    return found == 5 ? v4_bf16 : found == 4 ? v4 : found == 3 ? v3 : any;
}

}  // namespace fd2fast

#ifdef FD2FAST_X86_LEVELS
#define FD2FAST_FOR_LEVEL(f) fd2fast::for_level(base::f, v3::f, v4::f, v4_bf16::f)
#else
#define FD2FAST_FOR_LEVEL(f) base::f
#endif
