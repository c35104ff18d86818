// codes = round(h * 127 / amax), scale = amax / 127, h = activation(y) * smooth, amax >= max |h| of a sample,
// y = (norm(x) * weight + bias) * (1 + scale) + shift, the norm by groups of channels, over all pixels; channels last
//
// Idea: the first read of x finds, by chunks of pixels, each channel's mean, squares about it, and extremes. y is affine in a
// channel's x, so that these say what amax is before there is any y; the second read makes h and its codes. It goes backwards
// through the chunks: what was read last is still in the caches.
// Takes: x float32, float16 or bfloat16; operands any of these; any strides.
// Floor: 2 reads of x and a byte a code. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/group_norm_quantize.cpp
#include "activation.h"
#include "quantize.h"

namespace dk {
namespace {

constexpr int kPixels = kLanes == 16 ? 8 : 4;  // whose vectors the registers hold
constexpr int64_t kChunkElements = 64 * 1024, kChunkPixels = 64;
constexpr int64_t kSlab = 64;  // channels that are folded together where there are no groups
constexpr float kLowest = -1.27846454276f, kDeepest = 0.27846454276f;  // where silu has its minimum, and its magnitude there

// Of a chunk, a number a channel: a pixel's value, the mean and the sum of squares about it of what is left after taking that
// off, the extremes. Without a norm the largest magnitude stands for the mean: it forgets no NaN.
enum { kShift, kMean, kSquares, kLow, kHigh, kParts };
enum { kCenter, kFactor, kOffset, kSmooth, kCoefs };  // h = activation((x - center) * factor + offset) * smooth

struct Call {
    View x;
    Rows rows;
    int64_t samples, pixels, channels, width, groups, unit, units, chunk, chunks;  // a unit: channels that are folded together
    double eps;
    bool silu;
    int8_t* codes;
    float *scales, *parts, *coefs, *affine, *smooth, *largest;

