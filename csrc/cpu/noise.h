// A run of a sample's noise: csrc/philox.h with vectors.
#pragma once

#include "../philox.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dk {
namespace {

typedef uint64_t W __attribute__((vector_size(4 * kLanes)));  // a word of kLanes / 2 counters; the upper halves are anything

#if defined(__SSE2__)
struct HalvesOfW {
    __m128i v[2];
};
struct HalvesOfF {
    __m128 v[2];
};
#endif

// The product of the lower halves with c, in 64 bits.
DK_INLINE W product(W a, uint32_t c) {
#if defined(__AVX512F__)
    return bit_cast<W>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(c)));
#elif defined(__AVX2__)
    return bit_cast<W>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(c)));
#elif defined(__SSE2__)
    auto halves = bit_cast<HalvesOfW>(a);
    for (__m128i& h : halves.v) h = _mm_mul_epu32(h, _mm_set1_epi64x(c));
    return bit_cast<W>(halves);
#else
    return (a & 0xffffffffu) * static_cast<uint64_t>(c);
#endif
}

// The upper halves in the lower ones' place. By shuffle: of 512 bits one port alone multiplies and shifts.
DK_INLINE W upper(W a) {
#if defined(__AVX512F__)
    return bit_cast<W>(_mm512_shuffle_epi32(bit_cast<__m512i>(a), _MM_PERM_DDBB));
#else
    return a >> 32;
#endif
}

// The lower halves of a and b, in turn.
DK_INLINE I side_by_side(W a, W b) {
#if defined(__AVX512F__)
    const __m512i low = bit_cast<__m512i>(a);
    return bit_cast<I>(_mm512_mask_shuffle_epi32(low, 0xaaaa, bit_cast<__m512i>(b), _MM_PERM_CCAA));
#else
    return bit_cast<I>((a & 0xffffffffu) | (b << 32));
#endif
}

// A few vectors as one number, so that one's operations fill the others' waits.
constexpr int kWays = 4;
template <class V>
struct Few {
    V v[kWays];
};
template <class F>
DK_INLINE auto each(F f) {
    Few<decltype(f(0))> out;
    for (int w = 0; w < kWays; ++w) out.v[w] = f(w);
    return out;
}
#define DK_EACH(op)                                                                             \
    template <class V>                                                                          \
    DK_INLINE auto operator op(const Few<V>& a, const Few<V>& b) {                              \
        return each([&](int w) __attribute__((always_inline)) { return V(a.v[w] op b.v[w]); }); \
    }                                                                                           \
    template <class V>                                                                          \
    DK_INLINE auto operator op(const Few<V>& a, int32_t b) {                                    \
        return each([&](int w) __attribute__((always_inline)) { return V(a.v[w] op b); });      \
    }
DK_EACH(+)
DK_EACH(-)
DK_EACH(&)
DK_EACH(|)
DK_EACH(^)
DK_EACH(<<)
DK_EACH(>>)
DK_EACH(!=)
#undef DK_EACH
// Integers wrap: by way of unsigned ones, whose overflow is defined.
DK_INLINE Few<I> operator+(const Few<I>& a, int32_t b) {
    return each([&](int w) __attribute__((always_inline)) { return I(bit_cast<U>(a.v[w]) + static_cast<uint32_t>(b)); });
}
DK_INLINE Few<I> operator-(const Few<I>& a, int32_t b) {
    return each([&](int w) __attribute__((always_inline)) { return I(bit_cast<U>(a.v[w]) - static_cast<uint32_t>(b)); });
}
DK_INLINE Few<I> operator-(int32_t a, const Few<I>& b) {
    return each([&](int w) __attribute__((always_inline)) { return I(static_cast<uint32_t>(a) - bit_cast<U>(b.v[w])); });
}

