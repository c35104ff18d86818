// The contract a kernel sees: no torch, no Python, no allocation.
//
// A kernel is one function on a rung, under the op's own name:
//
//     Refusal norm_modulate(Stream, View y, View x, Optional scale, ..., Text norm, double eps, Text eps_mode);
//     DK_ENTRY(norm_modulate, "y x scale shift weight bias norm eps eps_mode")
//
// It fills the outputs that it is given and returns nullptr, or touches nothing and says in words why not. A kernel that
// needs memory of its own has a function of the same parameters that says how many bytes, and finds them in the Stream:
//
//     int64_t bytes(Stream, View y, ...);
//     DK_ENTRY_WITH_SCRATCH(norm_backward, "out grad ...", bytes)
//
// The same file is compiled once a rung; DK_RUNG names the rung and so the one symbol that the object exports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

// Never emitted: an object of an instruction set must hold no function that the linker could share.
#define DK_HOST_INLINE __attribute__((always_inline)) inline
#ifdef __CUDACC__
#include "cuda/guard.cuh"
#define DK_INLINE __host__ __device__ __forceinline__
#else
#define DK_INLINE DK_HOST_INLINE
#endif

namespace dk {

enum class DType : int8_t { f32, f16, bf16, i32, i64, b8, i8, u8, other };

// A borrowed tensor. Shape and strides are in elements, not bytes; an absent optional has ndim < 0.
struct View {
    void* data;
    const int64_t* shape;
    const int64_t* stride;
    int32_t ndim;
    DType dtype;

    DK_INLINE int64_t size(int i) const { return shape[i < 0 ? i + ndim : i]; }
    DK_INLINE int64_t step(int i) const { return stride[i < 0 ? i + ndim : i]; }
    DK_INLINE int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }
    DK_INLINE bool same_shape(const View& o) const {
        if (ndim != o.ndim) return false;
        for (int i = 0; i < ndim; ++i)
            if (shape[i] != o.shape[i]) return false;
        return true;
    }
    DK_INLINE bool contiguous(int from = 0) const {  // dimensions from.. are dense and in order, or there is nothing
        if (numel() == 0) return true;
        int64_t expected = 1;
        for (int i = ndim - 1; i >= from; --i) {
            if (shape[i] != 1 && stride[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
};

struct Optional : View {
    DK_INLINE explicit operator bool() const { return ndim >= 0; }
};

struct Views {
    const View* data;
    int64_t count;
    DK_INLINE const View& operator[](int64_t i) const { return data[i]; }
};

struct Text {
    const char* data;
    size_t count;
    DK_INLINE bool operator==(const char* word) const {
        size_t i = 0;
        for (; i < count && word[i]; ++i)
            if (data[i] != word[i]) return false;
        return i == count && !word[i];
    }
};

struct Stream {
    void* handle;    // the current stream of the tensors' device, nullptr on a CPU
    int32_t device;  // its index
    void* scratch;   // the bytes that the Entry asked for, aligned to 64; nothing is known of what they hold
};

// nullptr: all of the work is done (on a GPU: launched). Otherwise nothing was touched and the words say why.
// A reason that starts with '!' is no refusal but an error of the device: the border throws it.
using Refusal = const char*;

struct OptionalReal {
    double value;
    bool given;
    DK_INLINE explicit operator bool() const { return given; }
};

enum class Kind : int8_t { tensor, optional, tensors, integer, real, optional_real, text, boolean };

struct Value {
    union {
        View view;
        Views views;
        int64_t integer;
        double real;
        OptionalReal optional_real;
        Text text;
        bool boolean;
    };
};

struct Entry {
    const char* op;
    const char* params;  // names, outputs first, separated by one space
    const Kind* kinds;
    int32_t count;
    Refusal (*call)(Stream, const Value*);
    int64_t (*scratch)(const Value*);  // nullptr: none; 0 also where the call will be refused
};

namespace {

// A parameter's type, as the border names it and as it lies in a Value.
template <class T>
struct Param;
#define DK_PARAM(Type, name, member)                                          \
    template <>                                                               \
    struct Param<Type> {                                                      \
        static constexpr Kind kind = Kind::name;                              \
        static DK_HOST_INLINE Type get(const Value& v) { return {v.member}; } \
    };
DK_PARAM(View, tensor, view)
DK_PARAM(Optional, optional, view)
DK_PARAM(Views, tensors, views)
DK_PARAM(int64_t, integer, integer)
DK_PARAM(double, real, real)
DK_PARAM(OptionalReal, optional_real, optional_real)
DK_PARAM(Text, text, text)
DK_PARAM(bool, boolean, boolean)
#undef DK_PARAM

#ifndef __CUDACC__
struct Guard {
    DK_INLINE explicit Guard(int) {}
    DK_INLINE Refusal failure() { return nullptr; }
};
#endif

template <class F>
struct Bound;
template <class R, class... P>
struct Bound<R (*)(Stream, P...)> {
    static constexpr int count = sizeof...(P);
    static constexpr Kind kinds[] = {Param<P>::kind...};

    template <R (*F)(Stream, P...), size_t... I>
    static DK_HOST_INLINE R spread(Stream s, const Value* v, std::index_sequence<I...>) {
        return F(s, Param<P>::get(v[I])...);
    }
    template <R (*F)(Stream, P...)>
    static R call(Stream s, const Value* v) {
        Guard guard(s.device);
        if (Refusal why = guard.failure()) return why;
        if (Refusal why = spread<F>(s, v, std::index_sequence_for<P...>{})) return why;
        return guard.failure();
    }
    template <R (*F)(Stream, P...)>
    static R bytes(const Value* v) {
        return spread<F>(Stream{}, v, std::index_sequence_for<P...>{});
    }
};

}  // namespace
}  // namespace dk

#define DK_SYMBOL_(a, b) dk_##a##_##b
#define DK_SYMBOL(a, b) DK_SYMBOL_(a, b)
#define DK_DEFINE(op, names, bytes)                                                                                          \
    extern "C" {                                                                                                             \
    extern const dk::Entry DK_SYMBOL(DK_RUNG, op);                                                                           \
    constinit const dk::Entry DK_SYMBOL(DK_RUNG, op) = {                                                                     \
        #op,  names, dk::Bound<decltype(&op)>::kinds, dk::Bound<decltype(&op)>::count, &dk::Bound<decltype(&op)>::call<&op>, \
        bytes};                                                                                                              \
    }
#define DK_ENTRY(op, names) DK_DEFINE(op, names, nullptr)
#define DK_ENTRY_WITH_SCRATCH(op, names, f) DK_DEFINE(op, names, &dk::Bound<decltype(&f)>::bytes<&f>)
