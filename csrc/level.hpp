// Which of the kernels' instruction sets this processor runs.
#pragma once

namespace fd2fast {

// 1 anything, 3 and 4 the x86-64 levels of that number, 5 level 4 with bf16.
int processor_level();

// The one that is used: the processor's, or less by FD2FAST_CPU_CAPABILITY, else by ATEN_CPU_CAPABILITY (default, avx2, avx512,
// avx512_bf16). Read once; throws std::invalid_argument for another value of the former.
int level();

}  // namespace fd2fast
