// What the norms' kernels share: the call, the folded affine, a row's elements, its statistics, and y.
#pragma once

#include "../broadcast.h"
#include "../dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace dk {
namespace {

constexpr int kColumns = 4096;                  // columns whose (a, b) is kept: 32 KiB
constexpr int64_t kBlockOfWide = 1024;          // of a wider row: there is no keeping, and the first cache holds more than that
constexpr int64_t kChain = 1024;                // columns summed before the sum joins the others: long chains lose small terms
constexpr int64_t kSerialElements = 32 * 1024;  // work below this is not worth a second thread

struct Operand {
    View view;
    Rows rows;
    bool present = false;

    // f(i, v) with the vector v of columns begin + i on, zeros past n, of the row at `at`
    template <class G>
    DK_INLINE void each(int64_t at, int64_t begin, int64_t n, G f) const {
        switch (view.dtype) {
            case DType::f32: return walk(static_cast<const float*>(view.data), at, begin, n, f);
            case DType::f16: return walk(static_cast<const f16*>(view.data), at, begin, n, f);
            default: return walk(static_cast<const bf16*>(view.data), at, begin, n, f);
        }
    }
    DK_INLINE F load_at(int64_t at, int64_t column, int n) const {
        // As each() would, but for its loops.
        if (n == kLanes && view.step(-1) == 1) switch (view.dtype) {
                case DType::f32: return load(static_cast<const float*>(view.data) + at + column);
                case DType::f16: return load(static_cast<const f16*>(view.data) + at + column);
                default: return load(static_cast<const bf16*>(view.data) + at + column);
            }
        F out = {};
        if (n > 0) each(at, column, n, [&](int64_t, F v) __attribute__((always_inline)) { out = v; });
        return out;
    }

  private:
    template <class T, class G>
    DK_INLINE void walk(const T* data, int64_t at, int64_t begin, int64_t n, G f) const {
        const int64_t stride = view.step(-1);
        const T* const p = data + at + begin * stride;
        int64_t i = 0;
        if (stride == 1)
            for (; i + kLanes <= n; i += kLanes) f(i, load(p + i));
        for (; i < n; i += kLanes) f(i, gather(p + i * stride, stride, n - i < kLanes ? static_cast<int>(n - i) : kLanes));
    }
};

// A norm over rows of D columns, and the affine map that follows it.
struct Norm {
    View x;
    Rows x_rows;
    Operand weight, bias, scale, shift;
    int64_t columns;
    float eps;
    bool center, inside;
};

DK_INLINE Refusal describe(Operand& o, const Optional& given, const View& x) {
    if (!given) return nullptr;
    if (given.dtype > DType::bf16) return "an operand is not float32, float16 or bfloat16";
    if (!rows_of(given, x, o.rows)) return "an operand's shape does not fit x";
    o.view = given;
    o.present = true;
    return nullptr;
}

DK_INLINE Refusal describe(Norm& c, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
                           double eps, Text eps_mode) {
    if (!rows_of(x, c.x_rows)) return "x: fewer than 1 or more than 8 dimensions";
    c.x = x;
    c.columns = x.size(-1);
    c.eps = static_cast<float>(eps);
    c.center = norm == "layer";
    c.inside = eps_mode == "inside";
    if (!c.center && !(norm == "rms")) return "norm: neither 'layer' nor 'rms'";
    if (!c.inside && !(eps_mode == "outside")) return "eps_mode: neither 'inside' nor 'outside'";
    if (!(eps >= 0)) return "eps: negative";
    const Optional given[] = {weight, bias, scale, shift};
    Operand* const operands[] = {&c.weight, &c.bias, &c.scale, &c.shift};
    for (int k = 0; k < 4; ++k)
        if (Refusal why = describe(*operands[k], given[k], x)) return why;
    return nullptr;
}

DK_INLINE int64_t block_of(int64_t columns) { return columns <= kColumns ? kColumns : kBlockOfWide; }

// How many rows are worth a thread of their own.
DK_INLINE int64_t row_grain(int64_t columns) { return (kSerialElements + columns - 1) / columns; }

// The folded affine of up to kColumns columns, in T's order: y = h * a + b.
template <class T>
struct Affine {
    alignas(64) float a[kColumns], b[kColumns];
    int64_t key[4] = {-1, -1, -1, -1};
    bool offset = true;       // whether there is a b
    const float* factor = a;  // a, or the weight itself where it is all there is and lies as it is wanted

