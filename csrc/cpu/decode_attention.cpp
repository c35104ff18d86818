// k_cache, v_cache[slot of p] = RoPE(k), v;  o = softmax(RoPE(q) kT scale) v over what the cache then holds
//
// Idea: one token reads all of the cache once, so nothing is packed: scores are sums over whole vectors of a key, kLanes of
// them in flight, turned and added at the end; values are read as they lie. Chunks of slots are partial results, merged in
// order: their number, unlike the threads', decides the bits. Takes: float32, float16 or bfloat16, any strides, head dimensions
// up to 256, 1 to 64 new tokens; heads of k, v may be shared. Floor: the bytes of the cache's tokens. Compile: g++ -std=c++20
// -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/decode_attention.cpp
#include "attention.h"

namespace dk {
namespace {

constexpr int kChunk = 512;                  // slots
constexpr int kScores = kChunk + kLanes;     // floats from row to row
constexpr int kTall = kLanes == 16 ? 4 : 2;  // rows of queries that share a key's load
constexpr int kWide = kMaxHead + kLanes;
constexpr int64_t kMostTokens = 64;

struct Table {
    const float* data;  // [P, R / 2]; nullptr: there is none
    int64_t row, step;
};

struct Call {
    Lay q, k, v, k_cache, v_cache;
    Index index;
    Table cos, sin;
    int64_t positions, pairs;  // P, or what an int32 holds, and R / 2
    bool half, causal;
    int64_t samples, tokens, heads, kv_heads, d, dv, length, sinks;
    float factor;  // of scores, to units of log2
    void* o;       // [B, T, H, Dv]
    float* parts;  // [B, Hk, chunks, rows, part()]: o, the largest score, the sum of exponentials

    int64_t rows() const { return heads / kv_heads * tokens; }  // row = head in the group * T + token
    int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
    int64_t wide() const { return round_up(dv, kLanes); }
    int64_t part() const { return wide() + kLanes; }
    int64_t slot(int64_t p) const { return p < length ? p : sinks + (p - sinks) % (length - sinks); }
    int64_t held(int64_t sample) const { return index[sample] + tokens < length ? index[sample] + tokens : length; }
    float* part_of(int64_t sample, int64_t kv_head, int64_t chunk, int64_t row) const {
        return parts + (((sample * kv_heads + kv_head) * chunks() + chunk) * rows() + row) * part();
    }
};

template <class T>
T* token_of(const Lay& l, int64_t sample, int64_t token, int64_t head) {
    return static_cast<T*>(l.data) + sample * l.at[0] + token * l.at[1] + head * l.at[2];
}

// A row of D columns, widened and rotated to its position; zero up to the next whole vector.
template <class T>
void rotated(const Call& c, const T* x, int64_t step, int64_t position, float* to) {
    for (int64_t i = 0; i < c.d; i += kLanes) store(to + i, some(x + i * step, step, static_cast<int>(c.d - i)));
    for (int64_t i = 0; i < c.pairs; ++i) {
        float &a = to[c.half ? i : 2 * i], &b = to[c.half ? i + c.pairs : 2 * i + 1];
        const float x0 = a, x1 = b, cos = c.cos.data[position * c.cos.row + i * c.cos.step],
                    sin = c.sin.data[position * c.sin.row + i * c.sin.step];
        a = x0 * cos - x1 * sin, b = x0 * sin + x1 * cos;
    }
}

template <class T>
void append(const Call& c, int64_t sample, int64_t kv_head) {
    for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t position = c.index[sample] + t, slot = c.slot(position);
        alignas(64) float row[kWide];
        rotated(c, token_of<T>(c.k, sample, t, kv_head), c.k.at[3], position, row);
        T* const to = token_of<T>(c.k_cache, sample, slot, kv_head);
        for (int64_t i = 0; i < c.d; i += kLanes) {
            T lanes[kLanes];
            store(lanes, quiet(load(row + i)));
            for (int64_t j = 0; j < kLanes && i + j < c.d; ++j) to[(i + j) * c.k_cache.at[3]] = lanes[j];
        }
        const T* const from = token_of<T>(c.v, sample, t, kv_head);
        T* const v = token_of<T>(c.v_cache, sample, slot, kv_head);
        for (int64_t i = 0; i < c.dv; ++i) v[i * c.v_cache.at[3]] = from[i * c.v.at[3]];
    }
}

// s[r][j] = factor q[r] . k[j] for n keys, in whole vectors of j; what is beyond n is not a score.
template <int kRows, bool kUnit, class T>
void scores(const float (*q)[kWide], const T* k, int64_t token, int64_t step, int64_t n, int64_t d, float factor, float* s) {
    constexpr int kAt = kLanes / kRows;  // keys at a time
    for (int64_t j = 0; j < n; j += kAt) {
        F sums[kLanes] = {};
        for (int64_t i = 0; i < d; i += kLanes) {
            F left[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) left[r] = load(q[r] + i);
            const bool whole = kUnit && d - i >= kLanes;
#pragma GCC unroll 16
            for (int key = 0; key < kAt; ++key) {
                const T* const at = k + (j + key < n ? j + key : n - 1) * token + i * step;
                const F right = whole ? load(at) : some(at, kUnit ? 1 : step, static_cast<int>(d - i));
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) sums[r * kAt + key] = fma(left[r], right, sums[r * kAt + key]);
            }
        }
        turn(sums);
        F all = sums[0];
#pragma GCC unroll 16
        for (int i = 1; i < kLanes; ++i) all += sums[i];
        float lanes[kLanes];
        store(lanes, factor * all);
        for (int r = 0; r < kRows; ++r) std::memcpy(s + r * kScores + j, lanes + r * kAt, kAt * sizeof(float));
    }
}

