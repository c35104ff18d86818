// m = map(sum_g A_g p_g + a x + s z_0);  y_j = c_j m + d_j x + sum_k h_jk u_k + s_j z_(1+j)
//
// Idea: every tensor is read once and every result written once; a sample is cut into blocks, and within a block four
// vectors at a time stay in registers through both affine maps, whatever the counts of tensors are. What is not contiguous
// within a sample is gathered, and noise is made, block by block into L1 first; there too the copies for the model are made.
// Takes: model outputs float32, float16 or bfloat16, alike; the rest float32; any strides; coef [T, B or 1, K].
// Floor: one walk a tensor. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/solver_step.cpp
#include "../dispatch.h"
#include "../solver.h"
#include "noise.h"
#include "parallel.h"
#include "samples.h"

namespace dk {
namespace {

constexpr int kBlock = kRun;
constexpr int kUnroll = 4;
constexpr int64_t kStreamBytes = 4 << 20;       // results above this, together, go past the caches
constexpr int64_t kSerialElements = 16 * 1024;  // work below this is not worth a second thread

// What a step reads and writes of one block; z[0] is the noise before the map, z[1 + j] that of result j.
template <class T>
struct Block {
    const T* outputs[kMaxOutputs];
    const float* terms[kMaxTerms];  // x, history
    const float *mask, *known;      // nullptr: none
    const float* z[1 + kMaxResults];
    float* results[kMaxResults];
};

// kCount vectors from element i on; `load_` and `store_` say how a vector meets memory. Returns where m was not finite.
template <int kCount, class T, class Load, class Store>
DK_INLINE I step_at(const SolverCall& c, const Coefficients& k, const float* a, const Block<T>& block, int64_t i, Load load_,
                    Store store_) {
    F m[kCount], y[kCount];
    I bad{};
    const F ax = splat(k.x), lo = splat(k.lo), hi = splat(k.hi);
    for (int v = 0; v < kCount; ++v) m[v] = ax * load_(block.terms[0] + i + v * kLanes);
    for (int g = 0; g < c.outputs; ++g) {
        const F weight = splat(a[g]);
        for (int v = 0; v < kCount; ++v) m[v] = fma(weight, load_(block.outputs[g] + i + v * kLanes), m[v]);
    }
    if (block.z[0])
        for (int v = 0; v < kCount; ++v) m[v] = fma(splat(k.noise), load_(block.z[0] + i + v * kLanes), m[v]);
    if (c.watch)
        for (int v = 0; v < kCount; ++v) bad |= m[v] - m[v] != F{};
    for (int v = 0; v < kCount; ++v) {  // comparisons as torch.clamp: a NaN in m stays, a NaN bound spreads
        m[v] = choose(m[v] < lo, lo, m[v]);
        m[v] = choose(m[v] > hi, hi, m[v]);
        m[v] = choose((lo != lo) | (hi != hi), lo + hi, m[v]);
    }
    if (c.bound)
        for (int v = 0; v < kCount; ++v) m[v] = m[v] / splat(k.reach);
    if (block.mask)
        for (int v = 0; v < kCount; ++v) {
            const F share = splat(k.share) * load_(block.mask + i + v * kLanes);
            m[v] = fma(splat(1) - share, m[v], share * load_(block.known + i + v * kLanes));
        }
    for (int j = 0; j < c.results; ++j) {
        const F weight = splat(k.m[j]);
        for (int v = 0; v < kCount; ++v) y[v] = weight * m[v];
        for (int t = 0; t < c.terms; ++t) {
            const F w = splat(k.term[j][t]);
            for (int v = 0; v < kCount; ++v) y[v] = fma(w, load_(block.terms[t] + i + v * kLanes), y[v]);
        }
        if (block.z[1 + j])
            for (int v = 0; v < kCount; ++v) y[v] = fma(splat(k.added[j]), load_(block.z[1 + j] + i + v * kLanes), y[v]);
        for (int v = 0; v < kCount; ++v) store_(block.results[j] + i + v * kLanes, y[v]);
    }
    return bad;
}

// Whether m was anywhere not finite.
template <class T>
bool step_range(const SolverCall& c, const Coefficients& k, const float* a, const Block<T>& block, int64_t begin, int64_t end,
                bool streaming) {
    const auto get = [](const auto* p) __attribute__((always_inline)) { return load(p); };
    const auto put = [](float* p, F v) __attribute__((always_inline)) { store(p, v); };
    const auto past = [](float* p, F v) __attribute__((always_inline)) { stream(p, v); };
    int64_t i = begin;
    I bad{};
    if (streaming)
        for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) bad |= step_at<kUnroll>(c, k, a, block, i, get, past);
    else
        for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) bad |= step_at<kUnroll>(c, k, a, block, i, get, put);
    for (; i + kLanes <= end; i += kLanes) bad |= step_at<1>(c, k, a, block, i, get, put);
    if (i < end) {
        const int n = static_cast<int>(end - i);
        bad |= step_at<1>(
            c, k, a, block, i, [n](const auto* p) __attribute__((always_inline)) { return load(p, n); },
            [n](float* p, F v) __attribute__((always_inline)) { store(p, v, n); });
    }
    return any(bad);
}

