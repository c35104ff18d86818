// y = ((x - mean) / d * weight + bias) * (1 + scale) + shift over rows of D
//
// Idea: a row stays in registers, 16 bytes a load, all of a thread's loads in flight before the first use; a warp a row
// while that fits, then a block a row; statistics in two steps over the registers (subtract, then square; the sum of the
// differences is what rounding left of the mean). Rows that are wider than a block's registers, or not made of aligned
// 16-byte vectors, are walked three times, twice through the caches. Takes: x and y float32, float16 or bfloat16, alike;
// operands of any of these; any strides, any D >= 1. Floor: one read of x, one write of y. Compile: nvcc -std=c++20
// -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/norm_modulate.cu
#include "../broadcast.h"
#include "../dispatch.h"
#include "tile.cuh"

namespace dk {
namespace {

struct Operand {
    const void* data;
    Rows rows;
    int64_t stride;
    DType dtype;
    bool present;
};

struct Call {
    const void* x;
    void* y;
    Rows x_rows;
    int64_t x_stride, rows, columns;
    float eps;
    bool center, inside;
    Operand weight, bias, scale, shift;
};

// Elements [column, column + kCount) of the row that begins at `at`; kCount > 1 wants vectors (launch() saw to it).
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

// Where a row's operands begin.
struct Starts {
    int64_t weight, bias, scale, shift;
    __device__ __forceinline__ Starts(const Call& c, uint32_t row)
        : weight(c.weight.present ? c.weight.rows.offset(row) : 0),
          bias(c.bias.present ? c.bias.rows.offset(row) : 0),
          scale(c.scale.present ? c.scale.rows.offset(row) : 0),
          shift(c.shift.present ? c.shift.rows.offset(row) : 0) {}
};

template <int kCount>
__device__ __forceinline__ void affine(const Call& c, const Starts& at, int64_t column, float (&v)[kCount]) {
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

__device__ __forceinline__ float divisor(const Call& c, float ms) { return c.inside ? sqrtf(ms + c.eps) : sqrtf(ms) + c.eps; }

// kThreads threads hold a row of at most kThreads * kItems vectors.
template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads < 128 ? 128 : kThreads, 1) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T);
    constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;
    const uint32_t row = blockIdx.x * kRows + threadIdx.x / kThreads;
    if (row >= c.rows) return;  // a whole warp, or a whole block
    const int lane = threadIdx.x % kThreads, vectors = static_cast<int>(c.columns / kVec);
    const T* x = static_cast<const T*>(c.x) + c.x_rows.offset(row);
    T* y = static_cast<T*>(c.y) + static_cast<int64_t>(row) * c.columns;

    float h[kItems][kVec];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int i = lane + j * kThreads;
        if (i < vectors) {
            load(x + i * kVec, h[j]);
        } else {
#pragma unroll
            for (int v = 0; v < kVec; ++v) h[j][v] = 0;
        }
    }
    const float count = static_cast<float>(c.columns);
    float mean[1] = {0};
    if (c.center) {
#pragma unroll
        for (int j = 0; j < kItems; ++j)
#pragma unroll
            for (int v = 0; v < kVec; ++v) mean[0] += h[j][v];
        sum<kThreads>(mean);
        mean[0] /= count;
    }
    float moments[2] = {0, 0};  // of the differences: their sum, and the sum of their squares
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const bool inside = lane + j * kThreads < vectors;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            h[j][v] = inside ? h[j][v] - mean[0] : 0.0f;
            moments[0] += h[j][v];
            moments[1] += h[j][v] * h[j][v];
        }
    }
    sum<kThreads>(moments);
    const float rest = c.center ? moments[0] / count : 0.0f;
    const float rstd = 1.0f / divisor(c, moments[1] / count - rest * rest);
    const Starts at(c, row);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int i = lane + j * kThreads;
        if (i >= vectors) break;
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[j][v] = (h[j][v] - rest) * rstd;
        affine(c, at, static_cast<int64_t>(i) * kVec, h[j]);
        store(y + i * kVec, h[j]);
    }
}

