// What the kernels on rows of D share: operands that meet x's rows, the statistics of a row, the arguments' description.
#pragma once

#include "../broadcast.h"
#include "../dispatch.h"
#include "tile.cuh"

namespace dk {
namespace {

// A strided tensor of any of the three dtypes, as rows that begin where `rows` says.
struct Operand {
    const void* data;
    Rows rows;
    int64_t stride;
    DType dtype;
    bool present;
};

// How rows are normalised, and what comes after.
struct Norm {
    int64_t rows, columns;
    float eps;
    bool center, inside;
    Operand weight, bias, scale, shift;
};

// Elements [column, column + kCount) of the row that begins at `at`; kCount > 1 wants vectors (whole_vectors() saw to it).
template <int kCount>
__device__ __forceinline__ void read(const Operand& o, int64_t at, int64_t column, float (&out)[kCount]) {
    const int64_t i = at + column * (kCount > 1 ? 1 : o.stride);
    if (o.dtype == DType::f32)
        load(static_cast<const float*>(o.data) + i, out);
    else if (o.dtype == DType::f16)
        load(static_cast<const __half*>(o.data) + i, out);
    else
        load(static_cast<const __nv_bfloat16*>(o.data) + i, out);
}

// An operand's elements, or `otherwise` where it is absent.
template <int kCount>
__device__ __forceinline__ void read_or(const Operand& o, float otherwise, int64_t at, int64_t column, float (&out)[kCount]) {
    if (o.present) {
        read(o, at, column, out);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) out[i] = otherwise;
    }
}

// Where a row's operands begin.
struct Starts {
    int64_t weight, bias, scale, shift;
    __device__ __forceinline__ Starts(const Norm& c, uint32_t row)
        : weight(c.weight.present ? c.weight.rows.offset(row) : 0),
          bias(c.bias.present ? c.bias.rows.offset(row) : 0),
          scale(c.scale.present ? c.scale.rows.offset(row) : 0),
          shift(c.shift.present ? c.shift.rows.offset(row) : 0) {}
};

template <int kCount>
__device__ __forceinline__ void affine(const Norm& c, const Starts& at, int64_t column, float (&v)[kCount]) {
    float t[kCount];
    if (c.weight.present) {
        read(c.weight, at.weight, column, t);
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] *= t[i];
    }
    if (c.bias.present) {
        read(c.bias, at.bias, column, t);
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] += t[i];
    }
    if (c.scale.present) {
        read(c.scale, at.scale, column, t);
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] *= 1.0f + t[i];
    }
    if (c.shift.present) {
        read(c.shift, at.shift, column, t);
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] += t[i];
    }
}

// The mean square about the mean: rounding must not make it negative; a NaN stays.
__device__ __forceinline__ float variance(float square, float rest) {
    const float ms = square - rest * rest;
    return ms < 0.0f ? 0.0f : ms;
}

__device__ __forceinline__ float divisor(const Norm& c, float ms) { return c.inside ? sqrtf(ms + c.eps) : sqrtf(ms) + c.eps; }

// Threads of a block whose rows take kThreads each, and rows of a block.
template <int kThreads>
constexpr int kBlock = kThreads < 128 ? 128 : kThreads;
template <int kThreads>
constexpr int kRows = kBlock<kThreads> / kThreads;

// A row that kThreads threads hold, zeros beyond its end, less its mean: x = h + mean, and the differences' mean is `rest`
// (what rounding left), that of their squares about it `ms`. Without centring, mean and rest are 0.
struct Moments {
    float mean, rest, ms;
};
template <int kThreads, int kItems, int kVec>
__device__ __forceinline__ Moments moments(float columns, bool center, int lane, int vectors, float (&h)[kItems][kVec]) {
    float mean[1] = {0};
    if (center) {
#pragma unroll
        for (int j = 0; j < kItems; ++j)
#pragma unroll
            for (int v = 0; v < kVec; ++v) mean[0] += h[j][v];
        sum<kThreads>(mean);
        mean[0] /= columns;
    }
    float of[2] = {0, 0};  // the differences: their sum, and the sum of their squares
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const bool inside = lane + j * kThreads < vectors;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            h[j][v] = inside ? h[j][v] - mean[0] : 0.0f;
            of[0] += h[j][v];
            of[1] += h[j][v] * h[j][v];
        }
    }
    sum<kThreads>(of);
    const float rest = center ? of[0] / columns : 0.0f;
    return {mean[0], rest, variance(of[1] / columns, rest)};
}

