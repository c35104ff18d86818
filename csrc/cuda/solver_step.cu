// m = clamp(sum_g A_g p_g + a x, lo, hi);  y_j = c_j m + d_j x + sum_k h_jk u_k + s_j noise
//
// Idea: four elements a thread (one, where a tensor is not made of aligned vectors); every load is issued before the first
// use, every result written once. The sample's row of coefficients is found on the device, through the step index, and kept
// in shared memory, so that a CUDA graph of a whole loop replays with other steps. A step outside of the table gives NaN
// and reads nothing outside. Takes: model outputs float32, float16 or bfloat16, alike; the rest float32; any strides; coef
// [T, B or 1, K]. Floor: one walk a tensor. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c
// csrc/cuda/solver_step.cu
#include "../broadcast.h"
#include "../dispatch.h"
#include "../solver.h"
#include "tile.cuh"

namespace dk {
namespace {

constexpr int kThreads = 256, kVector = 4;
constexpr int kMaxWidth = 2 * kMaxOutputs + 3 + kMaxResults * (1 + kMaxTerms);

// A tensor [B, ...] as samples of E elements.
struct Samples {
    const void* data;
    Rows inner;      // where element e lies
    int64_t sample;  // from one sample to the next
    bool straight;   // contiguous within a sample: element e lies at e
};

struct Device {
    Samples output[kMaxOutputs], term[kMaxTerms];
    float* result[kMaxResults];
    const float* coef;
    const int32_t* step;
    int64_t table, coef_step, coef_sample, coef_column;
    int64_t elements, blocks, guided;
    int32_t outputs, terms, results, width;
    bool two_rows;
};

// Elements [e, e + kVec) of sample b; kVec > 1 wants aligned vectors, side by side.
template <class T, int kVec>
__device__ __forceinline__ void read(const Samples& s, int64_t b, int64_t e, float (&out)[kVec]) {
    const T* p = static_cast<const T*>(s.data) + b * s.sample;
    load(p + (kVec > 1 || s.straight ? e : s.inner.offset(e)), out);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) solve(const __grid_constant__ Device d) {
    __shared__ float k[kMaxWidth];
    const int64_t b = blockIdx.x / d.blocks;
    const int64_t e = ((blockIdx.x - b * d.blocks) * kThreads + threadIdx.x) * kVec;
    if (threadIdx.x < d.width) {
        const int64_t step = *d.step;
        const bool valid = step >= 0 && step < d.table;
        k[threadIdx.x] = valid ? d.coef[step * d.coef_step + b * d.coef_sample + threadIdx.x * d.coef_column] : NAN;
    }
    __syncthreads();
    if (e >= d.elements) return;

    float p[kMaxOutputs][kVec], u[kMaxTerms][kVec];
#pragma unroll
    for (int g = 0; g < kMaxOutputs; ++g)
        if (g < d.outputs) read<T>(d.output[g], b, e, p[g]);
#pragma unroll
    for (int t = 0; t < kMaxTerms; ++t)
        if (t < d.terms) read<float>(d.term[t], b, e, u[t]);

    const int rest = d.two_rows ? d.outputs : 0;
    const float* const after = k + d.outputs + rest;
    float m[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) m[i] = after[0] * u[0][i];
#pragma unroll
    for (int g = 0; g < kMaxOutputs; ++g) {
        if (g >= d.outputs) break;
        const float first = k[g], second = k[g + rest];
#pragma unroll
        for (int i = 0; i < kVec; ++i) m[i] = fmaf(e + i < d.guided ? first : second, p[g][i], m[i]);
    }
    const float lo = after[1], hi = after[2];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {  // comparisons as torch.clamp: a NaN in m stays, a NaN bound spreads
        m[i] = m[i] < lo ? lo : m[i];
        m[i] = m[i] > hi ? hi : m[i];
        m[i] = lo != lo || hi != hi ? NAN : m[i];
    }
#pragma unroll
    for (int j = 0; j < kMaxResults; ++j) {
        if (j >= d.results) break;
        const float* const c = after + 3 + j * (1 + d.terms);
        float y[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) y[i] = c[0] * m[i];
#pragma unroll
        for (int t = 0; t < kMaxTerms; ++t) {
            if (t >= d.terms) break;
#pragma unroll
            for (int i = 0; i < kVec; ++i) y[i] = fmaf(c[1 + t], u[t][i], y[i]);
        }
        store(d.result[j] + b * d.elements + e, y);
    }
}

Samples samples(const View& t) {
    Samples s{};
    s.data = t.data;
    s.sample = t.stride[0];
    s.straight = t.contiguous(1);
    for (int k = 1; k < t.ndim; ++k)
        if (t.shape[k] != 1) s.inner.push(t.shape[k], t.stride[k]);
    return s;
}

bool whole_vectors(const View& t, int64_t elements) {
    const bool aligned = reinterpret_cast<uintptr_t>(t.data) % (kVector * size_of(t.dtype)) == 0;
    return aligned && t.contiguous(1) && elements % kVector == 0 && (t.shape[0] == 1 || t.stride[0] % kVector == 0);
}

Refusal solver_step(Stream stream, Views results, Views outputs, View x, Views history, View coef, View step, Optional noise,
                    int64_t results_count, int64_t guided_channels) {
    SolverCall c{};
    if (Refusal why = describe(c, results, outputs, x, history, coef, step, noise, results_count, guided_channels)) return why;
    Device d{};
    d.elements = c.elements;
    bool vectors = true;
    for (int g = 0; g < c.outputs; ++g) {
        d.output[g] = samples(c.output[g]);
        vectors = vectors && whole_vectors(c.output[g], c.elements);
    }
    for (int t = 0; t < c.terms; ++t) {
        d.term[t] = samples(c.term[t]);
        vectors = vectors && whole_vectors(c.term[t], c.elements);
    }
    for (int j = 0; j < c.results; ++j) {
        d.result[j] = static_cast<float*>(c.result[j].data);
        vectors = vectors && whole_vectors(c.result[j], c.elements);
    }
    const int64_t per_block = kThreads * (vectors ? kVector : 1);
    d.blocks = (c.elements + per_block - 1) / per_block;
    const int64_t blocks = c.batch * d.blocks;
    if (blocks == 0) return nullptr;
    if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
    d.coef = c.coef;
    d.step = static_cast<const int32_t*>(step.data);
    d.table = coef.shape[0];
    d.coef_step = coef.stride[0];
    d.coef_sample = c.coef_sample;
    d.coef_column = c.coef_column;
    d.guided = c.guided;
    d.outputs = c.outputs, d.terms = c.terms, d.results = c.results;
    d.width = static_cast<int32_t>(coef.shape[2]);
    d.two_rows = c.two_rows;
    return for_dtype(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        if (vectors)
            solve<T, kVector><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(d);
        else
            solve<T, 1><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(d);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::solver_step;
DK_ENTRY(solver_step, "out outputs x history coef step noise results guided_channels")