// factor y, in the copy's dtype, `copies` times.
template <class T>
void copy_run(const SolverCall& c, float factor, const float* y, int64_t b, int64_t begin, int64_t n, T) {
    for (int64_t n_copy = 0; n_copy < c.copies; ++n_copy) {
        T* to = static_cast<T*>(c.copy.data) + (n_copy * c.batch + b) * c.elements + begin;
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(to + i, quiet(splat(factor) * load(y + i)));
        if (i < n) store(to + i, quiet(splat(factor) * load(y + i, static_cast<int>(n - i))), static_cast<int>(n - i));
    }
}

template <class T>
void step_blocks(const SolverCall& c, int64_t step, bool stream_results, int64_t first, int64_t last) {
    T gathered[kMaxOutputs][kBlock];
    float copied[kMaxTerms + 2][kBlock];
    alignas(64) float noise[1 + kMaxResults][kBlock];
    Coefficients k;
    const int64_t blocks = (c.elements + kBlock - 1) / kBlock;
    int64_t loaded = -1;
    for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / blocks, begin = (item - b * blocks) * kBlock;
        const int64_t n = c.elements - begin < kBlock ? c.elements - begin : kBlock;
        if (b != loaded) k = coefficients(c, b), loaded = b;
        Block<T> block{};
        for (int g = 0; g < c.outputs; ++g) block.outputs[g] = run_of(c.output[g], b, begin, n, gathered[g]);
        for (int t = 0; t < c.terms; ++t) block.terms[t] = run_of(c.term[t], b, begin, n, copied[t]);
        if (c.mask) {
            block.mask = run_of(c.mask, b, begin, n, copied[kMaxTerms]);
            block.known = run_of(c.known, b, begin, n, copied[kMaxTerms + 1]);
        }
        for (int slot = 0; c.seed && slot <= c.results; ++slot)
            if ((slot ? k.added[slot - 1] : k.noise) != 0) {
                normal_run(noise[slot], c.seed[b * c.seed_sample], step, slot, begin, n);
                block.z[slot] = noise[slot];
            }
        bool streaming = stream_results;
        for (int j = 0; j < c.results; ++j) {
            block.results[j] = static_cast<float*>(c.result[j].data) + b * c.elements + begin;
            streaming = streaming && streamable(block.results[j]);
        }
        int64_t split = c.guided - begin;  // before it the first row of A, from it on the second
        split = split < 0 ? 0 : split > n ? n : split;
        bool bad = step_range(c, k, k.a, block, 0, split, streaming);
        bad |= step_range(c, k, k.rest, block, split, n, streaming && split == 0);
        if (c.watch) static_cast<float*>(c.flags.data)[item] = bad;
        if (c.copies && c.copy.dtype == DType::f32) copy_run(c, k.copy, block.results[0], b, begin, n, float{});
        if (c.copies && c.copy.dtype == DType::f16) copy_run(c, k.copy, block.results[0], b, begin, n, f16{});
        if (c.copies && c.copy.dtype == DType::bf16) copy_run(c, k.copy, block.results[0], b, begin, n, bf16{});
    }
    if (stream_results) stream_fence();
}

Refusal solver_step(Stream, Views out, Views outputs, View x, Views history, View coef, View step, Optional seed, Optional gain,
                    Optional bound, Optional mask, Optional known, int64_t results, int64_t guided_channels, int64_t copies,
                    Text copy_dtype, bool watch) {
    SolverCall c{};
    if (Refusal why = describe(c, out, outputs, x, history, coef, step, seed, gain, bound, mask, known, results,
                               guided_channels, copies, copy_dtype, watch))
        return why;
    const int64_t at = *static_cast<const int32_t*>(step.data);
    if (at < 0 || at >= coef.shape[0]) return "step: not a row of coef";
    c.coef += at * coef.stride[0];
    const int64_t items = c.batch * ((c.elements + kBlock - 1) / kBlock);
    if (items == 0) return nullptr;
    // what is copied is read again
    const bool streaming = !copies && x.numel() * c.results * static_cast<int64_t>(sizeof(float)) > kStreamBytes;
    return for_value(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        auto body = [&](int64_t first, int64_t last) { step_blocks<T>(c, at, streaming, first, last); };
        parallel_for(items, kSerialElements / kBlock, body);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::solver_step;
DK_ENTRY(solver_step,
         "out outputs x history coef step seed gain bound mask known results guided_channels copies copy_dtype watch")
