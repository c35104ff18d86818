// A call of qkv_prep or qkv_quantize, as their kernels see it (diffkernels/ops/qkv_prep.py, qkv_quantize.py).
#pragma once

#include "op.h"

namespace dk {
namespace {

// q, k or v.
struct Part {
    View x;  // [B, S, H, D]
    void* y;
    Optional bias, weight, shift;  // [H * D]; the others [D], or [H * D] where the norm goes across
    bool main;                     // q or k: normed and rotated
    float* scale = nullptr;        // y are codes: of each of their rows
    Optional less = {{nullptr, nullptr, nullptr, -1, DType::other}};  // what is taken from rows before: [(B,) H, D]

    DK_INLINE int64_t tokens() const { return x.shape[1]; }
    DK_INLINE int64_t heads() const { return x.shape[2]; }
    DK_INLINE int64_t columns() const { return x.shape[3]; }
};

struct Qkv {
    Part parts[3];
    int count;
    Optional cos, sin;  // [(B,) S, R / 2]
    int64_t half;       // R / 2, 0 without a rotation
    bool apart;         // the pairs are (i, i + R / 2)
    bool norm, center, across;
    float eps;
};

// Where the table's row of a token begins.
DK_INLINE int64_t row_of(const View& table, int64_t sample, int64_t token) {
    return (table.ndim == 3 ? sample * table.stride[0] : 0) + token * table.step(-2);
}

DK_HOST_INLINE bool is_vector(const Optional& t, int64_t size) {
    return !t || (t.ndim == 1 && t.shape[0] == size && t.dtype <= DType::bf16);
}

DK_HOST_INLINE bool is_table(const Optional& t, const View& q, int64_t half) {
    if (t.dtype != DType::f32 || t.ndim < 2 || t.ndim > 3 || t.size(-1) != half || t.size(-2) != q.shape[1]) return false;
    return t.ndim == 2 || t.shape[0] == q.shape[0];
}

// `coded`: of q and k out has codes and their scales, one after the other.
DK_HOST_INLINE Refusal describe(Qkv& c, Views out, View q, View k, Optional v, Optional q_bias, Optional k_bias,
                                Optional v_bias, Optional q_weight, Optional k_weight, Optional q_shift, Optional k_shift,
                                Optional cos, Optional sin, Text rope, Text norm, bool across, double eps, bool coded = false) {
    const Optional none{{nullptr, nullptr, nullptr, -1, DType::other}};
    const int each = coded ? 2 : 1;
    c.count = v ? 3 : 2;
    if (out.count != c.count + 2 * (each - 1)) return "out: not one for each of q, k and v";
    if (!v && v_bias) return "v_bias: without v";
    c.parts[0] = {q, out[0].data, q_bias, q_weight, q_shift, true};
    c.parts[1] = {k, out[each].data, k_bias, k_weight, k_shift, true};
    if (v) c.parts[2] = {v, out[2 * each].data, v_bias, none, none, false};
    c.norm = !(norm == "none");
    c.center = norm == "layer";
    if (c.norm && !c.center && !(norm == "rms")) return "norm: neither 'none', 'rms' nor 'layer'";
    c.apart = rope == "half";
    if (!c.apart && !(rope == "interleaved")) return "rope: neither 'interleaved' nor 'half'";
    if (!(eps >= 0)) return "eps: negative";
    c.across = across;
    c.eps = static_cast<float>(eps);
    for (int i = 0; i < c.count; ++i) {
        const Part& p = c.parts[i];
        if (p.x.ndim != 4 || p.x.shape[3] < 1) return "q, k, v: not [B, S, H, D]";
        if (p.x.dtype != q.dtype) return "q, k, v: not of one dtype";
        const View& y = out[i * each];
        if (!y.same_shape(p.x) || !y.contiguous() || y.dtype != (coded && p.main ? DType::i8 : p.x.dtype))
            return "out: not contiguous, or not like q, k and v";
        if (coded && p.main) {
            const View& scale = out[i * each + 1];
            if (scale.ndim != 3 || scale.dtype != DType::f32 || !scale.contiguous() || scale.numel() * p.columns() != y.numel())
                return "out: not a float32 scale a row";
            c.parts[i].scale = static_cast<float*>(scale.data);
        }
        const int64_t all = p.heads() * p.columns(), normed = across ? all : p.columns();
        if (!c.norm && (p.weight || p.shift)) return "a weight or shift without a norm";
        if (!is_vector(p.bias, all) || !is_vector(p.weight, normed) || !is_vector(p.shift, normed))
            return "a bias, weight or shift: not float32, float16 or bfloat16, or not of as many columns";
    }
    if (k.shape[0] != q.shape[0] || k.shape[3] != q.shape[3]) return "k: not of q's batch and head dimension";
    for (int i = 0; v && i < 3; ++i)
        if (v.shape[i] != k.shape[i]) return "v: not of k's batch, length and heads";
    c.cos = cos, c.sin = sin;
    c.half = cos && cos.ndim > 0 ? cos.size(-1) : 0;
    if (!cos && !sin) return nullptr;
    if (!cos || !sin || !cos.same_shape(sin)) return "cos and sin: not alike";
    if (c.half < 1 || 2 * c.half > q.shape[3] || k.shape[1] != q.shape[1] || !is_table(cos, q, c.half) ||
        !is_table(sin, q, c.half))
        return "cos and sin: not float32 [S, R / 2] or [B, S, R / 2]";
    return nullptr;
}

}  // namespace
}  // namespace dk
