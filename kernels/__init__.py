"""Triton kernels and their launchers; loaded as fd2fast.kernels only."""

if __name__ != "fd2fast.kernels":
    raise ImportError("import fd2fast.kernels instead: a second copy of every kernel would be compiled")
