// The two passes of crop.hpp: each plane is resized along rows as vectors, then along columns by tables of neighbours.
#include "crop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fd2fast::crop {
namespace {

using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;

struct bfloat16 {
    uint16_t bits;
};

inline float load(float v) { return v; }

inline float load(bfloat16 v) {
    const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &wide, sizeof f);
    return f;
}

inline void store(float* p, float v) { *p = v; }

// To the nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, float v) {
    uint32_t u;
    std::memcpy(&u, &v, sizeof u);
    p->bits = static_cast<uint16_t>(v == v ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
}

// For each pixel p of the resized axis: its first neighbour in the crop, both shares, and the pixel of the view it goes to.
struct Axis {
    std::vector<int64_t> first, place;
    std::vector<float> near, far;

    Axis(int64_t length, int64_t size, bool flip, int64_t roll)
        : first(size), place(size), near(size), far(size) {
        // in fp32, rounded in the places where torch's own resize rounds
        const float scale = static_cast<float>(length) / static_cast<float>(size);
        const int64_t shift = ((roll % size) + size) % size;
        for (int64_t p = 0; p < size; ++p) {
            const float centre = scale * (static_cast<float>(p) + 0.5f);
            const float at = std::clamp(centre - 0.5f, 0.0f, static_cast<float>(length - 1));
            first[p] = static_cast<int64_t>(at);
            far[p] = at - static_cast<float>(first[p]);
            near[p] = 1.0f - far[p];
            place[p] = ((flip ? size - 1 - p : p) + shift) % size;
        }
    }
};

struct Axes {
    Axis down, right;
};

std::vector<Axes> axes_of(const Batch& batch) {
    std::vector<Axes> found;
    for (const Draw& d : batch.draws)
        found.push_back({Axis(d.height, batch.size, false, d.down), Axis(d.width, batch.size, d.flip, d.right)});
    return found;
}

std::vector<int64_t> owners(const Batch& batch) {
    std::vector<int64_t> found;
    for (size_t s = 0; s + 1 < batch.segments.size(); ++s)
        found.insert(found.end(), static_cast<size_t>(batch.segments[s + 1] - batch.segments[s]), static_cast<int64_t>(s));
    return found;
}

// One image and channel.
template <typename T>
void forward_plane(const Draw& d, const Axes& axes, int64_t size, const Images& images, const T* image,
                   const Images& views, T* view, float* line) {
    const int64_t step = images.stride[3], out = views.stride[3];
    const Axis& right = axes.right;
    line[d.width] = 0.0f;  // the neighbour behind the last pixel, which has no share
    for (int64_t p = 0; p < size; ++p) {
        const int64_t y = axes.down.first[p], below = std::min(y + 1, d.height - 1);
        const float near = axes.down.near[p], far = axes.down.far[p];
        const T* a = image + (d.top + y) * images.stride[2] + d.left * step;
        const T* b = image + (d.top + below) * images.stride[2] + d.left * step;
        if (step == 1)
            for (int64_t x = 0; x < d.width; ++x) line[x] = near * load(a[x]) + far * load(b[x]);
        else
            for (int64_t x = 0; x < d.width; ++x) line[x] = near * load(a[x * step]) + far * load(b[x * step]);
        T* row = view + axes.down.place[p] * views.stride[2];
        for (int64_t q = 0; q < size; ++q) {
            const float* t = line + right.first[q];
            store(row + right.place[q] * out, right.near[q] * t[0] + right.far[q] * t[1]);
        }
    }
}

