// The two passes of crop.hpp: pixels of up to four channels as vectors, resized along columns, then along rows by tables of neighbours.
#include "crop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "lanes.hpp"

namespace fd2fast::crop {
namespace {

using std::int64_t;
using std::size_t;
using std::uint16_t;

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

// Up to four channels of one pixel side by side: what is done to a pixel is done to all of them at once.
constexpr int lanes = 4;
using Pixel = F<lanes>;

// K channels `step` apart; lane by lane, because a vector load of what was just stored piece by piece waits for the stores.
template <int K, typename T>
FD2FAST_INLINE Pixel load_pixel(const T* p, int64_t step) {
    const auto lane = [&](int c) { return c < K ? load<1>(p + c * step)[0] : 0.0f; };
    return Pixel{lane(0), lane(1), lane(2), lane(3)};
}

template <int K>
FD2FAST_INLINE void store_pixel(float* p, Pixel v, int64_t step) {
    for (int c = 0; c < K; ++c) p[c * step] = v[c];
}

template <int K>
FD2FAST_INLINE void store_pixel(bfloat16* p, Pixel v, int64_t step) {
    const auto bits = rounded_bits<lanes>(v);
    for (int c = 0; c < K; ++c) p[c * step].bits = static_cast<uint16_t>(bits[c]);
}

// Some channels of one image.
struct Work {
    const Draw& draw;
    const Axes& axes;
    int64_t size;
    Pixel* buffer;
};

int64_t forward_pixels(const Images& images) { return 3 * (images.width + 1); }

template <int K, typename T, typename V>
void forward_image(const Work& work, const Images& images, const T* image, const Images& views, V* view) {
    const Draw& d = work.draw;
    const Axis &down = work.axes.down, &right = work.axes.right;
    // the two rows of the crop that a row of the view lies between, by the parity of their number; `mix` of them
    Pixel *rows[2] = {work.buffer, work.buffer + images.width + 1}, *mix = work.buffer + 2 * (images.width + 1);
    int64_t held[2] = {-1, -1};
    const auto row_of = [&](int64_t y) {
        Pixel* row = rows[y % 2];
        if (held[y % 2] != y) {
            const T* from = image + (d.top + y) * images.stride[2] + d.left * images.stride[3];
            for (int64_t x = 0; x < d.width; ++x)
                row[x] = load_pixel<K>(from + x * images.stride[3], images.stride[1]);
            held[y % 2] = y;
        }
        return row;
    };
    mix[d.width] = Pixel{};  // the neighbour behind the last pixel, which has no share
    for (int64_t p = 0; p < work.size; ++p) {
        const int64_t y = down.first[p];
        const Pixel *a = row_of(y), *b = row_of(std::min(y + 1, d.height - 1));
        for (int64_t x = 0; x < d.width; ++x) mix[x] = down.near[p] * a[x] + down.far[p] * b[x];
        V* row = view + down.place[p] * views.stride[2];
        for (int64_t q = 0; q < work.size; ++q) {
            const Pixel* t = mix + right.first[q];
            store_pixel<K>(row + right.place[q] * views.stride[3], right.near[q] * t[0] + right.far[q] * t[1],
                           views.stride[1]);
        }
    }
}

int64_t backward_pixels(const Images& images, int64_t size) { return 2 * size + 2 * (images.width + 1); }

template <int K, typename T, typename V>
void backward_image(const Work& work, const Images& views, const V* grad, const Images& images, T* image) {
    const Draw& d = work.draw;
    const Axis &down = work.axes.down, &right = work.axes.right;
    const int64_t size = work.size;
    // rows y and y + 1 of the crop with the view's columns, in the order before flip and roll: all that is ever unfinished
    Pixel *now = work.buffer, *next = now + size, *own = next + size, *beside = own + images.width + 1;
    std::fill(now, now + 2 * size, Pixel{});
    const auto clear = [&](int64_t y, int64_t first, int64_t end) {
        T* row = image + y * images.stride[2];
        for (int64_t x = first; x < end; ++x) store_pixel<K>(row + x * images.stride[3], Pixel{}, images.stride[1]);
    };
    const auto finish = [&](int64_t y) {
        std::fill(own, own + 2 * (images.width + 1), Pixel{});
        // two sums, so that neighbouring pixels of the view do not wait for each other
        for (int64_t q = 0; q < size; ++q) {
            own[right.first[q]] += right.near[q] * now[q];
            beside[right.first[q] + 1] += right.far[q] * now[q];
        }
        T* row = image + (d.top + y) * images.stride[2];
        clear(d.top + y, 0, d.left);
        for (int64_t x = 0; x < d.width; ++x)
            store_pixel<K>(row + (d.left + x) * images.stride[3], own[x] + beside[x], images.stride[1]);
        clear(d.top + y, d.left + d.width, images.width);
        std::swap(now, next);
        std::fill(next, next + size, Pixel{});
    };
    for (int64_t y = 0; y < d.top; ++y) clear(y, 0, images.width);
    int64_t y = 0;
    for (int64_t p = 0; p < size; ++p) {
        for (; y < down.first[p]; ++y) finish(y);
        const V* row = grad + down.place[p] * views.stride[2];
        for (int64_t q = 0; q < size; ++q) {
            const Pixel g = load_pixel<K>(row + right.place[q] * views.stride[3], views.stride[1]);
            now[q] += down.near[p] * g;
            next[q] += down.far[p] * g;
        }
    }
    for (; y < d.height; ++y) finish(y);
    for (y = d.top + d.height; y < images.height; ++y) clear(y, 0, images.width);
}

template <int K>
using Channels = std::integral_constant<int, K>;

// Calls each with (number of channels, work, image number, first channel) for every image, some channels at a time.
template <typename Each>
void over_images(const Batch& batch, int64_t pixels, const Each& each) {
    const auto axes = axes_of(batch);
    const auto owner = owners(batch);
    const int64_t parts = (batch.channels + lanes - 1) / lanes, count = static_cast<int64_t>(owner.size()) * parts;
    std::vector<Pixel> buffers(static_cast<size_t>(batch.threads * pixels));
    // exceptions cannot leave a parallel region: everything is allocated before
#pragma omp parallel for num_threads(batch.threads) schedule(static)
    for (int thread = 0; thread < batch.threads; ++thread)
        for (int64_t k = count * thread / batch.threads; k < count * (thread + 1) / batch.threads; ++k) {
            const int64_t n = k / parts, c = k % parts * lanes, s = owner[n];
            const Work work{batch.draws[s], axes[s], batch.size, buffers.data() + thread * pixels};
            switch (std::min<int64_t>(lanes, batch.channels - c)) {
                case 1: each(Channels<1>{}, work, n, c); break;
                case 2: each(Channels<2>{}, work, n, c); break;
                case 3: each(Channels<3>{}, work, n, c); break;
                default: each(Channels<lanes>{}, work, n, c);
            }
        }
}

template <typename T, typename V>
void forward_all(const Batch& batch, const Images& images, const void* image, const Images& views, void* view) {
    over_images(batch, forward_pixels(images), [&](auto channels, const Work& work, int64_t n, int64_t c) {
        forward_image<decltype(channels)::value>(work, images, static_cast<const T*>(image) + n * images.stride[0] + c * images.stride[1], views,
                      static_cast<V*>(view) + n * views.stride[0] + c * views.stride[1]);
    });
}

template <typename T, typename V>
void backward_all(const Batch& batch, const Images& views, const void* grad, const Images& images, void* grad_image) {
    over_images(batch, backward_pixels(images, batch.size), [&](auto channels, const Work& work, int64_t n, int64_t c) {
        backward_image<decltype(channels)::value>(work, views, static_cast<const V*>(grad) + n * views.stride[0] + c * views.stride[1], images,
                       static_cast<T*>(grad_image) + n * images.stride[0] + c * images.stride[1]);
    });
}

// Calls each with a null pointer to the images' type and one to the views'.
template <typename Each>
void by_types(const Batch& batch, const Each& each) {
    const auto with = [&](auto* image) {
        if (batch.view_type == Type::float32)
            each(image, static_cast<float*>(nullptr));
        else
            each(image, static_cast<bfloat16*>(nullptr));
    };
    if (batch.type == Type::float32)
        with(static_cast<float*>(nullptr));
    else
        with(static_cast<bfloat16*>(nullptr));
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
    by_types(batch, [&](auto* t, auto* v) {
        forward_all<std::decay_t<decltype(*t)>, std::decay_t<decltype(*v)>>(batch, images, image, views, view);
    });
}

void backward(const Batch& batch, const Images& views, const void* grad, const Images& images, void* grad_image) {
    check(batch, images);
    by_types(batch, [&](auto* t, auto* v) {
        backward_all<std::decay_t<decltype(*t)>, std::decay_t<decltype(*v)>>(batch, views, grad, images, grad_image);
    });
}

}  // namespace fd2fast::crop
