// The activations, of a vector.
#pragma once

#include "simd.h"

namespace dk {
namespace {

// Infinity where exp ends: x / (1 + it) is then 0, and NaN for an infinite x, as PyTorch has it.
DK_INLINE F exp_to_infinity(F x) { return choose(x > 88.0f, splat(__builtin_inff()), exp(x)); }

template <bool kTanh>
DK_INLINE F gelu(F x) {
    if (kTanh) return x / (1 + exp_to_infinity(-1.5957691216f * fma(0.044715f * x * x, x, x)));  // tanh by the sigmoid
    return 0.5f * x * (1 + erf(0.70710678118f * x));
}
DK_INLINE F silu(F x) { return x / (1 + exp_to_infinity(-x)); }

}  // namespace
}  // namespace dk
