// G = (dh - mean(dh) - k h mean(dh h)) / d + residual, dh = grad (1 + scale) weight; the operands' gradients are sums over rows
//
// Idea: a row is walked three times in the first cache: for its statistics, which are cheaper computed anew than read; for
// the means of dh and dh h; for G. While the rows share their operands, P = sum grad and Q = sum grad h are all that is kept:
// d shift = P, d scale = weight Q + bias P, d bias = (1 + scale) P, d weight = (1 + scale) Q; d gate has its own, sum G delta.
// Rows are cut into chunks by the shape alone. A chunk finishes the sums that lie within it and leaves what goes over its
// ends in scratch; the second step adds these up, in the chunks' order: any number of threads gives the same bits.
// Takes: grad, x, residual and d x float32, float16 or bfloat16, alike; delta and operands of any of these; any strides.
// Floor: a read of grad, x (residual, delta) and a write of d x (d delta). Compile: g++ -std=c++20 -O3 -march=native
// -DDK_RUNG=native -Icsrc -c csrc/cpu/norm_backward.cpp
#include "norm.h"

namespace dk {
namespace {

constexpr int64_t kChunks = 64;  // at most so many, and so many threads
constexpr int kSums = 5;         // scale, shift, weight, bias, gate
constexpr int kGate = 4;

struct Sum {
    bool wanted = false;
    View out{};
    int64_t repeat = 1;  // rows that one row of the operand gathers
    int slot = 0;        // which of the wanted ones
};

struct Call {
    Norm norm, gate;
    View grad, residual, delta;
    Rows grad_rows, residual_rows, delta_rows;
    Operand delta_as_operand;
    View dx, d_delta;
    Sum sums[kSums];
    bool has_residual, has_delta, wants_x, wants_delta;
    int wanted_sums;
    int64_t rows, chunk, width;  // width: columns, rounded up to whole pairs
    float* scratch;

