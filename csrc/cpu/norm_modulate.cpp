// y = ((x - mean) / d * weight + bias) * (1 + scale) + shift over rows of D
//
// Idea: weight, bias, scale and shift fold into one pair (a, b) a column, kept in L1 while rows share it. A row is walked
// twice: for its statistics, about a value near its mean, while y's lines are asked for; then for y, while the next row's
// lines are. Streaming stores were slower at every size.
// Takes: x and y float32, float16 or bfloat16, alike; operands of any of these; any strides, any D >= 1.
// Floor: 2 walks over memory. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/norm_modulate.cpp
#include "../broadcast.h"
#include "../dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace dk {
namespace {

constexpr int kColumns = 4096;                  // columns whose (a, b) is kept: 32 KiB
constexpr int64_t kChain = 1024;                // columns summed before the sum joins the others: long chains lose small terms
constexpr int64_t kSerialElements = 32 * 1024;  // work below this is not worth a second thread

struct Operand {
    View view;
    Rows rows;
    bool present = false;

    // columns [begin, begin + n) of row `at`, by vector
    DK_INLINE F load_at(int64_t at, int64_t column, int n) const {
        const int64_t stride = view.step(-1), i = at + column * stride;
        switch (view.dtype) {
            case DType::f32: return read(static_cast<const float*>(view.data) + i, stride, n);
            case DType::f16: return read(static_cast<const f16*>(view.data) + i, stride, n);
            default: return read(static_cast<const bf16*>(view.data) + i, stride, n);
        }
    }

  private:
    template <class T>
    static DK_INLINE F read(const T* p, int64_t stride, int n) {
        if (stride != 1) return gather(p, stride, n);
        return n == kLanes ? load(p) : load(p, n);
    }
};

struct Call {
    View y, x;
    Rows x_rows;
    Operand weight, bias, scale, shift;
    int64_t columns;
    float eps;
    bool center, inside;
};

// The folded affine of up to kColumns columns, in T's order: y = h * a + b.
template <class T>
struct Affine {
    alignas(64) float a[kColumns], b[kColumns];
    int64_t key[4] = {-1, -1, -1, -1};

