// Which of the kernels' instruction sets this processor runs.
#pragma once

namespace fd2fast {

// 1 anything, 3 and 4 the x86-64 levels of that number, 5 level 4 with bf16.
int level();

}  // namespace fd2fast
