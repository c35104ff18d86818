// y[h, w, c] = bias[c] + sum_ij weight[c, i, j] x[h + i - kh/2, w + j - kw/2, c] (+ x[h, w, c]), channels last
//
// Idea: a tile has some vectors of channels side by side. The rows of each that two output rows need are packed, with their
// zero padding, in a ring: as they lie, neighbours are a whole pixel apart, which is a page every other pixel. kPixels
// neighbours of both rows then sum up in registers: a vector is read once for all taps that it meets in two rows of the
// kernel; what is written, and what the next rows need, is asked for meanwhile.
// Takes: x and y float32, float16 or bfloat16, alike; weight and bias any of these; any strides; odd kernels, up to 27 by 27.
// Floor: 1 read, 1 write, kh kw multiply-adds an element.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/depthwise_conv2d.cpp
#include "norm.h"

namespace dk {
namespace {

constexpr int kPixels = kLanes == 16 ? 8 : 4;  // what the registers hold in two rows, beside the window and two taps
constexpr int64_t kVectors = 32 / kLanes;      // of a tile's channels, where there are tiles for all threads
constexpr int64_t kRing = 65536;               // bytes of their rings
constexpr int64_t kRows = 16, kAcross = 32;    // of a tile: each tile reads kh - 1 more rows, kw - 1 more columns

struct Call {
    View x, y, weight;
    const float* taps;  // [width / kLanes, kh, kw, kLanes]; then the bias, [width]
    int64_t width, kh, kw, vectors, tile;
    bool residual;

    DK_INLINE int64_t tiles(int64_t n, int64_t size) const { return (n + size - 1) / size; }
    DK_INLINE int64_t items() const {
        return x.size(0) * tiles(x.size(1), kRows) * tiles(x.size(2), tile) * tiles(width, vectors * kLanes);
    }
    DK_INLINE int64_t step(int i) const { return x.size(i) > 1 ? x.step(i) : 0; }  // one alone may have any
    DK_INLINE int64_t packed() const { return tile + kw - 1; }                     // columns of a ring's row
    DK_INLINE int64_t ring() const { return packed() * (kh + 1) * kLanes; }
};

DK_INLINE int64_t width_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Columns [first, first + packed) of row h, zeros where there is none: a tile's vectors, each into a ring of its own.
template <class T>
DK_INLINE void pack(const Call& k, const T* base, int64_t h, int64_t first, int64_t channels, float* to) {
    const int64_t across = k.x.size(2), pixel = k.step(2), step = k.x.step(3), ring = k.ring(), packed = k.packed();
    const bool inside = h >= 0 && h < k.x.size(1), whole = channels == kVectors * kLanes && step == 1;
    const T* from = base + (inside ? h * k.step(1) + first * pixel : 0);  // read where there is a pixel
    for (int64_t w = first; w < first + packed; ++w, from += pixel, to += kLanes) {
        if (!inside || w < 0 || w >= across) {
            for (int64_t v = 0; v * kLanes < channels; ++v) store(to + v * ring, F{});
        } else if (whole) {
#pragma GCC unroll 8
            for (int64_t v = 0; v < kVectors; ++v) store(to + v * ring, load(from + v * kLanes));
        } else {
            for (int64_t v = 0, c = 0; c < channels; ++v, c += kLanes) {
                const int m = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
                store(to + v * ring, m == kLanes && step == 1 ? load(from + c) : gather(from + c * step, step, m));
            }
        }
    }
}

// kPixels sums of an output row, and of the one below it; tap j of pixel p meets packed column j + p, so a window slides along.
// What lies in one row of the ring meets the kernel's row `taps` for the upper, and the one before that for the lower. kTaps:
// kw, or 0 where it is not known here.
template <int kTaps, bool kUpper, bool kLower>
DK_INLINE void accumulate(const float* line, const float* taps, int64_t kw, F (&sum)[2][kPixels]) {
    F window[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels - 1; ++p) window[p] = load(line + p * kLanes);
#pragma GCC unroll 8
    for (int64_t j = 0; j < (kTaps ? kTaps : kw); ++j) {
        window[kPixels - 1] = load(line + (j + kPixels - 1) * kLanes);
        if constexpr (kUpper) {
            const F tap = load(taps + j * kLanes);
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) sum[0][p] = fma(tap, window[p], sum[0][p]);
        }
        if constexpr (kLower) {
            const F tap = load(taps + (j - (kTaps ? kTaps : kw)) * kLanes);
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) sum[1][p] = fma(tap, window[p], sum[1][p]);
        }
#pragma GCC unroll 8
        for (int p = 0; p < kPixels - 1; ++p) window[p] = window[p + 1];
    }
}

