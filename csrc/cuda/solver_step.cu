// m = map(sum_g A_g p_g + a x + s z_0);  y_j = c_j m + d_j x + sum_k h_jk u_k + s_j z_(1+j)
//
// Idea: four elements a thread and 1024 a block, which is one run of `watch`; every load is issued before the coefficients
// are waited for, every result written once. Four elements side by side are one Philox block; where tensors are not made of
// aligned vectors a thread's elements lie a warp apart, and noise changes hands within the warp. The sample's row of
// coefficients is found on the device, through the step index, so that a CUDA graph of a whole loop replays with other
// steps. A step outside of the table gives NaN and reads nothing outside. Takes: model outputs float32, float16 or bfloat16,
// alike; the rest float32; any strides; coef [T, B or 1, K]. Floor: one walk a tensor.
// Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/solver_step.cu
#include "../dispatch.h"
#include "../solver.h"
#include "philox.cuh"
#include "samples.cuh"
#include "tile.cuh"

namespace dk {
namespace {

constexpr int kEach = 4, kThreads = kRun / kEach;
constexpr int kFewOutputs = 2, kFewTerms = 3;  // what most solvers need, in fewer registers
constexpr int kMaxWidth = 2 * kMaxOutputs + 5 + kMaxResults * (2 + kMaxTerms) + 1;  // a, s, lo, hi, l; c, s_j; e
static_assert(kMaxWidth < kThreads);

struct Device {
    Samples output[kMaxOutputs], term[kMaxTerms], mask, known;
    float *result[kMaxResults], *flags;
    void* copy;
    const int32_t* step;
    const int64_t* seed;
    const float *coef, *gain, *bound;
    int64_t table, coef_step, coef_sample, coef_column, seed_sample, gain_sample, bound_sample;
    int64_t batch, elements, guided;
    uint32_t blocks;  // of a sample
    int32_t outputs, terms, results, copies, width;
    DType copy_dtype;
    bool two_rows;
};

// A thread's four elements of a run: side by side in a vector, otherwise a warp apart. Element i is `first() + i * kApart`.
template <bool kVectors>
struct Place {
    static constexpr int kApart = kVectors ? 1 : 32;
    int64_t run;  // where it begins in the sample
    int inside;   // how many elements it has
    static __device__ __forceinline__ int first() {
        const int tid = threadIdx.x;
        return kVectors ? tid * kEach : tid / 32 * (32 * kEach) + tid % 32;
    }
    __device__ __forceinline__ bool has(int i) const { return first() + (kVectors ? 0 : i * kApart) < inside; }
};

// Those elements as they lie in memory.
template <class T, bool kVectors>
struct Four {
    T v[kEach];
    __device__ __forceinline__ void fetch(const Samples& s, int64_t b, const Place<kVectors>& at) {
        const T* const p = static_cast<const T*>(s.data) + b * s.sample;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int64_t e = at.run + at.first() + i * at.kApart;
            v[i] = narrow<T>(0);
            if (at.has(i)) v[i] = p[s.straight ? e : s.inner.offset(static_cast<uint32_t>(e))];
        }
    }
    __device__ __forceinline__ void get(float (&out)[kEach]) const {
#pragma unroll
        for (int i = 0; i < kEach; ++i) out[i] = widen(v[i]);
    }
};
template <class T>
struct Four<T, true> {
    uint4 raw;  // half of it, where T has 16 bits
    __device__ __forceinline__ void fetch(const Samples& s, int64_t b, const Place<true>& at) {
        raw = make_uint4(0, 0, 0, 0);
        if (!at.has(0)) return;
        const T* const p = static_cast<const T*>(s.data) + (b * s.sample + at.run) + at.first();
        if constexpr (sizeof(T) == 4) {
            raw = *reinterpret_cast<const uint4*>(p);
        } else {
            const uint2 two = *reinterpret_cast<const uint2*>(p);
            raw.x = two.x, raw.y = two.y;
        }
    }
    __device__ __forceinline__ void get(float (&out)[kEach]) const {
        float wide[16 / sizeof(T)];
        unpack(raw, wide, T{});
#pragma unroll
        for (int i = 0; i < kEach; ++i) out[i] = wide[i];
    }
};

// Writes y[i] to element `base` + that of Place; `count` times, `apart` elements from one to the next.
template <class T, bool kVectors>
__device__ __forceinline__ void put(T* to, const Place<kVectors>& at, const float (&y)[kEach], int count, int64_t apart) {
    to += at.run + at.first();
    if constexpr (!kVectors) {
        for (int n = 0; n < count; ++n, to += apart)
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if (at.has(i)) to[i * at.kApart] = narrow<T>(y[i]);
    } else if (at.has(0)) {
#pragma unroll 1
        for (int n = 0; n < count; ++n, to += apart) store(to, y);
    }
}

// z[i] is element 4 lane + i of the warp's 128 and becomes element lane + 32 i. The whole warp is here.
__device__ __forceinline__ void spread(float (&z)[kEach]) {
    const int lane = threadIdx.x % 32;
    float out[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const float v = __shfl_sync(0xffffffffu, z[j], 8 * i + lane / 4);
            if (j == 0 || lane % 4 == j) out[i] = v;
        }
#pragma unroll
    for (int i = 0; i < kEach; ++i) z[i] = out[i];
}

// How many blocks a multiprocessor is to hold: what the registers allow without spilling.
template <class T, bool kVectors, int kTerms>
constexpr int kResident = kTerms == kFewTerms          ? 5
                          : kVectors && sizeof(T) == 2 ? 4
                                                       : 3;

// At most kOutputs model outputs and kTerms of x and history; kMany: a mask, too.
template <class T, bool kVectors, int kOutputs, int kTerms>
__global__ void __launch_bounds__(kThreads, kResident<T, kVectors, kTerms>) solve(const __grid_constant__ Device d) {
    constexpr bool kMany = kTerms == kMaxTerms;
    __shared__ float k[kMaxWidth + 1];  // the row, then the sample's bound
    __shared__ int64_t seed;
    __shared__ int32_t step;
    const uint32_t b = blockIdx.x / d.blocks, tid = threadIdx.x;
    const int64_t run = static_cast<int64_t>(blockIdx.x - b * d.blocks) * kRun;
    const Place<kVectors> at{run, static_cast<int>(d.elements - run < kRun ? d.elements - run : kRun)};
    const int32_t now = *d.step;

    Four<T, kVectors> p[kOutputs];
    Four<float, kVectors> u[kTerms], mask, known;
#pragma unroll
    for (int g = 0; g < kOutputs; ++g)
        if (g < d.outputs) p[g].fetch(d.output[g], b, at);
#pragma unroll
    for (int t = 0; t < kTerms; ++t)
        if (t < d.terms) u[t].fetch(d.term[t], b, at);
    const bool masked = kMany && d.mask.data;
    if (masked) mask.fetch(d.mask, b, at), known.fetch(d.known, b, at);

    asm volatile("" ::: "memory");  // none of these loads waits for the step, then for its coefficients

    const int rows = d.outputs * (d.two_rows ? 2 : 1), drawn = d.seed ? 1 : 0;
    if (tid < d.width) {
        const float gain = d.gain && static_cast<int>(tid) < rows ? d.gain[b * d.gain_sample] : 1.0f;
        const bool valid = now >= 0 && now < d.table;
        k[tid] = valid ? gain * d.coef[now * d.coef_step + b * d.coef_sample + tid * d.coef_column] : NAN;
    } else if (tid == d.width) {
        if (d.seed) seed = d.seed[b * d.seed_sample];
        if (d.bound) k[tid] = d.bound[b * d.bound_sample];
        step = now;
    }
    const auto add_noise = [&](float factor, uint32_t slot, float (&to)[kEach]) {
        if (factor == 0.0f) return;  // alike in the whole block
        float z[kEach];
        normals(seed, step, slot, static_cast<uint64_t>(run / kEach + tid), z);
        if constexpr (!kVectors) spread(z);
#pragma unroll
        for (int i = 0; i < kEach; ++i) to[i] = fmaf(factor, z[i], to[i]);
    };
    __syncthreads();

    const float* c = k + rows;
    const int64_t limit = d.guided - run;
    const int guided = limit < 0 ? 0 : limit < kRun ? static_cast<int>(limit) : kRun;
    float m[kEach], v[kEach];
    u[0].get(v);
    const float ax = *c++;
#pragma unroll
    for (int i = 0; i < kEach; ++i) m[i] = ax * v[i];
#pragma unroll
    for (int g = 0; g < kOutputs; ++g) {
        if (g >= d.outputs) break;
        const float first = k[g], second = k[g + rows - d.outputs];
        p[g].get(v);
#pragma unroll
        for (int i = 0; i < kEach; ++i) m[i] = fmaf(at.first() + i * at.kApart < guided ? first : second, v[i], m[i]);
    }
    if (drawn) add_noise(*c++, 0, m);
    bool bad = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) bad = bad || (at.has(i) && !isfinite(m[i]));

