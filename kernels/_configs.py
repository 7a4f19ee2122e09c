"""Block sizes and warps of the kernels. None is measured yet: they are chosen by counting bytes in flight."""

# elements per program and warps; 1024 float32 elements of four tensors are 16 KiB in flight per program
ADAM_BLOCK = 1024
ADAM_WARPS = 4
