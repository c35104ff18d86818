// y = ((x - mean) / d * weight + bias) * (1 + scale) + shift over rows of D
//
// Idea: a row stays in registers, 16 bytes a load, all of a thread's loads in flight before the first use; a warp a row
// while that fits, then a block a row; statistics in two steps over the registers (subtract, then square; the sum of the
// differences is what rounding left of the mean). Rows that are wider than a block's registers, or not made of aligned
// 16-byte vectors, are walked three times, twice through the caches. Takes: x and y float32, float16 or bfloat16, alike;
// operands of any of these; any strides, any D >= 1. Floor: one read of x, one write of y. Compile: nvcc -std=c++20
// -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/norm_modulate.cu
#include "norm.cuh"

namespace dk {
namespace {

struct Call {
    Norm norm;
    Operand x;
    void* y;
};

// kThreads threads hold a row of at most kThreads * kItems vectors.
template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T);
    const uint32_t row = blockIdx.x * kRows<kThreads> + threadIdx.x / kThreads;
    if (row >= c.norm.rows) return;  // a whole warp, or a whole block
    const int lane = threadIdx.x % kThreads, vectors = static_cast<int>(c.norm.columns / kVec);
    const T* x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    T* y = static_cast<T*>(c.y) + static_cast<int64_t>(row) * c.norm.columns;

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
    const Moments m = moments<kThreads>(static_cast<float>(c.norm.columns), c.norm.center, lane, vectors, h);
    const float rstd = 1.0f / divisor(c.norm, m.ms);
    const Starts at(c.norm, row);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int i = lane + j * kThreads;
        if (i >= vectors) break;
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[j][v] = (h[j][v] - m.rest) * rstd;
        affine(c.norm, at, static_cast<int64_t>(i) * kVec, h[j]);
        store(y + i * kVec, h[j]);
    }
}

// A block walks the row three times; kVec = 1 takes any stride and alignment.
template <class T, int kVec>
__global__ void __launch_bounds__(kWalkers, 1) walked(const __grid_constant__ Call c) {
    const uint32_t row = blockIdx.x;
    const int64_t columns = c.norm.columns;
    const T* x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    T* y = static_cast<T*>(c.y) + static_cast<int64_t>(row) * columns;
    const Moments m =
        walked_moments<kVec>(columns, c.norm.center, [&](int64_t i, float (&h)[kVec]) { load(x + i * c.x.stride, h); });
    const float rstd = 1.0f / divisor(c.norm, m.ms);
    const Starts at(c.norm, row);
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kVec; i < columns; i += static_cast<int64_t>(kWalkers) * kVec) {
        float h[kVec];
        load(x + i * c.x.stride, h);
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[v] = (h[v] - m.mean - m.rest) * rstd;
        affine(c.norm, at, i, h);
        store(y + i, h);
    }
}

Refusal norm_modulate(Stream stream, View y, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
                      double eps, Text eps_mode) {
    Call c{};
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (Refusal why = describe(c.norm, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (Refusal why = describe_like(c.x, x, x)) return why;
    c.y = y.data;
    if (c.norm.rows == 0) return nullptr;
    const bool vectors = whole_vectors(c.norm) && whole_vectors(c.x, c.norm.columns) && aligned16(c.y);
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto rows = static_cast<unsigned>(c.norm.rows);
        const auto launch = [&](auto threads, auto items) {
            constexpr int kThreads = decltype(threads)::value, kItems = decltype(items)::value;
            const unsigned blocks = (rows + kRows<kThreads> - 1) / kRows<kThreads>;
            kept<T, kThreads, kItems><<<blocks, kBlock<kThreads>, 0, queue>>>(c);
        };
        if (!vectors)
            walked<T, 1><<<rows, kWalkers, 0, queue>>>(c);
        else if (!for_kept(c.norm.columns / kVec, launch))
            walked<T, kVec><<<rows, kWalkers, 0, queue>>>(c);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::norm_modulate;
DK_ENTRY(norm_modulate, "out x scale shift weight bias norm eps eps_mode")
