// What the ops that make 8-bit codes share: a row in a thread's line, its largest magnitude, its codes and their scale.
#pragma once

#include "norm.h"
#include "parallel.h"

namespace dk {
namespace {

constexpr float kLeast = 0x1p-100f;  // a row of nothing larger counts as zeros
constexpr float kMost = 3.40282347e38f;

// Without their signs floats are ordered as integers are, NaN behind infinity: the largest of these forgets no NaN.
DK_INLINE I magnitude(F v) { return bit_cast<I>(v) & 0x7fffffff; }

typedef int32_t I8 __attribute__((vector_size(32)));
typedef int32_t I4 __attribute__((vector_size(16)));

DK_INLINE float largest_magnitude(I v) {
#if defined(__AVX512F__)
    const I8 eight = larger(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    const I8 eight = v;
#endif
    const I4 four =
        larger(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    return bit_cast<float>(larger(larger(four[0], four[2]), larger(four[1], four[3])));
}

// To nearest even, in the low byte: what is added leaves no bit behind the point. The product is rounded first, as it is said.
DK_INLINE U coded(F h, F inverse) { return bit_cast<U>(product(h, inverse) + splat(0x1.8p23f)); }

// The low bytes of a pair in T's order, as they lie. Said outright: gcc 12 makes a dozen instructions of a conversion.
typedef int8_t B __attribute__((vector_size(kPair)));
#if defined(__AVX512F__)
template <class T>
DK_INLINE B bytes_in_order(U lo, U hi, T) {
    return bit_cast<B>(
        _mm256_set_m128i(_mm512_cvtepi32_epi8(bit_cast<__m512i>(hi)), _mm512_cvtepi32_epi8(bit_cast<__m512i>(lo))));
}
#elif defined(__AVX2__)
template <class T>
DK_INLINE B bytes_in_order(U lo, U hi, T) {
    const __m256i words = _mm256_packus_epi32(bit_cast<__m256i>(lo & 0xffu), bit_cast<__m256i>(hi & 0xffu));  // by halves
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m256i spread = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    return bit_cast<B>(_mm256_castsi256_si128(spread));
}
#else
template <class T>
DK_INLINE B bytes_in_order(U lo, U hi, T) {
    B found;
    typedef int8_t Half __attribute__((vector_size(kLanes)));
    const Half halves[] = {__builtin_convertvector(lo, Half), __builtin_convertvector(hi, Half)};
    std::memcpy(&found, halves, sizeof found);
    return found;
}
#endif
DK_INLINE B bytes_in_order(U even, U odd, bf16) {
    const U both = (even & 0xffu) | (odd << 8 & 0xff00u);
#if defined(__AVX512F__)
    return bit_cast<B>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(both)));
#elif defined(__AVX2__)
    const __m256i halves = _mm256_packus_epi32(bit_cast<__m256i>(both), bit_cast<__m256i>(both));
    return bit_cast<B>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000)));
#else
    return bit_cast<B>(__builtin_convertvector(both, H));
#endif
}
template <class T>
DK_INLINE void store_codes(int8_t* y, U lo, U hi, T tag) {
    const B found = bytes_in_order(lo, hi, tag);
    std::memcpy(y, &found, sizeof found);
}
template <class T>
DK_INLINE void store_codes(int8_t* y, U lo, U hi, T tag, int n) {  // the first n
    const B found = bytes_in_order(lo, hi, tag);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi8(y, (1u << n) - 1, bit_cast<__m256i>(found));
#else
    std::memcpy(y, &found, n);
#endif
}

// The call's outputs, and its rows by part: each part has a line in scratch, behind the line that holds `smooth`.
struct Codes {
    int8_t* codes;
    float *scales, *lines;
    const float* smooth;  // in T's order, or nullptr
    int64_t rotate;       // the columns of a group, or 0
    float norm;           // 1 / sqrt(rotate), or 1
    int64_t columns, rows, width, parts;