    DK_INLINE int64_t items() const { return samples * chunks; }
    DK_INLINE int64_t end_of(int64_t first) const { return pixels - first < chunk ? pixels : first + chunk; }
};

// The sizes; returns the bytes of scratch.
DK_INLINE int64_t plan(Call& c, const View& x, int64_t groups) {
    c.samples = x.shape[0], c.channels = x.size(-1), c.pixels = 1, c.groups = groups;
    for (int i = 1; i < x.ndim - 1; ++i) c.pixels *= x.shape[i];
    c.width = (c.channels + 31) / 32 * 32;
    c.unit = groups ? c.channels / groups : kSlab, c.units = (c.channels + c.unit - 1) / c.unit;
    const int64_t wanted = kChunkElements / c.channels, least = wanted < kChunkPixels ? kChunkPixels : wanted;
    c.chunk = least < c.pixels ? least / kPixels * kPixels : c.pixels;
    c.chunks = (c.pixels + c.chunk - 1) / c.chunk;
    const int64_t rows = c.items() * kParts + c.samples * (kCoefs + 2) + 1;
    return (rows * c.width + c.samples * c.units) * static_cast<int64_t>(sizeof(float));
}

// a where it is less, or more, else b, as where a is NaN. Said outright: gcc 12 compares and blends.
#if defined(__AVX512F__)
DK_INLINE F lower(F a, F b) { return _mm512_min_ps(a, b); }
DK_INLINE F higher(F a, F b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
DK_INLINE F lower(F a, F b) { return _mm256_min_ps(a, b); }
DK_INLINE F higher(F a, F b) { return _mm256_max_ps(a, b); }
#else
DK_INLINE F lower(F a, F b) { return a < b ? a : b; }
DK_INLINE F higher(F a, F b) { return a > b ? a : b; }
#endif

template <class T>
DK_INLINE F half_of(const T* p, int half) {  // of a pair in T's order
    return load(p + half * kLanes);
}
DK_INLINE F half_of(const bf16* p, int half) {
    U w;
    std::memcpy(&w, p, sizeof w);
    return bit_cast<F>(half ? w & 0xffff0000u : w << 16);
}

// kCount pixels' values of some channels join what is known of `before` others. Means of few pixels are taken first and their
// squares about them: nothing cancels, whatever the data's mean is.
template <bool kNorm, int kCount>
DK_INLINE void join(const F (&v)[kCount], float* at, int64_t width, float before) {
    F low = load(at + kLow * width), high = load(at + kHigh * width);
    for (int i = 0; i < kCount; ++i) low = lower(v[i], low), high = higher(v[i], high);
    store(at + kLow * width, low), store(at + kHigh * width, high);
    if constexpr (kNorm) {
        const F shift = load(at + kShift * width), known = load(at + kMean * width);
        F total = v[0] - shift, squares = {};
        for (int i = 1; i < kCount; ++i) total += v[i] - shift;
        const F mean = total * (1.0f / kCount), apart = mean - known;
        for (int i = 0; i < kCount; ++i) {
            const F e = v[i] - shift - mean;
            squares = fma(e, e, squares);
        }
        const float share = kCount / (before + kCount);
        store(at + kMean * width, fma(apart, splat(share), known));
        store(at + kSquares * width, fma(apart * apart, splat(before * share), load(at + kSquares * width) + squares));
    } else {
        I most = bit_cast<I>(load(at + kMean * width));
        for (int i = 0; i < kCount; ++i) most = larger(magnitude(v[i]), most);
        store(at + kMean * width, bit_cast<F>(most));
    }
}

template <class T, bool kUnit, bool kNorm, int kCount>
DK_INLINE void join_rows(const Call& c, int64_t row, float* part, float before) {
    const T* from[kCount];
    for (int i = 0; i < kCount; ++i) from[i] = static_cast<const T*>(c.x.data) + c.rows.offset(row + i);
    const auto both = [&](const T* const(&p)[kCount], int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            F v[kCount];
            for (int i = 0; i < kCount; ++i) v[i] = half_of(p[i], half);
            join<kNorm, kCount>(v, part + k + half * kLanes, c.width, before);
        }
    };
    int64_t k = 0;
    for (; kUnit && k + kPair <= c.channels; k += kPair) {
        const T* p[kCount];
        for (int i = 0; i < kCount; ++i) p[i] = from[i] + k;
        both(p, k);
    }
    for (; k < c.channels; k += kPair) {
        T line[kCount][kPair] = {};
        const T* p[kCount];
        const int n = c.channels - k < kPair ? static_cast<int>(c.channels - k) : kPair;
        for (int i = 0; i < kCount; ++i) {
            p[i] = line[i];
            for (int j = 0; j < n; ++j) line[i][j] = from[i][(k + j) * c.x.step(-1)];
        }
        both(p, k);
    }
}

template <class T, bool kUnit, bool kNorm>
__attribute__((noinline)) void look(const Call& c, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / c.chunks, first = (item - b * c.chunks) * c.chunk, last = c.end_of(first);
        float* const part = c.parts + item * kParts * c.width;
        const Row<T, kUnit> one(c.x, c.rows, b * c.pixels + first);
        for (int64_t k = 0; k < c.channels; k += kPair) {
            const int64_t left = c.channels - k;
            const Pair v = left < kPair ? one.some(k, static_cast<int>(left)) : one.at(k);
            for (const int to : {kShift, kLow, kHigh})
                store(part + to * c.width + k, v.lo), store(part + to * c.width + k + kLanes, v.hi);
            for (const int to : {kMean, kSquares})
                store(part + to * c.width + k, F{}), store(part + to * c.width + k + kLanes, F{});
        }
        int64_t pixel = first;
        for (; pixel + kPixels <= last; pixel += kPixels)
            join_rows<T, kUnit, kNorm, kPixels>(c, b * c.pixels + pixel, part, static_cast<float>(pixel - first));
        for (; pixel < last; ++pixel)
            join_rows<T, kUnit, kNorm, 1>(c, b * c.pixels + pixel, part, static_cast<float>(pixel - first));
        for (int64_t k = 0; k < kParts * c.width && kEvenOdd<T>; k += kPair) {
            const Pair v = as_it_lies({load(part + k), load(part + k + kLanes)}, T{});
            store(part + k, v.lo), store(part + k + kLanes, v.hi);
        }
    }
}

// Of a unit of a sample: its channels' coefficients, those of a pair in the order that the second read wants, and what its
// largest |h| can be.
template <class T>
__attribute__((noinline)) void fold(const Call& c, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / c.units, from = (item - b * c.units) * c.unit, w = c.width;
        const int64_t n = c.channels - from < c.unit ? c.channels - from : c.unit;
        const float* const part = c.parts + b * c.chunks * kParts * w + from;
        double mean = 0, rstd = 1;
        if (c.groups) {
            const double all = static_cast<double>(c.pixels) * static_cast<double>(n);
            double squares = 0;
            const auto over = [&](auto value) __attribute__((always_inline)) {
                for (int64_t k = 0; k < c.chunks; ++k) {
                    const double count = static_cast<double>(c.end_of(k * c.chunk) - k * c.chunk);
                    const float* const p = part + k * kParts * w;
                    for (int64_t i = 0; i < n; ++i) value(p + i, count, static_cast<double>(p[i]) + p[kMean * w + i]);
                }
            };
            over([&](const float*, double count, double v) { mean += count * v; });
            mean /= all;
            over([&](const float* p, double count, double v) { squares += p[kSquares * w] + count * (v - mean) * (v - mean); });
            rstd = 1 / __builtin_sqrt(squares / all + c.eps);
        }
        const float center = static_cast<float>(mean), less = static_cast<float>((center - mean) * rstd);
        I most{};
        for (int64_t i = 0; i < n; i += kLanes) {
            const int some = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
            const auto at = [&](const float* p) { return some == kLanes ? load(p + i) : load(p + i, some); };
            F low = at(part + kLow * w), high = at(part + kHigh * w);
            I seen{};
            for (int64_t k = 0; k < c.chunks; ++k) {
                const float* const p = part + k * kParts * w;
                low = lower(at(p + kLow * w), low), high = higher(at(p + kHigh * w), high);
                if (!c.groups) seen = larger(bit_cast<I>(at(p + kMean * w)), seen);
            }
            const F gain = at(c.affine + b * 2 * w + from), plus = at(c.affine + (b * 2 + 1) * w + from);
            const F factor = gain * static_cast<float>(rstd), smooth = at(c.smooth + from);
            const F offset = choose(magnitude(gain) < 0x7f800000, fma(gain, splat(less), plus), plus);  // not 0 * infinity
            const F y0 = fma(low - center, factor, offset), y1 = fma(high - center, factor, offset);
            I reach = larger(magnitude(c.silu ? silu(y0) : y0), magnitude(c.silu ? silu(y1) : y1));
            const I crossed = (y0 < kLowest) != (y1 < kLowest);
            if (c.silu) reach = larger(crossed & bit_cast<I>(splat(kDeepest)), reach);
            reach = larger(seen > 0x7f800000 ? seen : I{}, reach);
            most = larger(magnitude(bit_cast<F>(reach) * smooth), most);
            for (int j = 0; j < some; ++j) {
                const int64_t channel = from + i + j, in = channel % kPair;
                float* const to = c.coefs + b * kCoefs * w + (kEvenOdd<T> ? channel - in + in % 2 * kLanes + in / 2 : channel);
                to[kCenter * w] = center, to[kFactor * w] = factor[j];
                to[kOffset * w] = offset[j], to[kSmooth * w] = smooth[j];
            }
        }
        c.largest[item] = largest_magnitude(most);
    }
}

