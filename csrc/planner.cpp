// Plans of grouped steps and counter-based iteration tables. fd2fast/reference/planner.py is the specification.
#include "planner.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace fd2fast {
namespace {

constexpr std::int64_t kMost = 2147483647;  // ids and counts fit int32

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

void at_least(const char* name, std::int64_t value, std::int64_t low) {
    if (value < low) {
        refuse(std::string(name) + " must be at least " + std::to_string(low) + ", got " + std::to_string(value));
    }
}

void at_most(const char* name, std::int64_t value, std::int64_t high) {
    if (value > high) {
        refuse(std::string(name) + " must be at most " + std::to_string(high) + ", got " + std::to_string(value));
    }
}

void between(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    at_least(name, value, low);
    at_most(name, value, high);
}

// The most rows that one step may hold; 0: no limit.
std::int64_t row_limit(const PlanRequest& r) {
    std::int64_t limit = r.max_rows;
    if (limit && limit < r.segment_size) {
        refuse("max_rows_per_step too small for one segment: " + std::to_string(r.segment_size) +
               " rows needed, got " + std::to_string(limit));
    }
    if (r.memory_limit) {
        const std::int64_t need = r.bytes_fixed + r.segment_size * r.bytes_per_row;
        if (r.memory_limit < need) {
            refuse("memory_limit too small for one segment: " + std::to_string(need) + " bytes needed (" +
                   std::to_string(r.bytes_fixed) + " + " + std::to_string(r.segment_size) + " rows of " +
                   std::to_string(r.bytes_per_row) + "), got " + std::to_string(r.memory_limit));
        }
        const std::int64_t fit = (r.memory_limit - r.bytes_fixed) / r.bytes_per_row;
        limit = limit ? std::min(limit, fit) : fit;
    }
    return limit;
}

void check(const PlanRequest& r) {
    between("classes", r.classes, 1, kMost);
    between("ipc", r.ipc, 1, kMost);
    between("group_size", r.group_size, 1, kMost);
    at_least("segment_size", r.segment_size, 1);
    if (r.segment_size > r.classes) {
        refuse("segment larger than the class count: " + std::to_string(r.segment_size) + " > " +
               std::to_string(r.classes));
    }
    at_least("segments_per_step", r.segments_per_step, 0);
    at_least("max_rows_per_step", r.max_rows, 0);
    at_least("memory_limit", r.memory_limit, 0);
    // 2^31 rows of at most 2^31 bytes do not overflow
    between("bytes_per_row", r.bytes_per_row, 0, kMost);
    at_least("bytes_fixed", r.bytes_fixed, 0);
    at_most("bytes_fixed", r.bytes_fixed, std::int64_t{1} << 61);
    if ((r.memory_limit == 0) != (r.bytes_per_row == 0)) refuse("memory_limit and bytes_per_row go together");
    for (const std::int64_t size : r.bucket_sizes) at_least("bucket_sizes", size, 1);
}

}  // namespace