    float lo = *c++, hi = *c++, reach = 1;
    const bool unclear = lo != lo || hi != hi;
    if (d.bound) {
        reach = k[d.width];
        reach = reach < lo ? lo : reach;  // comparisons as torch.clamp: a NaN stays
        reach = reach > hi ? hi : reach;
        lo = -reach, hi = reach;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // a NaN in m stays, a NaN bound spreads
        m[i] = m[i] < lo ? lo : m[i];
        m[i] = m[i] > hi ? hi : m[i];
        if (unclear || hi != hi) m[i] = NAN;
    }
    if (d.bound) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) m[i] /= reach;
    }
    if (masked) {
        const float share = *c++;
        float w[kEach];
        mask.get(w), known.get(v);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            w[i] *= share;
            m[i] = fmaf(1.0f - w[i], m[i], w[i] * v[i]);
        }
    }
    const int64_t base = b * d.elements;
#pragma unroll 1  // one copy of the noise's code, not three
    for (int j = 0; j < d.results; ++j) {
        float y[kEach];
        const float cm = *c++;
#pragma unroll
        for (int i = 0; i < kEach; ++i) y[i] = cm * m[i];
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
            if (t >= d.terms) break;
            const float weight = c[t];
            u[t].get(v);
#pragma unroll
            for (int i = 0; i < kEach; ++i) y[i] = fmaf(weight, v[i], y[i]);
        }
        c += d.terms;
        if (drawn) add_noise(*c++, 1 + j, y);
        put(d.result[j] + base, at, y, 1, 0);
        if (j == 0 && d.copies) {
            const float factor = k[d.width - 1];
#pragma unroll
            for (int i = 0; i < kEach; ++i) y[i] *= factor;
            const int64_t apart = d.batch * d.elements;
            if (d.copy_dtype == DType::f32)
                put(static_cast<float*>(d.copy) + base, at, y, d.copies, apart);
            else if (d.copy_dtype == DType::f16)
                put(static_cast<__half*>(d.copy) + base, at, y, d.copies, apart);
            else
                put(static_cast<__nv_bfloat16*>(d.copy) + base, at, y, d.copies, apart);
        }
    }
    if (d.flags) {
        const int any = __syncthreads_or(bad);
        if (tid == 0) d.flags[blockIdx.x] = any ? 1.0f : 0.0f;
    }
}

