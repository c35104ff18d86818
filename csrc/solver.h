// What a solver step's arguments mean, once for every rung: shapes checked, the coefficient row's columns named.
#pragma once

#include "broadcast.h"
#include "op.h"

namespace dk {
namespace {

constexpr int kMaxOutputs = 4, kMaxHistory = 5, kMaxResults = 3;
constexpr int kMaxTerms = 1 + kMaxHistory;
constexpr int kRun = 1024;  // elements of a sample that share one flag

// The head of a row of coef, and what it is applied to: gain sum_g A_g outputs_g + a x.
struct Mix {
    View output[kMaxOutputs], x;
    int32_t outputs;
    int64_t batch, elements;  // elements of one sample
    int64_t guided;           // elements of one sample that the first row of A serves
    bool two_rows;
    const float* coef;  // [B or 1, K] of the step, once the step is known
    int64_t coef_sample, coef_column;
    const float* gain;  // one a sample, or nullptr
    int64_t gain_sample;

    DK_INLINE int64_t columns() const { return outputs * (two_rows ? 2 : 1) + 1; }
};

struct SolverCall : Mix {
    View term[kMaxTerms], result[kMaxResults], copy, flags;  // terms: x, history
    Optional mask, known;
    int32_t terms, results, copies;
    bool watch;
    const int64_t* seed;  // one a sample, or nullptr
    const float* bound;
    int64_t seed_sample, bound_sample;