// rows: [height + 1, size] of the crop, with the view's columns in the order before flip and roll; sums: 2 [width + 1].
template <typename T>
void backward_plane(const Draw& d, const Axes& axes, int64_t size, const Images& views, const T* grad,
                    const Images& images, T* image, float* rows, float* line, float* sums) {
    const int64_t in = views.stride[3], out = images.stride[3];
    const Axis& right = axes.right;
    std::fill(rows, rows + (d.height + 1) * size, 0.0f);
    for (int64_t p = 0; p < size; ++p) {
        const T* row = grad + axes.down.place[p] * views.stride[2];
        const float near = axes.down.near[p], far = axes.down.far[p];
        float* a = rows + axes.down.first[p] * size;
        float* b = a + size;
        for (int64_t q = 0; q < size; ++q) line[q] = load(row[right.place[q] * in]);
        for (int64_t q = 0; q < size; ++q) a[q] += near * line[q];
        for (int64_t q = 0; q < size; ++q) b[q] += far * line[q];
    }
    float *own = sums, *next = sums + d.width + 1;
    for (int64_t y = 0; y < images.height; ++y) {
        T* row = image + y * images.stride[2];
        const bool inside = y >= d.top && y < d.top + d.height;
        if (!inside) {
            for (int64_t x = 0; x < images.width; ++x) store(row + x * out, 0.0f);
            continue;
        }
        const float* from = rows + (y - d.top) * size;
        std::fill(sums, sums + 2 * (d.width + 1), 0.0f);
        // two sums, so that neighbouring pixels of the view do not wait for each other
        for (int64_t q = 0; q < size; ++q) {
            own[right.first[q]] += right.near[q] * from[q];
            next[right.first[q] + 1] += right.far[q] * from[q];
        }
        for (int64_t x = 0; x < d.left; ++x) store(row + x * out, 0.0f);
        for (int64_t x = 0; x < d.width; ++x) store(row + (d.left + x) * out, own[x] + next[x]);
        for (int64_t x = d.left + d.width; x < images.width; ++x) store(row + x * out, 0.0f);
    }
}

template <typename T>
void forward_all(const Batch& batch, const Images& images, const void* image, const Images& views, void* view) {
    const auto axes = axes_of(batch);
    const auto owner = owners(batch);
    const int64_t planes = static_cast<int64_t>(owner.size()) * batch.channels, length = images.width + 1;
    std::vector<float> lines(static_cast<size_t>(batch.threads * length));
    // exceptions cannot leave a parallel region: everything is allocated before
#pragma omp parallel for num_threads(batch.threads) schedule(static)
    for (int thread = 0; thread < batch.threads; ++thread)
        for (int64_t k = planes * thread / batch.threads; k < planes * (thread + 1) / batch.threads; ++k) {
            const int64_t n = k / batch.channels, c = k % batch.channels, s = owner[n];
            forward_plane(batch.draws[s], axes[s], batch.size, images,
                          static_cast<const T*>(image) + n * images.stride[0] + c * images.stride[1], views,
                          static_cast<T*>(view) + n * views.stride[0] + c * views.stride[1],
                          lines.data() + thread * length);
        }
}

template <typename T>
void backward_all(const Batch& batch, const Images& views, const void* grad, const Images& images, void* grad_image) {
    const auto axes = axes_of(batch);
    const auto owner = owners(batch);
    const int64_t planes = static_cast<int64_t>(owner.size()) * batch.channels;
    const int64_t held = (images.height + 1) * batch.size, length = held + batch.size + 2 * (images.width + 1);
    std::vector<float> buffers(static_cast<size_t>(batch.threads * length));
#pragma omp parallel for num_threads(batch.threads) schedule(static)
    for (int thread = 0; thread < batch.threads; ++thread)
        for (int64_t k = planes * thread / batch.threads; k < planes * (thread + 1) / batch.threads; ++k) {
            const int64_t n = k / batch.channels, c = k % batch.channels, s = owner[n];
            float* rows = buffers.data() + thread * length;
            backward_plane(batch.draws[s], axes[s], batch.size, views,
                           static_cast<const T*>(grad) + n * views.stride[0] + c * views.stride[1], images,
                           static_cast<T*>(grad_image) + n * images.stride[0] + c * images.stride[1], rows, rows + held,
                           rows + held + batch.size);
        }
}

}  // namespace

void check(const Batch& batch, const Images& images) {
    for (size_t s = 0; s < batch.draws.size(); ++s) {
        const Draw& d = batch.draws[s];
        if (d.top < 0 || d.left < 0 || d.height < 1 || d.width < 1 || d.top + d.height > images.height ||
            d.left + d.width > images.width || d.height > batch.size || d.width > batch.size)
            throw std::invalid_argument("crop " + std::to_string(s) + " must lie inside the image and not be larger than the view");
    }
}

void forward(const Batch& batch, const Images& images, const void* image, const Images& views, void* view) {
    check(batch, images);
    if (batch.type == Type::float32)
        forward_all<float>(batch, images, image, views, view);
    else
        forward_all<bfloat16>(batch, images, image, views, view);
}

void backward(const Batch& batch, const Images& views, const void* grad, const Images& images, void* grad_image) {
    check(batch, images);
    if (batch.type == Type::float32)
        backward_all<float>(batch, views, grad, images, grad_image);
    else
        backward_all<bfloat16>(batch, views, grad, images, grad_image);
}

}  // namespace fd2fast::crop
