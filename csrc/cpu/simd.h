// The vector of the instruction set in force: 16 floats with AVX-512, else 8 (the baseline too: same reduction tree).
// Written with the compilers' vector types, so that a kernel is one text for every rung; only the half-precision
// conversions, the tails and the streaming stores name instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../op.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dk {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

template <DType D>
struct TypeOf;
template <>
struct TypeOf<DType::f32> {
    using type = float;
};
template <>
struct TypeOf<DType::f16> {
    using type = f16;
};
template <>
struct TypeOf<DType::bf16> {
    using type = bf16;
};

DK_INLINE F splat(float x) { return x - F{}; }        // x + 0 would lose the sign of -0, and so cost an addition
DK_INLINE F fma(F a, F b, F c) { return a * b + c; }  // one instruction where there is one: -ffp-contract=fast

// a b, rounded: where the compiler contracts it with a sum, or not, bits would differ by rung or by a row's strides.
DK_INLINE F product(F a, F b) {
    F v = a * b;
#if defined(__AVX2__)
    asm("" : "+v"(v));
#endif
    return v;
}

template <class To, class From>
DK_INLINE To bit_cast(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &v, sizeof out);
    return out;
}

DK_INLINE F choose(I mask, F yes, F no) { return mask ? yes : no; }
DK_INLINE bool any(I mask) {  // a comparison's result
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(bit_cast<__m256>(mask)) != 0;
#else
    int32_t some = 0;
    for (int i = 0; i < kLanes; ++i) some |= mask[i];
    return some != 0;
#endif
}

// Half precision, by vector, to nearest even. For bf16 a NaN must be `quiet`, which is cheaper once than at every store:
// rounding carries a NaN whose lower half is zero to a NaN, and arithmetic on such NaNs makes only such NaNs.
#if defined(__AVX512F__)  // said outright: gcc 12 makes two halves of it
DK_INLINE F widen(H h, bf16) { return bit_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)), 16)); }
#else
DK_INLINE F widen(H h, bf16) { return bit_cast<F>(__builtin_convertvector(h, U) << 16); }
#endif
DK_INLINE F quiet(F v) { return choose(v == v, v, splat(__builtin_nanf(""))); }
DK_INLINE U rounded(F v) {  // the bf16 is the upper half
    const U u = bit_cast<U>(v);
    return u + 0x7fffu + ((u >> 16) & 1u);
}
DK_INLINE H narrow(F v, bf16) { return __builtin_convertvector(rounded(v) >> 16, H); }

