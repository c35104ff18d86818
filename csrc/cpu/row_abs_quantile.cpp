// The q-quantile of |m| in every sample, m = gain sum_g A_g p_g + a x
//
// Idea: positive floats are ordered as their bits are, so the order statistic is found by three histograms, of 11, 10 and
// 10 bits, each of the elements that share the bits found so far; m is made anew for each and never written. The next one
// up lies in the last histogram or is the least of what lies above it. Counts are exact: threads change nothing.
// Takes: outputs float32, float16 or bfloat16, alike; the rest float32; any strides; q in [0, 1].
// Floor: three walks of outputs and x, from L2 where a sample fits. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native
// -Icsrc -c csrc/cpu/row_abs_quantile.cpp
#include "../dispatch.h"
#include "../solver.h"
#include "parallel.h"
#include "samples.h"

namespace dk {
namespace {

constexpr int kBlock = 1024, kUnroll = 4;
constexpr int64_t kChunk = 16 * kBlock;                              // elements of a sample that a thread takes at a time
constexpr int kLevels = 3, kBits[] = {11, 10, 10}, kBins = 1 << 11;  // of the 31 that |m| has
constexpr int kShift[] = {20, 10, 0};
constexpr uint32_t kInfinity = 0x7f800000u, kNone = 0xffffffffu;

// What a walk over some of a sample's elements finds.
struct Found {
    uint32_t count[kBins];
    uint32_t above;  // the least |m| with more in the bits found so far, in the last walk
};

// What is known of a sample: the leading bits of its order statistic, and its rank among the elements that share them.
struct Search {
    uint32_t bits;
    int64_t rank;
    float value;
};

// m of kCount vectors from element i on; `load_` says how a vector is read.
template <int kCount, class T, class Load, class Use>
DK_INLINE void magnitudes(const Mix& c, const float* a, float ax, const T* const* outputs, const float* x, int64_t i, int lanes,
                          Load load_, Use use) {
    F m[kCount];
    for (int v = 0; v < kCount; ++v) m[v] = splat(ax) * load_(x + i + v * kLanes);
    for (int g = 0; g < c.outputs; ++g) {
        const F weight = splat(a[g]);
        for (int v = 0; v < kCount; ++v) m[v] = fma(weight, load_(outputs[g] + i + v * kLanes), m[v]);
    }
    for (int v = 0; v < kCount; ++v) use(bit_cast<U>(m[v]) & 0x7fffffffu, lanes);
}

// use(bits of |m|, how many of the vector's lanes are elements) for elements [begin, end) of sample b.
template <class T, class Use>
DK_INLINE void walk(const Mix& c, const Head& k, int64_t b, int64_t begin, int64_t end, Use use) {
    T gathered[kMaxOutputs][kBlock];
    float copied[kBlock];
    for (; begin < end; begin += kBlock) {
        const int64_t n = end - begin < kBlock ? end - begin : kBlock;
        const T* outputs[kMaxOutputs];
        for (int g = 0; g < c.outputs; ++g) outputs[g] = run_of(c.output[g], b, begin, n, gathered[g]);
        const float* const x = run_of(c.x, b, begin, n, copied);
        int64_t split = c.guided - begin;
        split = split < 0 ? 0 : split > n ? n : split;
        const auto get = [](const auto* p) __attribute__((always_inline)) { return load(p); };
        int64_t i = 0;
        for (const int64_t stop : {split, n}) {
            const float* const a = i < split ? k.a : k.rest;
            for (; i + kUnroll * kLanes <= stop; i += kUnroll * kLanes)
                magnitudes<kUnroll>(c, a, k.x, outputs, x, i, kLanes, get, use);
            while (i < stop) {
                const int lanes = stop - i < kLanes ? static_cast<int>(stop - i) : kLanes;
                const auto some = [lanes](const auto* p) __attribute__((always_inline)) { return load(p, lanes); };
                magnitudes<1>(c, a, k.x, outputs, x, i, lanes, some, use);
                i += lanes;
            }
        }
    }
}

template <class T>
void first_walk(const Mix& c, const Head& k, int64_t b, int64_t begin, int64_t end, Found& found) {
    uint32_t odd[kBins] = {};  // two histograms: the same bin twice in a row would wait for itself
    walk<T>(c, k, b, begin, end, [&](U bits, int lanes) __attribute__((always_inline)) {
        uint32_t bin[kLanes];
        const U top = bits >> kShift[0];
        std::memcpy(bin, &top, sizeof bin);
        if (lanes == kLanes)
            for (int i = 0; i < kLanes; i += 2) ++found.count[bin[i]], ++odd[bin[i + 1]];
        else
            for (int i = 0; i < lanes; ++i) ++found.count[bin[i]];
    });
    for (int i = 0; i < kBins; ++i) found.count[i] += odd[i];
}

// Asked only where a histogram says that something is infinite or worse.
template <class T>
bool has_nan(const Mix& c, int64_t b) {
    Head k;
    head_of(c, b, k);
    I nan{};
    walk<T>(c, k, b, 0, c.elements, [&](U bits, int) __attribute__((always_inline)) { nan |= bits > kInfinity; });
    return any(nan);
}

template <class T>
void later_walk(const Mix& c, const Head& k, int64_t b, int64_t begin, int64_t end, uint32_t prefix, int level, Found& found) {
    const int shift = kShift[level - 1];
    U above = U{} + kNone;
    I lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    walk<T>(c, k, b, begin, end, [&](U bits, int lanes) __attribute__((always_inline)) {
        const I real = lane < lanes;
        const U top = bits >> shift;
        const I match = (top == prefix) & real;
        if (level == 2) {
            const U candidate = ((top > prefix) & real) ? bits : U{} + kNone;
            above = candidate < above ? candidate : above;
        }
        if (any(match))  // rare: a bin of the first walk is an eighth of an octave
            for (int i = 0; i < kLanes; ++i)
                if (match[i]) ++found.count[(bits[i] >> kShift[level]) & ((1u << kBits[level]) - 1)];
    });
    for (int i = 0; i < kLanes; ++i) found.above = above[i] < found.above ? above[i] : found.above;
}

// The bin that holds the rank; returns the least filled one after it, or -1.
DK_INLINE int descend(Search& s, const uint32_t* count, int level) {
    const int bins = 1 << kBits[level];
    int bin = 0;
    while (bin < bins - 1 && s.rank >= count[bin]) s.rank -= count[bin++];
    s.bits = s.bits << kBits[level] | static_cast<uint32_t>(bin);
    if (s.rank + 1 < count[bin]) return bin;
    for (int next = bin + 1; next < bins; ++next)
        if (count[next]) return next;
    return -1;
}

// The order statistic and the next one up are known: the point between them.
DK_INLINE void finish(Search& s, int next, uint32_t above, double fraction) {
    const uint32_t low = (1u << kBits[2]) - 1;
    const float below = bit_cast<float>(s.bits);
    const float upper = bit_cast<float>(next >= 0 ? (s.bits & ~low) | static_cast<uint32_t>(next) : above);
    s.value = fraction == 0 || below == upper ? below : below + static_cast<float>(fraction) * (upper - below);
}

template <class T>
void look(const Mix& c, int64_t b, int64_t begin, int64_t end, int level, const Search& s, Found& found) {
    std::memset(found.count, 0, sizeof found.count);
    found.above = kNone;
    Head k;
    head_of(c, b, k);
    if (level == 0)
        first_walk<T>(c, k, b, begin, end, found);
    else
        later_walk<T>(c, k, b, begin, end, s.bits, level, found);
}

// A level further down, by what was found in the whole sample.
template <class T>
void go_down(const Mix& c, int64_t b, int level, double fraction, const Found& sum, Search& s) {
    uint32_t huge = 0;
    for (uint32_t bin = kInfinity >> kShift[0]; level == 0 && bin < kBins; ++bin) huge += sum.count[bin];
    const int next = descend(s, sum.count, level);
    if (level == 0) s.value = huge && has_nan<T>(c, b) ? __builtin_nanf("") : 0;
    if (level == 2 && s.value == s.value) finish(s, next, sum.above, fraction);
}

// Samples of one chunk, each by one thread.
template <class T>
void short_samples(const Mix& c, int64_t rank, double fraction, float* out) {
    auto body = [&](int64_t first, int64_t last) {
        Found found;
        for (int64_t b = first; b < last; ++b) {
            Search s{0, rank, 0};
            for (int level = 0; level < kLevels; ++level) {
                look<T>(c, b, 0, c.elements, level, s, found);
                go_down<T>(c, b, level, fraction, found, s);
            }
            out[b] = s.value;
        }
    };
    parallel_for(c.batch, 1, body);
}

// Longer ones level by level, each chunk by itself.
template <class T>
void long_samples(const Mix& c, int64_t chunks, int64_t rank, double fraction, Found* all, Search* searches, float* out) {
    for (int64_t b = 0; b < c.batch; ++b) searches[b] = {0, rank, 0};
    for (int level = 0; level < kLevels; ++level) {
        auto each = [&](int64_t first, int64_t last) {
            for (int64_t item = first; item < last; ++item) {
                const int64_t b = item / chunks, begin = (item - b * chunks) * kChunk;
                const int64_t end = c.elements - begin < kChunk ? c.elements : begin + kChunk;
                look<T>(c, b, begin, end, level, searches[b], all[item]);
            }
        };
        parallel_for(c.batch * chunks, 1, each);
        auto choose = [&](int64_t first, int64_t last) {
            for (int64_t b = first; b < last; ++b) {
                Found& sum = all[b * chunks];
                for (int64_t i = 1; i < chunks; ++i) {
                    const Found& more = all[b * chunks + i];
                    for (int bin = 0; bin < kBins; ++bin) sum.count[bin] += more.count[bin];
                    sum.above = more.above < sum.above ? more.above : sum.above;
                }
                go_down<T>(c, b, level, fraction, sum, searches[b]);
                out[b] = searches[b].value;
            }
        };
        parallel_for(c.batch, 1, choose);
    }
}

int64_t chunks_of(const View& x) { return (elements_of(x) + kChunk - 1) / kChunk; }

int64_t bytes(Stream, View, Views, View x, View, View, Optional, double, int64_t) {
    if (x.ndim < 1 || chunks_of(x) <= 1) return 0;
    return x.shape[0] * static_cast<int64_t>(chunks_of(x) * sizeof(Found) + sizeof(Search));
}

Refusal row_abs_quantile(Stream stream, View out, Views outputs, View x, View coef, View step, Optional gain, double q,
                         int64_t guided_channels) {
    Mix c{};
    if (Refusal why = describe(c, outputs, x, coef, step, gain, guided_channels)) return why;
    if (!per_sample(out, c.batch, DType::f32) || !out.contiguous()) return "out: not contiguous float32 [B]";
    if (!(q >= 0 && q <= 1) || c.elements == 0) return "q: not 0 to 1, or no elements";
    const int64_t at = *static_cast<const int32_t*>(step.data);
    if (at < 0 || at >= coef.shape[0]) return "step: not a row of coef";
    c.coef += at * coef.stride[0];
    if (c.batch == 0) return nullptr;
    const int64_t chunks = chunks_of(x);
    const double place = q * static_cast<double>(c.elements - 1);
    const int64_t rank = static_cast<int64_t>(place);
    const double fraction = place - static_cast<double>(rank);
    float* const y = static_cast<float*>(out.data);
    return for_value(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        Found* const found = static_cast<Found*>(stream.scratch);
        if (chunks == 1)
            short_samples<T>(c, rank, fraction, y);
        else
            long_samples<T>(c, chunks, rank, fraction, found, reinterpret_cast<Search*>(found + c.batch * chunks), y);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::row_abs_quantile;
DK_ENTRY_WITH_SCRATCH(row_abs_quantile, "out outputs x coef step gain q guided_channels", dk::bytes)