// o[r] = sum over j of p[r][j] v[j], kVectors of its columns; the last vector holds `last` of them.
template <int kRows, int kVectors, bool kUnit, class T>
void values(const float* p, const T* v, int64_t token, int64_t step, int64_t n, int last, float* o, int64_t o_row) {
    F sums[kRows][kVectors] = {};
#pragma GCC unroll 1
    for (int64_t j = 0; j < n; ++j, v += token) {
        F right[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i + 1 < kVectors; ++i)
            right[i] = kUnit ? load(v + i * kLanes) : gather(v + i * kLanes * step, step, kLanes);
        right[kVectors - 1] = some(v + (kVectors - 1) * kLanes * step, kUnit ? 1 : step, last);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) sums[r][i] = fma(splat(p[r * kScores + j]), right[i], sums[r][i]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) store(o + r * o_row + i * kLanes, sums[r][i]);
}

template <int kRows, bool kUnit, class T>
void attend(const Call& c, int64_t sample, int64_t kv_head, int64_t chunk, int64_t row) {
    const int64_t first = chunk * kChunk, held = c.held(sample), n = held - first < kChunk ? held - first : kChunk;
    float* const o = c.part_of(sample, kv_head, chunk, row);
    const int64_t wide = c.wide(), part = c.part(), width = round_up(n, kLanes);
    alignas(64) float q[kRows][kWide], s[kRows * kScores];
    for (int r = 0; r < kRows; ++r) {
        const int64_t head = kv_head * (c.heads / c.kv_heads) + (row + r) / c.tokens, t = (row + r) % c.tokens;
        rotated(c, token_of<T>(c.q, sample, t, head), c.q.at[3], c.index[sample] + t, q[r]);
    }
    scores<kRows, kUnit>(q, token_of<T>(c.k_cache, sample, first, kv_head), c.k_cache.at[1], c.k_cache.at[3], n, c.d, c.factor,
                         s);
    for (int r = 0; r < kRows; ++r) {
        float* const line = s + r * kScores;
        for (int64_t t = (row + r) % c.tokens + 1; c.causal && t < c.tokens; ++t) {
            const int64_t later = c.slot(c.index[sample] + t) - first;
            if (later >= 0 && later < n) line[later] = -__builtin_inff();
        }
        for (int64_t j = n; j < width; ++j) line[j] = -__builtin_inff();
        const float top = largest_of(line, width);
        o[r * part + wide] = top;
        o[r * part + wide + 1] = exponentials_of<false>(line, width, 1, top == -__builtin_inff() ? 0 : top);
    }
    const T* v = token_of<T>(c.v_cache, sample, first, kv_head);
    const int64_t token = c.v_cache.at[1], step = c.v_cache.at[3];
    for (int64_t i = 0; i < c.dv; i += 4 * kLanes) {
        const int64_t vectors = (wide - i) / kLanes;
        const int last = vectors > 4 || c.dv % kLanes == 0 ? kLanes : static_cast<int>(c.dv % kLanes);
        if (vectors >= 4) values<kRows, 4, kUnit>(s, v + i * step, token, step, n, last, o + i, part);
        if (vectors == 3) values<kRows, 3, kUnit>(s, v + i * step, token, step, n, last, o + i, part);
        if (vectors == 2) values<kRows, 2, kUnit>(s, v + i * step, token, step, n, last, o + i, part);
        if (vectors == 1) values<kRows, 1, kUnit>(s, v + i * step, token, step, n, last, o + i, part);
    }
}

