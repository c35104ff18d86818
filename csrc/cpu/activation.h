// The activations, of a vector.
#pragma once

#include "simd.h"

namespace dk {
namespace {

// x / (1 + exp(z)); where exp ends 0, and NaN for an infinite x, as PyTorch has it.
DK_INLINE F over_one_and_exp(F x, F z) {
    const I beyond = z > 87.0f;  // ratio wants no larger divisor
    return x * choose(beyond, F{}, ratio(splat(1), 1 + exp(choose(beyond, F{}, z))));
}

template <bool kTanh>
DK_INLINE F gelu(F x) {
    if (kTanh) return over_one_and_exp(x, -1.5957691216f * fma(0.044715f * x * x, x, x));  // tanh by the sigmoid
    return 0.5f * x * (1 + erf(0.70710678118f * x));
}
DK_INLINE F silu(F x) { return over_one_and_exp(x, -x); }

enum Activation { kNone, kGelu, kGeluTanh, kSilu };
constexpr const char* kActivations[] = {"none", "gelu", "gelu_tanh", "silu"};

template <int kActivation>
DK_INLINE F activated(F x) {
    if (kActivation == kGelu) return gelu<false>(x);
    if (kActivation == kGeluTanh) return gelu<true>(x);
    return kActivation == kSilu ? silu(x) : x;
}

}  // namespace
}  // namespace dk
