// y = rotate(norm(x + bias) * weight + shift) of q and k; v + bias. qkv_quantize: 8-bit codes of q and k, and a scale a row.
//
// Idea: a token at a time, all of its heads of q, k and v, which lie side by side in a packed projection; its row of the
// tables is spread once and serves them all. A head is walked up to three times in the first cache: for its mean, for the
// squares about it, for y; which codes are made of in a line of its own. Biases and weights are copied to float32 once a call.
// Takes: q, k and v float32, float16 or bfloat16, alike; biases, weights and shifts of any of these; any strides; R up to 1024.
// Floor: a read and a write of each. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/qkv_prep.cpp
#include "../qkv.h"
#include "quantize.h"

namespace dk {
namespace {

constexpr int64_t kTable = 1024;  // columns of a head that may be rotated
constexpr int64_t kCoded = 256;   // columns of a head that codes are made of
constexpr int kAhead = 8;         // heads whose statistics are found together

// cos and sin of a token as the walk over a head meets them. Interleaved: each twice, sin as -sin, sin.
struct Table {
    alignas(64) float cos[kTable + kPair], sin[kTable + kPair];
};

// What a walk wants of q, k or v besides x; nullptr where there is none.
struct Vectors {
    const float *bias, *weight, *shift, *less;
};

DK_INLINE int64_t room(const Optional& v) { return v && v.ndim == 1 ? v.shape[0] + kLanes : 0; }

// A vector in float32, with room for the last lanes' reads. Returns where the next one goes.
template <class T>
DK_INLINE float* widened(const Optional& v, float* to) {
    const int64_t stride = v.stride[0], size = v.shape[0];
    const T* const from = static_cast<const T*>(v.data);
    for (int64_t i = 0; i < size; i += kLanes)
        store(to + i, quiet(gather(from + i * stride, stride, size - i < kLanes ? static_cast<int>(size - i) : kLanes)));
    return to + room(v);
}
DK_INLINE const float* copied(const Optional& v, float*& to) {
    if (!v) return nullptr;
    const float* const found = to;
    to = v.dtype == DType::f32 ? widened<float>(v, to) : v.dtype == DType::f16 ? widened<f16>(v, to) : widened<bf16>(v, to);
    return found;
}

void spread(const Qkv& c, int64_t sample, int64_t token, Table& table) {
    const float* const cos = static_cast<const float*>(c.cos.data) + row_of(c.cos, sample, token);
    const float* const sin = static_cast<const float*>(c.sin.data) + row_of(c.sin, sample, token);
    const int64_t cos_step = c.cos.step(-1), sin_step = c.sin.step(-1);
    for (int64_t i = 0; i < c.half; i += kLanes) {
        const int n = c.half - i < kLanes ? static_cast<int>(c.half - i) : kLanes;
        const F cv = quiet(gather(cos + i * cos_step, cos_step, n)), sv = quiet(gather(sin + i * sin_step, sin_step, n));
        if (c.apart) {
            store(table.cos + i, cv), store(table.sin + i, sv);
        } else {
            const Pair twice = interleave({cv, cv}), turned = interleave({-sv, sv});
            store(table.cos + 2 * i, twice.lo), store(table.cos + 2 * i + kLanes, twice.hi);
            store(table.sin + 2 * i, turned.lo), store(table.sin + 2 * i + kLanes, turned.hi);
        }
    }
}

// The same of [(B,) H, D].
DK_INLINE int64_t room_of_all(const Optional& v) { return v ? v.numel() + kLanes : 0; }
const float* copied_all(const Optional& v, float*& to) {
    if (!v) return nullptr;
    const float *const found = to, *const from = static_cast<const float*>(v.data);
    const int64_t columns = v.size(-1), heads = v.size(-2), rows = columns ? v.numel() / columns : 0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* const row = from + (v.ndim == 3 ? r / heads * v.stride[0] : 0) + r % heads * v.step(-2);
        for (int64_t i = 0; i < columns; i += kLanes)
            store(to + r * columns + i, gather(row + i * v.step(-1), v.step(-1), columns - i < kLanes ? columns - i : kLanes));
    }
    to += room_of_all(v);
    return found;
}

// f(i, n) for columns i.. of [begin, end), n of them: kLanes, but for the last.
template <class G>
DK_INLINE void walk(int64_t begin, int64_t end, G f) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
    if (i < end) f(i, static_cast<int>(end - i));
}

