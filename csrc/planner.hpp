// Plans of grouped steps and counter-based iteration tables: types and contracts; no Python, no torch, no CUDA.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fd2fast {

// What a plan is made from. 0 means "no limit" for segments_per_step, max_rows, memory_limit and bytes_per_row.
struct PlanRequest {
    std::int64_t classes = 0;
    std::int64_t ipc = 0;
    std::int64_t group_size = 0;
    std::int64_t segment_size = 0;
    std::int64_t segments_per_step = 0;
    std::int64_t max_rows = 0;
    std::int64_t memory_limit = 0;  // bytes
    std::int64_t bytes_per_row = 0;
    std::int64_t bytes_fixed = 0;
    std::vector<std::int64_t> bucket_sizes;  // segments; empty: any step size
};

// Segment s = image_id * n_blocks + block owns classes [first_class, end_class).
struct Plan {
    std::int64_t segments_per_step = 0;  // the limit used
    std::int64_t max_rows = 0;           // the limit used, memory included; 0: none
    std::vector<std::int32_t> first_class, end_class, block, image_id, group, slot;  // [S]
    std::vector<std::int64_t> step_segments;  // [S] ids in execution order
    std::vector<std::int64_t> step_offsets;   // [n_steps + 1]
    std::vector<std::int32_t> step_wave;      // [n_steps], ascending
    std::vector<std::int64_t> prior_segments;
    std::vector<std::int64_t> prior_offsets;  // [S + 1]
};

// Throws std::invalid_argument that names the value, what was wanted and what came.
Plan make_plan(const PlanRequest& request);

// The method's augmentation; one crop, flip and roll per segment and iteration.
struct DrawSpec {
    std::uint64_t seed = 0;
    std::int64_t size = 0;    // pixels: the (square) image
    std::int64_t jitter = 0;  // pixels: the largest roll
    bool augment = true;
    double scale[2] = {0.08, 1.0};
    double ratio[2] = {0.75, 4.0 / 3.0};
};

constexpr std::int64_t kColumns = 7;  // top, left, height, width, flip, roll_down, roll_right

void check_draws(const DrawSpec& spec);
void check_segments(const std::int64_t* segments, std::int64_t n);

// Fills out [count, n, kColumns]; threads 0: as many as pay. Same values for any number of threads.
void fill_table(const DrawSpec& spec, const std::int64_t* segments, std::int64_t n, std::int64_t first_iteration,
                std::int64_t count, std::int32_t* out, int threads);

// Fills out [count] with .5 * (1 + cos(pi * t / total)) * lr.
void fill_rates(double lr, std::int64_t first_iteration, std::int64_t count, std::int64_t total, double* out);

// Philox4x32-10 (Salmon et al., 2011): counters [n, 4] -> bits [n, 4].
void philox_bits(std::uint64_t seed, const std::uint32_t* counters, std::int64_t n, std::uint32_t* bits);

struct StreamSpec {
    DrawSpec draws;
    std::vector<std::int64_t> segments;
    std::int64_t first_iteration = 0;
    std::int64_t count = 0;  // iterations in all
    std::int64_t chunk = 0;  // iterations per table
    std::int64_t depth = 0;  // tables in the ring
    std::int64_t keep = 0;   // tables that the caller may still read, the newest included; < depth
    double lr = 0;
    std::int64_t total = 0;  // length of the learning-rate schedule
};

// One page-aligned allocation of `depth` slots; each slot is params [chunk, n, kColumns], then rates [chunk].
class Ring {
  public:
    Ring(std::int64_t depth, std::int64_t chunk, std::int64_t n);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    std::int32_t* params(std::int64_t slot) const;
    double* rates(std::int64_t slot) const;
    std::byte* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

  private:
    std::size_t rates_at_ = 0, stride_ = 0, bytes_ = 0;
    std::byte* data_ = nullptr;
};

// Fills tables ahead on a background thread. A table handed out stays untouched for `keep` calls of next().
class TableStream {
  public:
    explicit TableStream(StreamSpec spec);
    ~TableStream();
    TableStream(const TableStream&) = delete;
    TableStream& operator=(const TableStream&) = delete;

    // Waits for the next table and returns its index, or -1 after the last. Rethrows what the thread threw;
    // throws std::invalid_argument once closed.
    std::int64_t next();
    // Stops and joins the thread, wakes a waiting next(); may be called twice.
    void close();
    // False in a forked child: there the thread does not run and the stream must not be destroyed.
    bool here() const;

    const StreamSpec& spec() const { return spec_; }
    const std::shared_ptr<Ring>& ring() const { return ring_; }
    std::int64_t tables() const { return tables_; }
    std::int64_t slot(std::int64_t table) const { return table % spec_.depth; }
    std::int64_t iterations(std::int64_t table) const;  // in this table: chunk, fewer in the last

  private:
    void work();

    StreamSpec spec_;
    std::int64_t tables_ = 0;
    std::shared_ptr<Ring> ring_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::int64_t taken_ = 0;   // tables handed out
    std::int64_t filled_ = 0;  // tables ready
    bool stop_ = false;
    std::exception_ptr error_;
    std::mutex join_mutex_;
    int owner_ = 0;  // process that started the thread
    std::thread thread_;
};

}  // namespace fd2fast