// The same of a row that a block of kWalkers threads walks, kVec elements a step; x(i, h) gives elements [i, i + kVec).
constexpr int kWalkers = 512;
template <int kVec, class X>
__device__ __forceinline__ Moments walked_moments(int64_t columns, bool center, X&& x) {
    const float count = static_cast<float>(columns);
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(kWalkers) * kVec;
    float h[kVec];
    float mean[1] = {0};
    if (center) {
        for (int64_t i = first; i < columns; i += step) {
            x(i, h);
#pragma unroll
            for (int v = 0; v < kVec; ++v) mean[0] += h[v];
        }
        sum<kWalkers>(mean);
        mean[0] /= count;
    }
    float of[2] = {0, 0};
    for (int64_t i = first; i < columns; i += step) {
        x(i, h);
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            const float e = h[v] - mean[0];
            of[0] += e;
            of[1] += e * e;
        }
    }
    sum<kWalkers>(of);
    const float rest = center ? of[0] / count : 0.0f;
    return {mean[0], rest, variance(of[1] / count, rest)};
}

// Every row of the tensor begins on a multiple of 16 bytes and has its elements side by side.
inline bool whole_vectors(const void* data, const Rows& rows, int64_t stride, int64_t columns, DType dtype) {
    const int64_t vec = 16 / size_of(dtype);
    if (!aligned16(data) || stride != 1 || columns % vec) return false;
    for (int k = 0; k < rows.ndim; ++k)
        if (rows.stride[k] % vec) return false;
    return true;
}
inline bool whole_vectors(const Operand& o, int64_t columns) {
    return !o.present || whole_vectors(o.data, o.rows, o.stride, columns, o.dtype);
}
inline bool whole_vectors(const Norm& c) {
    return whole_vectors(c.weight, c.columns) && whole_vectors(c.bias, c.columns) && whole_vectors(c.scale, c.columns) &&
           whole_vectors(c.shift, c.columns);
}

// An operand of x's rows; one that is absent stays so.
inline Refusal describe(Operand& o, const Optional& t, const View& x) {
    if (!t) return nullptr;
    if (t.dtype > DType::bf16) return "an operand is not float32, float16 or bfloat16";
    if (!rows_of(t, x, o.rows)) return "an operand's shape does not fit x";
    o.data = t.data;
    o.stride = t.step(-1);
    o.dtype = t.dtype;
    o.present = true;
    return nullptr;
}

// A tensor of x's shape.
inline Refusal describe_like(Operand& o, const View& t, const View& x) {
    if (!t.same_shape(x)) return "a tensor is not of x's shape";
    if (t.dtype > DType::bf16) return "a tensor is not float32, float16 or bfloat16";
    if (!rows_of(t, o.rows)) return "x: fewer than 1 or more than 8 dimensions";
    o.data = t.data;
    o.stride = t.step(-1);
    o.dtype = t.dtype;
    o.present = true;
    return nullptr;
}

inline Refusal describe(Norm& c, const View& x, const Optional& scale, const Optional& shift, const Optional& weight,
                        const Optional& bias, const Text& norm, double eps, const Text& eps_mode) {
    if (x.ndim < 1 || x.ndim > kMaxDims) return "x: fewer than 1 or more than 8 dimensions";
    if (x.dtype > DType::bf16) return "x: not float32, float16 or bfloat16";
    c.columns = x.size(-1);
    c.eps = static_cast<float>(eps);
    c.center = norm == "layer";
    c.inside = eps_mode == "inside";
    if (!c.center && !(norm == "rms")) return "norm: neither 'layer' nor 'rms'";
    if (!c.inside && !(eps_mode == "outside")) return "eps_mode: neither 'inside' nor 'outside'";
    if (!(eps >= 0)) return "eps: negative";
    const Optional* const given[] = {&weight, &bias, &scale, &shift};
    Operand* const operands[] = {&c.weight, &c.bias, &c.scale, &c.shift};
    for (int k = 0; k < 4; ++k)
        if (Refusal why = describe(*operands[k], *given[k], x)) return why;
    c.rows = c.columns ? x.numel() / c.columns : 0;
    if (c.rows > 0x7fffffff) return "more than 2^31 - 1 rows";  // the grid's limit; and the rows' 32-bit indices
    return nullptr;
}

// body(threads, items): how many threads hold a row of `vectors` vectors, and how many each; false where it is too wide.
template <class F>
bool for_kept(int64_t vectors, F&& body) {
    if (vectors <= 32 * 2)
        body(Tag<32>{}, Tag<2>{});
    else if (vectors <= 32 * 5)
        body(Tag<32>{}, Tag<5>{});
    else if (vectors <= 128 * 3)
        body(Tag<128>{}, Tag<3>{});
    else if (vectors <= 256 * 3)
        body(Tag<256>{}, Tag<3>{});
    else if (vectors <= 512 * 4)
        body(Tag<512>{}, Tag<4>{});
    else if (vectors <= 512 * 8)
        body(Tag<512>{}, Tag<8>{});
    else
        return false;
    return true;
}

}  // namespace
}  // namespace dk