    // f(part, begin, end) over all rows
    template <class G>
    DK_INLINE void each(G f) const {
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) f(lines + k * width, k * rows / parts, (k + 1) * rows / parts);
        };
        parallel_for(parts, 1, body);
    }
};

DK_INLINE void plan(Codes& c, int64_t rows, int64_t columns) {
    c.rows = rows, c.columns = columns;
    c.width = (columns + 31) / 32 * 32;
    const int64_t grain = row_grain(columns), most = (rows + grain - 1) / grain, threads = dk_parallel_threads();
    c.parts = most < threads ? most : threads;
}

DK_INLINE int64_t bytes_of(int64_t rows, int64_t columns) {
    if (rows < 1 || columns < 1) return 0;
    Codes c{};
    plan(c, rows, columns);
    return (1 + c.parts) * c.width * static_cast<int64_t>(sizeof(float));
}

// Of rows of x; `columns` are those of the codes.
DK_INLINE Refusal describe(Codes& c, Operand& factor, const Views& out, const View& x, int64_t columns, const Optional& smooth,
                           int64_t rotate) {
    if (out.count != 2) return "out: not codes and their scales";
    const View &codes = out[0], &scales = out[1];
    if (codes.dtype != DType::i8 || codes.ndim != x.ndim || codes.size(-1) != columns || !codes.contiguous())
        return "codes: not contiguous int8 of the result's shape";
    if (scales.dtype != DType::f32 || scales.ndim != x.ndim - 1 || !scales.contiguous())
        return "scales: not contiguous float32, one a row";
    for (int i = 0; i < scales.ndim; ++i)
        if (scales.shape[i] != x.shape[i] || codes.shape[i] != x.shape[i]) return "out: not of x's rows";
    if (columns < 1) return "x: no columns";
    if (smooth) {
        if (smooth.dtype > DType::bf16 || smooth.ndim != 1 || smooth.shape[0] != columns)
            return "smooth: not [D] of float32, float16 or bfloat16";
        factor.view = smooth, factor.present = true;
    }
    if (rotate != 0 && ((rotate != 64 && rotate != 128 && rotate != 256) || columns % rotate != 0))
        return "rotate: not 0, 64, 128 or 256, or no divisor of the columns";
    c.rotate = rotate, c.norm = rotate == 64 ? 0.125f : rotate == 128 ? 0.0883883476f : rotate == 256 ? 0.0625f : 1;
    c.codes = static_cast<int8_t*>(codes.data), c.scales = static_cast<float*>(scales.data);
    c.columns = columns, c.rows = scales.numel();
    return nullptr;
}

template <class T>
DK_INLINE void prepare(Codes& c, const Operand& factor, void* scratch) {
    plan(c, c.rows, c.columns);
    auto* const to = static_cast<float*>(scratch);
    c.lines = to + c.width;
    if (!factor.present) return;
    factor.each(0, 0, c.columns, [to](int64_t i, F v) __attribute__((always_inline)) { store(to + i, v); });
    for (int64_t i = 0; i < c.width && kEvenOdd<T>; i += kPair) {
        const Pair v = in_order(load(to + i), load(to + i + kLanes), T{});
        store(to + i, v.lo), store(to + i + kLanes, v.hi);
    }
    c.smooth = to;
}

// The steps of a Walsh-Hadamard transform are sums and differences of columns 1 apart, then 2, 4, 8, ...: in this order, and so
// with the same bits on every rung. Vectors kStep apart; or lanes.
template <int kStep, int kCount>
DK_INLINE void across(F (&v)[kCount]) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
        if (!(i & kStep)) {
            const F a = v[i], b = v[i | kStep];
            v[i] = a + b, v[i | kStep] = a - b;
        }
}
template <int kStep, int kCount>
DK_INLINE void within(F (&v)[kCount]) {
    F sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = i & kStep ? -1.0f : 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] = fma(v[i], sign, swapped<kStep>(v[i]));  // exact but for the sum's rounding
}
// Steps from kFrom vectors on.
template <int kFrom, int kCount>
DK_INLINE void across_from(F (&v)[kCount]) {
    if constexpr (kFrom < kCount) {
        across<kFrom>(v);
        across_from<2 * kFrom>(v);
    }
}
template <int kFrom, int kCount>
DK_INLINE void within_from(F (&v)[kCount]) {
    if constexpr (kFrom < kLanes) {
        within<kFrom>(v);
        within_from<2 * kFrom>(v);
    }
}