    DK_INLINE int64_t chunks() const { return (rows + chunk - 1) / chunk; }
    // A chunk's own memory: P, Q, sum G delta; then for each wanted sum what began before the chunk, and what began in it.
    DK_INLINE int64_t chunk_floats() const { return (3 + 2 * wanted_sums) * width; }
    DK_INLINE float* part(int64_t k, int row) const { return scratch + k * chunk_floats() + row * width; }
    DK_INLINE float* part(int64_t k, const Sum& s, bool began) const { return part(k, 3 + 2 * s.slot + began); }
};

DK_INLINE void plan(Call& c, const View& x) {
    c.norm.columns = x.size(-1);
    c.rows = c.norm.columns ? x.numel() / c.norm.columns : 0;
    c.width = (c.norm.columns + 31) / 32 * 32;
    const int64_t few = (c.rows + kChunks - 1) / kChunks, grain = row_grain(c.norm.columns ? c.norm.columns : 1);
    c.chunk = few > grain ? few : grain;
}

// n elements of a pair that is in T's order, to an output of any dtype.
template <class T>
DK_INLINE void emit(const View& out, int64_t at, Pair v, int n) {
    const Pair flat = as_it_lies(v, T{});
    const Pair calm{quiet(flat.lo), quiet(flat.hi)};
    const int lo = n < kLanes ? n : kLanes;
    const auto both = [&](auto* p) __attribute__((always_inline)) { store(p, calm.lo, lo), store(p + lo, calm.hi, n - lo); };
    switch (out.dtype) {
        case DType::f32: return both(static_cast<float*>(out.data) + at);
        case DType::f16: return both(static_cast<f16*>(out.data) + at);
        default: return both(static_cast<bf16*>(out.data) + at);
    }
}

template <class T>
DK_INLINE void emit_row(const View& out, int64_t row, int64_t columns, const float* from) {
    for (int64_t i = 0; i < columns; i += kPair) {
        const int n = columns - i < kPair ? static_cast<int>(columns - i) : kPair;
        emit<T>(out, row * columns + i, Pair{load(from + i), load(from + i + kLanes)}, n);
    }
}

// Columns of an operand in T's order; `otherwise` where it is absent.
template <class T>
DK_INLINE Pair operand(const Operand& o, int64_t at, int64_t column, int n, float otherwise) {
    if (!o.present) return {splat(otherwise), splat(otherwise)};
    const int lo = n < kLanes ? n : kLanes;
    return in_order(o.load_at(at, column, lo), o.load_at(at, column + lo, n - lo), T{});
}

// What the chunk has added up goes to the operands' sums; row `last` was the last of a stretch that shares all operands.
template <class T>
void settle(const Call& c, int64_t k, int64_t last, bool (&fresh)[kSums][2]) {
    const Norm& norm = c.norm;
    const int64_t columns = norm.columns, begin = k * c.chunk;
    const float *const p = c.part(k, 0), *const q = c.part(k, 1), *const e = c.part(k, 2);
    const int64_t weight = norm.weight.present ? norm.weight.rows.offset(last) : 0;
    const int64_t bias = norm.bias.present ? norm.bias.rows.offset(last) : 0;
    const int64_t scale = norm.scale.present ? norm.scale.rows.offset(last) : 0;
    for (int which = 0; which < kSums; ++which) {
        const Sum& s = c.sums[which];
        if (!s.wanted) continue;
        const int64_t group = last / s.repeat;
        const bool began = group * s.repeat >= begin;
        float* const to = c.part(k, s, began);
        for (int64_t i = 0; i < columns; i += kPair) {
            const int n = columns - i < kPair ? static_cast<int>(columns - i) : kPair;
            const Pair sp{load(p + i), load(p + i + kLanes)}, sq{load(q + i), load(q + i + kLanes)};
            Pair v = sp;
            if (which == 0) {
                const Pair w = operand<T>(norm.weight, weight, i, n, 1), b = operand<T>(norm.bias, bias, i, n, 0);
                v = {fma(w.lo, sq.lo, b.lo * sp.lo), fma(w.hi, sq.hi, b.hi * sp.hi)};
            } else if (which == 2 || which == 3) {
                const Pair m = operand<T>(norm.scale, scale, i, n, 0), u = which == 2 ? sq : sp;
                v = {fma(m.lo, u.lo, u.lo), fma(m.hi, u.hi, u.hi)};
            } else if (which == kGate) {
                v = {load(e + i), load(e + i + kLanes)};
            }
            if (!fresh[which][began]) v = {v.lo + load(to + i), v.hi + load(to + i + kLanes)};
            store(to + i, v.lo), store(to + i + kLanes, v.hi);
        }
        fresh[which][began] = false;
        if (began && (last + 1) % s.repeat == 0) {  // it lies within the chunk
            emit_row<T>(s.out, group, columns, to);
            fresh[which][1] = true;
        }
    }
}

template <class T, bool kUnit, bool kDelta>
DK_INLINE void one_row(const Call& c, Affine<T>& affine, Affine<T>& gate, int64_t k, int64_t r, int64_t next) {
    const Norm& norm = c.norm;
    const int64_t columns = norm.columns, block = block_of(columns);
    const Row<T, kUnit> x(norm.x, norm.x_rows, r), g(c.grad, c.grad_rows, r);
    T* const dx = c.wants_x ? static_cast<T*>(c.dx.data) + r * columns : nullptr;
    const Moments m = moments(norm, x, dx);
    const float inverse = 1.0f / m.divisor;
    const F center = splat(m.center), rstd = splat(inverse), less = splat(-m.rest * inverse);
    const auto normed = [&](F v) __attribute__((always_inline)) { return fma(v - center, rstd, less); };
    float *const p = c.part(k, 0), *const q = c.part(k, 1), *const e = c.part(k, 2);
    const bool sums = c.wanted_sums > 0, last_walk = c.wants_x || kDelta;

    F total = {}, product = {};
    for (int64_t from = 0; from < columns; from += block) {
        const int64_t n = columns - from < block ? columns - from : block;
        affine.prepare(norm, r, from, n);
        F t0 = {}, t1 = {}, u0 = {}, u1 = {};  // a block's own: long chains lose small terms
        const auto add = [&](Pair xv, Pair gv, int64_t i) __attribute__((always_inline)) {
            const F h0 = normed(xv.lo), h1 = normed(xv.hi);
            const F d0 = gv.lo * load(affine.factor + i), d1 = gv.hi * load(affine.factor + i + kLanes);
            t0 += d0, t1 += d1, u0 = fma(d0, h0, u0), u1 = fma(d1, h1, u1);
            if (sums) {
                float *const pi = p + from + i, *const qi = q + from + i;
                store(pi, load(pi) + gv.lo), store(pi + kLanes, load(pi + kLanes) + gv.hi);
                store(qi, fma(gv.lo, h0, load(qi))), store(qi + kLanes, fma(gv.hi, h1, load(qi + kLanes)));
            }
        };
        int64_t i = 0;
        for (; i + kPair <= n; i += kPair) add(x.at(from + i), g.at(from + i), i);
        if (const int some = static_cast<int>(n - i)) add(x.some(from + i, some), g.some(from + i, some), i);
        total += t0 + t1, product += u0 + u1;
    }
    if (!last_walk) return;
    const float count = static_cast<float>(columns), root = __builtin_sqrtf(m.ms);
    const float kink = norm.inside ? 1.0f : m.ms == 0 ? 0.0f : m.divisor / root;
    const F mean = splat(norm.center ? sum(total) / count : 0.0f), slope = splat(kink * (sum(product) / count));

    const Row<T, kUnit> next_x(norm.x, norm.x_rows, next), next_g(c.grad, c.grad_rows, next);
    const Row<T, kUnit> residual = c.has_residual ? Row<T, kUnit>(c.residual, c.residual_rows, r) : x;
    const bool same = kDelta && c.delta.dtype == norm.x.dtype;
    const Row<T, kUnit> delta = same ? Row<T, kUnit>(c.delta, c.delta_rows, r) : x;
    const int64_t delta_at = kDelta ? c.delta_rows.offset(r) : 0;
    for (int64_t from = 0; from < columns; from += block) {
        const int64_t n = columns - from < block ? columns - from : block;
        if (columns > block) affine.prepare(norm, r, from, n);
        if (kDelta) gate.prepare(c.gate, r, from, n);
        const auto step = [&](int64_t i, auto whole, int some) __attribute__((always_inline)) {
            constexpr bool kWhole = decltype(whole)::value;
            const auto read = [&](const Row<T, kUnit>& row) __attribute__((always_inline)) {
                return kWhole ? row.at(from + i) : row.some(from + i, some);
            };
            const Pair xv = read(x), gv = read(g);
            Pair G{rstd * (fma(gv.lo, load(affine.factor + i), -mean) - normed(xv.lo) * slope),
                   rstd * (fma(gv.hi, load(affine.factor + i + kLanes), -mean) - normed(xv.hi) * slope)};
            if (c.has_residual) {
                const Pair v = read(residual);
                G = {G.lo + v.lo, G.hi + v.hi};
            }
            if (c.wants_x) kWhole ? store_pair(dx + from + i, G) : store_some(dx + from + i, G, some);
            if (kDelta) {
                if (c.sums[kGate].wanted) {
                    const Pair v = same ? read(delta) : operand<T>(c.delta_as_operand, delta_at, from + i, some, 0);
                    float* const at = e + from + i;
                    store(at, fma(G.lo, v.lo, load(at))), store(at + kLanes, fma(G.hi, v.hi, load(at + kLanes)));
                }
                if (c.wants_delta) {
                    const Pair v{G.lo * load(gate.factor + i), G.hi * load(gate.factor + i + kLanes)};
                    if (kWhole && same)
                        store_pair(static_cast<T*>(c.d_delta.data) + r * columns + from + i, v);
                    else
                        emit<T>(c.d_delta, r * columns + from + i, v, some);
                }
            }
        };
        int64_t i = 0;
        for (; i + kPair <= n; i += kPair) {
            if (kUnit) prefetch(next_x.p + from + i, kPair * sizeof(T)), prefetch(next_g.p + from + i, kPair * sizeof(T));
            step(i, Tag<1>{}, kPair);
        }
        if (i < n) step(i, Tag<0>{}, static_cast<int>(n - i));
    }
}

template <class T, bool kUnit, bool kDelta>
void run(const Call& c, int64_t k0, int64_t k1) {
    Affine<T> affine, gate;
    const Operand* const operands[] = {&c.norm.scale, &c.norm.shift, &c.norm.weight, &c.norm.bias, &c.gate.weight};
    for (int64_t k = k0; k < k1; ++k) {
        const int64_t begin = k * c.chunk, end = begin + c.chunk < c.rows ? begin + c.chunk : c.rows;
        bool fresh[kSums][2];
        for (auto& f : fresh) f[0] = f[1] = true;
        for (int64_t r = begin; r < end; ++r) {
            bool changes = r == begin;
            for (const Operand* o : operands) changes = changes || (o->present && r % o->rows.repeat == 0);
            if (changes && c.wanted_sums) {
                if (r != begin) settle<T>(c, k, r - 1, fresh);
                std::memset(c.part(k, 0), 0, 3 * c.width * sizeof(float));
            }
            one_row<T, kUnit, kDelta>(c, affine, gate, k, r, r + 1 < end ? r + 1 : r);
        }
        if (c.wanted_sums) settle<T>(c, k, end - 1, fresh);
    }
}

// The groups that several chunks share: items are blocks of columns of each group of each wanted sum.
template <class T>
void join(const Call& c, int64_t begin, int64_t end) {
    const int64_t blocks = (c.norm.columns + kColumns - 1) / kColumns;
    int64_t first = 0;
    for (const Sum& s : c.sums) {
        if (!s.wanted) continue;
        const int64_t items = c.rows / s.repeat * blocks;
        for (int64_t item = begin > first ? begin - first : 0; item < items && first + item < end; ++item) {
            const int64_t group = item / blocks, from = item % blocks * kColumns;
            const int64_t k0 = group * s.repeat / c.chunk, k1 = ((group + 1) * s.repeat - 1) / c.chunk;
            if (k0 == k1) continue;
            const int64_t to = from + kColumns < c.norm.columns ? from + kColumns : c.norm.columns;
            for (int64_t i = from; i < to; i += kPair) {
                Pair v = {};
                for (int64_t k = k0; k <= k1; ++k) {
                    const float* const part = c.part(k, s, k == k0) + i;
                    v = {v.lo + load(part), v.hi + load(part + kLanes)};
                }
                emit<T>(s.out, group * c.norm.columns + i, v, to - i < kPair ? static_cast<int>(to - i) : kPair);
            }
        }
        first += items;
    }
}

int64_t bytes(Stream, Views, View, View x, Optional, Optional, Optional, Optional, Text, double, Text, Optional, Optional,
              Optional, int64_t wanted) {
    if (x.ndim < 1 || !(wanted & 0b1011110)) return 0;
    Call c{};
    plan(c, x);
    for (int bit : {1, 2, 3, 4, 6}) c.wanted_sums += wanted >> bit & 1;
    return c.chunks() * c.chunk_floats() * static_cast<int64_t>(sizeof(float));
}

Refusal describe(Call& c, const Views& out, const View& x, const Optional (&inputs)[7], int64_t wanted) {
    // x, scale, shift, weight, bias, delta, gate: the bits of `wanted`; which of them gather rows, and into which sum
    const Operand* const operands[] = {nullptr,      &c.norm.scale, &c.norm.shift, &c.norm.weight,
                                       &c.norm.bias, nullptr,       &c.gate.weight};
    constexpr int which[] = {-1, 0, 1, 2, 3, -1, kGate};
    int64_t count = 0;
    for (int k = 0; k < 7; ++k) {
        if (!(wanted >> k & 1)) continue;
        if (!inputs[k]) return "wanted: the gradient of an input that is absent";
        if (count == out.count || !out[count].same_shape(inputs[k]) || out[count].dtype != inputs[k].dtype ||
            !out[count].contiguous())
            return "out: not contiguous, or not like what is wanted";
        const View& o = out[count++];
        if (k == 0) c.wants_x = true, c.dx = o;
        if (k == 5) c.wants_delta = true, c.d_delta = o;
        if (which[k] >= 0) c.sums[which[k]] = {true, o, operands[k]->rows.repeat, c.wanted_sums++};
    }
    if (wanted < 0 || wanted >> 7 || count != out.count) return "wanted: does not fit the outputs";
    static_cast<void>(x);
    return nullptr;
}

Refusal norm_backward(Stream stream, Views out, View grad, View x, Optional scale, Optional shift, Optional weight,
                      Optional bias, Text norm, double eps, Text eps_mode, Optional residual, Optional delta, Optional gate,
                      int64_t wanted) {
    Call c{};
    if (Refusal why = describe(c.norm, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (!grad.same_shape(x) || grad.dtype != x.dtype || !rows_of(grad, c.grad_rows)) return "grad: not like x";
    c.grad = grad;
    if (residual) {
        if (!residual.same_shape(x) || residual.dtype != x.dtype || !rows_of(residual, c.residual_rows))
            return "residual: not like x";
        c.residual = residual, c.has_residual = true;
    }
    if (delta) {
        if (!delta.same_shape(x) || delta.dtype > DType::bf16 || !rows_of(delta, c.delta_rows))
            return "delta: not of x's shape";
        c.delta = delta, c.has_delta = true;
        c.delta_as_operand.view = delta, c.delta_as_operand.present = true;
    } else if (gate) {
        return "gate: without delta";
    }
    c.gate.columns = x.size(-1);
    if (Refusal why = describe(c.gate.weight, gate, x)) return why;
    if (Refusal why = describe(c, out, x, {Optional{x}, scale, shift, weight, bias, delta, gate}, wanted)) return why;
    plan(c, x);
    c.scratch = static_cast<float*>(stream.scratch);
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        if (x.numel() == 0) {  // sums of nothing
            for (const Sum& s : c.sums)
                if (s.wanted && s.out.data)  // null where the sum has no elements either
                    std::memset(s.out.data, 0, static_cast<size_t>(s.out.numel()) * (s.out.dtype == DType::f32 ? 4 : 2));
            return Refusal{nullptr};
        }
        const bool unit = (x.step(-1) == 1 && grad.step(-1) == 1 && (!residual || residual.step(-1) == 1) &&
                           (!delta || delta.step(-1) == 1)) ||
                          x.size(-1) == 1;
        return for_bool(unit, [&](auto u) {
            return for_bool(c.has_delta && (c.wants_delta || c.sums[kGate].wanted), [&](auto d) -> Refusal {
                auto chunks = [&](int64_t k0, int64_t k1) { run<T, decltype(u)::value, decltype(d)::value>(c, k0, k1); };
                parallel_for(c.chunks(), 1, chunks);
                int64_t items = 0;
                for (const Sum& s : c.sums)
                    if (s.wanted) items += c.rows / s.repeat * ((x.size(-1) + kColumns - 1) / kColumns);
                auto joined = [&](int64_t begin, int64_t end) { join<T>(c, begin, end); };
                parallel_for(items, 1 + kSerialElements / (kColumns < x.size(-1) ? kColumns : x.size(-1)) / 8, joined);
                return nullptr;
            });
        });
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::norm_backward;
DK_ENTRY_WITH_SCRATCH(norm_backward, "out grad x scale shift weight bias norm eps eps_mode residual delta gate wanted", bytes)