// A block walks the row three times, kVec elements a step; kVec = 1 takes any stride and alignment.
constexpr int kWalkers = 512;
template <class T, int kVec>
__global__ void __launch_bounds__(kWalkers, 1) walked(const __grid_constant__ Call c) {
    const uint32_t row = blockIdx.x;
    const T* x = static_cast<const T*>(c.x) + c.x_rows.offset(row);
    T* y = static_cast<T*>(c.y) + static_cast<int64_t>(row) * c.columns;
    const float count = static_cast<float>(c.columns);
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(kWalkers) * kVec;
    float h[kVec];
    float mean[1] = {0};
    if (c.center) {
        for (int64_t i = first; i < c.columns; i += step) {
            load(x + i * c.x_stride, h);
#pragma unroll
            for (int v = 0; v < kVec; ++v) mean[0] += h[v];
        }
        sum<kWalkers>(mean);
        mean[0] /= count;
    }
    float moments[2] = {0, 0};
    for (int64_t i = first; i < c.columns; i += step) {
        load(x + i * c.x_stride, h);
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            const float e = h[v] - mean[0];
            moments[0] += e;
            moments[1] += e * e;
        }
    }
    sum<kWalkers>(moments);
    const float rest = c.center ? moments[0] / count : 0.0f;
    const float rstd = 1.0f / divisor(c, moments[1] / count - rest * rest);
    const Starts at(c, row);
    for (int64_t i = first; i < c.columns; i += step) {
        load(x + i * c.x_stride, h);
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[v] = (h[v] - mean[0] - rest) * rstd;
        affine(c, at, i, h);
        store(y + i, h);
    }
}

template <class T, int kThreads, int kItems>
void launch_kept(const Call& c, cudaStream_t stream) {
    constexpr int kRows = kThreads < 128 ? 128 / kThreads : 1;
    const auto blocks = static_cast<unsigned>((c.rows + kRows - 1) / kRows);
    kept<T, kThreads, kItems><<<blocks, kThreads * kRows, 0, stream>>>(c);
}

template <class T>
void launch(const Call& c, bool vectors, cudaStream_t stream) {
    constexpr int kVec = 16 / sizeof(T);
    const int64_t n = c.columns / kVec;
    if (!vectors)
        walked<T, 1><<<static_cast<unsigned>(c.rows), kWalkers, 0, stream>>>(c);
    else if (n <= 32 * 2)
        launch_kept<T, 32, 2>(c, stream);
    else if (n <= 32 * 5)
        launch_kept<T, 32, 5>(c, stream);
    else if (n <= 128 * 3)
        launch_kept<T, 128, 3>(c, stream);
    else if (n <= 256 * 3)
        launch_kept<T, 256, 3>(c, stream);
    else if (n <= 512 * 4)
        launch_kept<T, 512, 4>(c, stream);
    else if (n <= 512 * 8)
        launch_kept<T, 512, 8>(c, stream);
    else
        walked<T, kVec><<<static_cast<unsigned>(c.rows), kWalkers, 0, stream>>>(c);
}

// Every row of the tensor begins on a multiple of 16 bytes and has its elements side by side.
bool whole_vectors(const void* data, const Rows& rows, int64_t stride, int64_t columns, DType dtype) {
    const int64_t vec = 16 / size_of(dtype);
    if (!aligned16(data) || stride != 1 || columns % vec) return false;
    for (int k = 0; k < rows.ndim; ++k)
        if (rows.stride[k] % vec) return false;
    return true;
}

Refusal norm_modulate(Stream stream, View y, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
                      double eps, Text eps_mode) {
    Call c{};
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (!rows_of(x, c.x_rows)) return "x: fewer than 1 or more than 8 dimensions";
    c.y = y.data, c.x = x.data;
    c.columns = x.size(-1);
    c.x_stride = x.step(-1);
    c.eps = static_cast<float>(eps);
    c.center = norm == "layer";
    c.inside = eps_mode == "inside";
    if (!c.center && !(norm == "rms")) return "norm: neither 'layer' nor 'rms'";
    if (!c.inside && !(eps_mode == "outside")) return "eps_mode: neither 'inside' nor 'outside'";
    if (!(eps >= 0)) return "eps: negative";
    bool vectors = whole_vectors(x.data, c.x_rows, c.x_stride, c.columns, x.dtype) && aligned16(y.data);
    const Optional given[] = {weight, bias, scale, shift};
    Operand* const operands[] = {&c.weight, &c.bias, &c.scale, &c.shift};
    for (int k = 0; k < 4; ++k) {
        if (!given[k]) continue;
        Operand& o = *operands[k];
        if (given[k].dtype > DType::bf16) return "an operand is not float32, float16 or bfloat16";
        if (!rows_of(given[k], x, o.rows)) return "an operand's shape does not fit x";
        o.data = given[k].data;
        o.stride = given[k].step(-1);
        o.dtype = given[k].dtype;
        o.present = true;
        vectors = vectors && whole_vectors(o.data, o.rows, o.stride, c.columns, o.dtype);
    }
    const int64_t total = x.numel();
    if (total == 0) return nullptr;
    c.rows = total / c.columns;
    if (c.rows > 0x7fffffff) return "more than 2^31 - 1 rows";  // the grid's limit; and the rows' 32-bit indices
    return for_dtype(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        launch<T>(c, vectors, static_cast<cudaStream_t>(stream.handle));
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::norm_modulate;
DK_ENTRY(norm_modulate, "out x scale shift weight bias norm eps eps_mode")