Refusal solver_step(Stream stream, Views out, Views outputs, View x, Views history, View coef, View step, Optional seed,
                    Optional gain, Optional bound, Optional mask, Optional known, int64_t results, int64_t guided_channels,
                    int64_t copies, Text copy_dtype, bool watch) {
    SolverCall c{};
    if (Refusal why = describe(c, out, outputs, x, history, coef, step, seed, gain, bound, mask, known, results,
                               guided_channels, copies, copy_dtype, watch))
        return why;
    Device d{};
    bool vectors = true;
    const auto sampled = [&](const View& t) {
        vectors = vectors && whole_vectors(t, c.elements, kEach);
        return samples(t);
    };
    for (int g = 0; g < c.outputs; ++g) d.output[g] = sampled(c.output[g]);
    for (int t = 0; t < c.terms; ++t) d.term[t] = sampled(c.term[t]);
    if (mask) d.mask = sampled(mask), d.known = sampled(known);
    for (int j = 0; j < c.results; ++j) {
        d.result[j] = static_cast<float*>(c.result[j].data);
        vectors = vectors && whole_vectors(c.result[j], c.elements, kEach);
    }
    if (copies) {
        d.copy = c.copy.data;
        d.copy_dtype = c.copy.dtype;
        vectors = vectors && reinterpret_cast<uintptr_t>(d.copy) % (kEach * size_of(d.copy_dtype)) == 0;
    }
    if (!vectors && c.elements > 0x7fffffff) return "more than 2^31 - 1 elements a sample, not in aligned vectors";
    const int64_t runs = (c.elements + kRun - 1) / kRun;
    if (c.batch * runs == 0) return nullptr;
    if (c.batch * runs > 0x7fffffff) return "more than 2^31 - 1 blocks";
    d.flags = watch ? static_cast<float*>(c.flags.data) : nullptr;
    d.step = static_cast<const int32_t*>(step.data);
    d.table = coef.shape[0];
    d.coef = c.coef, d.coef_step = coef.stride[0], d.coef_sample = c.coef_sample, d.coef_column = c.coef_column;
    d.seed = c.seed, d.seed_sample = c.seed_sample;
    d.gain = c.gain, d.gain_sample = c.gain_sample;
    d.bound = c.bound, d.bound_sample = c.bound_sample;
    d.batch = c.batch, d.elements = c.elements, d.guided = c.guided;
    d.blocks = static_cast<uint32_t>(runs);
    d.outputs = c.outputs, d.terms = c.terms, d.results = c.results, d.copies = c.copies;
    d.width = static_cast<int32_t>(c.width());
    d.two_rows = c.two_rows;
    const bool few = vectors && c.outputs <= kFewOutputs && c.terms <= kFewTerms && !mask;
    return for_value(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto blocks = static_cast<unsigned>(c.batch * runs);
        if (few)
            solve<T, true, kFewOutputs, kFewTerms><<<blocks, kThreads, 0, queue>>>(d);
        else if (vectors)
            solve<T, true, kMaxOutputs, kMaxTerms><<<blocks, kThreads, 0, queue>>>(d);
        else
            solve<T, false, kMaxOutputs, kMaxTerms><<<blocks, kThreads, 0, queue>>>(d);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::solver_step;
DK_ENTRY(solver_step,
         "out outputs x history coef step seed gain bound mask known results guided_channels copies copy_dtype watch")
