// What every attention kernel is asked: sizes, strides, and which keys a query sees. Written once for CPU and CUDA.
#pragma once

#include "op.h"

namespace dk {
namespace {

constexpr int kMaxHead = 256;

// Elements, by sample, token, head and column: q, k, v, o and their gradients; for a mask, by sample, head, query and key.
struct Lay {
    void* data;
    int64_t at[4];  // strides in elements, 0 along what it is broadcast
    DType dtype;    // other: there is none
};

struct Index {
    const int32_t* data;  // nullptr: there is none
    int64_t step;
    DK_INLINE int64_t operator[](int64_t i) const { return data[i * step]; }
};

// One sample, or one sequence of a packed call.
struct Sequence {
    int64_t q_sample, q_first, queries;  // its rows of q, o and lse
    int64_t k_sample, k_first, keys;     // its rows of k and v
    bool bad;                            // an index is out of bounds: its result is NaN
};

enum class Causal : int8_t { none, bottom_right, top_left };

struct Attention {
    int64_t samples;  // or sequences
    int64_t heads, kv_heads, d, dv;
    int64_t q_samples, q_tokens, k_samples, k_tokens;
    Lay q, k, v, bias, mask;
    Index key_lengths, cu_q, cu_k, kv_index;
    Causal causal;
    float scale;