// silu of a finite y, within some 3e-7 of it: no code goes past 127. A sample that is coded holds nothing else, and so its
// exponential needs none of what exp() does for infinities and NaN; the polynomial is a minimax fit of exp(-r), to 1e-7.
DK_INLINE F silu_of_finite(F y) {
    const F magic = splat(0x1.8p23f), least = higher(y, splat(-87)), z = lower(least, splat(87));  // silu(-87) codes as 0
    const F shifted = fma(z, splat(-0x1.715476p0f), magic), n = shifted - magic;
    const F r = fma(n, splat(0x1.7f7d1cp-20f), fma(n, splat(0x1.62e4p-1f), z));  // ln 2 in two floats
    F p = splat(-0x1.0fe5b4p-7f);
    for (const float c : {0x1.575f0ep-5f, -0x1.555a18p-3f, 0x1.fffd1ap-2f, -0x1.fffff6p-1f, 0x1.000002p0f})
        p = fma(p, r, splat(c));
    return ratio(least, 1 + bit_cast<F>(bit_cast<U>(p) + (bit_cast<U>(shifted) << 23)));
}

template <class T, bool kUnit, bool kActivated>
__attribute__((noinline)) void encode(const Call& c, int64_t begin, int64_t end) {
    for (int64_t item = end; item-- > begin;) {
        const int64_t b = item / c.chunks, first = (item - b * c.chunks) * c.chunk, last = c.end_of(first);
        int32_t most = 0;
        for (int64_t u = 0; u < c.units; ++u) most = larger(bit_cast<int32_t>(c.largest[b * c.units + u]), most);
        const float amax = bit_cast<float>(most);
        if (first == 0) c.scales[b] = amax <= kLeast ? 1 : amax / 127;
        int8_t* to = c.codes + (b * c.pixels + first) * c.channels;
        if (!(amax > kLeast && amax <= kMost)) {
            std::memset(to, 0, static_cast<size_t>((last - first) * c.channels));
            continue;
        }
        const F inverse = splat(127 / amax);
        const float* const coefs = c.coefs + b * kCoefs * c.width;
        const int64_t w = c.width;
        const auto code = [&](F x, int64_t i) __attribute__((always_inline)) {
            const float* const p = coefs + i;
            const F y = fma(x - load(p + kCenter * w), load(p + kFactor * w), load(p + kOffset * w));
            return coded(product(kActivated ? silu_of_finite(y) : y, load(p + kSmooth * w)), inverse);
        };
        for (int64_t pixel = first; pixel < last; ++pixel, to += c.channels) {
            const Row<T, kUnit> row(c.x, c.rows, b * c.pixels + pixel);
            int64_t i = 0;
            for (; i + kPair <= c.channels; i += kPair) {
                const Pair v = row.at(i);
                store_codes(to + i, code(v.lo, i), code(v.hi, i + kLanes), T{});
            }
            if (const int n = static_cast<int>(c.channels - i)) {
                const Pair v = row.some(i, n);
                int8_t tail[kPair];
                store_codes(tail, code(v.lo, i), code(v.hi, i + kLanes), T{});
                std::memcpy(to + i, tail, n);
            }
        }
    }
}

