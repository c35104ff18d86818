// mean((t_i - mean t_i) (t_j - mean t_j)) over the elements of every sample
//
// Idea: one read. A block of 1024 elements is centred about its own mean while it lies in L1, and blocks are merged in float64
// by Chan's formula, so nothing cancels; differences from the block's first element make a constant sample's variance an exact
// zero. Parts of a sample are cut by its shape alone and merged in order: threads change nothing.
// Takes: 1 to 4 tensors float32, float16 or bfloat16, alike, any strides.
// Floor: one walk a tensor. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/row_covariance.cpp
#include "../dispatch.h"
#include "parallel.h"
#include "samples.h"

namespace dk {
namespace {

constexpr int kMost = 4, kBlock = 1024;
constexpr int64_t kPart = 16 * kBlock;
constexpr int kFlush = 8;  // vectors that are added up in float32

// Of n elements: the means, and the sums of products about them.
struct Moments {
    double n, mean[kMost], product[kMost][kMost];
};

DK_INLINE void merge(Moments& into, const Moments& more, int count) {
    const double n = into.n + more.n;
    if (more.n == 0) return;
    double apart[kMost];
    for (int i = 0; i < count; ++i) apart[i] = more.mean[i] - into.mean[i];
    for (int i = 0; i < count; ++i)
        for (int j = 0; j < count; ++j) into.product[i][j] += more.product[i][j] + apart[i] * apart[j] * (into.n * more.n / n);
    for (int i = 0; i < count; ++i) into.mean[i] += apart[i] * (more.n / n);
    into.n = n;
}

template <class T>
DK_INLINE F shifted(const T* p, int64_t i, int64_t n, F from) {
    return n - i >= kLanes ? load(p + i) - from : first(load(p + i, static_cast<int>(n - i)) - from, static_cast<int>(n - i));
}

template <int count, class T>
Moments moments_of(const T* const* tensors, int64_t n) {
    Moments block{};
    block.n = static_cast<double>(n);
    F from[kMost], middle[kMost];
    for (int t = 0; t < count; ++t) {
        const T head[1] = {tensors[t][0]};
        from[t] = splat(load(head, 1)[0]);
        double sum_of = 0;
        for (int64_t i = 0; i < n; i += kFlush * kLanes) {
            F s{};
            const int64_t end = n - i < kFlush * kLanes ? n : i + kFlush * kLanes;
            for (int64_t v = i; v < end; v += kLanes) s += shifted(tensors[t], v, n, from[t]);
            sum_of += sum(s);
        }
        const float mean = static_cast<float>(sum_of / block.n);
        block.mean[t] = static_cast<double>(from[t][0]) + mean;
        middle[t] = splat(mean);
    }
    // products about `mean`, which rounding left a little off the mean: what is left of the sums goes off again
    double off[kMost] = {};
    for (int64_t i = 0; i < n; i += kFlush * kLanes) {
        const int64_t end = n - i < kFlush * kLanes ? n : i + kFlush * kLanes;
        F sums[count] = {}, products[count][count] = {};
        const auto add = [&](const F(&d)[count]) __attribute__((always_inline)) {
            for (int t = 0; t < count; ++t) {
                sums[t] += d[t];
                for (int u = 0; u <= t; ++u) products[t][u] = fma(d[t], d[u], products[t][u]);
            }
        };
        F d[count];
        int64_t v = i;
        for (; v + kLanes <= end; v += kLanes) {
            for (int t = 0; t < count; ++t) d[t] = load(tensors[t] + v) - from[t] - middle[t];
            add(d);
        }
        if (v < end) {
            const int lanes = static_cast<int>(end - v);
            for (int t = 0; t < count; ++t) d[t] = first(shifted(tensors[t], v, n, from[t]) - middle[t], lanes);
            add(d);
        }
        for (int t = 0; t < count; ++t) {
            off[t] += sum(sums[t]);
            for (int u = 0; u <= t; ++u) block.product[t][u] += sum(products[t][u]);
        }
    }
    for (int t = 0; t < count; ++t)
        for (int u = 0; u <= t; ++u) {
            block.product[t][u] -= off[t] * off[u] / block.n;
            block.product[u][t] = block.product[t][u];
        }
    for (int t = 0; t < count; ++t) block.mean[t] += off[t] / block.n;
    return block;
}

int64_t parts_of(const View& t) { return (elements_of(t) + kPart - 1) / kPart; }

int64_t bytes(Stream, View, Views tensors) {
    const bool none = tensors.count < 1 || tensors[0].ndim < 1;
    return none ? 0 : tensors[0].shape[0] * parts_of(tensors[0]) * static_cast<int64_t>(sizeof(Moments));
}

Refusal row_covariance(Stream stream, View out, Views tensors) {
    if (tensors.count < 1 || tensors.count > kMost) return "tensors: not 1 to 4";
    const View& x = tensors[0];
    if (x.ndim < 1 || x.ndim > kMaxDims) return "tensors: no dimension, or more than 8";
    for (int t = 1; t < tensors.count; ++t)
        if (!tensors[t].same_shape(x) || tensors[t].dtype != x.dtype) return "tensors: not alike";
    const int count = static_cast<int>(tensors.count);
    const int64_t batch = x.shape[0], elements = elements_of(x), parts = parts_of(x);
    if (out.dtype != DType::f32 || !out.contiguous() || out.numel() != batch * count * count)
        return "out: not float32 [B, K, K]";
    if (elements == 0) return "tensors: no elements";
    Moments* const found = static_cast<Moments*>(stream.scratch);
    return for_value(Floats{}, x.dtype, "tensors: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto block = count == 1   ? moments_of<1, T>
                           : count == 2 ? moments_of<2, T>
                           : count == 3 ? moments_of<3, T>
                                        : moments_of<4, T>;
        auto look = [&](int64_t first, int64_t last) {
            T gathered[kMost][kBlock];
            for (int64_t item = first; item < last; ++item) {
                const int64_t b = item / parts, begin = (item - b * parts) * kPart;
                const int64_t end = elements - begin < kPart ? elements : begin + kPart;
                Moments all{};
                for (int64_t at = begin; at < end; at += kBlock) {
                    const int64_t n = end - at < kBlock ? end - at : kBlock;
                    const T* runs[kMost];
                    for (int t = 0; t < count; ++t) runs[t] = run_of(tensors[t], b, at, n, gathered[t]);
                    merge(all, block(runs, n), count);
                }
                found[item] = all;
            }
        };
        parallel_for(batch * parts, 1, look);
        for (int64_t b = 0; b < batch; ++b) {
            Moments all = found[b * parts];
            for (int64_t i = 1; i < parts; ++i) merge(all, found[b * parts + i], count);
            float* const y = static_cast<float*>(out.data) + b * count * count;
            for (int i = 0; i < count; ++i)
                for (int j = 0; j < count; ++j) y[i * count + j] = static_cast<float>(all.product[i][j] / all.n);
        }
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::row_covariance;
DK_ENTRY_WITH_SCRATCH(row_covariance, "out tensors", dk::bytes)