struct Vectors {
    using F = Few<dk::F>;
    using I = Few<dk::I>;
    static DK_INLINE F splat(float x) {
        return each([&](int) __attribute__((always_inline)) { return dk::splat(x); });
    }
    static DK_INLINE F mul(const F& a, const F& b) {
        return each([&](int w) __attribute__((always_inline)) {
            dk::F product = a.v[w] * b.v[w];
#if defined(__AVX2__)
            asm("" : "+v"(product));  // costs nothing, and nothing can be fused across it
#elif !defined(__x86_64__)
            product = __builtin_assoc_barrier(product);
#endif
            return product;
        });
    }
    static DK_INLINE dk::F root(dk::F v) {
#if defined(__AVX512F__)
        return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
        return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
        auto halves = bit_cast<HalvesOfF>(v);
        for (__m128& h : halves.v) h = _mm_sqrt_ps(h);
        return bit_cast<dk::F>(halves);
#else
        for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
        return v;
#endif
    }
    static DK_INLINE F sqrt(const F& v) {
        return each([&](int w) __attribute__((always_inline)) { return root(v.v[w]); });
    }
    static DK_INLINE F to_float(const I& i) {
        return each([&](int w) __attribute__((always_inline)) { return __builtin_convertvector(i.v[w], dk::F); });
    }
    static DK_INLINE I bits(const F& v) { return bit_cast<I>(v); }
    static DK_INLINE F from_bits(const I& i) { return bit_cast<F>(i); }
    static DK_INLINE F choose(const I& mask, const F& yes, const F& no) {
        return each([&](int w) __attribute__((always_inline)) { return dk::choose(mask.v[w], yes.v[w], no.v[w]); });
    }
};

// Of every 128 bits the lower halves interleaved, and the upper ones.
DK_INLINE Pair zip(dk::F a, dk::F b) {
#if defined(__AVX512F__)
    return {_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)};
#else
    return {__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13), __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)};
#endif
}

constexpr int kNoiseStep = 2 * kWays * kLanes;  // elements that one round of counters makes

// Elements [begin, begin + n) of the sample's noise; begin is a multiple of 4, and out has room for whole kNoiseSteps.
DK_INLINE void normal_run(float* out, int64_t seed, int64_t step, uint32_t slot, int64_t begin, int64_t n) {
    const uint64_t key = static_cast<uint64_t>(seed);
    W lane;
    for (int i = 0; i < kLanes / 2; ++i) lane[i] = i / 2 + i % 2 * (kLanes / 4);  // so that `zip` puts them in order
    for (int64_t at = 0; at < n; at += kNoiseStep) {
        W a[kWays], b[kWays], c[kWays], d[kWays];
        for (int w = 0; w < kWays; ++w) {
            const W counter = lane + static_cast<uint64_t>((begin + at) / 4 + w * (kLanes / 2));
            a[w] = counter, b[w] = counter >> 32, c[w] = W{} + static_cast<uint32_t>(step), d[w] = W{} + slot;
        }
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < kPhiloxRounds; ++round) {
            for (int w = 0; w < kWays; ++w) {
                const W p = product(a[w], kPhiloxA), q = product(c[w], kPhiloxB);
                a[w] = upper(q) ^ b[w] ^ static_cast<uint64_t>(k0), b[w] = q;
                c[w] = upper(p) ^ d[w] ^ static_cast<uint64_t>(k1), d[w] = p;
            }
            k0 += kWeylA, k1 += kWeylB;
        }
        Few<I> radius, angle;
        for (int w = 0; w < kWays; ++w) radius.v[w] = side_by_side(a[w], c[w]), angle.v[w] = side_by_side(b[w], d[w]);
        Few<dk::F> even, odd;
        Normal<Vectors>::pair(radius, angle, even, odd);
        for (int w = 0; w < kWays; ++w) {
            const Pair z = zip(even.v[w], odd.v[w]);
            store(out + at + 2 * w * kLanes, z.lo);
            store(out + at + (2 * w + 1) * kLanes, z.hi);
        }
    }
}

}  // namespace
}  // namespace dk
