// z = x * weight; moments = (mean, sum (x - mean)^2), over rows of D
//
// Idea: as norm_modulate: a row stays in registers, a warp or a block a row, the statistics in two steps. Rows that are wider
// than a block's registers, or not made of aligned 16-byte vectors, are walked three times, twice through the caches. Takes: x
// and z float32, float16 or bfloat16, alike; weight any of these; moments float32; any strides, any D >= 1. Floor: one read
// of x, one write of z. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/slice_moments.cu
#include "norm.cuh"

namespace dk {
namespace {

struct Call {
    int64_t rows, columns;
    Operand x, weight;
    void* z;
    float2* moments;
};

__device__ __forceinline__ float2 pair_of(const Moments& m, int64_t columns) {
    return make_float2(m.mean + m.rest, m.ms * static_cast<float>(columns));
}

// kThreads threads hold a row of at most kThreads * kItems vectors.
template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T);
    const uint32_t row = blockIdx.x * kRows<kThreads> + threadIdx.x / kThreads;
    if (row >= c.rows) return;  // a whole warp, or a whole block
    const int lane = threadIdx.x % kThreads, vectors = static_cast<int>(c.columns / kVec);
    const T* x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    T* z = static_cast<T*>(c.z) + static_cast<int64_t>(row) * c.columns;
    const int64_t weight_at = c.weight.rows.offset(row);

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
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int i = lane + j * kThreads;
        if (i >= vectors) break;
        float t[kVec];
        read(c.weight, weight_at, static_cast<int64_t>(i) * kVec, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) t[v] *= h[j][v];
        store(z + i * kVec, t);
    }
    const Moments m = moments<kThreads>(static_cast<float>(c.columns), true, lane, vectors, h);
    if (lane == 0) c.moments[row] = pair_of(m, c.columns);
}

// A block walks the row three times; kVec = 1 takes any stride and alignment.
template <class T, int kVec>
__global__ void __launch_bounds__(kWalkers, 1) walked(const __grid_constant__ Call c) {
    const uint32_t row = blockIdx.x;
    const T* x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    T* z = static_cast<T*>(c.z) + static_cast<int64_t>(row) * c.columns;
    const int64_t weight_at = c.weight.rows.offset(row);
    const Moments m = walked_moments<kVec>(c.columns, true, [&](int64_t i, float (&h)[kVec]) { load(x + i * c.x.stride, h); });
    if (threadIdx.x == 0) c.moments[row] = pair_of(m, c.columns);
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kVec; i < c.columns; i += static_cast<int64_t>(kWalkers) * kVec) {
        float h[kVec], t[kVec];
        load(x + i * c.x.stride, h);
        read(c.weight, weight_at, i, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[v] *= t[v];
        store(z + i, h);
    }
}

Refusal slice_moments(Stream stream, Views out, View x, View weight) {
    Call c{};
    if (out.count != 2 || !out[0].same_shape(x) || !out[0].contiguous() || out[0].dtype != x.dtype)
        return "out: not z and moments, or z not contiguous and like x";
    if (Refusal why = describe_like(c.x, x, x)) return why;
    if (Refusal why = describe(c.weight, Optional{weight}, x)) return why;
    c.columns = x.size(-1);
    c.rows = c.columns ? x.numel() / c.columns : 0;
    const View& m = out[1];
    bool fits = m.dtype == DType::f32 && m.ndim == x.ndim && m.size(-1) == 2 && m.contiguous();
    for (int k = 0; fits && k < x.ndim - 1; ++k) fits = m.size(k) == x.size(k);
    if (!fits) return "moments: not contiguous float32 [..., 2]";
    if (!c.columns && m.numel()) return "x: rows without columns";
    if (c.rows > 0x7fffffff) return "more than 2^31 - 1 rows";  // the grid's limit; and the rows' 32-bit indices
    if (c.rows == 0) return nullptr;
    c.z = out[0].data;
    c.moments = static_cast<float2*>(m.data);
    if (reinterpret_cast<uintptr_t>(m.data) % sizeof(float2)) return "moments: not aligned to 8 bytes";
    const bool vectors = whole_vectors(c.x, c.columns) && whole_vectors(c.weight, c.columns) && aligned16(c.z);
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto rows = static_cast<unsigned>(c.rows);
        const auto launch = [&](auto threads, auto items) {
            constexpr int kThreads = decltype(threads)::value, kItems = decltype(items)::value;
            const unsigned blocks = (rows + kRows<kThreads> - 1) / kRows<kThreads>;
            kept<T, kThreads, kItems><<<blocks, kBlock<kThreads>, 0, queue>>>(c);
        };
        if (!vectors)
            walked<T, 1><<<rows, kWalkers, 0, queue>>>(c);
        else if (!for_kept(c.columns / kVec, launch))
            walked<T, kVec><<<rows, kWalkers, 0, queue>>>(c);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::slice_moments;
DK_ENTRY(slice_moments, "out x weight")