// Apart, so that what rounding needs takes no registers from the sums. below: from an output row to the next, 0: there is none.
template <class T>
__attribute__((noinline)) void put(const F (&sum)[2][kPixels], T* to, int64_t pixel, int64_t below, int64_t pixels,
                                   int64_t channels) {
    const int m = channels < kLanes ? static_cast<int>(channels) : kLanes,
              n = pixels < kPixels ? static_cast<int>(pixels) : kPixels;
    for (int r = 0; r < (below ? 2 : 1); ++r, to += below)
        for (int p = 0; p < n; ++p)
            m == kLanes ? store(to + p * pixel, quiet(sum[r][p])) : store(to + p * pixel, quiet(sum[r][p]), m);
}

template <class T, int kTaps>
void tile(const Call& k, int64_t b, int64_t h0, int64_t w0, int64_t c0) {
    alignas(64) float rings[kRing / 4];
    const View& x = k.x;
    const int64_t height = x.size(1), across = x.size(2), all = x.size(3), line = k.packed() * kLanes;
    const int64_t channels = all - c0 < k.vectors * kLanes ? all - c0 : k.vectors * kLanes;
    const T* const base = static_cast<const T*>(x.data) + b * x.step(0) + c0 * x.step(3);
    const int64_t above = k.kh / 2, h1 = h0 + kRows < height ? h0 + kRows : height;
    const int64_t w1 = w0 + k.tile < across ? w0 + k.tile : across;
    const int64_t size = k.ring(), row = k.step(1), pixel = k.step(2), kernel = k.kh * k.kw * kLanes, below = across * all;
    const bool residual = k.residual;
    int64_t oldest = 0;
    const auto slot = [&](int64_t i) {  // where row h - above + i lies
        const int64_t at = oldest + i * line;
        return at < size ? at : at - size;
    };
    const auto in = [&](int64_t h, int64_t i) { pack(k, base, h - above + i, w0 - k.kw / 2, channels, rings + slot(i)); };
    for (int64_t i = 0; i < k.kh - 1; ++i) in(h0, i);
    for (int64_t h = h0; h < h1; h += 2, oldest = slot(2)) {
        in(h, k.kh - 1);
        in(h, k.kh);
        const int64_t upper = slot(above) + k.kw / 2 * kLanes, lower = slot(above + 1) + k.kw / 2 * kLanes;
        for (int64_t w = w0; w < w1; w += kPixels) {
            const float* from = rings + (w - w0) * kLanes;
            const float *taps = k.taps + c0 * k.kh * k.kw, *bias = k.taps + k.kh * k.kw * k.width + c0;
            T* to = static_cast<T*>(k.y.data) + ((b * height + h) * across + w) * all + c0;
            const T* next = base + (h + above + 2) * row + w * pixel;
            for (int64_t c = 0; c < channels; c += kLanes) {
                F sum[2][kPixels];
                const F first = load(bias);
#pragma GCC unroll 8
                for (int p = 0; p < kPixels; ++p) sum[0][p] = sum[1][p] = first;
                if (residual)
#pragma GCC unroll 8
                    for (int p = 0; p < kPixels; ++p) {
                        sum[0][p] += load(from + upper + p * kLanes);
                        sum[1][p] += load(from + lower + p * kLanes);
                    }
                // What this step writes, and what the next rows are made of: some at a time.
                const auto ask = [&](int64_t i) {
                    for (int64_t p = i; p < kPixels; p += k.kh) {
                        __builtin_prefetch(to + p * all, 1);
                        __builtin_prefetch(to + below + p * all, 1);
                        __builtin_prefetch(next + p * pixel, 0, 2);
                        __builtin_prefetch(next + row + p * pixel, 0, 2);
                    }
                };
                ask(0);
                accumulate<kTaps, true, false>(from + slot(0), taps, k.kw, sum);
                for (int64_t i = 1; i < k.kh; ++i) {
                    ask(i);
                    accumulate<kTaps, true, true>(from + slot(i), taps + i * k.kw * kLanes, k.kw, sum);
                }
                accumulate<kTaps, false, true>(from + slot(k.kh), taps + kernel, k.kw, sum);
                F found[2][kPixels];  // in memory: `put` is a call
#pragma GCC unroll 8
                for (int p = 0; p < kPixels; ++p) found[0][p] = sum[0][p], found[1][p] = sum[1][p];
                put(found, to, all, h + 1 < h1 ? below : 0, w1 - w, channels - c);
                from += size, taps += kernel, bias += kLanes, to += kLanes, next += kLanes;
            }
        }
    }
}

