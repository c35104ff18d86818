// From run-time values to types: one lambda, instantiated once a choice. No match refuses, in words.
#pragma once

#include "op.h"

namespace dk {
namespace {

template <DType... Ds>
struct DTypes {};
template <int... Ns>
struct Values {};

template <DType D>
struct DTypeTag {
    static constexpr DType value = D;
};
template <int N>
struct IntTag {
    static constexpr int value = N;
};

using Floats = DTypes<DType::f32, DType::f16, DType::bf16>;

template <class F>
DK_HOST_INLINE Refusal for_dtype(DTypes<>, DType, Refusal otherwise, F&&) {
    return otherwise;
}
template <DType D, DType... Ds, class F>
DK_HOST_INLINE Refusal for_dtype(DTypes<D, Ds...>, DType d, Refusal otherwise, F&& body) {
    return d == D ? body(DTypeTag<D>{}) : for_dtype(DTypes<Ds...>{}, d, otherwise, body);
}

template <class F>
DK_HOST_INLINE Refusal for_value(Values<>, int64_t, Refusal otherwise, F&&) {
    return otherwise;
}
template <int N, int... Ns, class F>
DK_HOST_INLINE Refusal for_value(Values<N, Ns...>, int64_t n, Refusal otherwise, F&& body) {
    return n == N ? body(IntTag<N>{}) : for_value(Values<Ns...>{}, n, otherwise, body);
}

template <class F>
DK_HOST_INLINE Refusal for_bool(bool b, F&& body) {
    return b ? body(IntTag<1>{}) : body(IntTag<0>{});
}

}  // namespace
}  // namespace dk