// How a head is normed: (x + bias - center - rest) * rstd.
struct Normed {
    float center = 0, rest = 0, rstd = 1;
};

// A head's columns, then * weight + shift.
template <class T, bool kUnit>
struct Head {
    const T* x;
    int64_t stride;
    Vectors with;
    Normed m = {};

    DK_INLINE F at(int64_t i, int n) const {  // zeros, or the bias, past n
        const F v = !kUnit ? gather(x + i * stride, stride, n) : n == kLanes ? load(x + i) : load(x + i, n);
        return with.bias ? v + load(with.bias + i) : v;
    }
    DK_INLINE F normed(int64_t i, int n) const {
        F h = fma(at(i, n) - splat(m.center), splat(m.rstd), splat(-m.rest * m.rstd));
        if (with.weight) h = product(h, load(with.weight + i));
        return with.shift ? h + load(with.shift + i) : h;
    }
};

// Where a head's results go: a row of memory; or a line, and codes of it once all of them are there.
template <class T>
struct Result {
    T* to;
    DK_INLINE Result(const Part& p, int64_t row, const float*, bool, float*) : to(static_cast<T*>(p.y) + row * p.columns()) {}
    DK_INLINE void put(int64_t i, int n, F v) { n == kLanes ? store(to + i, v) : store(to + i, v, n); }
    DK_INLINE void end() const {}
};
template <>
struct Result<int8_t> {
    Codes codes{};
    Line<float> of;
    const float* const less;
    const int64_t row;
    const bool half;
    DK_INLINE Result(const Part& p, int64_t r, const float* from, bool apart, float* line)
        : of(codes, line), less(from), row(r), half(apart) {
        codes.codes = static_cast<int8_t*>(p.y), codes.scales = p.scale, codes.norm = 1, codes.columns = p.columns();
    }
    DK_INLINE void put(int64_t i, int n, F v) {
        if (less) v -= load(less + i);
        if (n < kLanes) v = first(v, n);
        if (half && n < kLanes)
            store(of.at + i, v, n);  // behind is the other half
        else
            store(of.at + i, v);
        of.lo = larger(magnitude(v), of.lo);
    }
    DK_INLINE void end() const {
        store(of.at + (codes.columns + kLanes - 1) / kLanes * kLanes, F{});  // what lies there may be subnormal: slow
        of.code(codes, row);
    }
};

// All heads of a token of q, k or v, to a row of Y each.
template <class T, bool kUnit, class Y>
struct Token {
    const Qkv& c;
    const Part& part;
    const Vectors& with;
    const T* x;
    const int64_t sample, row;  // of y, its first head's

    DK_INLINE Token(const Qkv& call, const Part& p, const Vectors& v, int64_t of, int64_t token)
        : c(call),
          part(p),
          with(v),
          x(static_cast<const T*>(p.x.data) + of * p.x.stride[0] + token * p.x.stride[1]),
          sample(of),
          row((of * p.tokens() + token) * p.heads()) {}

    DK_INLINE Head<T, kUnit> head(int64_t h) const {
        const int64_t from = h * part.columns(), affine = c.across ? from : 0;
        const auto past = [](const float* p, int64_t n) __attribute__((always_inline)) { return p ? p + n : p; };
        return {x + h * part.x.stride[2], part.x.stride[3],
                Vectors{past(with.bias, from), past(with.weight, affine), past(with.shift, affine),
                        past(with.less, (part.less.ndim == 3 ? sample * part.heads() : 0) * part.columns() + from)}};
    }