template <class T>
void merge(const Call& c, int64_t sample, int64_t kv_head, int64_t row) {
    const int64_t wide = c.wide(), used = (c.held(sample) + kChunk - 1) / kChunk;
    const int64_t head = kv_head * (c.heads / c.kv_heads) + row / c.tokens, t = row % c.tokens;
    T* const to = static_cast<T*>(c.o) + ((sample * c.tokens + t) * c.heads + head) * c.dv;
    float top = -__builtin_inff(), total = 0;
    for (int64_t i = 0; i < used; ++i) top = larger(c.part_of(sample, kv_head, i, row)[wide], top);
    const float base = top == -__builtin_inff() ? 0 : top;
    alignas(64) float sums[kWide] = {};
    for (int64_t i = 0; i < used; ++i) {
        const float *const part = c.part_of(sample, kv_head, i, row), kept = exp2(splat(part[wide] - base))[0];
        total += kept * part[wide + 1];
        for (int64_t j = 0; j < wide; j += kLanes) store(sums + j, fma(splat(kept), load(part + j), load(sums + j)));
    }
    for (int64_t j = 0; j < c.dv; j += kLanes) {
        const F value = quiet(load(sums + j) * (1 / total));
        if (c.dv - j >= kLanes)
            store(to + j, value);
        else
            store(to + j, value, static_cast<int>(c.dv - j));
    }
}

Refusal parse(Call& c, View q, View k, View v, View k_cache, View v_cache, View index, Optional cos, Optional sin, Text rope,
              int64_t sinks, bool causal, OptionalReal scale) {
    for (const View* t : {&q, &k, &v, &k_cache, &v_cache})
        if (t->ndim != 4 || t->dtype != q.dtype || !is_float(t->dtype))
            return "q, k, v, k_cache, v_cache: not alike, of four dimensions, float32, float16 or bfloat16";
    c.samples = q.shape[0], c.tokens = q.shape[1], c.heads = q.shape[2], c.d = q.shape[3];
    c.kv_heads = k.shape[2], c.dv = v.shape[3], c.length = k_cache.shape[1], c.sinks = sinks;
    if (c.tokens < 1 || c.tokens > kMostTokens) return "q: not 1 to 64 tokens";
    if (c.d < 1 || c.dv < 1 || c.d > kMaxHead || c.dv > kMaxHead) return "q, v: head dimension";
    if (c.kv_heads < 1 || c.heads % c.kv_heads) return "k: its heads do not divide q's";
    const int64_t shapes[][4] = {{c.samples, c.tokens, c.kv_heads, c.d},
                                 {c.samples, c.tokens, c.kv_heads, c.dv},
                                 {c.samples, c.length, c.kv_heads, c.d},
                                 {c.samples, c.length, c.kv_heads, c.dv}};
    const View* const tensors[] = {&k, &v, &k_cache, &v_cache};
    for (int i = 0; i < 4; ++i)
        if (!has(*tensors[i], shapes[i], q.dtype)) return "k, v, k_cache or v_cache: shape";
    for (const View* t : {&k_cache, &v_cache})
        for (int i = 0; i < 4; ++i)
            if (t->shape[i] > 1 && t->stride[i] == 0) return "k_cache or v_cache: elements that share memory";
    if (sinks < 0 || sinks > c.length - c.tokens) return "sinks: not 0 to the cache's tokens less q's";
    const int64_t one[] = {c.samples};
    if (!has(index, one, DType::i32)) return "index: not [B] int32";
    c.index = Index{static_cast<const int32_t*>(index.data), index.stride[0]};
    c.cos = c.sin = Table{}, c.positions = INT32_MAX, c.pairs = 0;
    if (cos || sin) {
        if (cos.ndim != 2 || sin.ndim != 2 || cos.dtype != DType::f32 || sin.dtype != DType::f32 ||
            cos.shape[0] != sin.shape[0] || cos.shape[1] != sin.shape[1] || 2 * cos.shape[1] > c.d)
            return "cos, sin: not alike, [P, R / 2] float32";
        c.positions = cos.shape[0], c.pairs = cos.shape[1];
        c.cos = Table{static_cast<const float*>(cos.data), cos.stride[0], cos.stride[1]};
        c.sin = Table{static_cast<const float*>(sin.data), sin.stride[0], sin.stride[1]};
    }
    c.half = rope == "half";
    if (!c.half && !(rope == "interleaved")) return "rope: unknown";
    if (scale && scale.value != scale.value) return "scale: NaN";
    c.causal = causal;
    c.factor = kLog2e * static_cast<float>(scale ? scale.value : 1 / __builtin_sqrt(static_cast<double>(c.d)));
    c.q = lay_of(q), c.k = lay_of(k), c.v = lay_of(v), c.k_cache = lay_of(k_cache), c.v_cache = lay_of(v_cache);
    return nullptr;
}