    DK_INLINE int64_t group() const { return heads / kv_heads; }
    DK_INLINE Sequence sequence(int64_t i) const {
        Sequence s{i, 0, q_tokens, i, 0, k_tokens, false};
        if (cu_q.data) {
            s.q_sample = s.k_sample = 0;
            s.q_first = cu_q[i], s.queries = cu_q[i + 1] - s.q_first;
            s.k_first = cu_k[i], s.keys = cu_k[i + 1] - s.k_first;
            s.bad = s.q_first < 0 || s.queries < 0 || s.q_first + s.queries > q_tokens || s.k_first < 0 || s.keys < 0 ||
                    s.k_first + s.keys > k_tokens;
            if (s.bad) s.queries = s.keys = 0;
        }
        if (kv_index.data) {
            s.k_sample = kv_index[i];
            if (s.k_sample < 0 || s.k_sample >= k_samples) s.bad = true, s.k_sample = 0, s.keys = 0;
        }
        if (key_lengths.data && !s.bad) {
            s.keys = key_lengths[i];
            if (s.keys < 0 || s.keys > k_tokens) s.bad = true, s.keys = 0;
        }
        return s;
    }
    // How many of the first keys query `i` of the sequence sees, as far as causality and lengths say.
    DK_INLINE int64_t seen(const Sequence& s, int64_t i) const {
        if (causal == Causal::none) return s.keys;
        const int64_t n = i + 1 + (causal == Causal::bottom_right ? s.keys - s.queries : 0);
        return n < 0 ? 0 : n < s.keys ? n : s.keys;
    }
};

DK_INLINE Lay lay_of(const View& t) {
    Lay l{t.data, {}, t.ndim < 0 ? DType::other : t.dtype};
    for (int i = 0; i < t.ndim; ++i) l.at[4 - t.ndim + i] = t.shape[i] == 1 ? 0 : t.stride[i];
    return l;
}

DK_HOST_INLINE bool broadcasts(const View& t, const int64_t (&to)[4]) {
    if (t.ndim > 4) return false;
    for (int i = 0; i < t.ndim; ++i)
        if (t.shape[i] != 1 && t.shape[i] != to[4 - t.ndim + i]) return false;
    return true;
}

template <int N>
DK_HOST_INLINE bool has(const View& t, const int64_t (&shape)[N], DType dtype) {
    if (t.ndim != N || t.dtype != dtype) return false;
    for (int i = 0; i < N; ++i)
        if (t.shape[i] != shape[i]) return false;
    return true;
}

DK_HOST_INLINE bool is_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

// Whether the numbers that a host can read are in bounds; what a GPU holds is looked at there, by Attention::sequence.
DK_HOST_INLINE Refusal readable(const Attention& a) {
    if (a.cu_q.data && (a.cu_q[0] != 0 || a.cu_k[0] != 0 || a.cu_q[a.samples] != a.q_tokens || a.cu_k[a.samples] != a.k_tokens))
        return "cu_q, cu_k: not from 0 to the number of tokens";
    for (int64_t i = 0; i < a.samples; ++i)
        if (a.sequence(i).bad) return "cu_q, cu_k, key_lengths or kv_index: out of bounds";
    return nullptr;
}

// `coded`: q and k are 8-bit codes.
DK_HOST_INLINE Refusal parse(Attention& a, const View& q, const View& k, const View& v, const Optional& bias,
                             const Optional& mask, const Optional& key_lengths, const Optional& cu_q, const Optional& cu_k,
                             const Optional& kv_index, const Text& causal, double scale, bool coded = false) {
    if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4) return "q, k, v: not four-dimensional";
    if (!is_float(v.dtype) || k.dtype != q.dtype || q.dtype != (coded ? DType::i8 : v.dtype))
        return "q, k, v: not alike (or q and k not int8), or not float32, float16 or bfloat16";
    a.q_samples = q.shape[0], a.q_tokens = q.shape[1], a.heads = q.shape[2], a.d = q.shape[3];
    a.k_samples = k.shape[0], a.k_tokens = k.shape[1], a.kv_heads = k.shape[2], a.dv = v.shape[3];
    if (a.d < 1 || a.dv < 1 || a.d > kMaxHead || a.dv > kMaxHead || k.shape[3] != a.d) return "q, k, v: head dimension";
    for (int i = 0; i < 3; ++i)
        if (v.shape[i] != k.shape[i]) return "v: not like k";
    if (a.kv_heads < 1 || a.heads % a.kv_heads) return "k: its heads do not divide q's";
    a.q = lay_of(q), a.k = lay_of(k), a.v = lay_of(v), a.bias = lay_of(bias), a.mask = lay_of(mask);
    const int64_t full[] = {a.q_samples, a.heads, a.q_tokens, a.k_tokens};
    if (bias && (!is_float(bias.dtype) || !broadcasts(bias, full))) return "bias: its dtype or shape";
    if (mask && (mask.dtype != DType::b8 || !broadcasts(mask, full))) return "mask: its dtype or shape";
    const Optional* indices[] = {&key_lengths, &kv_index, &cu_q, &cu_k};
    Index* found[] = {&a.key_lengths, &a.kv_index, &a.cu_q, &a.cu_k};
    for (int i = 0; i < 4; ++i) {
        const Optional& t = *indices[i];
        *found[i] = Index{};
        if (!t) continue;
        if (t.dtype != DType::i32 || t.ndim != 1 || (i < 2 ? t.shape[0] != a.q_samples : t.shape[0] < 1))
            return "key_lengths, kv_index, cu_q or cu_k: dtype or shape";
        *found[i] = Index{static_cast<const int32_t*>(t.data), t.stride[0]};
    }
    a.samples = a.q_samples;
    if (cu_q || cu_k) {
        if (!cu_q || !cu_k || cu_q.shape[0] != cu_k.shape[0] || a.q_samples != 1 || a.k_samples != 1 || bias || mask ||
            key_lengths || kv_index)
            return "cu_q, cu_k: not alike, or beside what is not packed";
        a.samples = cu_q.shape[0] - 1;
    } else if (!kv_index && a.k_samples != a.q_samples) {
        return "k: its batch";
    }
    const bool bottom_right = causal == "bottom-right", top_left = causal == "top-left";
    if (!bottom_right && !top_left && !(causal == "none")) return "causal: unknown";
    a.causal = bottom_right ? Causal::bottom_right : top_left ? Causal::top_left : Causal::none;
    if (scale != scale) return "scale: NaN";
    a.scale = static_cast<float>(scale);
    return nullptr;
}

}  // namespace
}  // namespace dk
