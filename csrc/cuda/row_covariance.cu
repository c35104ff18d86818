// mean((t_i - mean t_i) (t_j - mean t_j)) over the elements of every sample
//
// Idea: one read. A block takes a chunk of a sample: what its threads load first, together, gives a centre near the mean (by
// differences from the first element, so that a constant sample is exactly its centre, and its variance an exact zero).
// Products about the centre are added up in float32 over a few elements, then in float64, and what the centre lacks to the
// mean goes off again. A second kernel merges the chunks. They are cut by the shape alone, and added up in one fixed order:
// any GPU gives the same bits. Takes: 1 to 4 tensors float32, float16 or bfloat16, alike, any strides. Floor: one walk a
// tensor. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/row_covariance.cu
#include "../dispatch.h"
#include "samples.cuh"
#include "tile.cuh"

namespace dk {
namespace {

constexpr int kMost = 4, kThreads = 256, kWarps = kThreads / 32, kLanes = 32;
constexpr int64_t kChunk = 16 * 1024;
constexpr int kPairs = kMost * (kMost + 1) / 2;
constexpr int kWords = kMost + kPairs;  // of a chunk: the means, then the sums of products about them

DK_INLINE constexpr int pair(int i, int j) { return i * (i + 1) / 2 + j; }  // j <= i

struct Device {
    Samples tensor[kMost];
    float* out;
    double* parts;  // [B, chunks, kWords], or nullptr: one chunk is the whole sample
    int64_t elements;
    uint32_t chunks;
    int32_t count;
};

// kVec elements as they lie.
template <class T, int kVec>
struct Held {
    uint4 raw;
    __device__ __forceinline__ void fetch(const T* p, const Samples&, int64_t e) {
        raw = *reinterpret_cast<const uint4*>(p + e);
    }
    __device__ __forceinline__ void get(float (&out)[kVec]) const { unpack(raw, out, T{}); }
};
template <class T>
struct Held<T, 1> {
    T v;
    __device__ __forceinline__ void fetch(const T* p, const Samples& s, int64_t e) {
        v = p[s.straight ? e : s.inner.offset(static_cast<uint32_t>(e))];
    }
    __device__ __forceinline__ void get(float (&out)[1]) const { out[0] = widen(v); }
};

// The sum over a warp, in every lane, in one fixed order.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// At most kCount tensors. A thread takes kLoads vectors of each at a time.
template <class T, int kVec, int kCount>
__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ Device d) {
    constexpr int kLoads = kVec == 1 ? 8 : 2, kStep = kThreads * kLoads * kVec, kSums = kCount + kCount * (kCount + 1) / 2;
    __shared__ float head[kCount];
    __shared__ double sums[kWarps][kSums];
    const int tid = threadIdx.x;
    const uint32_t b = blockIdx.x / d.chunks, chunk = blockIdx.x - b * d.chunks;
    const int64_t begin = chunk * kChunk;
    const int n = static_cast<int>(d.elements - begin < kChunk ? d.elements - begin : kChunk);
    float centre[kCount] = {};
    double total[kSums] = {};
    for (int first = 0; first < n; first += kStep) {
        Held<T, kVec> held[kCount][kLoads];
#pragma unroll
        for (int t = 0; t < kCount; ++t)
#pragma unroll
            for (int l = 0; l < kLoads; ++l) {
                const int i = first + (l * kThreads + tid) * kVec;
                held[t][l] = {};
                if (t >= d.count || i >= n) continue;
                const Samples& s = d.tensor[t];
                held[t][l].fetch(static_cast<const T*>(s.data) + b * s.sample, s, begin + i);
            }
        if (first == 0) {
            if (tid == 0)
#pragma unroll
                for (int t = 0; t < kCount; ++t) {
                    float x[kVec];
                    held[t][0].get(x);
                    head[t] = x[0];
                }
            __syncthreads();
            float apart[kCount] = {};
#pragma unroll
            for (int t = 0; t < kCount; ++t)
#pragma unroll
                for (int l = 0; l < kLoads; ++l) {
                    float x[kVec];
                    held[t][l].get(x);
#pragma unroll
                    for (int v = 0; v < kVec; ++v)
                        if ((l * kThreads + tid) * kVec < n) apart[t] += x[v] - head[t];
                }
            sum<kThreads>(apart);
#pragma unroll
            for (int t = 0; t < kCount; ++t) centre[t] = head[t] + apart[t] / static_cast<float>(n < kStep ? n : kStep);
        }
        float few[kSums] = {};
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
            const bool inside = first + (l * kThreads + tid) * kVec < n;
            float x[kCount][kVec];
#pragma unroll
            for (int t = 0; t < kCount; ++t) held[t][l].get(x[t]);
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
#pragma unroll
                for (int t = 0; t < kCount; ++t) {
                    x[t][v] = inside ? x[t][v] - centre[t] : 0.0f;
                    few[t] += x[t][v];
#pragma unroll
                    for (int u = 0; u <= t; ++u) few[kCount + pair(t, u)] = fmaf(x[t][v], x[u][v], few[kCount + pair(t, u)]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kSums; ++k) total[k] += few[k];
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
        total[k] = warp_sum(total[k]);
        if (tid % kLanes == 0) sums[tid / kLanes][k] = total[k];
    }
    __syncthreads();
    if (tid < kSums)
        for (int w = 1; w < kWarps; ++w) sums[0][tid] += sums[w][tid];
    __syncthreads();
    if (tid >= kMost * kMost) return;
    const int i = tid / kMost, j = tid % kMost;
    if (i >= d.count || j > i) return;
    const double off = sums[0][i] / n, product = sums[0][kCount + pair(i, j)] - off * sums[0][j];
    if (d.parts) {
        double* const part = d.parts + static_cast<int64_t>(blockIdx.x) * kWords;
        if (i == j) {
            double own = 0;
#pragma unroll
            for (int t = 0; t < kCount; ++t)
                if (t == i) own = centre[t];
            part[i] = own + off;
        }
        part[kMost + pair(i, j)] = product;
    } else {
        float* const y = d.out + static_cast<int64_t>(b) * d.count * d.count;
        y[i * d.count + j] = y[j * d.count + i] = static_cast<float>(product / n);
    }
}

// A warp a sample.
__global__ void __launch_bounds__(kLanes) merge(const __grid_constant__ Device d) {
    const uint32_t b = blockIdx.x, lane = threadIdx.x;
    const double* const parts = d.parts + static_cast<int64_t>(b) * d.chunks * kWords;
    const double all = static_cast<double>(d.elements);
    const auto size = [&](uint32_t chunk) {
        const int64_t left = d.elements - chunk * kChunk;
        return static_cast<double>(left < kChunk ? left : kChunk);
    };
    double middle[kMost] = {}, product[kPairs] = {};
    for (uint32_t chunk = lane; chunk < d.chunks; chunk += kLanes)
#pragma unroll
        for (int t = 0; t < kMost; ++t)  // from the first chunk's mean: equal means give it back exactly
            if (t < d.count) middle[t] += size(chunk) * (parts[static_cast<int64_t>(chunk) * kWords + t] - parts[t]);
#pragma unroll
    for (int t = 0; t < kMost; ++t)
        if (t < d.count) middle[t] = parts[t] + warp_sum(middle[t]) / all;
    for (uint32_t chunk = lane; chunk < d.chunks; chunk += kLanes) {
        const double* const part = parts + static_cast<int64_t>(chunk) * kWords;
#pragma unroll
        for (int i = 0; i < kMost; ++i)
#pragma unroll
            for (int j = 0; j <= i; ++j)
                if (i < d.count)
                    product[pair(i, j)] +=
                        part[kMost + pair(i, j)] + size(chunk) * (part[i] - middle[i]) * (part[j] - middle[j]);
    }
    float* const y = d.out + static_cast<int64_t>(b) * d.count * d.count;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j)
            if (i < d.count) {
                const float v = static_cast<float>(warp_sum(product[pair(i, j)]) / all);
                if (lane == 0) y[i * d.count + j] = y[j * d.count + i] = v;
            }
}

int64_t chunks_of(const View& t) { return (elements_of(t) + kChunk - 1) / kChunk; }

int64_t bytes(Stream, View, Views tensors) {
    if (tensors.count < 1 || tensors[0].ndim < 1 || chunks_of(tensors[0]) < 2) return 0;
    return tensors[0].shape[0] * chunks_of(tensors[0]) * kWords * static_cast<int64_t>(sizeof(double));
}

Refusal row_covariance(Stream stream, View out, Views tensors) {
    if (tensors.count < 1 || tensors.count > kMost) return "tensors: not 1 to 4";
    const View& x = tensors[0];
    if (x.ndim < 1 || x.ndim > kMaxDims) return "tensors: no dimension, or more than 8";
    const int64_t count = tensors.count, elements = elements_of(x), chunks = chunks_of(x), blocks = x.shape[0] * chunks;
    if (out.dtype != DType::f32 || !out.contiguous() || out.numel() != x.shape[0] * count * count)
        return "out: not float32 [B, K, K]";
    if (elements == 0) return "tensors: no elements";
    if (blocks > 0x7fffffff || elements > 0x7fffffff) return "more than 2^31 - 1 blocks, or elements a sample";
    Device d{};
    bool vectors = true;
    for (int t = 0; t < count; ++t) {
        if (!tensors[t].same_shape(x) || tensors[t].dtype != x.dtype) return "tensors: not alike";
        d.tensor[t] = samples(tensors[t]);
        vectors = vectors && whole_vectors(tensors[t], elements, 16 / size_of(x.dtype));
    }
    d.out = static_cast<float*>(out.data);
    d.parts = chunks > 1 ? static_cast<double*>(stream.scratch) : nullptr;
    d.elements = elements;
    d.chunks = static_cast<uint32_t>(chunks);
    d.count = static_cast<int32_t>(count);
    return for_value(Floats{}, x.dtype, "tensors: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto grid = static_cast<unsigned>(blocks);
        if (grid == 0) return nullptr;
        if (vectors && count <= 2)
            gather<T, kVec, 2><<<grid, kThreads, 0, queue>>>(d);
        else if (vectors)
            gather<T, kVec, kMost><<<grid, kThreads, 0, queue>>>(d);
        else
            gather<T, 1, kMost><<<grid, kThreads, 0, queue>>>(d);
        if (d.parts) merge<<<static_cast<unsigned>(x.shape[0]), kLanes, 0, queue>>>(d);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::row_covariance;
DK_ENTRY_WITH_SCRATCH(row_covariance, "out tensors", dk::bytes)