    void prepare(const Norm& c, int64_t row, int64_t begin, int64_t n) {
        const Operand* operands[4] = {&c.weight, &c.bias, &c.scale, &c.shift};
        int64_t at[4];
        bool same = begin == 0 && n == c.columns;  // one block holds the row: it may serve the next row too
        for (int k = 0; k < 4; ++k) {
            at[k] = operands[k]->present ? operands[k]->rows.offset(row) : 0;
            same = same && key[k] == at[k];
        }
        if (same) return;
        const auto set = [&](const Operand& o, int64_t start, float* to, float otherwise) __attribute__((always_inline)) {
            if (o.present)
                return o.each(start, begin, n, [to](int64_t i, F v) __attribute__((always_inline)) { store(to + i, v); });
            for (int64_t i = 0; i < n; i += kLanes) store(to + i, splat(otherwise));
        };
        if (n % kPair) {  // sums may run over whole pairs
            float* const past = a + n / kPair * kPair;
            store(past, F{}), store(past + kLanes, F{});
        }
        const View& w = c.weight.view;
        const bool alone = c.weight.present && !c.scale.present && !kEvenOdd<T> && w.dtype == DType::f32 && w.step(-1) == 1;
        factor = alone && n % kPair == 0 ? static_cast<const float*>(w.data) + at[0] + begin : a;
        if (factor == a) set(c.weight, at[0], a, 1);
        offset = c.bias.present || c.shift.present;
        if (offset) set(c.bias, at[1], b, 0);
        if (c.scale.present)
            c.scale.each(at[2], begin, n, [this](int64_t i, F v) __attribute__((always_inline)) {
                store(a + i, (1 + v) * load(a + i));
                if (offset) store(b + i, (1 + v) * load(b + i));
            });
        if (c.shift.present)
            c.shift.each(at[3], begin, n,
                         [this](int64_t i, F v) __attribute__((always_inline)) { store(b + i, load(b + i) + v); });
        if (kEvenOdd<T>)
            for (int64_t i = 0; i < n; i += kPair)
                for (float* p : {a, b}) {
                    const Pair v = in_order(load(p + i), load(p + i + kLanes), T{});
                    store(p + i, v.lo), store(p + i + kLanes, v.hi);
                }
        for (int k = 0; k < 4; ++k) key[k] = begin == 0 ? at[k] : -1;
    }
};

template <class T, bool kUnit>
struct Row {
    const T* p;
    int64_t stride;

    DK_INLINE Row(const View& v, const Rows& rows, int64_t r)
        : p(static_cast<const T*>(v.data) + rows.offset(r)), stride(v.step(-1)) {}
    DK_INLINE explicit Row(const T* dense) : p(dense), stride(1) {}

