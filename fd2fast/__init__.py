"""fd2fast: fast fine-grained dataset distillation. Importing it loads no GPU code and compiles nothing."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fd2fast")
except PackageNotFoundError:  # a checkout on the path without an installation
    __version__ = "0+unknown"

__all__ = ["__version__"]
