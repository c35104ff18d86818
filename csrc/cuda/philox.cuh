// A thread's noise: csrc/philox.h with scalars. Compiles for the host as well, where contraction has to be off.
#pragma once

#include "../philox.h"

namespace dk {
namespace {

// int32 that wraps.
struct Word {
    uint32_t v;
    DK_INLINE Word(uint32_t bits) : v(bits) {}
    DK_INLINE Word(int32_t bits) : v(static_cast<uint32_t>(bits)) {}
    friend DK_INLINE Word operator+(Word a, Word b) { return a.v + b.v; }
    friend DK_INLINE Word operator-(Word a, Word b) { return a.v - b.v; }
    friend DK_INLINE Word operator&(Word a, Word b) { return a.v & b.v; }
    friend DK_INLINE Word operator|(Word a, Word b) { return a.v | b.v; }
    friend DK_INLINE Word operator^(Word a, Word b) { return a.v ^ b.v; }
    friend DK_INLINE Word operator!=(Word a, Word b) { return static_cast<uint32_t>(a.v != b.v); }
    friend DK_INLINE Word operator>>(Word a, int by) { return static_cast<int32_t>(a.v) >> by; }
};

struct Scalars {
    using F = float;
    using I = Word;
    static DK_INLINE F splat(float x) { return x; }
    static DK_INLINE F choose(I condition, F yes, F no) { return condition.v ? yes : no; }
    static DK_INLINE F to_float(I i) { return static_cast<float>(static_cast<int32_t>(i.v)); }
#ifdef __CUDA_ARCH__
    static DK_INLINE F mul(F a, F b) { return __fmul_rn(a, b); }  // never half of a fused multiply-add
    static DK_INLINE F sqrt(F v) { return __fsqrt_rn(v); }
    static DK_INLINE I bits(F v) { return __float_as_uint(v); }
    static DK_INLINE F from_bits(I i) { return __uint_as_float(i.v); }
#else
    static DK_INLINE F mul(F a, F b) { return a * b; }
    static DK_INLINE F sqrt(F v) { return __builtin_sqrtf(v); }
    static DK_INLINE I bits(F v) { return __builtin_bit_cast(uint32_t, v); }
    static DK_INLINE F from_bits(I i) { return __builtin_bit_cast(float, i.v); }
#endif
};

// Elements [4 block, 4 block + 4) of a sample's noise.
DK_INLINE void normals(int64_t seed, int32_t step, uint32_t slot, uint64_t block, float (&z)[4]) {
    uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32), c = static_cast<uint32_t>(step),
             d = slot;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p = static_cast<uint64_t>(a) * kPhiloxA, q = static_cast<uint64_t>(c) * kPhiloxB;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ k0, b = static_cast<uint32_t>(q);
        c = static_cast<uint32_t>(p >> 32) ^ d ^ k1, d = static_cast<uint32_t>(p);
        k0 += kWeylA, k1 += kWeylB;
    }
    Normal<Scalars>::pair(a, b, z[0], z[1]);
    Normal<Scalars>::pair(c, d, z[2], z[3]);
}

}  // namespace
}  // namespace dk