    // The sums over `heads` of them of x + bias - center, and of its squares.
    DK_INLINE void sums(int64_t first_head, int64_t heads, float center, float& plain, float& square) const {
        const F about = splat(center);
        F total = {}, squares = {};
        for (int64_t h = first_head; h < first_head + heads; ++h) {
            const Head<T, kUnit> from = head(h);
            F d = {}, q = {};  // a head's own: long chains lose small terms
            walk(0, part.columns(), [&](int64_t i, int n) __attribute__((always_inline)) {
                const F e = n == kLanes ? from.at(i, n) - about : first(from.at(i, n) - about, n);
                d += e;
                q = fma(e, e, q);
            });
            total += d, squares += q;
        }
        plain = sum(total), square = sum(squares);
    }

    // Of the heads that share it.
    DK_INLINE Normed moments(int64_t first_head, int64_t heads) const {
        const float count = static_cast<float>(heads * part.columns());
        float plain, square, center = 0;
        if (c.center) {
            sums(first_head, heads, 0, plain, square);
            center = plain / count;
        }
        sums(first_head, heads, center, plain, square);
        const float rest = c.center ? plain / count : 0;  // what rounding left of the mean
        const float rounded = square / count - rest * rest;
        const float ms = rounded < 0 ? 0 : rounded;  // a NaN stays
        return {center, rest, 1.0f / __builtin_sqrtf(ms + c.eps)};
    }

    DK_INLINE void prepare(const Table& table) const {
        const int64_t columns = part.columns(), half = part.main ? c.half : 0;
        const bool norm = part.main && c.norm;
        Normed of[kAhead];
        [[maybe_unused]] alignas(64) float line[kCoded + kPair];
        if (norm && c.across) {
            const Normed all = moments(0, part.heads());
            for (Normed& m : of) m = all;
        }
        for (int64_t h = 0; h < part.heads(); ++h) {
            if (norm && !c.across && h % kAhead == 0)  // the next heads' at once: none waits for another's root
                for (int64_t k = 0; k < kAhead && h + k < part.heads(); ++k) of[k] = moments(h + k, 1);
            Head<T, kUnit> from = head(h);
            from.m = of[h % kAhead];
            Result<Y> to(part, row + h, from.with.less, c.apart, line);
            const auto put = [&](int64_t i, int n, F v) __attribute__((always_inline)) { to.put(i, n, v); };
            if (c.apart)
                walk(0, half, [&](int64_t i, int n) __attribute__((always_inline)) {
                    const F a = from.normed(i, n), b = from.normed(i + half, n);
                    const F cos = load(table.cos + i), sin = load(table.sin + i);
                    put(i, n, fma(a, cos, -product(b, sin)));
                    put(i + half, n, fma(b, cos, product(a, sin)));
                });
            else
                walk(0, 2 * half, [&](int64_t i, int n) __attribute__((always_inline)) {
                    const F v = from.normed(i, n);
                    put(i, n, fma(v, load(table.cos + i), product(swapped<1>(v), load(table.sin + i))));
                });
            walk(2 * half, columns, [&](int64_t i, int n) __attribute__((always_inline)) { put(i, n, from.normed(i, n)); });
            to.end();
        }
    }
};

// Tokens [begin, end) of all samples, each of up to `tokens`. Y: what q and k become.
template <class T, bool kUnit, class Y>
__attribute__((noinline)) void run(const Qkv& c, const Vectors* with, int64_t tokens, int64_t begin, int64_t end) {
    Table table;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t sample = r / tokens, token = r - sample * tokens;
        if (c.half) spread(c, sample, token, table);
        for (int i = 0; i < 2; ++i)
            if (token < c.parts[i].tokens()) Token<T, kUnit, Y>(c, c.parts[i], with[i], sample, token).prepare(table);
        if (c.count == 3 && token < c.parts[2].tokens())
            Token<T, kUnit, T>(c, c.parts[2], with[2], sample, token).prepare(table);
    }
}

int64_t bytes(Stream, Views, View, View, Optional, Optional q_bias, Optional k_bias, Optional v_bias, Optional q_weight,
              Optional k_weight, Optional q_shift, Optional k_shift, Optional, Optional, Text, Text, bool, double) {
    int64_t n = 0;
    for (const Optional& v : {q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift}) n += room(v);
    return n * static_cast<int64_t>(sizeof(float));
}

