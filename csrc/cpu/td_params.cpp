// out[t, p] = p1 + s (p0 - p1), s = sigmoid(tau[t] (1 + w) + b), and the gradients of all five
//
// Idea: blocks of columns whose parameters stay in the first cache for all times; the gradient adds up over the times in
// registers, d tau over the columns by block, into scratch, then in the blocks' order.
// Takes: any strides; parameters float32, float16 or bfloat16, alike; tau any of these.
// Floor: 4 reads of P and a write of T P. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/td_params.cpp
#include "norm.h"

namespace dk {
namespace {

constexpr int64_t kBlock = 2048;  // columns
constexpr const char* kNotAlike = "p0, p1, w, b: not alike";

struct Call {
    const View* parameter[4];  // p0, p1, w, b
    Operand tau;
    int64_t times, columns;
    bool unit = true;  // every parameter's elements lie side by side
    DK_INLINE float time(int64_t t) const { return tau.load_at(t * tau.view.step(0), 0, 1)[0]; }
    DK_INLINE int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
};

DK_INLINE Refusal describe(Call& c, const View& p0, const View& p1, const View& w, const View& b, const View& tau) {
    const View* all[] = {&p0, &p1, &w, &b};
    for (int k = 0; k < 4; ++k) {
        if (all[k]->ndim != 1 || !all[k]->same_shape(p0) || all[k]->dtype != p0.dtype) return kNotAlike;
        c.parameter[k] = all[k];
        c.unit = c.unit && (all[k]->step(0) == 1 || p0.size(0) == 1);
    }
    if (tau.ndim != 1 || tau.dtype > DType::bf16) return "tau: not one dimension of float32, float16 or bfloat16";
    c.tau.view = tau;
    c.times = tau.size(0);
    c.columns = p0.size(0);
    return nullptr;
}

template <class T, bool kUnit>
struct Column {  // a pair of columns of each parameter; beyond n, zeros
    Pair p0, p1, w, b;
    DK_INLINE Column(const Call& c, int64_t i, int n) {
        Pair* const to[] = {&p0, &p1, &w, &b};
        for (int k = 0; k < 4; ++k) {
            const Row<T, kUnit> row(*c.parameter[k], Rows{}, 0);
            *to[k] = n == kPair ? row.at(i) : row.some(i, n);
        }
    }
};

DK_INLINE F sigmoid(F z) { return 1 / (1 + exp(-z)); }

template <class T, bool kUnit>
void forward(const Call& c, T* out, int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < end * kBlock && i < c.columns; i += kPair) {
        const int n = c.columns - i < kPair ? static_cast<int>(c.columns - i) : kPair;
        const Column<T, kUnit> p(c, i, n);
        for (int64_t t = 0; t < c.times; ++t) {
            const F tau = quiet(splat(c.time(t)));
            const auto mix = [&](F p0, F p1, F w, F b)
                                 __attribute__((always_inline)) { return fma(sigmoid(fma(tau, 1 + w, b)), p0 - p1, p1); };
            const Pair v{mix(p.p0.lo, p.p1.lo, p.w.lo, p.b.lo), mix(p.p0.hi, p.p1.hi, p.w.hi, p.b.hi)};
            T* const to = out + t * c.columns + i;
            n == kPair ? store_pair(to, v) : store_some(to, v, n);
        }
    }
}

Refusal td_params(Stream, View out, View p0, View p1, View w, View b, View tau) {
    Call c{};
    if (Refusal why = describe(c, p0, p1, w, b, tau)) return why;
    if (out.ndim != 2 || out.size(0) != c.times || out.size(1) != c.columns || out.dtype != p0.dtype || !out.contiguous())
        return "out: not contiguous [T, P] like p0";
    return for_value(Floats{}, p0.dtype, "p0: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(c.unit, [&](auto unit) -> Refusal {
            auto body = [&](int64_t begin, int64_t end) {
                forward<T, decltype(unit)::value>(c, static_cast<T*>(out.data), begin, end);
            };
            if (c.times) parallel_for(c.blocks(), 1 + kSerialElements / 4 / (kBlock * c.times), body);
            return nullptr;
        });
    });
}

// Where the gradients go: null where one is not wanted.
template <class T>
struct Gradients {
    T* parameter[4];
    float* tau;  // [blocks, T, kLanes]
};