    DK_INLINE int64_t width() const {
        const int drawn = seed ? 1 : 0;
        return columns() + drawn + 2 + (mask ? 1 : 0) + results * (1 + terms + drawn) + (copies ? 1 : 0);
    }
};

// One sample's row of coef, by name.
struct Head {
    float a[kMaxOutputs], rest[kMaxOutputs], x;
};
struct Coefficients : Head {
    float noise, lo, hi, reach, share;  // reach is 1 without a bound: m is divided by it
    float m[kMaxResults], term[kMaxResults][kMaxTerms], added[kMaxResults], copy;
};

// Fills `head` and returns the next column.
DK_INLINE int64_t head_of(const Mix& c, int64_t b, Head& head) {
    const float* p = c.coef + b * c.coef_sample;
    const float gain = c.gain ? c.gain[b * c.gain_sample] : 1;
    int64_t column = 0;
    for (int g = 0; g < c.outputs; ++g) head.a[g] = head.rest[g] = gain * p[column++ * c.coef_column];
    if (c.two_rows)
        for (int g = 0; g < c.outputs; ++g) head.rest[g] = gain * p[column++ * c.coef_column];
    head.x = p[column++ * c.coef_column];
    return column;
}

DK_INLINE Coefficients coefficients(const SolverCall& c, int64_t b) {
    Coefficients k{};
    const float* p = c.coef + b * c.coef_sample;
    int64_t column = head_of(c, b, k);
    const auto next = [&] { return p[column++ * c.coef_column]; };
    if (c.seed) k.noise = next();
    k.lo = next(), k.hi = next(), k.reach = 1;
    if (c.bound) {
        float reach = c.bound[b * c.bound_sample];
        reach = reach < k.lo ? k.lo : reach;  // comparisons as torch.clamp: a NaN stays
        reach = reach > k.hi ? k.hi : reach;
        k.reach = k.hi = k.lo != k.lo || k.hi != k.hi ? k.lo + k.hi : reach;
        k.lo = -k.reach;
    }
    if (c.mask) k.share = next();
    for (int j = 0; j < c.results; ++j) {
        k.m[j] = next();
        for (int t = 0; t < c.terms; ++t) k.term[j][t] = next();
        if (c.seed) k.added[j] = next();
    }
    if (c.copies) k.copy = next();
    return k;
}

inline bool per_sample(const View& t, int64_t batch, DType dtype) {
    return t.dtype == dtype && t.ndim == 1 && t.shape[0] == batch;
}

inline Refusal describe(Mix& c, Views outputs, View x, View coef, View step, Optional gain, int64_t guided_channels) {
    if (x.ndim < 1 || x.ndim > kMaxDims || x.dtype != DType::f32) return "x: not float32, or more than 8 dimensions";
    if (outputs.count < 1 || outputs.count > kMaxOutputs) return "outputs: not 1 to 4";
    if (step.dtype != DType::i32 || step.ndim != 0) return "step: not a 0-dim int32";
    if (coef.dtype != DType::f32 || coef.ndim != 3 || coef.shape[0] < 1) return "coef: not float32 [T, B or 1, K]";
    c.x = x;
    c.batch = x.shape[0];
    c.elements = elements_of(x);
    c.outputs = static_cast<int32_t>(outputs.count);
    for (int g = 0; g < c.outputs; ++g) {
        if (!outputs[g].same_shape(x) || outputs[g].dtype != outputs[0].dtype) return "outputs: not alike, or not x's shape";
        c.output[g] = outputs[g];
    }
    c.two_rows = guided_channels != -1;
    if (c.two_rows && (x.ndim < 2 || guided_channels < 0 || guided_channels > x.shape[1]))
        return "guided_channels: out of range";
    c.guided = c.two_rows ? (x.shape[1] ? c.elements / x.shape[1] * guided_channels : 0) : c.elements;
    if (coef.shape[2] < c.columns() || (coef.shape[1] != 1 && coef.shape[1] != c.batch)) return "coef: not [T, B or 1, K]";
    c.coef = static_cast<const float*>(coef.data);
    c.coef_sample = coef.shape[1] == 1 ? 0 : coef.stride[1];
    c.coef_column = coef.stride[2];
    if (gain) {
        if (!per_sample(gain, c.batch, DType::f32)) return "gain: not float32 [B]";
        c.gain = static_cast<const float*>(gain.data);
        c.gain_sample = gain.stride[0];
    }
    return nullptr;
}

inline Refusal describe(SolverCall& c, Views out, Views outputs, View x, Views history, View coef, View step, Optional seed,
                        Optional gain, Optional bound, Optional mask, Optional known, int64_t results, int64_t guided_channels,
                        int64_t copies, Text copy_dtype, bool watch) {
    if (Refusal why = describe(c, outputs, x, coef, step, gain, guided_channels)) return why;
    if (history.count > kMaxHistory) return "history: more than 5";
    if (results < 1 || results > kMaxResults || copies < 0 || copies > kMaxOutputs)
        return "results: not 1 to 3, or copies: not 0 to 4";
    if (out.count != results + (copies ? 1 : 0) + (watch ? 1 : 0)) return "out: not as many as asked for";
    c.results = static_cast<int32_t>(results);
    c.copies = static_cast<int32_t>(copies);
    c.watch = watch;
    c.term[c.terms++] = x;
    for (int k = 0; k < history.count; ++k) c.term[c.terms++] = history[k];
    for (int t = 0; t < c.terms; ++t)
        if (!c.term[t].same_shape(x) || c.term[t].dtype != DType::f32) return "history: not float32 of x's shape";
    for (int j = 0; j < c.results; ++j) {
        c.result[j] = out[j];
        if (!out[j].same_shape(x) || out[j].dtype != DType::f32 || !out[j].contiguous()) return "results: not like x";
    }
    if (seed) {
        if (!per_sample(seed, c.batch, DType::i64)) return "seed: not int64 [B]";
        c.seed = static_cast<const int64_t*>(seed.data);
        c.seed_sample = seed.stride[0];
    }
    if (bound) {
        if (!per_sample(bound, c.batch, DType::f32)) return "bound: not float32 [B]";
        c.bound = static_cast<const float*>(bound.data);
        c.bound_sample = bound.stride[0];
    }
    if (static_cast<bool>(mask) != static_cast<bool>(known)) return "mask, known: one without the other";
    c.mask = mask, c.known = known;
    for (const Optional& t : {mask, known})
        if (t && (!t.same_shape(x) || t.dtype != DType::f32)) return "mask, known: not float32 of x's shape";
    if (copies) {
        c.copy = out[results];
        const DType wanted = copy_dtype == "float32"    ? DType::f32
                             : copy_dtype == "float16"  ? DType::f16
                             : copy_dtype == "bfloat16" ? DType::bf16
                                                        : DType::other;
        if (c.copy.dtype != wanted || wanted == DType::other || !c.copy.contiguous() ||
            c.copy.numel() != copies * c.batch * c.elements)
            return "copy_dtype: not float32, float16 or bfloat16";
    }
    if (watch) {
        c.flags = out[out.count - 1];
        if (c.flags.dtype != DType::f32 || !c.flags.contiguous() ||
            c.flags.numel() != c.batch * ((c.elements + kRun - 1) / kRun))
            return "watch: flags are not float32, one a run";
    }
    if (coef.shape[2] < c.width()) return "coef: too few columns";
    return nullptr;
}

}  // namespace
}  // namespace dk