// A call that has been described, in scratch of that size.
template <bool kCodes>
Refusal prepare(const Qkv& c, void* scratch) {
    if (2 * c.half > kTable) return "cos and sin: more than 512 columns";
    bool unit = true;
    int64_t tokens = 0, elements = 0;
    for (int i = 0; i < c.count; ++i) {
        const Part& p = c.parts[i];
        unit = unit && (p.x.stride[3] == 1 || p.columns() == 1);
        tokens = p.tokens() > tokens ? p.tokens() : tokens;
        elements += p.heads() * p.columns();
    }
    const int64_t samples = c.parts[0].x.shape[0];
    if (samples * tokens * elements == 0) return nullptr;
    return for_value(Floats{}, c.parts[0].x.dtype, "q: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(unit, [&](auto is_unit) -> Refusal {
            auto* to = static_cast<float*>(scratch);
            Vectors with[3] = {};
            for (int i = 0; i < c.count; ++i) {
                const Part& p = c.parts[i];
                with[i] = {copied(p.bias, to), copied(p.weight, to), copied(p.shift, to), copied_all(p.less, to)};
            }
            auto body = [&](int64_t begin, int64_t end) {
                run<T, decltype(is_unit)::value, std::conditional_t<kCodes, int8_t, T>>(c, with, tokens, begin, end);
            };
            parallel_for(samples * tokens, row_grain(elements), body);
            return nullptr;
        });
    });
}

Refusal qkv_prep(Stream stream, Views out, View q, View k, Optional v, Optional q_bias, Optional k_bias, Optional v_bias,
                 Optional q_weight, Optional k_weight, Optional q_shift, Optional k_shift, Optional cos, Optional sin,
                 Text rope, Text norm, bool across, double eps) {
    Qkv c{};
    if (Refusal why = describe(c, out, q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope,
                               norm, across, eps))
        return why;
    return prepare<false>(c, stream.scratch);
}

int64_t bytes_of_codes(Stream stream, Views out, View q, View k, Optional v, Optional q_bias, Optional k_bias, Optional v_bias,
                       Optional q_weight, Optional k_weight, Optional q_shift, Optional k_shift, Optional cos, Optional sin,
                       Optional center, Text rope, Text norm, bool across, double eps) {
    return bytes(stream, out, q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm,
                 across, eps) +
           room_of_all(center) * static_cast<int64_t>(sizeof(float));
}

Refusal qkv_quantize(Stream stream, Views out, View q, View k, Optional v, Optional q_bias, Optional k_bias, Optional v_bias,
                     Optional q_weight, Optional k_weight, Optional q_shift, Optional k_shift, Optional cos, Optional sin,
                     Optional center, Text rope, Text norm, bool across, double eps) {
    Qkv c{};
    if (Refusal why = describe(c, out, q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope,
                               norm, across, eps, true))
        return why;
    if (q.shape[3] > kCoded) return "q, k: more than 256 columns of a head";
    if (center && (center.dtype != DType::f32 || center.ndim < 2 || center.ndim > 3 || center.size(-1) != k.shape[3] ||
                   center.size(-2) != k.shape[2] || (center.ndim == 3 && center.shape[0] != k.shape[0])))
        return "center: not float32 [H, D] or [B, H, D], as k has them";
    c.parts[1].less = center;
    return prepare<true>(c, stream.scratch);
}

}  // namespace
}  // namespace dk

using dk::qkv_prep, dk::qkv_quantize;
DK_ENTRY_WITH_SCRATCH(qkv_prep, "out q k v q_bias k_bias v_bias q_weight k_weight q_shift k_shift cos sin rope norm across eps",
                      dk::bytes)
DK_ENTRY_WITH_SCRATCH(qkv_quantize,
                      "out q k v q_bias k_bias v_bias q_weight k_weight q_shift k_shift cos sin center rope norm across eps",
                      dk::bytes_of_codes)