Plan make_plan(const PlanRequest& r) {
    check(r);
    Plan p;
    p.max_rows = row_limit(r);

    const std::int64_t blocks = (r.classes + r.segment_size - 1) / r.segment_size;
    const std::int64_t n = blocks * r.ipc;
    at_most("number of segments", n, kMost);
    const std::int64_t waves = std::min(r.group_size, r.ipc);
    const std::int64_t groups = (r.ipc + r.group_size - 1) / r.group_size;
    p.segments_per_step = r.segments_per_step ? r.segments_per_step : blocks * groups;
    const std::int64_t full_groups = r.ipc / r.group_size, rest = r.ipc % r.group_size;
    const std::int64_t priors =
        blocks * (full_groups * (r.group_size * (r.group_size - 1) / 2) + rest * (rest - 1) / 2);
    at_most("number of priors", priors, kMost);

    for (auto* column : {&p.first_class, &p.end_class, &p.block, &p.image_id, &p.group, &p.slot}) column->resize(n);
    p.prior_segments.reserve(priors);
    p.prior_offsets.reserve(n + 1);
    p.prior_offsets.push_back(0);
    for (std::int64_t i = 0, s = 0; i < r.ipc; ++i) {
        const std::int64_t group = i / r.group_size, first_image = group * r.group_size;
        for (std::int64_t b = 0; b < blocks; ++b, ++s) {
            p.first_class[s] = static_cast<std::int32_t>(b * r.segment_size);
            p.end_class[s] = static_cast<std::int32_t>(std::min(r.classes, (b + 1) * r.segment_size));
            p.block[s] = static_cast<std::int32_t>(b);
            p.image_id[s] = static_cast<std::int32_t>(i);
            p.group[s] = static_cast<std::int32_t>(group);
            p.slot[s] = static_cast<std::int32_t>(i - first_image);
            for (std::int64_t j = first_image; j < i; ++j) p.prior_segments.push_back(j * blocks + b);
            p.prior_offsets.push_back(static_cast<std::int64_t>(p.prior_segments.size()));
        }
    }

    std::vector<std::int64_t> buckets = r.bucket_sizes;
    std::sort(buckets.begin(), buckets.end());
    const std::int64_t full_blocks = r.classes / r.segment_size;
    p.step_segments.reserve(n);
    p.step_offsets.push_back(0);
    for (std::int64_t wave = 0; wave < waves; ++wave) {
        // full segments first, so that all steps but a few are made of equal ones
        for (std::int64_t i = wave; i < r.ipc; i += r.group_size) {
            for (std::int64_t b = 0; b < full_blocks; ++b) p.step_segments.push_back(i * blocks + b);
        }
        for (std::int64_t i = wave; full_blocks < blocks && i < r.ipc; i += r.group_size) {
            p.step_segments.push_back(i * blocks + full_blocks);
        }
        const std::int64_t end = static_cast<std::int64_t>(p.step_segments.size());
        for (std::int64_t begin = p.step_offsets.back(); begin < end;) {
            std::int64_t fit = 0, rows = 0;
            while (begin + fit < end && fit < p.segments_per_step) {
                const std::int64_t s = p.step_segments[begin + fit];
                rows += p.end_class[s] - p.first_class[s];
                if (p.max_rows && rows > p.max_rows) break;
                ++fit;
            }
            const auto above = std::upper_bound(buckets.begin(), buckets.end(), fit);
            begin += above == buckets.begin() ? fit : *(above - 1);
            p.step_offsets.push_back(begin);
            p.step_wave.push_back(static_cast<std::int32_t>(wave));
        }
    }
    return p;
}

