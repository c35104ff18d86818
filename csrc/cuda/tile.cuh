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
    else if constexpr (sizeof pack == 8)
        __stwb(reinterpret_cast<uint2*>(p), *reinterpret_cast<const uint2*>(&pack));
    else
        *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// To a tensor of any of the three dtypes, from element `at` on.
template <int kCount>
__device__ __forceinline__ void emit(void* out, DType dtype, int64_t at, const float (&v)[kCount]) {
    if (dtype == DType::f32) {
        constexpr int kStep = kCount < 4 ? kCount : 4;
#pragma unroll
        for (int first = 0; first < kCount; first += kStep) {
            float t[kStep];
#pragma unroll
            for (int i = 0; i < kStep; ++i) t[i] = v[first + i];
            store(static_cast<float*>(out) + at + first, t);
        }
    } else if (dtype == DType::f16) {
        store(static_cast<__half*>(out) + at, v);
    } else {
        store(static_cast<__nv_bfloat16*>(out) + at, v);
    }
}

// 16 bytes as they lie: what is held for later. Of a 16-bit dtype the elements of a struct would take a register each.
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[4], float) {
    out[0] = __uint_as_float(raw.x), out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z), out[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[8], __nv_bfloat16) {
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(pairs[i] << 16);
        out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[8], __half) {
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i] & 0xffffu)));
        out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i] >> 16)));
    }
}

// Each v[n] becomes its sum over kThreads consecutive threads, in every one of them, in one fixed order. More than a warp: the
// whole block of kAll threads is here. Without kFence: since the last sum of so many values there was another barrier.
template <int kThreads, int kAll = kThreads, bool kFence = true, int kCount>
__device__ __forceinline__ void sum(float (&v)[kCount]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int offset = (kThreads < 32 ? kThreads : 32) / 2; offset > 0; offset /= 2)
            v[n] += __shfl_xor_sync(0xffffffffu, v[n], offset);
    if constexpr (kThreads > 32) {
        constexpr int kWarps = kThreads / 32;
        __shared__ float partial[kCount][kAll / 32];
        const int warp = threadIdx.x / 32;
        if constexpr (kFence) __syncthreads();  // the previous sum has been read
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int n = 0; n < kCount; ++n) partial[n][warp] = v[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            const float* const own = partial[n] + (kThreads == kAll ? 0 : warp / kWarps * kWarps);
            v[n] = 0;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) v[n] += own[i];
        }
    }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t size_of(DType d) { return d == DType::f32 ? 4 : 2; }

}  // namespace
}  // namespace dk
