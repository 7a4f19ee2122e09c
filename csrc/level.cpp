// The instruction set that the kernels run with: the processor's, or less where the environment caps it.
#include "level.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fd2fast {

int processor_level() {
#ifdef FD2FAST_X86_LEVELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        return __builtin_cpu_supports("avx512bf16") ? 5 : 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 3;
#endif
    return 1;
}

namespace {

// The cap that a variable names, 0 for none; `strict`: another value is an error.
int cap_of(const char* variable, bool strict) {
    const char* given = std::getenv(variable);
    const std::string value = given == nullptr ? "" : given;
    if (value.empty()) return 0;
    if (value == "default") return 1;
    if (value == "avx2") return 3;
    if (value == "avx512") return 4;
    if (value == "avx512_bf16") return 5;
    if (strict)
        throw std::invalid_argument(std::string(variable) + " must be default, avx2, avx512 or avx512_bf16, got " + value);
    return 0;
}

}  // namespace

int level() {
    static const int found = [] {
        const int own = cap_of("FD2FAST_CPU_CAPABILITY", true), torch = cap_of("ATEN_CPU_CAPABILITY", false);
        const int cap = own != 0 ? own : torch != 0 ? torch : 5;
        return std::min(processor_level(), cap);
    }();
    return found;
}

}  // namespace fd2fast
