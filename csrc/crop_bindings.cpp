// pybind11 only: addresses of torch tensors' memory in, the GIL released; the caller answers for shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "crop.hpp"

namespace py = pybind11;
using namespace fd2fast::crop;

namespace {

using Shape = std::array<std::int64_t, 4>;
using Rows = std::vector<std::array<std::int64_t, 7>>;

Batch batch(bool half, bool half_view, std::int64_t channels, std::int64_t size, std::vector<std::int64_t> segments, const Rows& rows,
            int threads) {
    const auto type = [](bool is_half) { return is_half ? Type::bfloat16 : Type::float32; };
    Batch found{type(half), type(half_view), channels, size, std::move(segments), {}, threads < 1 ? 1 : threads};
    for (const auto& r : rows) found.draws.push_back({r[0], r[1], r[2], r[3], r[4] != 0, r[5], r[6]});
    return found;
}

Images images(const Shape& shape, const Shape& stride) {
    return {shape[2], shape[3], {stride[0], stride[1], stride[2], stride[3]}};
}

}  // namespace

PYBIND11_MODULE(_crop, m) {
    m.doc() = "CPU kernels of the shared crop, resize, flip and roll (csrc/crop.hpp)";
    using Release = py::call_guard<py::gil_scoped_release>;
    m.def(
        "forward",
        [](bool half, bool half_view, const std::vector<std::int64_t>& segments, const Rows& rows, const Shape& shape, const Shape& stride,
           std::uintptr_t image, const Shape& view_shape, const Shape& view_stride, std::uintptr_t view, int threads) {
            forward(batch(half, half_view, shape[1], view_shape[2], segments, rows, threads), images(shape, stride),
                    reinterpret_cast<const void*>(image), images(view_shape, view_stride), reinterpret_cast<void*>(view));
        },
        Release());
    m.def(
        "backward",
        [](bool half, bool half_view, const std::vector<std::int64_t>& segments, const Rows& rows, const Shape& view_shape,
           const Shape& view_stride, std::uintptr_t grad, const Shape& shape, const Shape& stride, std::uintptr_t grad_image,
           int threads) {
            backward(batch(half, half_view, shape[1], view_shape[2], segments, rows, threads), images(view_shape, view_stride),
                     reinterpret_cast<const void*>(grad), images(shape, stride), reinterpret_cast<void*>(grad_image));
        },
        Release());
}
