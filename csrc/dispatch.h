// From run-time values to types: one lambda, instantiated once a choice. No match refuses, in words.
#pragma once

#include "op.h"

namespace dk {
namespace {

template <auto... Vs>
struct Values {};
using Floats = Values<DType::f32, DType::f16, DType::bf16>;

template <auto V>
struct Tag {
    static constexpr auto value = V;
};

template <class T, class F>
DK_HOST_INLINE Refusal for_value(Values<>, T, Refusal otherwise, F&&) {
    return otherwise;
}
template <auto V, auto... Vs, class T, class F>
DK_HOST_INLINE Refusal for_value(Values<V, Vs...>, T v, Refusal otherwise, F&& body) {
    return v == V ? body(Tag<V>{}) : for_value(Values<Vs...>{}, v, otherwise, body);
}

template <class F>
DK_HOST_INLINE Refusal for_bool(bool b, F&& body) {
    return b ? body(Tag<1>{}) : body(Tag<0>{});
}

}  // namespace
}  // namespace dk
