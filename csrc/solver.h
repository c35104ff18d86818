// What a solver step's arguments mean, once for every rung: shapes checked, the coefficient row's columns named.
#pragma once

#include "broadcast.h"
#include "op.h"

namespace dk {
namespace {

constexpr int kMaxOutputs = 4, kMaxHistory = 4, kMaxResults = 3;
constexpr int kMaxTerms = 1 + kMaxHistory + 1;

struct SolverCall {
    View output[kMaxOutputs], term[kMaxTerms], result[kMaxResults];  // terms: x, history, noise
    int32_t outputs, terms, results;
    int64_t batch, elements;  // elements of one sample
    int64_t guided;           // elements of one sample that the first row of A serves
    bool two_rows;
    const float* coef;  // [B or 1, K] of the step, once the step is known
    int64_t coef_sample, coef_column;
};

// One sample's row of coef, by name.
struct Coefficients {
    float a[kMaxOutputs], rest[kMaxOutputs];
    float x, lo, hi;
    float m[kMaxResults], term[kMaxResults][kMaxTerms];
};

DK_INLINE Coefficients coefficients(const SolverCall& c, int64_t b) {
    Coefficients k;
    const float* p = c.coef + b * c.coef_sample;
    int64_t column = 0;
    const auto next = [&] { return p[column++ * c.coef_column]; };
    for (int g = 0; g < c.outputs; ++g) k.a[g] = k.rest[g] = next();
    if (c.two_rows)
        for (int g = 0; g < c.outputs; ++g) k.rest[g] = next();
    k.x = next(), k.lo = next(), k.hi = next();
    for (int j = 0; j < c.results; ++j) {
        k.m[j] = next();
        for (int t = 0; t < c.terms; ++t) k.term[j][t] = next();
    }
    return k;
}

inline Refusal describe(SolverCall& c, Views results, Views outputs, View x, Views history, View coef, View step,
                        Optional noise, int64_t results_count, int64_t guided_channels) {
    if (x.ndim < 1 || x.ndim > kMaxDims || x.dtype != DType::f32) return "x: not float32, or more than 8 dimensions";
    if (outputs.count < 1 || outputs.count > kMaxOutputs) return "outputs: not 1 to 4";
    if (history.count > kMaxHistory) return "history: more than 4";
    if (results.count != results_count || results_count < 1 || results_count > kMaxResults) return "results: not 1 to 3";
    if (step.dtype != DType::i32 || step.ndim != 0) return "step: not a 0-dim int32";
    if (coef.dtype != DType::f32 || coef.ndim != 3 || coef.shape[0] < 1) return "coef: not float32 [T, B or 1, K]";
    c.batch = x.shape[0];
    c.elements = 1;
    for (int k = 1; k < x.ndim; ++k) c.elements *= x.shape[k];
    c.outputs = static_cast<int32_t>(outputs.count);
    c.results = static_cast<int32_t>(results_count);
    for (int g = 0; g < c.outputs; ++g) {
        if (!outputs[g].same_shape(x) || outputs[g].dtype != outputs[0].dtype) return "outputs: not alike, or not x's shape";
        c.output[g] = outputs[g];
    }
    c.term[c.terms++] = x;
    for (int k = 0; k < history.count; ++k) c.term[c.terms++] = history[k];
    if (noise) c.term[c.terms++] = noise;
    for (int t = 0; t < c.terms; ++t)
        if (!c.term[t].same_shape(x) || c.term[t].dtype != DType::f32) return "history, noise: not float32 of x's shape";
    for (int j = 0; j < c.results; ++j) {
        if (!results[j].same_shape(x) || results[j].dtype != DType::f32 || !results[j].contiguous())
            return "results: not contiguous float32 of x's shape";
        c.result[j] = results[j];
    }
    c.two_rows = guided_channels != -1;
    if (c.two_rows && (x.ndim < 2 || guided_channels < 0 || guided_channels > x.shape[1]))
        return "guided_channels: out of range";
    c.guided = c.two_rows ? (x.shape[1] ? c.elements / x.shape[1] * guided_channels : 0) : c.elements;
    const int64_t width = c.outputs * (c.two_rows ? 2 : 1) + 3 + c.results * (1 + c.terms);
    if (coef.shape[2] != width || (coef.shape[1] != 1 && coef.shape[1] != c.batch)) return "coef: not [T, B or 1, K]";
    c.coef = static_cast<const float*>(coef.data);
    c.coef_sample = coef.shape[1] == 1 ? 0 : coef.stride[1];
    c.coef_column = coef.stride[2];
    return nullptr;
}

}  // namespace
}  // namespace dk
