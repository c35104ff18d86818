// y[h, w, c] = bias[c] + sum_ij weight[c, i, j] x[h + i - kh/2, w + j - kw/2, c] (+ x[h, w, c]), channels last
//
// Idea: a tile has a vector of channels. The kh rows of it that an output row needs are packed side by side, with their zero
// padding, in a ring in the first cache: as they lie, neighbours are a whole pixel apart, which is a page every other pixel.
// kPixels neighbours then sum up in registers: an input vector is read once for all taps of a kernel's row that it meets.
// Takes: x and y float32, float16 or bfloat16, alike; weight and bias any of these; any strides; odd kernels, up to 21 by 21.
// Floor: 1 read, 1 write, kh kw multiply-adds an element. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc
// -c csrc/cpu/depthwise_conv2d.cpp
#include "norm.h"

namespace dk {
namespace {

constexpr int kPixels = kLanes == 16 ? 8 : 4;  // what the registers hold, beside the window and a tap
constexpr int64_t kRing = 65536;               // bytes of the ring
constexpr int64_t kRows = 16;                  // output rows of a tile: each tile reads kh - 1 more

struct Call {
    View x, y, weight;
    const float* taps;  // [kh, kw, width]; then the bias, [width]
    int64_t width, kh, kw, tile;
    bool residual;

    DK_INLINE int64_t tiles(int64_t n, int64_t size) const { return (n + size - 1) / size; }
    DK_INLINE int64_t packed() const { return tile + kw - 1; }  // columns of a ring's row
};

DK_INLINE int64_t width_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Columns [first, first + packed) of row h, zeros where there is none.
template <class T>
DK_INLINE void pack(const Call& k, const T* base, int64_t h, int64_t first, int m, float* to) {
    const View& x = k.x;
    const bool inside = h >= 0 && h < x.size(1), whole = m == kLanes && x.step(3) == 1;
    for (int64_t j = 0; j < k.packed(); ++j) {
        const int64_t w = first + j;
        F v = {};
        if (inside && w >= 0 && w < x.size(2)) {
            const T* const from = base + h * x.step(1) + w * x.step(2);
            v = whole ? load(from) : gather(from, x.step(3), m);
        }
        store(to + j * kLanes, v);
    }
}

// kPixels sums; tap j of pixel p meets packed column j + p, so a window slides along. kTaps: kw, or 0 where it is not known
// here.
template <int kTaps>
DK_INLINE void accumulate(const float* line, const float* taps, int64_t width, int64_t kw, F (&sum)[kPixels]) {
    F window[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels - 1; ++p) window[p] = load(line + p * kLanes);
#pragma GCC unroll 8
    for (int64_t j = 0; j < (kTaps ? kTaps : kw); ++j) {
        window[kPixels - 1] = load(line + (j + kPixels - 1) * kLanes);
        const F tap = load(taps + j * width);
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) sum[p] = fma(tap, window[p], sum[p]);
#pragma GCC unroll 8
        for (int p = 0; p < kPixels - 1; ++p) window[p] = window[p + 1];
    }
}

template <class T, int kTaps>
void tile(const Call& k, int64_t b, int64_t h0, int64_t w0, int64_t c) {
    alignas(64) float ring[kRing / 4];
    const View& x = k.x;
    const int64_t height = x.size(1), across = x.size(2), channels = x.size(3), line = k.packed() * kLanes;
    const int m = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
    const T* const base = static_cast<const T*>(x.data) + b * x.step(0) + c * x.step(3);
    const int64_t above = k.kh / 2, h1 = h0 + kRows < height ? h0 + kRows : height;
    const int64_t w1 = w0 + k.tile < across ? w0 + k.tile : across;
    const F bias = load(k.taps + k.kh * k.kw * k.width + c);
    for (int64_t i = 0; i < k.kh - 1; ++i) pack(k, base, h0 - above + i, w0 - k.kw / 2, m, ring + i * line);
    for (int64_t h = h0; h < h1; ++h) {
        const int64_t oldest = (h - h0) % k.kh;  // row h - above + i lies in slot (oldest + i) % kh
        pack(k, base, h + above, w0 - k.kw / 2, m, ring + (oldest + k.kh - 1) % k.kh * line);
        for (int64_t w = w0; w < w1; w += kPixels) {
            F sum[kPixels];
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) sum[p] = bias;
            int64_t slot = oldest;
            for (int64_t i = 0; i < k.kh; ++i) {
                const float* const at = ring + slot * line + (w - w0) * kLanes;
                if (k.residual && i == above)
#pragma GCC unroll 8
                    for (int p = 0; p < kPixels; ++p) sum[p] += load(at + (p + k.kw / 2) * kLanes);
                accumulate<kTaps>(at, k.taps + i * k.kw * k.width + c, k.width, k.kw, sum);
                slot = slot + 1 == k.kh ? 0 : slot + 1;
            }
            T* const to = static_cast<T*>(k.y.data) + ((b * height + h) * across + w) * channels + c;
            const int n = w1 - w < kPixels ? static_cast<int>(w1 - w) : kPixels;
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) {
                if (p >= n) break;
                m == kLanes ? store(to + p * channels, quiet(sum[p])) : store(to + p * channels, quiet(sum[p]), m);
            }
        }
    }
}

template <class T, int kTaps>
void run(const Call& k, int64_t begin, int64_t end) {
    const int64_t rows = k.tiles(k.x.size(1), kRows), columns = k.tiles(k.x.size(2), k.tile), vectors = k.width / kLanes;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / vectors, j = i / columns;
        tile<T, kTaps>(k, j / rows, j % rows * kRows, i % columns * k.tile, item % vectors * kLanes);
    }
}

// The weights as [kh, kw, width]: a vector of channels for each tap.
template <class T>
void arrange(const Call& k, float* taps) {
    const View& w = k.weight;
    for (int64_t c = 0; c < k.width; c += kLanes) {
        const int64_t left = w.size(0) - c;
        const T* const from = static_cast<const T*>(w.data) + c * w.step(0);
        for (int64_t i = 0; i < k.kh; ++i)
            for (int64_t j = 0; j < k.kw; ++j)
                store(taps + (i * k.kw + j) * k.width + c,
                      gather(from + i * w.step(2) + j * w.step(3), w.step(0), left < kLanes ? static_cast<int>(left) : kLanes));
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
    const int64_t kh = weight.size(2), kw = weight.size(3), fits = kRing / 4 / kLanes / kh - (kw - 1);
    if (fits < kPixels) return "weight: a kernel larger than 21 by 21";
    const int64_t wanted = (x.size(2) + kPixels - 1) / kPixels * kPixels, most = fits / kPixels * kPixels;
    const Call k{x, y, weight, taps, width_of(x.size(3)), kh, kw, wanted < most ? wanted : most, residual};
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
            const int64_t items = x.size(0) * k.tiles(x.size(1), kRows) * k.tiles(x.size(2), k.tile) * (k.width / kLanes);
            const int64_t work = kRows * k.tile * kLanes * kh * kw / 8;
            parallel_for(items, (kSerialElements + work - 1) / work, body);
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
