// pybind11 only: addresses of torch tensors' memory in, the GIL released; the caller answers for shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "frozen.hpp"
#include "level.hpp"
#include "winograd.hpp"

namespace py = pybind11;
using namespace fd2fast::frozen;

namespace {

using Address = std::uintptr_t;
using Pair = std::array<std::int64_t, 2>;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const float* floats(Address address) { return at<const float>(address); }

template <typename T>
std::vector<T*> all_at(const std::vector<Address>& addresses) {
    std::vector<T*> pointers;
    for (const Address a : addresses) pointers.push_back(at<T>(a));
    return pointers;
}

BatchNorm batch_norm(const std::array<Address, 4>& constants, int activation) {
    return {floats(constants[0]), floats(constants[1]), floats(constants[2]), floats(constants[3]),
            static_cast<Activation>(activation)};
}

Window window(Pair kernel, Pair stride, Pair padding, Pair dilation, Pair in, Pair out) {
    return {{kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]},
            {in[0], in[1]},         {out[0], out[1]}};
}

}  // namespace

PYBIND11_MODULE(_frozen, m) {
    m.doc() = "CPU kernels of a frozen network's layers (csrc/frozen.hpp)";
    m.def("processor_level", &fd2fast::processor_level);
    m.def("level", &fd2fast::level);
    using Release = py::call_guard<py::gil_scoped_release>;

    py::class_<Map>(m, "Map")
        .def(py::init([](bool half, std::vector<std::int64_t> segments, std::int64_t area, std::int64_t channels,
                         int threads) {
                 return Map{half ? Type::bfloat16 : Type::float32, std::move(segments), area, channels, threads};
             }),
             py::arg("half"), py::arg("segments"), py::arg("area"), py::arg("channels"), py::arg("threads"));

    m.def(
        "bn_act_forward",
        [](const Map& map, std::array<Address, 4> constants, int activation, Address x, Address residual, Address y,
           Address bits, Address mean, Address var, Address loss) {
            bn_act_forward(map, batch_norm(constants, activation), at<const void>(x), at<const void>(residual), at<void>(y),
                           at<std::uint8_t>(bits), at<float>(mean), at<float>(var), at<float>(loss));
        },
        Release());
    m.def(
        "bn_act_backward",
        [](const Map& map, std::array<Address, 4> constants, int activation, Address x, Address grad, Address bits,
           Address mean, Address var, Address grad_loss, Address grad_x, Address grad_residual) {
            bn_act_backward(map, batch_norm(constants, activation), at<const void>(x), at<const void>(grad),
                            at<const std::uint8_t>(bits), floats(mean), floats(var), floats(grad_loss), at<void>(grad_x),
                            at<void>(grad_residual));
        },
        Release());
    m.def(
        "statistics",
        [](const Map& map, Address x, Address mean, Address var) {
            statistics(map, at<const void>(x), at<float>(mean), at<float>(var));
        },
        Release());
    m.def(
        "statistics_backward",
        [](const Map& map, Address x, Address mean, Address grad_mean, Address grad_var, Address grad_x) {
            statistics_backward(map, at<const void>(x), floats(mean), floats(grad_mean), floats(grad_var), at<void>(grad_x));
        },
        Release());
    m.def(
        "join_forward",
        [](const Map& map, std::array<Address, 4> constants, int activation, const std::vector<Address>& maps,
           const std::vector<Address>& statistics, const std::vector<std::int64_t>& channels, Address y, Address loss) {
            join_forward(map, batch_norm(constants, activation), all_at<const void>(maps), all_at<const float>(statistics),
                         channels, at<void>(y), at<float>(loss));
        },
        Release());
    m.def(
        "join_backward",
        [](const Map& map, std::array<Address, 4> constants, int activation, const std::vector<Address>& maps,
           const std::vector<Address>& statistics, const std::vector<std::int64_t>& channels, Address grad, Address grad_loss,
           const std::vector<Address>& grads, const std::vector<Address>& grad_statistics) {
            join_backward(map, batch_norm(constants, activation), all_at<const void>(maps), all_at<const float>(statistics),
                          channels, at<const void>(grad), floats(grad_loss), all_at<void>(grads),
                          all_at<float>(grad_statistics));
        },
        Release());
    m.def(
        "unit_root_forward",
        [](std::int64_t rows, std::int64_t dims, float eps, Address x, Address z, Address norms, int threads) {
            unit_root_forward(rows, dims, eps, floats(x), at<float>(z), at<float>(norms), threads);
        },
        Release());
    m.def(
        "unit_root_backward",
        [](std::int64_t rows, std::int64_t dims, float eps, Address x, Address z, Address norms, Address grad, Address grad_x,
           int threads) {
            unit_root_backward(rows, dims, eps, floats(x), floats(z), floats(norms), floats(grad), at<float>(grad_x), threads);
        },
        Release());
    m.def(
        "distances",
        [](std::int64_t rows, std::int64_t classes, std::int64_t dims, Address z, Address prototypes, Address out,
           int threads) { distances(rows, classes, dims, floats(z), floats(prototypes), at<float>(out), threads); },
        Release());
    m.def(
        "pull",
        [](std::int64_t rows, std::int64_t classes, std::int64_t dims, Address z, Address prototypes, Address weights,
           Address out, int threads) {
            pull(rows, classes, dims, floats(z), floats(prototypes), floats(weights), at<float>(out), threads);
        },
        Release());
    m.def(
        "max_pool_forward",
        [](bool half, std::int64_t images, std::int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
           Pair in, Pair out, Address x, Address y, Address places, int threads) {
            max_pool_forward(half ? Type::bfloat16 : Type::float32, images, channels,
                             window(kernel, stride, padding, dilation, in, out), at<const void>(x), at<void>(y),
                             at<std::uint8_t>(places), threads);
        },
        Release());
    m.def(
        "max_pool_backward",
        [](bool half, std::int64_t images, std::int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
           Pair in, Pair out, Address grad, Address places, Address grad_x, int threads) {
            max_pool_backward(half ? Type::bfloat16 : Type::float32, images, channels,
                              window(kernel, stride, padding, dilation, in, out), at<const void>(grad),
                              at<const std::uint8_t>(places), at<void>(grad_x), threads);
        },
        Release());
    m.def(
        "depthwise_backward",
        [](bool half, std::int64_t images, std::int64_t channels, Pair kernel, Pair stride, Pair padding, Pair dilation,
           Pair in, Pair out, Address grad, Address weight, Address grad_x, int threads) {
            depthwise_backward(half ? Type::bfloat16 : Type::float32, images, channels,
                               window(kernel, stride, padding, dilation, in, out), at<const void>(grad), floats(weight),
                               at<void>(grad_x), threads);
        },
        Release());
    m.def("winograd_packed_floats", &fd2fast::winograd::packed_floats);
    m.def(
        "winograd_transform",
        [](Address weight, std::array<std::int64_t, 4> strides, std::int64_t channels_in, std::int64_t channels_out, bool turned,
           Address packed, int threads) {
            const std::int64_t by[4] = {strides[0], strides[1], strides[2], strides[3]};
            fd2fast::winograd::transform_and_pack(floats(weight), by, channels_in, channels_out, turned, at<float>(packed),
                                                  threads);
        },
        Release());
    m.def(
        "winograd_weight_gradient",
        [](bool half, std::int64_t images, std::int64_t channels_in, std::int64_t channels_out, Pair in, Pair out, Pair padding,
           Address x, Address grad, Address grad_weight, std::array<std::int64_t, 4> strides, int threads) {
            const fd2fast::winograd::Shape shape{images, channels_in, channels_out, in[0], in[1], out[0], out[1],
                                                 {padding[0], padding[1]}};
            const std::int64_t by[4] = {strides[0], strides[1], strides[2], strides[3]};
            fd2fast::winograd::weight_gradient(half ? Type::bfloat16 : Type::float32, shape, at<const void>(x),
                                               at<const void>(grad), at<float>(grad_weight), by, threads);
        },
        Release());
    m.def(
        "winograd_convolve",
        [](bool half, std::int64_t images, std::int64_t channels_in, std::int64_t channels_out, Pair in, Pair out, Pair padding,
           Address x, Address packed, Address bias, Address y, int threads) {
            const fd2fast::winograd::Shape shape{images, channels_in, channels_out, in[0], in[1], out[0], out[1],
                                                 {padding[0], padding[1]}};
            fd2fast::winograd::convolve(half ? Type::bfloat16 : Type::float32, shape, at<const void>(x), floats(packed),
                                        floats(bias), at<void>(y), threads);
        },
        Release());
}
