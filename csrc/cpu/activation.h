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

#if defined(__AVX512F__)
// What gelu multiplies x by is 1 - q(x), or q(-x) below zero: q(t) is the normal distribution's upper tail, or the sigmoid of
// tanh's form at -t. It is looked up: 32 quartics, each through five Chebyshev points of its interval, lie in ten registers.
// They miss q by 4e-9; from 5.55 on it is 0, about where 1 + erf becomes it in float32.
constexpr float kSteps = 5.5f;  // intervals a unit

constexpr double exp_of(double x) {
    double sum = 1, term = 1;
    for (int n = 1; n < 12; ++n) sum += term *= x / 1024 / n;
    for (int n = 0; n < 10; ++n) sum *= sum;
    return sum;
}
constexpr double upper_tail(double t, bool tanh) {
    if (tanh) return 1 / (1 + exp_of(1.5957691216057308 * (t + 0.044715 * t * t * t)));
    double sum = t, term = t;  // 1/2 - q(t) = phi(t) (t + t³/3 + t⁵/15 + ...)
    for (int n = 1; n < 80; ++n) sum += term *= t * t / (2 * n + 1);
    return 0.5 - 0.3989422804014327 * exp_of(-t * t / 2) * sum;
}

struct Quartics {
    alignas(64) float of[5][32];  // in u - k, u = kSteps t, k the integer nearest to it
};
constexpr Quartics quartics(bool tanh) {
    constexpr double a = 0.47552825814757677, b = 0.29389262614623657, a2 = a * a, b2 = b * b;
    Quartics q{};
    for (int k = 0; k < 31; ++k) {
        const auto at = [&](double d) { return upper_tail((k + d) / kSteps, tanh); };
        const double middle = at(0), far = (at(a) + at(-a)) / 2 - middle, near = (at(b) + at(-b)) / 2 - middle;
        const double far_slope = (at(a) - at(-a)) / 2 / a, near_slope = (at(b) - at(-b)) / 2 / b;
        const double fourth = (far / a2 - near / b2) / (a2 - b2), third = (far_slope - near_slope) / (a2 - b2);
        const double of[] = {middle, far_slope - third * a2, far / a2 - fourth * a2, third, fourth};
        for (int i = 0; i < 5; ++i) q.of[i][k] = static_cast<float>(of[i]);
    }
    return q;
}
template <bool kTanh>
constexpr Quartics kTail = quartics(kTanh);

template <bool kTanh>
DK_INLINE F gelu(F x) {
    const F t = bit_cast<F>(bit_cast<I>(x) & 0x7fffffff), u = _mm512_min_ps(splat(31), kSteps * t);  // a NaN stays one
    const F magic = splat(0x1.8p23f), nearest = u + magic, d = u - (nearest - magic);
    const auto coefficient = [&](int i) __attribute__((always_inline)) -> F {
        const float* const of = kTail<kTanh>.of[i];
        return _mm512_permutex2var_ps(load(of), bit_cast<__m512i>(nearest), load(of + 16));
    };
    F q = coefficient(4);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) q = fma(q, d, coefficient(i));
    return x * choose(x > 0, 1 - q, q);
}
#else
// x P(x²) / Q(x²), a minimax fit on [-3.92, 3.92], 1.6e-8 from erf; beyond, erf rounds to ±1: exactly, since gelu multiplies
// what is left of 1 + erf by x.
DK_INLINE F erf(F x) {
    const F clamped = choose(x < -3.92f, splat(-3.92f), choose(x > 3.92f, splat(3.92f), x)), z = clamped * clamped;
    F p = splat(2.034669706e-06f), q = splat(3.806895984e-05f);
    for (const float c : {2.874604834e-04f, 3.867935389e-03f, 5.305927619e-02f, 1.927563250e-01f, 1.128378987f})
        p = fma(p, z, splat(c));
    for (const float c : {1.188000431e-03f, 1.517153252e-02f, 1.150812507e-01f, 5.041575432e-01f, 1.0f})
        q = fma(q, z, splat(c));
    const F y = ratio(clamped * p, q);
    return choose(x < -3.92f, splat(-1.0f), choose(x > 3.92f, splat(1.0f), y));
}

template <bool kTanh>
DK_INLINE F gelu(F x) {
    if (kTanh) return over_one_and_exp(x, -1.5957691216f * fma(0.044715f * x * x, x, x));  // tanh by the sigmoid
    return 0.5f * x * (1 + erf(0.70710678118f * x));
}
#endif

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