template <class T, int kTaps>
void run(const Call& k, int64_t begin, int64_t end) {
    const int64_t rows = k.tiles(k.x.size(1), kRows), columns = k.tiles(k.x.size(2), k.tile);
    const int64_t wide = k.vectors * kLanes, across = k.tiles(k.width, wide);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / across, j = i / columns;
        tile<T, kTaps>(k, j / rows, j % rows * kRows, i % columns * k.tile, item % across * wide);
    }
}

// The weights as [width / kLanes, kh, kw, kLanes]: a vector of channels for each tap. Some taps at a time are turned in memory.
template <class T>
void arrange(const Call& k, float* taps) {
    constexpr int64_t kSome = 8;
    const View& w = k.weight;
    const int64_t channel = w.step(0), tap = w.step(3);
    for (int64_t c = 0; c < k.width; c += kLanes) {
        const int64_t lanes = w.size(0) - c < kLanes ? w.size(0) - c : kLanes;
        for (int64_t i = 0; i < k.kh; ++i)
            for (int64_t j = 0; j < k.kw; j += kSome) {
                const T* from = static_cast<const T*>(w.data) + c * channel + i * w.step(2) + j * tap;
                const int64_t n = k.kw - j < kSome ? k.kw - j : kSome;
                T turned[kSome][kLanes] = {};
                for (int64_t l = 0; l < lanes; ++l, from += channel)
                    for (int64_t t = 0; t < n; ++t) turned[t][l] = from[t * tap];
                for (int64_t t = 0; t < n; ++t, taps += kLanes) store(taps, load(turned[t]));
            }
    }
}

int64_t bytes(Stream, View, View, View weight, Optional, bool) {
    return weight.ndim == 4 ? (weight.size(2) * weight.size(3) + 1) * width_of(weight.size(0)) * 4 : 0;
}

Refusal depthwise_conv2d(Stream stream, View y, View x, View weight, Optional bias, bool residual) {
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (x.ndim != 4) return "x: not [B, H, W, C]";
    if (weight.ndim != 4 || weight.size(0) != x.size(3) || weight.size(1) != 1 || !(weight.size(2) & 1) ||
        !(weight.size(3) & 1))
        return "weight: not [C, 1, odd, odd]";
    if (bias && (bias.ndim != 1 || bias.size(0) != x.size(3))) return "bias: not [C]";
    if (weight.dtype > DType::bf16 || (bias && bias.dtype > DType::bf16))
        return "weight or bias: not float32, float16 or bfloat16";
    const auto taps = static_cast<float*>(stream.scratch);
    const int64_t kh = weight.size(2), kw = weight.size(3);
    const auto fits = [&](int64_t vectors) {  // pixels
        const int64_t most = (kRing / 4 / kLanes / vectors / (kh + 1) - (kw - 1)) / kPixels * kPixels;
        return most < kAcross ? most : kAcross;
    };
    if (fits(1) < kPixels) return "weight: a kernel larger than 27 by 27";
    const int64_t wanted = (x.size(2) + kPixels - 1) / kPixels * kPixels;
    Call k{x, y, weight, taps, width_of(x.size(3)), kh, kw, 2 * kVectors, 0, residual};
    do {
        k.vectors /= 2;
        k.tile = wanted < fits(k.vectors) ? wanted : fits(k.vectors);
    } while (k.vectors > 1 && (k.tile < kPixels || k.items() < dk_parallel_threads()));
    if (x.numel() == 0) return nullptr;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        for_value(Floats{}, weight.dtype, nullptr, [&](auto w) -> Refusal {
            arrange<typename TypeOf<decltype(w)::value>::type>(k, taps);
            return nullptr;
        });
        Operand b;
        if (bias) b.view = bias, b.present = true;
        for (int64_t c = 0; c < k.width; c += kLanes) {
            const int64_t left = x.size(3) - c;
            store(taps + kh * kw * k.width + c,
                  b.present ? b.load_at(0, c, left < kLanes ? static_cast<int>(left) : kLanes) : F{});
        }
        const auto with = [&](auto count) {
            auto body = [&](int64_t begin, int64_t end) { run<T, decltype(count)::value>(k, begin, end); };
            const int64_t wide = k.vectors * kLanes, work = kRows * k.tile * (wide < k.width ? wide : k.width) * kh * kw / 8;
            parallel_for(k.items(), (kSerialElements + work - 1) / work, body);
        };
        kw == 7 ? with(Tag<7>{}) : kw == 3 ? with(Tag<3>{}) : with(Tag<0>{});
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::depthwise_conv2d;
DK_ENTRY_WITH_SCRATCH(depthwise_conv2d, "out x weight bias residual", bytes)
