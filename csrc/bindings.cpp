// pybind11 only: convert, release the GIL, map exceptions.
#include <pybind11/pybind11.h>
#include "planner.hpp"
PYBIND11_MODULE(_planner, m) { m.doc() = "Plans of grouped steps (C++)"; }
