// Products of bfloat16 as they are, two in a lane.
#pragma once

#include "simd.h"

namespace dk {
namespace {

// Where there is an instruction for it, a lane of a product's operands holds a pair of bfloat16, and k counts pairs.
// DK_EMULATE_DOTS: the same without the instruction, for tests.
#if defined(__AVX512BF16__) || (defined(__AVX512F__) && defined(DK_EMULATE_DOTS))
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;
DK_INLINE F load_pairs(const void* p, int64_t n) {  // n elements, the rest zero
    return bit_cast<F>(_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, p));
}
#else
template <class T>
constexpr bool kPairs = false;
DK_INLINE F load_pairs(const void*, int64_t) { return F{}; }
#endif
#if defined(__AVX512BF16__)
DK_INLINE F dot(F a, F b, F c) { return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)); }
DK_INLINE H halves(F v) { return bit_cast<H>(_mm512_cvtneps_pbh(v)); }
#else
DK_INLINE F dot(F a, F b, F c) {
    const U x = bit_cast<U>(a), y = bit_cast<U>(b);
    return fma(bit_cast<F>(x << 16), bit_cast<F>(y << 16), fma(bit_cast<F>(x & 0xffff0000u), bit_cast<F>(y & 0xffff0000u), c));
}
DK_INLINE H halves(F v) { return narrow(v, bf16{}); }
#endif

}  // namespace
}  // namespace dk