template <class T, bool kUnit>
void backward(const Call& c, const View& grad, const Gradients<T>& to, int64_t begin, int64_t end) {
    const Rows none;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t last = (block + 1) * kBlock < c.columns ? (block + 1) * kBlock : c.columns;
        float* const d_tau = to.tau ? to.tau + block * c.times * kLanes : nullptr;
        for (int64_t t = 0; d_tau && t < c.times; ++t) store(d_tau + t * kLanes, F{});
        for (int64_t i = block * kBlock; i < last; i += kPair) {
            const int n = last - i < kPair ? static_cast<int>(last - i) : kPair;
            const Column<T, kUnit> p(c, i, n);
            Pair d[4] = {};
            for (int64_t t = 0; t < c.times; ++t) {
                Row<T, kUnit> row(grad, none, 0);
                row.p += t * grad.step(0);
                const Pair g = n == kPair ? row.at(i) : row.some(i, n);  // zeros beyond n: they add nothing
                const F tau = quiet(splat(c.time(t)));
                const auto add = [&](F g, F p0, F p1, F w, F b, F& d0, F& d1, F& dw, F& db) __attribute__((always_inline)) {
                    const F s = sigmoid(fma(tau, 1 + w, b)), dz = g * (p0 - p1) * s * (1 - s);
                    d0 += g * s, d1 += g * (1 - s), dw += dz * tau, db += dz;
                    return dz * (1 + w);
                };
                const F lo = add(g.lo, p.p0.lo, p.p1.lo, p.w.lo, p.b.lo, d[0].lo, d[1].lo, d[2].lo, d[3].lo);
                const F hi = add(g.hi, p.p0.hi, p.p1.hi, p.w.hi, p.b.hi, d[0].hi, d[1].hi, d[2].hi, d[3].hi);
                if (d_tau) store(d_tau + t * kLanes, load(d_tau + t * kLanes) + (lo + hi));
            }
            for (int k = 0; k < 4; ++k)
                if (to.parameter[k]) store_some(to.parameter[k] + i, d[k], n);
        }
    }
}

int64_t bytes(Stream, Views, View, View p0, View, View, View, View tau, int64_t) {
    return 4 * kLanes * ((p0.numel() + kBlock - 1) / kBlock) * tau.numel();
}

Refusal td_params_backward(Stream stream, Views out, View grad, View p0, View p1, View w, View b, View tau, int64_t wanted) {
    Call c{};
    if (Refusal why = describe(c, p0, p1, w, b, tau)) return why;
    if (grad.ndim != 2 || grad.size(0) != c.times || grad.size(1) != c.columns || grad.dtype != p0.dtype)
        return "grad: not [T, P] like p0";
    c.unit = c.unit && (grad.step(1) == 1 || c.columns == 1);
    const View* const inputs[] = {&p0, &p1, &w, &b, &tau};
    int64_t count = 0;
    for (int k = 0; k < 5; ++k) {
        if (!(wanted >> k & 1)) continue;
        if (count == out.count || !out[count].same_shape(*inputs[k]) || out[count].dtype != inputs[k]->dtype ||
            !out[count].contiguous())
            return "out: not contiguous, or not like what is wanted";
        ++count;
    }
    if (wanted < 0 || wanted > 31 || count != out.count) return "wanted: does not fit the outputs";
    return for_value(Floats{}, p0.dtype, "p0: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        Gradients<T> to{};
        int64_t at = 0;
        for (int k = 0; k < 4; ++k)
            if (wanted >> k & 1) to.parameter[k] = static_cast<T*>(out[at++].data);
        if (wanted & 16) to.tau = static_cast<float*>(stream.scratch);
        for_bool(c.unit, [&](auto unit) -> Refusal {
            auto body = [&](int64_t begin, int64_t end) { backward<T, decltype(unit)::value>(c, grad, to, begin, end); };
            parallel_for(c.blocks(), 1 + kSerialElements / 4 / (kBlock * (c.times + 1)), body);
            return nullptr;
        });
        if (!(wanted & 16)) return nullptr;
        return for_value(Floats{}, tau.dtype, nullptr, [&](auto time) -> Refusal {
            using To = typename TypeOf<decltype(time)::value>::type;
            for (int64_t t = 0; t < c.times; ++t) {
                F total = {};
                for (int64_t block = 0; block < c.blocks(); ++block) total += load(to.tau + (block * c.times + t) * kLanes);
                store(static_cast<To*>(out[at].data) + t, quiet(splat(sum(total))), 1);
            }
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::td_params;
using dk::td_params_backward;
DK_ENTRY(td_params, "out p0 p1 w b tau")
DK_ENTRY_WITH_SCRATCH(td_params_backward, "out grad p0 p1 w b tau wanted", bytes)
