// Tensor cores from a warp (sm_80): tiles of shared memory as fragments, products of fragments, copies that nobody waits for.
//
// Lane l = 4 g + t of a warp holds: of A (16 x 16) rows g and g + 8, columns 2 t + {0, 1} and 8 more, as {g, g + 8} x {first,
// second half}; of B (16 x 8) rows 2 t + {0, 1} and 8 more of column g; of C (16 x 8) columns 2 t + {0, 1} of row g, then of
// row g + 8. So two neighbouring C, narrowed, are an A.
#pragma once

#include "tile.cuh"

namespace dk {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Zeros, and nothing is read, where not `inside`. `to` and `from` are multiples of kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
    const uint32_t bytes = inside ? kBytes : 0;
    const size_t at = __cvta_generic_to_global(from);
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(at), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(at), "n"(kBytes), "r"(bytes) : "memory");
}
// Until all that this thread copied has come; other threads see it after a barrier.
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 8 x 8 elements each: lane 8 i + r says where row r of matrix i lies (16 bytes, aligned). kTurned: as their transposes.
template <bool kTurned>
__device__ __forceinline__ void matrices(uint32_t (&m)[4], uint32_t at) {
    if constexpr (kTurned)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(at));
}
template <bool kTurned>
__device__ __forceinline__ void matrices(uint32_t (&m)[2], uint32_t at) {
    if constexpr (kTurned)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(at));
}

// c += a b, 16 x 8; a is 16 deep, or 8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[2], uint32_t b, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[2], uint32_t b, __half) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Two elements of a fragment, the first in the low half.
__device__ __forceinline__ uint32_t pair(float first, float second, __nv_bfloat16) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}
__device__ __forceinline__ uint32_t pair(float first, float second, __half) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}

// Two units in the last place at most; exact at 0 and -inf.
__device__ __forceinline__ float exp2_approximate(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace
}  // namespace dk
