// m = clamp(sum_g A_g p_g + a x, lo, hi);  y_j = c_j m + d_j x + sum_k h_jk u_k + s_j noise
//
// Idea: every tensor is read once and every result written once; a sample is cut into blocks, and within a block four
// vectors at a time stay in registers through both affine maps, whatever the counts of tensors are. A tensor that is not
// contiguous within a sample is gathered block by block into L1 first.
// Takes: model outputs float32, float16 or bfloat16, alike; the rest float32; any strides; coef [T, B or 1, K].
// Floor: one walk a tensor. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/solver_step.cpp
#include "../broadcast.h"
#include "../dispatch.h"
#include "../solver.h"
#include "parallel.h"
#include "simd.h"

namespace dk {
namespace {

constexpr int kBlock = 1024;
constexpr int kUnroll = 4;
constexpr int64_t kStreamBytes = 4 << 20;       // results above this, together, go past the caches
constexpr int64_t kSerialElements = 16 * 1024;  // work below this is not worth a second thread

// Elements [begin, begin + n) of sample b as a contiguous run: where they lie, or copied to `buffer`.
template <class T>
const T* run_of(const View& t, int64_t b, int64_t begin, int64_t n, T* buffer) {
    const T* sample = static_cast<const T*>(t.data) + b * t.stride[0];
    if (t.contiguous(1)) return sample + begin;
    int64_t index[kMaxDims];
    for (int64_t k = t.ndim - 1, i = begin; k > 0; --k) {
        index[k] = i % t.shape[k];
        i /= t.shape[k];
    }
    int64_t at = 0;
    for (int k = 1; k < t.ndim; ++k) at += index[k] * t.stride[k];
    for (int64_t i = 0; i < n; ++i) {
        buffer[i] = sample[at];
        for (int k = t.ndim - 1; k > 0; --k) {
            at += t.stride[k];
            if (++index[k] < t.shape[k]) break;
            at -= t.shape[k] * t.stride[k];
            index[k] = 0;
        }
    }
    return buffer;
}

template <class T>
struct Block {
    const T* outputs[kMaxOutputs];
    const float* terms[kMaxTerms];  // x, history, noise
    float* results[kMaxResults];
};

// kCount vectors from element i on; `load_` and `store_` say how a vector meets memory.
template <int kCount, class T, class Load, class Store>
DK_INLINE void step_at(const SolverCall& c, const Coefficients& k, const float* a, const Block<T>& block, int64_t i, Load load_,
                       Store store_) {
    F m[kCount], y[kCount];
    const F ax = splat(k.x), lo = splat(k.lo), hi = splat(k.hi);
    for (int v = 0; v < kCount; ++v) m[v] = ax * load_(block.terms[0] + i + v * kLanes);
    for (int g = 0; g < c.outputs; ++g) {
        const F weight = splat(a[g]);
        for (int v = 0; v < kCount; ++v) m[v] = fma(weight, load_(block.outputs[g] + i + v * kLanes), m[v]);
    }
    for (int v = 0; v < kCount; ++v) {  // comparisons as torch.clamp: a NaN in m stays, a NaN bound spreads
        m[v] = choose(m[v] < lo, lo, m[v]);
        m[v] = choose(m[v] > hi, hi, m[v]);
        m[v] = choose((lo != lo) | (hi != hi), lo + hi, m[v]);
    }
    for (int j = 0; j < c.results; ++j) {
        const F weight = splat(k.m[j]);
        for (int v = 0; v < kCount; ++v) y[v] = weight * m[v];
        for (int t = 0; t < c.terms; ++t) {
            const F w = splat(k.term[j][t]);
            for (int v = 0; v < kCount; ++v) y[v] = fma(w, load_(block.terms[t] + i + v * kLanes), y[v]);
        }
        for (int v = 0; v < kCount; ++v) store_(block.results[j] + i + v * kLanes, y[v]);
    }
}

template <class T>
void step_range(const SolverCall& c, const Coefficients& k, const float* a, const Block<T>& block, int64_t begin, int64_t end,
                bool streaming) {
    const auto get = [](const auto* p) __attribute__((always_inline)) { return load(p); };
    const auto put = [](float* p, F v) __attribute__((always_inline)) { store(p, v); };
    const auto past = [](float* p, F v) __attribute__((always_inline)) { stream(p, v); };
    int64_t i = begin;
    if (streaming)
        for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) step_at<kUnroll>(c, k, a, block, i, get, past);
    else
        for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) step_at<kUnroll>(c, k, a, block, i, get, put);
    for (; i + kLanes <= end; i += kLanes) step_at<1>(c, k, a, block, i, get, put);
    if (i < end) {
        const int n = static_cast<int>(end - i);
        step_at<1>(
            c, k, a, block, i, [n](const auto* p) __attribute__((always_inline)) { return load(p, n); },
            [n](float* p, F v) __attribute__((always_inline)) { store(p, v, n); });
    }
}

template <class T>
void step_blocks(const SolverCall& c, bool stream_results, int64_t first, int64_t last) {
    T gathered[kMaxOutputs][kBlock];
    float copied[kMaxTerms][kBlock];
    Coefficients k;
    const int64_t blocks = (c.elements + kBlock - 1) / kBlock;
    int64_t loaded = -1;
    for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / blocks, begin = (item - b * blocks) * kBlock;
        const int64_t n = c.elements - begin < kBlock ? c.elements - begin : kBlock;
        if (b != loaded) k = coefficients(c, b), loaded = b;
        Block<T> block;
        for (int g = 0; g < c.outputs; ++g) block.outputs[g] = run_of(c.output[g], b, begin, n, gathered[g]);
        for (int t = 0; t < c.terms; ++t) block.terms[t] = run_of(c.term[t], b, begin, n, copied[t]);
        bool streaming = stream_results;
        for (int j = 0; j < c.results; ++j) {
            block.results[j] = static_cast<float*>(c.result[j].data) + b * c.elements + begin;
            streaming = streaming && streamable(block.results[j]);
        }
        int64_t split = c.guided - begin;  // before it the first row of A, from it on the second
        split = split < 0 ? 0 : split > n ? n : split;
        step_range(c, k, k.a, block, 0, split, streaming);
        step_range(c, k, k.rest, block, split, n, streaming && split == 0);
    }
    if (stream_results) stream_fence();
}

Refusal solver_step(Stream, Views results, Views outputs, View x, Views history, View coef, View step, Optional noise,
                    int64_t results_count, int64_t guided_channels) {
    SolverCall c{};
    if (Refusal why = describe(c, results, outputs, x, history, coef, step, noise, results_count, guided_channels)) return why;
    const int64_t at = *static_cast<const int32_t*>(step.data);
    if (at < 0 || at >= coef.shape[0]) return "step: not a row of coef";
    c.coef += at * coef.stride[0];
    const int64_t items = c.batch * ((c.elements + kBlock - 1) / kBlock);
    if (items == 0) return nullptr;
    const bool streaming = x.numel() * c.results * static_cast<int64_t>(sizeof(float)) > kStreamBytes;
    return for_dtype(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        auto body = [&](int64_t first, int64_t last) { step_blocks<T>(c, streaming, first, last); };
        parallel_for(items, kSerialElements / kBlock, body);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::solver_step;
DK_ENTRY(solver_step, "out outputs x history coef step noise results guided_channels")
