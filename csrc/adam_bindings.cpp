// pybind11 only: addresses of torch tensors' memory in, the GIL released; the caller answers for shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "adam.hpp"

namespace py = pybind11;
using namespace fd2fast::adam;

PYBIND11_MODULE(_adam, m) {
    m.doc() = "CPU kernel of adam_clamp_ (csrc/adam.hpp)";
    m.def(
        "step_clamp",
        [](std::int64_t planes, std::int64_t area, const std::array<float, 6>& r, const std::vector<float>& low,
           const std::vector<float>& high, std::uintptr_t grad, std::uintptr_t image, std::uintptr_t exp_avg,
           std::uintptr_t exp_avg_sq, int threads) {
            step_clamp(planes, area, static_cast<std::int64_t>(low.size()), {r[0], r[1], r[2], r[3], r[4], r[5]},
                       low.data(), high.data(), reinterpret_cast<const float*>(grad), reinterpret_cast<float*>(image),
                       reinterpret_cast<float*>(exp_avg), reinterpret_cast<float*>(exp_avg_sq), threads < 1 ? 1 : threads);
        },
        py::call_guard<py::gil_scoped_release>());
}