// gain = weight * (1 + scale) and plus = bias * (1 + scale) + shift of every sample, and smooth; zeros past the channels.
DK_INLINE void prepare(const Call& c, const Operand (&o)[5]) {
    for (int64_t b = 0; b < c.samples; ++b)
        for (int64_t i = 0; i < c.width; i += kLanes) {
            const int64_t left = c.channels - i;
            const int n = left < kLanes ? left < 0 ? 0 : static_cast<int>(left) : kLanes;
            const auto value = [&](int k, float otherwise) {
                return o[k].present ? o[k].load_at(o[k].view.ndim == 2 ? b * o[k].view.step(0) : 0, i, n) : splat(otherwise);
            };
            const F weight = value(0, 1), bias = value(1, 0), more = 1 + value(2, 0), shift = value(3, 0);
            store(c.affine + b * 2 * c.width + i, first(weight * more, n));
            store(c.affine + (b * 2 + 1) * c.width + i, first(bias * more + shift, n));
            if (b == 0) store(c.smooth + i, first(value(4, 1), n));
        }
}

int64_t bytes(Stream, Views, View x, int64_t groups, Optional, Optional, Optional, Optional, Optional, Text, double) {
    Call c{};
    return x.ndim < 2 || x.numel() == 0 || groups < 0 || groups > x.size(-1) ? 0 : plan(c, x, groups);
}

