// What the CUDA kernels share: element types, vectors of 16 bytes, sums over the threads of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../op.h"

namespace dk {
namespace {

template <DType D>
struct TypeOf;
template <>
struct TypeOf<DType::f32> {
    using type = float;
};
template <>
struct TypeOf<DType::f16> {
    using type = __half;
};
template <>
struct TypeOf<DType::bf16> {
    using type = __nv_bfloat16;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

// kCount elements that one instruction moves; the address is a multiple of the size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T v[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[kCount]) {
    constexpr int kStep = sizeof(T) * kCount > 16 ? static_cast<int>(16 / sizeof(T)) : kCount;
#pragma unroll
    for (int first = 0; first < kCount; first += kStep) {
        const auto pack = *reinterpret_cast<const Pack<T, kStep>*>(p + first);
#pragma unroll
        for (int i = 0; i < kStep; ++i) out[first + i] = widen(pack.v[i]);
    }
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[kCount]) {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.v[i] = narrow<T>(in[i]);
    if constexpr (sizeof pack == 16)  // said outright: nvcc splits some of the plain ones into four
        __stwb(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&pack));
    else
        *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// Each v[n] becomes its sum over kThreads consecutive threads, in every one of them, in one fixed order.
template <int kThreads, int kCount>
__device__ __forceinline__ void sum(float (&v)[kCount]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) v[n] += __shfl_xor_sync(0xffffffffu, v[n], offset);
    if constexpr (kThreads > 32) {  // then the row has the block to itself
        __shared__ float partial[kCount][kThreads / 32];
        __syncthreads();  // the previous sum has been read
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int n = 0; n < kCount; ++n) partial[n][threadIdx.x / 32] = v[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            v[n] = 0;
#pragma unroll
            for (int i = 0; i < kThreads / 32; ++i) v[n] += partial[n][i];
        }
    }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t size_of(DType d) { return d == DType::f32 ? 4 : 2; }

}  // namespace
}  // namespace dk