    void prepare(const Call& c, int64_t row, int64_t begin, int64_t n) {
        const Operand* operands[4] = {&c.weight, &c.bias, &c.scale, &c.shift};
        int64_t at[4];
        bool same = begin == 0 && n == c.columns;  // one block holds the row: it may serve the next row too
        for (int k = 0; k < 4; ++k) {
            at[k] = operands[k]->present ? operands[k]->rows.offset(row) : 0;
            same = same && key[k] == at[k];
        }
        if (same) return;
        for (int64_t i = 0; i < n; i += kPair) {
            F factor[2], offset[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t at_column = begin + i + half * kLanes, left = n - i - half * kLanes;
                const int m = left < 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
                F f = splat(1), o = splat(0);
                if (c.weight.present) f = c.weight.load_at(at[0], at_column, m);
                if (c.bias.present) o = c.bias.load_at(at[1], at_column, m);
                if (c.scale.present) {
                    const F s = 1 + c.scale.load_at(at[2], at_column, m);
                    f *= s;
                    o *= s;
                }
                if (c.shift.present) o += c.shift.load_at(at[3], at_column, m);
                factor[half] = f;
                offset[half] = o;
            }
            const Pair f = in_order(factor[0], factor[1], T{}), o = in_order(offset[0], offset[1], T{});
            store(a + i, f.lo), store(a + i + kLanes, f.hi);  // kColumns is a multiple of kPair: the last pair fits
            store(b + i, o.lo), store(b + i + kLanes, o.hi);
        }
        for (int k = 0; k < 4; ++k) key[k] = begin == 0 ? at[k] : -1;
    }
};

template <class T, bool kUnit>
struct Row {
    const T* p;
    int64_t stride;

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

template <class T, bool kUnit>
Means means(const Row<T, kUnit>& row, int64_t n, float about, T* y) {
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
            prefetch_for_write(y + i, 2 * kPair * sizeof(T));
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
    float center, rest, divisor;
};

// One walk, about the mean of the first columns. Where they are not like the row (the mean is further from them than a
// standard deviation), the squares would cancel, and a second walk goes about the mean that the first has found.
template <class T, bool kUnit>
DK_INLINE Moments moments(const Call& c, const Row<T, kUnit>& row, T* y) {
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
    return {center, m.rest, c.inside ? __builtin_sqrtf(ms + c.eps) : __builtin_sqrtf(ms) + c.eps};
}

template <class T, bool kUnit>
void normalize(const Call& c, int64_t begin, int64_t end) {
    Affine<T> affine;
    for (int64_t r = begin; r < end; ++r) {
        const T* const x = static_cast<const T*>(c.x.data);
        const Row<T, kUnit> row{x + c.x_rows.offset(r), c.x.step(-1)};
        const T* const next = kUnit && r + 1 < end ? x + c.x_rows.offset(r + 1) : row.p;
        T* const y = static_cast<T*>(c.y.data) + r * c.columns;
        const Moments m = moments(c, row, y);
        const F center = splat(m.center), rstd = splat(1.0f / m.divisor), less = splat(-m.rest / m.divisor);
        for (int64_t from = 0; from < c.columns; from += kColumns) {
            const int64_t n = c.columns - from < kColumns ? c.columns - from : kColumns;
            affine.prepare(c, r, from, n);
            const auto value = [&](Pair v, int64_t i) __attribute__((always_inline)) {
                return Pair{fma(fma(v.lo - center, rstd, less), load(affine.a + i), load(affine.b + i)),
                            fma(fma(v.hi - center, rstd, less), load(affine.a + i + kLanes), load(affine.b + i + kLanes))};
            };
            // The statistics keep the memory waiting, so the next row is asked for here.
            const auto ahead = [&](int64_t i) __attribute__((always_inline)) { prefetch(next + from + i, kPair * sizeof(T)); };
            int64_t i = 0;
            for (; i + kPair <= n; i += kPair) ahead(i), store_pair(y + from + i, value(row.at(from + i), i));
            if (i < n) {
                const int last = static_cast<int>(n - i);
                T line[kPair];
                store_pair(line, value(row.some(from + i, last), i));
                std::memcpy(y + from + i, line, last * sizeof(T));
            }
        }
    }
}

Refusal norm_modulate(Stream, View y, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
                      double eps, Text eps_mode) {
    Call c{};
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (!rows_of(x, c.x_rows)) return "x: fewer than 1 or more than 8 dimensions";
    c.y = y, c.x = x;
    c.columns = x.size(-1);
    c.eps = static_cast<float>(eps);
    c.center = norm == "layer";
    c.inside = eps_mode == "inside";
    if (!c.center && !(norm == "rms")) return "norm: neither 'layer' nor 'rms'";
    if (!c.inside && !(eps_mode == "outside")) return "eps_mode: neither 'inside' nor 'outside'";
    if (!(eps >= 0)) return "eps: negative";
    const Optional given[] = {weight, bias, scale, shift};
    Operand* const operands[] = {&c.weight, &c.bias, &c.scale, &c.shift};
    for (int k = 0; k < 4; ++k) {
        if (!given[k]) continue;
        if (given[k].dtype > DType::bf16) return "an operand is not float32, float16 or bfloat16";
        if (!rows_of(given[k], x, operands[k]->rows)) return "an operand's shape does not fit x";
        operands[k]->view = given[k];
        operands[k]->present = true;
    }
    const int64_t total = x.numel();
    if (total == 0) return nullptr;
    return for_dtype(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const int64_t rows = total / c.columns;
        const int64_t grain = (kSerialElements + c.columns - 1) / c.columns;
        return for_bool(x.step(-1) == 1 || c.columns == 1, [&](auto unit) -> Refusal {
            auto body = [&](int64_t begin, int64_t end) { normalize<T, decltype(unit)::value>(c, begin, end); };
            parallel_for(rows, grain, body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::norm_modulate;
DK_ENTRY(norm_modulate, "out x scale shift weight bias norm eps eps_mode")
