// Philox4x32-10 and the normal numbers made of it: once for every rung, bit for bit the same on all of them.
//
// The key is the sample's 64-bit seed, the counter (e/4 low, e/4 high, step, slot), lane e % 4. A word r is
// u = (r >> 8) 2^-24 + 2^-25; Box-Muller makes lanes (0, 1) of words (0, 1) and lanes (2, 3) of words (2, 3):
// sqrt(-2 log u) cos(2 pi v), sqrt(-2 log u) sin(2 pi v). To be the same everywhere the arithmetic is plain IEEE: `mul` never
// becomes half of a fused multiply-add. Within 3.8 ulp of float64, by exhaustion: 1.19 (radius), 2.09 (cosine), 0.5 (product).
#pragma once

#include <cstdint>

#include "op.h"

namespace dk {
namespace {

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;  // multipliers of words 0 and 2
constexpr uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;      // what a round adds to the key
constexpr int kPhiloxRounds = 10;

// Our fits: -2 log(1 + r) = -2 r + r² + r³ L(r) on [sqrt ½ - 1, sqrt 2 - 1]; sin(pi/2 t) = t S(t²), cos(pi/2 t) = C(t²) on [-½,
// ½].
#define DK_LOG                                                                                                    \
    -0.17400860786437988f, 0.2853497266769409f, -0.29829537868499756f, 0.3315517008304596f, -0.3992612659931183f, \
        0.5000267624855042f, -0.6666781902313232f
#define DK_SIN -0x1.2d9302p-8f, 0x1.465e92p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f
#define DK_COS -0x1.4e35dap-6f, 0x1.03ae64p-2f, -0x1.3bd38cp+0f, 0x1.fffffep-1f

// A: an arithmetic, with F (float32), I (int32, wrapping), F mul(F, F), F sqrt(F), F to_float(I), I bits(F), F from_bits(I),
// F choose(I condition, F yes, F no) and F splat(float).
template <class A>
struct Normal {
    using F = typename A::F;
    using I = typename A::I;

    template <int kCount>
    static DK_INLINE F horner(F x, const float (&c)[kCount]) {
        F p = A::splat(c[0]);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int i = 1; i < kCount; ++i) p = A::mul(p, x) + A::splat(c[i]);
        return p;
    }

    // sqrt(-2 log u) with u = (k + ½) 2^-24, k = word >> 8.
    static DK_INLINE F radius(I word) {
        const F k = A::to_float((word >> 8) & 0xffffff);
        const I octave = A::bits(k + A::splat(0.5f)) - 0x3f3504f3;  // from sqrt ½ on
        const I shift = octave & ~0x7fffff;                         // u = 2^(e - 24) (1 + r), r without an error
        const F r = (A::mul(k, A::from_bits(0x3f800000 - shift)) - A::splat(1.0f)) + A::from_bits(0x3f000000 - shift);
        const F square = A::mul(r, r), e = A::to_float((octave >> 23) - 24);
        const float c[] = {DK_LOG};
        const F t = A::mul(A::mul(horner(r, c), r), square) + square;
        // -2 log 2 in two floats, the second with few bits
        return A::sqrt(((t + A::mul(e, A::splat(4.2438888e-4f))) - (r + r)) + A::mul(e, A::splat(-1.38671875f)));
    }

    // The two normal numbers of two words.
    static DK_INLINE void pair(I word, I angle, F& even, F& odd) {
        const I turn = ((angle & ~0x7f) | 0x80) + (1 << 29);  // 2^32 is one; bits 30 and 31: the nearest quarter
        const F t = A::from_bits(((turn >> 7) & 0x7fffff) | 0x3f800000) - A::splat(1.5f), z = A::mul(t, t);
        const float s[] = {DK_SIN}, c[] = {DK_COS};
        const F sine = A::mul(horner(z, s), t), cosine = horner(z, c);
        const I swapped = (turn & 0x40000000) != 0;
        const F x = A::choose(swapped, sine, cosine), y = A::choose(swapped, cosine, sine);
        const F length = radius(word);
        even = A::mul(length, A::from_bits(A::bits(x) ^ ((turn + 0x40000000) & INT32_MIN)));
        odd = A::mul(length, A::from_bits(A::bits(y) ^ (turn & INT32_MIN)));
    }
};

}  // namespace
}  // namespace dk