// A line, by groups of kGroup columns; the largest magnitude of what it becomes. kPaired: in bf16's order.
template <bool kPaired, int kGroup>
__attribute__((noinline)) I rotated(float* at, int64_t columns) {
    constexpr int kHeld = kLanes == 16 ? kGroup : 64;  // columns that the registers hold
    constexpr int kVectors = kHeld / kLanes, kParts = kGroup / kHeld;
    I most{};
    for (int64_t part = 0; part < columns; part += kHeld) {
        F v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(at + part + i * kLanes);
        if constexpr (kPaired) across<1>(v);
        within_from<1>(v);
        across_from<kPaired ? 2 : 1>(v);
        for (int i = 0; i < kVectors; ++i) {
            store(at + part + i * kLanes, v[i]);
            if constexpr (kParts == 1) most = larger(magnitude(v[i]), most);
        }
    }
    for (int64_t group = 0; group < columns && kParts > 1; group += kGroup)
#pragma GCC unroll 1  // gcc would take all at once, and spill
        for (int64_t i = group; i < group + kHeld; i += kLanes) {
            F v[kParts];
            for (int k = 0; k < kParts; ++k) v[k] = load(at + i + k * kHeld);
            across_from<1>(v);
            for (int k = 0; k < kParts; ++k) store(at + i + k * kHeld, v[k]), most = larger(magnitude(v[k]), most);
        }
    return most;
}

// A row on its way: put in, then coded.
template <class T>
struct Line {
    float* const at;
    const float* const smooth;
    I lo{}, hi{};

    DK_INLINE Line(const Codes& c, float* line) : at(line), smooth(c.smooth) {}

    DK_INLINE void put(int64_t i, Pair v, int n) {  // a pair in T's order, kPair columns or, at the end, the first n
        if (smooth) v = {v.lo * load(smooth + i), v.hi * load(smooth + i + kLanes)};
        if (n < kPair) {
            const int before = kEvenOdd<T> ? (n + 1) / 2 : n < kLanes ? n : kLanes;
            v = {first(v.lo, before), first(v.hi, n - before)};
        }
        store(at + i, v.lo), store(at + i + kLanes, v.hi);
        lo = larger(magnitude(v.lo), lo), hi = larger(magnitude(v.hi), hi);
    }
    DK_INLINE void code(const Codes& c, int64_t r) const {
        const float amax = largest_magnitude(c.rotate == 64    ? rotated<kEvenOdd<T>, 64>(at, c.columns)
                                             : c.rotate == 128 ? rotated<kEvenOdd<T>, 128>(at, c.columns)
                                             : c.rotate == 256 ? rotated<kEvenOdd<T>, 256>(at, c.columns)
                                                               : larger(lo, hi));
        int8_t* const to = c.codes + r * c.columns;
        c.scales[r] = amax <= kLeast ? 1 : amax / 127 * c.norm;
        if (!(amax > kLeast && amax <= kMost)) {
            std::memset(to, 0, static_cast<size_t>(c.columns));
            return;
        }
        const F inverse = splat(127 / amax);
        int64_t i = 0;
        for (; i + kPair <= c.columns; i += kPair)
            store_codes(to + i, coded(load(at + i), inverse), coded(load(at + i + kLanes), inverse), T{});
        if (const int n = static_cast<int>(c.columns - i))
            store_codes(to + i, coded(load(at + i), inverse), coded(load(at + i + kLanes), inverse), T{}, n);
    }
};

}  // namespace
}  // namespace dk
