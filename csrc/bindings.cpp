// pybind11 only: convert, release the GIL, map exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "planner.hpp"

namespace py = pybind11;
using namespace fd2fast;

namespace {

using Segments = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;

// A numpy array that owns the vector: no copy.
template <typename T>
py::array_t<T> own(std::vector<T>&& values) {
    auto keep = std::make_unique<std::vector<T>>(std::move(values));
    const auto n = static_cast<py::ssize_t>(keep->size());
    T* data = keep->data();
    py::capsule base(keep.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(n, data, base);
}

py::dict plan_arrays(PlanRequest request) {
    Plan p;
    {
        py::gil_scoped_release release;
        p = make_plan(request);
    }
    py::dict d;
    d["segments_per_step"] = p.segments_per_step;
    d["max_rows_per_step"] = p.max_rows;
    d["first_class"] = own(std::move(p.first_class));
    d["end_class"] = own(std::move(p.end_class));
    d["block"] = own(std::move(p.block));
    d["image_id"] = own(std::move(p.image_id));
    d["group"] = own(std::move(p.group));
    d["slot"] = own(std::move(p.slot));
    d["step_segments"] = own(std::move(p.step_segments));
    d["step_offsets"] = own(std::move(p.step_offsets));
    d["step_wave"] = own(std::move(p.step_wave));
    d["prior_segments"] = own(std::move(p.prior_segments));
    d["prior_offsets"] = own(std::move(p.prior_offsets));
    return d;
}

DrawSpec draw_spec(std::uint64_t seed, std::int64_t size, std::int64_t jitter, bool augment,
                   std::pair<double, double> scale, std::pair<double, double> ratio) {
    return {seed, size, jitter, augment, {scale.first, scale.second}, {ratio.first, ratio.second}};
}

void want_vector(const Segments& segments) {
    if (segments.ndim() != 1) {
        throw std::invalid_argument("segments must be [n], got " + std::to_string(segments.ndim()) + " dimensions");
    }
}

py::array_t<std::int32_t> iteration_table(std::uint64_t seed, const Segments& segments, std::int64_t first_iteration,
                                          std::int64_t count, std::int64_t size, std::int64_t jitter, bool augment,
                                          std::pair<double, double> scale, std::pair<double, double> ratio,
                                          int threads) {
    want_vector(segments);
    if (count < 0) throw std::invalid_argument("count must be at least 0, got " + std::to_string(count));
    const DrawSpec spec = draw_spec(seed, size, jitter, augment, scale, ratio);
    py::array_t<std::int32_t> table({static_cast<py::ssize_t>(count), segments.shape(0), py::ssize_t{kColumns}});
    std::int32_t* out = table.mutable_data();
    const std::int64_t* ids = segments.data();
    const std::int64_t n = segments.shape(0);
    py::gil_scoped_release release;
    fill_table(spec, ids, n, first_iteration, count, out, threads);
    return table;
}

py::array_t<double> cosine_rates(double lr, std::int64_t first_iteration, std::int64_t count, std::int64_t total) {
    if (count < 0) throw std::invalid_argument("count must be at least 0, got " + std::to_string(count));
    py::array_t<double> rates(static_cast<py::ssize_t>(count));
    fill_rates(lr, first_iteration, count, total, rates.mutable_data());
    return rates;
}

py::array_t<std::uint32_t> philox(std::uint64_t seed, const Words& counters) {
    if (counters.ndim() != 2 || counters.shape(1) != 4) throw std::invalid_argument("counters must be [n, 4]");
    py::array_t<std::uint32_t> bits({counters.shape(0), py::ssize_t{4}});
    philox_bits(seed, counters.data(), counters.shape(0), bits.mutable_data());
    return bits;
}

py::capsule share(const std::shared_ptr<Ring>& ring) {
    return py::capsule(new std::shared_ptr<Ring>(ring), [](void* p) { delete static_cast<std::shared_ptr<Ring>*>(p); });
}

struct LeakInChild {
    void operator()(TableStream* stream) const {
        if (!stream->here()) return;
        py::gil_scoped_release release;
        delete stream;
    }
};
using StreamHolder = std::unique_ptr<TableStream, LeakInChild>;

StreamHolder open_stream(std::uint64_t seed, const Segments& segments, std::int64_t first_iteration,
                         std::int64_t count, std::int64_t size, std::int64_t jitter, bool augment,
                         std::pair<double, double> scale, std::pair<double, double> ratio, double lr,
                         std::int64_t total, std::int64_t chunk, std::int64_t depth, std::int64_t keep) {
    want_vector(segments);
    StreamSpec spec;
    spec.draws = draw_spec(seed, size, jitter, augment, scale, ratio);
    spec.segments.assign(segments.data(), segments.data() + segments.shape(0));
    spec.first_iteration = first_iteration;
    spec.count = count;
    spec.chunk = chunk;
    spec.depth = depth;
    spec.keep = keep;
    spec.lr = lr;
    spec.total = total;
    return StreamHolder(new TableStream(std::move(spec)));
}

py::tuple next_table(TableStream& stream) {
    std::int64_t table;
    {
        py::gil_scoped_release release;
        table = stream.next();
    }
    if (table < 0) throw py::stop_iteration();
    const Ring& ring = *stream.ring();
    const std::int64_t slot = stream.slot(table);
    const auto n = static_cast<py::ssize_t>(stream.spec().segments.size());
    const auto count = static_cast<py::ssize_t>(stream.iterations(table));
    const py::capsule base = share(stream.ring());
    return py::make_tuple(py::array_t<std::int32_t>({count, n, py::ssize_t{kColumns}}, ring.params(slot), base),
                          py::array_t<double>(count, ring.rates(slot), base));
}

py::array_t<std::uint8_t> memory(const TableStream& stream) {
    return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(stream.ring()->bytes()),
                                     reinterpret_cast<std::uint8_t*>(stream.ring()->data()), share(stream.ring()));
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
    m.doc() = "Plans of grouped steps and iteration tables (C++); fd2fast.distillation.planner is the typed face.";

    m.def(
        "make_plan",
        [](std::int64_t classes, std::int64_t ipc, std::int64_t group_size, std::int64_t segment_size,
           std::int64_t segments_per_step, std::int64_t max_rows, std::int64_t memory_limit,
           std::int64_t bytes_per_row, std::int64_t bytes_fixed, std::vector<std::int64_t> bucket_sizes) {
            return plan_arrays({classes, ipc, group_size, segment_size, segments_per_step, max_rows, memory_limit,
                                bytes_per_row, bytes_fixed, std::move(bucket_sizes)});
        },
        py::kw_only(), py::arg("classes"), py::arg("ipc"), py::arg("group_size"), py::arg("segment_size"),
        py::arg("segments_per_step"), py::arg("max_rows"), py::arg("memory_limit"), py::arg("bytes_per_row"),
        py::arg("bytes_fixed"), py::arg("bucket_sizes"), "The arrays of fd2fast.distillation.planner.Plan; 0: no limit.");
    m.def("iteration_table", &iteration_table, py::kw_only(), py::arg("seed"), py::arg("segments"),
          py::arg("first_iteration"), py::arg("count"), py::arg("size"), py::arg("jitter"), py::arg("augment"),
          py::arg("scale"), py::arg("ratio"), py::arg("threads"), "int32 [count, n, 7]; threads 0: as many as pay.");
    m.def("cosine_rates", &cosine_rates, py::arg("lr"), py::arg("first_iteration"), py::arg("count"),
          py::arg("total"), "float64 [count]");
    m.def("philox", &philox, py::arg("seed"), py::arg("counters"), "uint32 [n, 4] -> uint32 [n, 4]");

    py::class_<TableStream, StreamHolder>(m, "TableStream")
        .def(py::init(&open_stream), py::kw_only(), py::arg("seed"), py::arg("segments"), py::arg("first_iteration"),
             py::arg("count"), py::arg("size"), py::arg("jitter"), py::arg("augment"), py::arg("scale"),
             py::arg("ratio"), py::arg("lr"), py::arg("total"), py::arg("chunk"), py::arg("depth"), py::arg("keep"))
        .def("next", &next_table, "(params int32 [k, n, 7], rates float64 [k]); StopIteration after the last")
        .def("close", &TableStream::close, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("memory", &memory, "uint8: the whole ring");
}