// ---- draws ----
namespace {

constexpr std::int64_t kTries = 10;  // torchvision's RandomResizedCrop; counter word 0 of flip and roll

struct Bits {
    std::uint32_t x[4];
};

inline Bits philox(std::uint64_t seed, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * c0, b = std::uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(b);
        c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(a);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

inline double uniform(std::uint32_t x) { return x * 0x1p-32; }

// floor(u * n), exactly
inline std::int32_t below(std::uint32_t x, std::int64_t n) {
    return static_cast<std::int32_t>((static_cast<std::uint64_t>(x) * static_cast<std::uint64_t>(n)) >> 32);
}

// Half to even, |x| < 2^51; needs no instruction beyond SSE2.
inline double round_even(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// e^x from IEEE additions and products only, so that the same table comes from every machine and language.
inline double exponential(double x) {
    const double k = round_even(x * 0x1.71547652b82fep+0);                // 1 / ln 2
    const double r = (x - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return k == 0.0 ? p : std::ldexp(p, static_cast<int>(k));
}

struct Drawer {
    explicit Drawer(const DrawSpec& s)
        : spec(s),
          area(static_cast<double>(s.size) * static_cast<double>(s.size)),
          scale_span(s.scale[1] - s.scale[0]),
          log_low(std::log(s.ratio[0])),
          log_span(std::log(s.ratio[1]) - log_low) {
        const double side = static_cast<double>(s.size);
        fallback[2] = fallback[3] = static_cast<std::int32_t>(s.size);
        if (1.0 < s.ratio[0]) fallback[2] = static_cast<std::int32_t>(std::max(1.0, round_even(side / s.ratio[0])));
        if (1.0 > s.ratio[1]) fallback[3] = static_cast<std::int32_t>(std::max(1.0, round_even(side * s.ratio[1])));
        fallback[0] = static_cast<std::int32_t>((s.size - fallback[2]) / 2);
        fallback[1] = static_cast<std::int32_t>((s.size - fallback[3]) / 2);
    }

    void crop(std::uint32_t t, std::uint32_t lo, std::uint32_t hi, std::int32_t* out) const {
        const double side = static_cast<double>(spec.size);
        for (std::uint32_t attempt = 0; attempt < kTries; ++attempt) {
            const Bits b = philox(spec.seed, attempt, t, lo, hi);
            const double target = area * (spec.scale[0] + uniform(b.x[0]) * scale_span);
            const double aspect = exponential(log_low + uniform(b.x[1]) * log_span);
            const double w = round_even(std::sqrt(target * aspect)), h = round_even(std::sqrt(target / aspect));
            if (w > 0.0 && w <= side && h > 0.0 && h <= side) {
                out[2] = static_cast<std::int32_t>(h);
                out[3] = static_cast<std::int32_t>(w);
                out[0] = below(b.x[2], spec.size - out[2] + 1);
                out[1] = below(b.x[3], spec.size - out[3] + 1);
                return;
            }
        }
        std::copy(fallback, fallback + 4, out);
    }

    void row(std::int64_t iteration, std::int64_t segment, std::int32_t* out) const {
        const auto t = static_cast<std::uint32_t>(iteration), lo = static_cast<std::uint32_t>(segment),
                   hi = static_cast<std::uint32_t>(static_cast<std::uint64_t>(segment) >> 32);
        const Bits b = philox(spec.seed, kTries, t, lo, hi);
        if (spec.augment) {
            crop(t, lo, hi, out);
        } else {
            out[0] = out[1] = 0;
            out[2] = out[3] = static_cast<std::int32_t>(spec.size);
        }
        out[4] = spec.augment && b.x[0] < 0x80000000u;
        out[5] = below(b.x[1], spec.jitter + 1);
        out[6] = below(b.x[2], spec.jitter + 1);
    }

    DrawSpec spec;
    double area, scale_span, log_low, log_span;
    std::int32_t fallback[4];
};

void check_iterations(std::int64_t first, std::int64_t count) {
    at_least("first_iteration", first, 0);
    at_least("count", count, 0);
    constexpr std::int64_t end = std::int64_t{1} << 32;  // one counter word
    if (first > end - count) {
        refuse("iterations must stay below 4294967296, got " + std::to_string(first) + " + " + std::to_string(count));
    }
}

}  // namespace

void check_draws(const DrawSpec& s) {
    between("size", s.size, 1, 32768);
    between("jitter", s.jitter, 0, 32768);
    if (!(0.0 < s.scale[0] && s.scale[0] <= s.scale[1] && s.scale[1] <= 1.0)) {
        refuse("scale must be 0 < low <= high <= 1, got " + std::to_string(s.scale[0]) + ", " +
               std::to_string(s.scale[1]));
    }
    if (!(1e-3 <= s.ratio[0] && s.ratio[0] <= s.ratio[1] && s.ratio[1] <= 1e3)) {
        refuse("ratio must be 0.001 <= low <= high <= 1000, got " + std::to_string(s.ratio[0]) + ", " +
               std::to_string(s.ratio[1]));
    }
}

void check_segments(const std::int64_t* segments, std::int64_t n) {
    for (std::int64_t k = 0; k < n; ++k) at_least("segment id", segments[k], 0);
}

void fill_table(const DrawSpec& spec, const std::int64_t* segments, std::int64_t n, std::int64_t first_iteration,
                std::int64_t count, std::int32_t* out, int threads) {
    check_draws(spec);
    check_segments(segments, n);
    check_iterations(first_iteration, count);
    const Drawer drawer(spec);
    const std::int64_t rows = n * count;
    const auto fill = [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t k = begin; k < end;) {
            const std::int64_t t = k / n, stop = std::min(end, (t + 1) * n);
            for (std::int64_t s = k - t * n; k < stop; ++k, ++s) {
                drawer.row(first_iteration + t, segments[s], out + k * kColumns);
            }
        }
    };
    constexpr std::int64_t worth_a_thread = 1 << 16;
    std::int64_t parts = threads;
    if (parts <= 0) {
        parts = std::min<std::int64_t>(std::max(1u, std::thread::hardware_concurrency()), rows / worth_a_thread);
    }
    parts = std::max<std::int64_t>(1, std::min(parts, rows));
    std::vector<std::thread> helpers;
    const auto join = [&] {
        for (auto& helper : helpers) helper.join();
    };
    try {
        helpers.reserve(parts - 1);
        for (std::int64_t p = 1; p < parts; ++p) {
            helpers.emplace_back(fill, rows * p / parts, rows * (p + 1) / parts);
        }
    } catch (...) {
        join();
        throw;
    }
    fill(0, rows / parts);
    join();
}

void fill_rates(double lr, std::int64_t first_iteration, std::int64_t count, std::int64_t total, double* out) {
    if (!std::isfinite(lr)) refuse("lr must be finite, got " + std::to_string(lr));
    check_iterations(first_iteration, count);
    at_least("total", total, 1);
    if (first_iteration + count > total) {
        refuse("iterations run past the schedule: " + std::to_string(first_iteration) + " + " +
               std::to_string(count) + " > " + std::to_string(total));
    }
    constexpr double pi = 3.141592653589793;
    for (std::int64_t k = 0; k < count; ++k) {
        const double t = static_cast<double>(first_iteration + k);
        out[k] = 0.5 * (1.0 + std::cos(pi * t / static_cast<double>(total))) * lr;
    }
}

void philox_bits(std::uint64_t seed, const std::uint32_t* counters, std::int64_t n, std::uint32_t* bits) {
    for (std::int64_t k = 0; k < n; ++k) {
        const std::uint32_t* c = counters + 4 * k;
        const Bits b = philox(seed, c[0], c[1], c[2], c[3]);
        std::copy(b.x, b.x + 4, bits + 4 * k);
    }
}

// ---- the background thread ----
namespace {

constexpr std::size_t kLine = 64, kPage = 4096;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Ring::Ring(std::int64_t depth, std::int64_t chunk, std::int64_t n) {
    rates_at_ = round_up(static_cast<std::size_t>(chunk * n * kColumns) * sizeof(std::int32_t), kLine);
    stride_ = rates_at_ + round_up(static_cast<std::size_t>(chunk) * sizeof(double), kLine);
    bytes_ = round_up(static_cast<std::size_t>(depth) * stride_, kPage);  // whole pages: it may be pinned
    data_ = static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_));
    if (!data_) throw std::bad_alloc();
}

Ring::~Ring() { std::free(data_); }

std::int32_t* Ring::params(std::int64_t slot) const {
    return reinterpret_cast<std::int32_t*>(data_ + static_cast<std::size_t>(slot) * stride_);
}

double* Ring::rates(std::int64_t slot) const {
    return reinterpret_cast<double*>(data_ + static_cast<std::size_t>(slot) * stride_ + rates_at_);
}

TableStream::TableStream(StreamSpec spec) : spec_(std::move(spec)) {
    check_draws(spec_.draws);
    check_segments(spec_.segments.data(), static_cast<std::int64_t>(spec_.segments.size()));
    at_least("first_iteration", spec_.first_iteration, 0);
    at_least("count", spec_.count, 0);
    at_least("total", spec_.total, 1);
    const auto n = static_cast<std::int64_t>(spec_.segments.size());
    at_least("number of segments", n, 1);
    between("chunk", spec_.chunk, 1, 1 << 20);
    between("depth", spec_.depth, 2, 1 << 10);
    between("keep", spec_.keep, 1, spec_.depth - 1);
    at_most("rows in a table", spec_.chunk * n, kMost);
    tables_ = spec_.count / spec_.chunk + (spec_.count % spec_.chunk != 0);
    ring_ = std::make_shared<Ring>(spec_.depth, spec_.chunk, n);
    owner_ = static_cast<int>(getpid());
    thread_ = std::thread(&TableStream::work, this);
}

TableStream::~TableStream() { close(); }

std::int64_t TableStream::iterations(std::int64_t table) const {
    return std::min(spec_.chunk, spec_.count - table * spec_.chunk);
}

void TableStream::work() {
    try {
        for (std::int64_t table = 0; table < tables_; ++table) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                // tables [taken - keep, taken) are still read by the caller
                changed_.wait(lock, [&] {
                    const std::int64_t released = std::max(taken_ - spec_.keep, std::int64_t{0});
                    return stop_ || table < released + spec_.depth;
                });
                if (stop_) return;
            }
            const std::int64_t first = spec_.first_iteration + table * spec_.chunk;
            fill_table(spec_.draws, spec_.segments.data(), static_cast<std::int64_t>(spec_.segments.size()), first,
                       iterations(table), ring_->params(slot(table)), 1);
            fill_rates(spec_.lr, first, iterations(table), spec_.total, ring_->rates(slot(table)));
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                filled_ = table + 1;
            }
            changed_.notify_all();
        }
    } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        error_ = std::current_exception();
        changed_.notify_all();
    }
}

std::int64_t TableStream::next() {
    if (!here()) refuse("the table stream was opened by another process");
    std::unique_lock<std::mutex> lock(mutex_);
    if (stop_) refuse("the table stream is closed");
    if (taken_ == tables_) return -1;
    const std::int64_t table = taken_++;
    changed_.notify_all();
    changed_.wait(lock, [&] { return stop_ || filled_ > table || error_; });
    if (stop_) refuse("the table stream is closed");
    if (filled_ <= table) {
        taken_ = table;  // so that a second call meets the same error
        std::rethrow_exception(error_);
    }
    return table;
}

bool TableStream::here() const { return owner_ == static_cast<int>(getpid()); }

void TableStream::close() {
    if (!here()) return;  // a forked child has no such thread, and joining it would hang
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    const std::lock_guard<std::mutex> lock(join_mutex_);
    if (thread_.joinable()) thread_.join();
}

}  // namespace fd2fast
