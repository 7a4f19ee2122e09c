"""Data sets: layouts on disk, the built-in typefaces, prepared image arrays."""