    DK_INLINE Pair at(int64_t i) const { return kUnit ? load_pair(p + i) : some(i, kPair); }
    DK_INLINE Pair some(int64_t i, int n) const {  // the first n elements from i on, then zeros
        T line[kPair] = {};
        if (kUnit)
            std::memcpy(line, p + i, n * sizeof(T));
        else
            for (int k = 0; k < n; ++k) line[k] = p[(i + k) * stride];
        return load_pair(line);
    }
};

// The means over a row of x - center and of its square. Meanwhile y's lines are asked for.
struct Means {
    float rest, square;
};

template <class T, bool kUnit, class Y>
Means means(const Row<T, kUnit>& row, int64_t n, float about, Y* y) {
    const int64_t pairs = n / kPair * kPair;
    const F center = splat(about);
    const auto add = [](F e, F& d, F& q) __attribute__((always_inline)) {
        d += e;
        q = fma(e, e, q);
    };
    F d = {}, q = {};
    for (int64_t from = 0; from < pairs; from += kChain) {
        const int64_t to = pairs - from < kChain ? pairs : from + kChain;
        F d0 = {}, d1 = {}, d2 = {}, d3 = {}, q0 = {}, q1 = {}, q2 = {}, q3 = {};
        int64_t i = from;
        for (; i + 2 * kPair <= to; i += 2 * kPair) {
            prefetch_for_write(y + i, 2 * kPair * sizeof(Y));
            const Pair x = row.at(i), z = row.at(i + kPair);
            add(x.lo - center, d0, q0), add(x.hi - center, d1, q1);
            add(z.lo - center, d2, q2), add(z.hi - center, d3, q3);
        }
        if (i < to) {
            const Pair x = row.at(i);
            add(x.lo - center, d0, q0), add(x.hi - center, d1, q1);
        }
        d += (d0 + d1) + (d2 + d3);
        q += (q0 + q1) + (q2 + q3);
    }
    if (const int last = static_cast<int>(n - pairs)) {  // lanes past the end hold zeros, not differences
        const int lo = kEvenOdd<T> ? (last + 1) / 2 : last < kLanes ? last : kLanes;
        const Pair x = row.some(pairs, last);
        F d0 = {}, q0 = {};
        add(first(x.lo - center, lo), d0, q0), add(first(x.hi - center, last - lo), d0, q0);
        d += d0, q += q0;
    }
    const float count = static_cast<float>(n);
    return {sum(d) / count, sum(q) / count};
}

// x's mean is center + rest, in two floats: one float of a large mean is off by more than y may be.
struct Moments {
    float center, rest, ms, divisor;
};

// One walk, about the mean of the first columns. Where they are not like the row (the mean is further from them than a
// standard deviation), the squares would cancel, and a second walk goes about the mean that the first has found.
template <class T, bool kUnit, class Y>
DK_INLINE Moments moments(const Norm& c, const Row<T, kUnit>& row, Y* y) {
    float center = 0;
    if (c.center) {
        const int some = c.columns < kPair ? static_cast<int>(c.columns) : kPair;
        const Pair x = some == kPair ? row.at(0) : row.some(0, some);
        center = sum(x.lo + x.hi) / static_cast<float>(some);
    }
    Means m = means(row, c.columns, center, y);
    if (c.center && 2 * m.rest * m.rest > m.square) {
        center += m.rest;
        m = means(row, c.columns, center, y);
    }
    if (!c.center) m.rest = 0;
    const float rounded = m.square - m.rest * m.rest;
    const float ms = rounded < 0 ? 0 : rounded;  // of equal columns; a NaN stays
    return {center, m.rest, ms, c.inside ? __builtin_sqrtf(ms + c.eps) : __builtin_sqrtf(ms) + c.eps};
}

// A row's results, from its moments: put(i, v, n) takes a pair in T's order from column i on, kPair
// columns or, at the end, the first n; `ahead(i)` asks for what will be read next, from column i on.
template <class T, bool kUnit, class Put, class Ahead>
DK_INLINE void modulated(const Norm& c, Affine<T>& affine, int64_t r, const Row<T, kUnit>& row, const Moments& m, Put put,
                         Ahead ahead) {
    const F center = splat(m.center), rstd = splat(1.0f / m.divisor), less = splat(-m.rest / m.divisor);
    const int64_t block = block_of(c.columns);
    for (int64_t from = 0; from < c.columns; from += block) {
        const int64_t n = c.columns - from < block ? c.columns - from : block;
        affine.prepare(c, r, from, n);
        const bool near = c.columns <= kColumns;  // what lies further ahead would not stay
        const auto walk = [&](auto offset) __attribute__((always_inline)) {
            const auto value = [&](Pair v, int64_t i) __attribute__((always_inline)) {
                const F lo = fma(v.lo - center, rstd, less), hi = fma(v.hi - center, rstd, less);
                const F a0 = load(affine.factor + i), a1 = load(affine.factor + i + kLanes);
                if (!decltype(offset)::value) return Pair{lo * a0, hi * a1};
                return Pair{fma(lo, a0, load(affine.b + i)), fma(hi, a1, load(affine.b + i + kLanes))};
            };
            int64_t i = 0;
            for (; i + kPair <= n; i += kPair) {
                if (near) ahead(from + i);
                put(from + i, value(row.at(from + i), i), kPair);
            }
            if (const int some = static_cast<int>(n - i)) put(from + i, value(row.some(from + i, some), i), some);
        };
        affine.offset ? walk(Tag<1>{}) : walk(Tag<0>{});
    }
}
template <class T, bool kUnit, class Ahead>
DK_INLINE void modulate(const Norm& c, Affine<T>& affine, int64_t r, const Row<T, kUnit>& row, const Moments& m, T* y,
                        Ahead ahead) {
    const auto put = [y](int64_t i, Pair v, int n)
                         __attribute__((always_inline)) { n == kPair ? store_pair(y + i, v) : store_some(y + i, v, n); };
    modulated(c, affine, r, row, m, put, ahead);
}

}  // namespace
}  // namespace dk