#if defined(__AVX512F__)
DK_INLINE F widen(H h, f16) { return _mm512_cvtph_ps(bit_cast<__m256i>(h)); }
DK_INLINE H narrow(F v, f16) { return bit_cast<H>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__F16C__)
DK_INLINE F widen(H h, f16) { return _mm256_cvtph_ps(bit_cast<__m128i>(h)); }
DK_INLINE H narrow(F v, f16) { return bit_cast<H>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#else
// IEEE half by integer arithmetic: the exponent is moved by a multiplication, which also normalises subnormals.
DK_INLINE F widen(H h, f16) {
    const U w = __builtin_convertvector(h, U), magnitude = (w & 0x7fffu) << 13;
    const F scaled = bit_cast<F>(magnitude) * 0x1p112f;
    const U special = (w & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : bit_cast<U>(scaled);
    return bit_cast<F>(special | ((w & 0x8000u) << 16));
}
DK_INLINE H narrow(F v, f16) {
    const U u = bit_cast<U>(v), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    const U normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;  // overflows into infinity by itself
    const U subnormal = bit_cast<U>(bit_cast<F>(a) + 0.5f) - 0x3f000000u;   // the adder rounds to nearest even
    U out = a < (113u << 23) ? subnormal : normal;
    out = a >= 0x47800000u ? U{} + 0x7c00u : out;
    out = a > 0x7f800000u ? U{} + 0x7e00u : out;
    return __builtin_convertvector(out | sign, H);
}
#endif

// Loads of kLanes elements, and of the first n (the rest zero), from any alignment.
DK_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
DK_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return widen(h, T{});
}
#if defined(__AVX512F__)  // masked: a way through memory would wait for the stores
DK_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
template <class T>
DK_INLINE F load(const T* p, int n) {
    return widen(bit_cast<H>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)), T{});
}
#else
template <class T>
DK_INLINE F load(const T* p, int n) {
    T lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
#endif
// The same from elements that lie `stride` apart.
template <class T>
DK_INLINE F gather(const T* p, int64_t stride, int n) {
    T lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
    return load(lanes);
}

// Two vectors in an order of T's own: as they lie, but bf16 as even and odd elements, which needs no shuffle at all.
struct Pair {
    F lo, hi;
};
constexpr int kPair = 2 * kLanes;
template <class T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<bf16> = true;

template <class T>
DK_INLINE Pair load_pair(const T* p) {
    return {load(p), load(p + kLanes)};
}
DK_INLINE Pair load_pair(const bf16* p) {
    U w;
    std::memcpy(&w, p, sizeof w);
    return {bit_cast<F>(w << 16), bit_cast<F>(w & 0xffff0000u)};
}

// Two vectors as they lie, in T's order; for bf16 also quiet.
template <class T>
DK_INLINE Pair in_order(F lo, F hi, T) {
    return {lo, hi};
}
DK_INLINE Pair in_order(F lo, F hi, bf16) {
    lo = quiet(lo), hi = quiet(hi);
#if defined(__AVX512F__)
    return {__builtin_shufflevector(lo, hi, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(lo, hi, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#else
    return {__builtin_shufflevector(lo, hi, 0, 2, 4, 6, 8, 10, 12, 14),
            __builtin_shufflevector(lo, hi, 1, 3, 5, 7, 9, 11, 13, 15)};
#endif
}

// lo[0], hi[0], lo[1], hi[1], ...
DK_INLINE Pair interleave(Pair v) {
#if defined(__AVX512F__)
    return {__builtin_shufflevector(v.lo, v.hi, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(v.lo, v.hi, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#else
    return {__builtin_shufflevector(v.lo, v.hi, 0, 8, 1, 9, 2, 10, 3, 11),
            __builtin_shufflevector(v.lo, v.hi, 4, 12, 5, 13, 6, 14, 7, 15)};
#endif
}

// kLanes rows of a square, in registers: stored to[row of the result, step].
DK_INLINE void turn(F (&v)[kLanes]) {
#pragma GCC unroll 4
    for (int stage = 1; stage < kLanes; stage *= 2) {
        F out[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            const Pair p = interleave({v[i], v[i + kLanes / 2]});
            out[2 * i] = p.lo, out[2 * i + 1] = p.hi;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = out[i];
    }
}

// Lane i takes lane i ^ kStep.
template <int kStep, int... kI>
DK_INLINE F swapped(F v, std::integer_sequence<int, kI...>) {
    return __builtin_shufflevector(v, v, (kI ^ kStep)...);
}
template <int kStep>
DK_INLINE F swapped(F v) {
    return swapped<kStep>(v, std::make_integer_sequence<int, kLanes>{});
}

// A pair in T's order, as it lies.
template <class T>
DK_INLINE Pair as_it_lies(Pair v, T) {
    return v;
}
DK_INLINE Pair as_it_lies(Pair v, bf16) { return interleave(v); }

DK_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
template <class T>
DK_INLINE void store(T* p, F v) {
    const H h = narrow(v, T{});
    std::memcpy(p, &h, sizeof h);
}
#if defined(__AVX512F__)
DK_INLINE void store(float* p, F v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
template <class T>
DK_INLINE void store(T* p, F v, int n) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m256i>(narrow(v, T{})));
}
#else
template <class T>
DK_INLINE void store(T* p, F v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

DK_INLINE void store_pair(bf16* p, Pair v) {
    const U w = (rounded(v.lo) >> 16) | (rounded(v.hi) & 0xffff0000u);
    std::memcpy(p, &w, sizeof w);
}
template <class T>
DK_INLINE void store_pair(T* p, Pair v) {
    store(p, v.lo);
    store(p + kLanes, v.hi);
}

// The first n of a pair's elements.
template <class T>
DK_INLINE void store_some(T* p, Pair v, int n) {
    T line[kPair];
    store_pair(line, v);
    std::memcpy(p, line, n * sizeof(T));
}

// Past the caches, for results larger than them; the address is a multiple of the vector's size.
DK_INLINE void stream(float* p, F v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, v);
#else
    store(p, v);
#endif
}
DK_INLINE void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}
template <class T>
DK_INLINE bool streamable(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(F) == 0;
}
DK_INLINE void prefetch(const void* p, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line);
}
DK_INLINE void prefetch_for_write(void* p, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<char*>(p) + line, 1);
}

// The first n lanes of v, the rest zero.
DK_INLINE F first(F v, int n) {
    I lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return choose(lane < n, v, F{});
}

// a / b, b normal and neither huge nor tiny; by AVX-512 within 1 ulp at a third of the division's cycles.
DK_INLINE F ratio(F a, F b) {
#if defined(__AVX512F__)
    F r = _mm512_rcp14_ps(b);
    r = fma(r, fma(-b, r, splat(1)), r);
    const F q = a * r;
    return fma(r, fma(-b, q, a), q);
#else
    return a / b;
#endif
}

// Nearly 1 ulp in [-87, 88]; below and above, the values at these ends. A NaN stays one.
DK_INLINE F exp(F x) {
    x = choose(x < -87.0f, splat(-87.0f), choose(x > 88.0f, splat(88.0f), x));
    const F magic = splat(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
    const F n = fma(x, splat(0x1.715476p0f), magic) - magic;
    const F r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), x));  // ln 2 in two floats
    F p = splat(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
    const F whole = choose(n == n, n, F{});
    return p * bit_cast<F>((__builtin_convertvector(whole, I) + 127) << 23);
}

typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));

DK_INLINE float sum(F v) {
#if defined(__AVX512F__)
    const F8 eight =
        __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const F8 eight = v;
#endif
    const F4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class V>
DK_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}
DK_INLINE float largest(F v) {  // of numbers: a NaN may be left out
#if defined(__AVX512F__)
    const F8 eight = larger(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    const F8 eight = v;
#endif
    const F4 four =
        larger(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    return larger(larger(four[0], four[2]), larger(four[1], four[3]));
}

}  // namespace
}  // namespace dk