Refusal group_norm_quantize(Stream stream, Views out, View x, int64_t groups, Optional weight, Optional bias, Optional scale,
                            Optional shift, Optional smooth, Text activation, double eps) {
    Call c{};
    if (x.ndim < 2 || !rows_of(x, c.rows)) return "x: fewer than 2 or more than 8 dimensions";
    const int64_t channels = x.size(-1);
    if (channels < 1) return "x: no channels";
    if (out.count != 2 || out[0].dtype != DType::i8 || !out[0].same_shape(x) || !out[0].contiguous())
        return "codes: not contiguous int8 of x's shape";
    if (out[1].dtype != DType::f32 || out[1].ndim != 1 || out[1].shape[0] != x.shape[0] || !out[1].contiguous())
        return "scales: not contiguous float32, one a sample";
    if (groups < 0 || (groups && channels % groups)) return "groups: not 0, or no divisor of the channels";
    if (!(eps >= 0)) return "eps: negative";
    c.silu = activation == "silu";
    if (!c.silu && !(activation == "none")) return "activation: neither 'none' nor 'silu'";
    const Optional given[] = {weight, bias, scale, shift, smooth};
    Operand operands[5];
    for (int k = 0; k < 5; ++k) {
        const Optional& t = given[k];
        if (!t) continue;
        const int ndim = k == 2 || k == 3 ? 2 : 1;
        if (t.dtype > DType::bf16 || t.ndim != ndim || t.size(-1) != channels || (ndim == 2 && t.shape[0] != x.shape[0]))
            return "an operand is not [C], scale or shift not [B, C], of float32, float16 or bfloat16";
        operands[k].view = t, operands[k].present = true;
    }
    if (x.numel() == 0) {
        for (int64_t b = 0; b < x.shape[0]; ++b) static_cast<float*>(out[1].data)[b] = 1;
        return nullptr;
    }
    plan(c, x, groups);
    c.x = x, c.eps = eps;
    c.parts = static_cast<float*>(stream.scratch), c.coefs = c.parts + c.items() * kParts * c.width;
    c.affine = c.coefs + c.samples * kCoefs * c.width, c.smooth = c.affine + c.samples * 2 * c.width;
    c.largest = c.smooth + c.width;
    c.codes = static_cast<int8_t*>(out[0].data), c.scales = static_cast<float*>(out[1].data);
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        prepare(c, operands);
        return for_bool(x.step(-1) == 1 || channels == 1, [&](auto unit) -> Refusal {
            constexpr bool kUnit = decltype(unit)::value;
            const int64_t work = c.chunk * channels, folded = 8 * c.chunks * c.unit;
            const auto each = [](int64_t n, int64_t elements, auto body) __attribute__((always_inline)) {
                parallel_for(n, (kSerialElements + elements - 1) / elements, body);
            };
            c.groups ? each(c.items(), work, [&](int64_t begin, int64_t end) { look<T, kUnit, true>(c, begin, end); })
                     : each(c.items(), work, [&](int64_t begin, int64_t end) { look<T, kUnit, false>(c, begin, end); });
            each(c.samples * c.units, folded, [&](int64_t begin, int64_t end) { fold<T>(c, begin, end); });
            c.silu ? each(c.items(), work, [&](int64_t begin, int64_t end) { encode<T, kUnit, true>(c, begin, end); })
                   : each(c.items(), work, [&](int64_t begin, int64_t end) { encode<T, kUnit, false>(c, begin, end); });
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::group_norm_quantize;
DK_ENTRY_WITH_SCRATCH(group_norm_quantize, "out x groups weight bias scale shift smooth activation eps", bytes)