int64_t bytes(Stream, View, View q, View k, View v, View k_cache, View v_cache, View index, Optional cos, Optional sin,
              Text rope, int64_t sinks, bool causal, OptionalReal scale) {
    Call c{};
    if (parse(c, q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, causal, scale)) return 0;
    return c.samples * c.kv_heads * c.chunks() * c.rows() * c.part() * 4;
}

Refusal decode_attention(Stream stream, View out, View q, View k, View v, View k_cache, View v_cache, View index, Optional cos,
                         Optional sin, Text rope, int64_t sinks, bool causal, OptionalReal scale) {
    Call c{};
    if (Refusal why = parse(c, q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, causal, scale)) return why;
    for (int64_t b = 0; b < c.samples; ++b)
        if (c.index[b] < 0 || c.index[b] > c.positions - c.tokens) return "index: out of bounds";
    const int64_t o_shape[] = {c.samples, c.tokens, c.heads, c.dv};
    if (!has(out, o_shape, q.dtype) || !out.contiguous()) return "out: not o, contiguous";
    c.o = out.data, c.parts = static_cast<float*>(stream.scratch);
    return for_value(Floats{}, q.dtype, "q: dtype", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const int64_t pairs = c.samples * c.kv_heads, chunks = c.chunks(), rows = c.rows(),
                      grain = 1 + 65536 / (1 + c.length * rows);  // a thread's start is worth some microseconds
        auto written = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) append<T>(c, i / c.kv_heads, i % c.kv_heads);
        };
        parallel_for(pairs, 1 + 4096 / (c.tokens * (c.d + c.dv)), written);
        auto attended = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t sample = i / chunks / c.kv_heads, kv_head = i / chunks % c.kv_heads, chunk = i % chunks;
                if (c.held(sample) <= chunk * kChunk) continue;
                for_bool(c.k_cache.at[3] == 1 && c.v_cache.at[3] == 1, [&](auto unit) -> Refusal {
                    constexpr bool kUnit = decltype(unit)::value != 0;
                    int64_t row = 0;
                    for (; row + kTall <= rows; row += kTall) attend<kTall, kUnit, T>(c, sample, kv_head, chunk, row);
                    for (; row < rows; ++row) attend<1, kUnit, T>(c, sample, kv_head, chunk, row);
                    return nullptr;
                });
            }
        };
        parallel_for(pairs * chunks, grain, attended);
        auto merged = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge<T>(c, i / rows / c.kv_heads, i / rows % c.kv_heads, i % rows);
        };
        parallel_for(pairs * rows, 1 + 4096 / (chunks * c.part()), merged);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::decode_attention, dk::bytes;
DK_ENTRY_WITH_SCRATCH(decode_attention, "out q k v k_cache v_cache index cos sin rope sinks causal scale", bytes)
