// x_new = x + gate * delta; y = norm_modulate(x_new, ...), over rows of D
//
// Idea: x_new is written, and y computed from it as norm_modulate does while the row is in the first cache; in its last walk
// the next row of x and of delta is asked for. The gate is folded once for all the rows that share it.
// Takes: x, x_new and y float32, float16 or bfloat16, alike; delta and operands of any of these; any strides, any D >= 1.
// Floor: 2 reads and 2 writes. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/gate_residual_norm.cpp
#include "norm.h"

namespace dk {
namespace {

struct Call {
    Norm norm;  // of x_new
    Norm gate;  // no norm: the gate as the weight of an affine map
    View x;
    Rows x_rows;
    Operand delta;
};

// x_new = x + gate * delta, a block of columns.
template <class T, bool kUnit>
DK_INLINE void update(const Call& c, const Affine<T>& gate, int64_t r, int64_t from, int64_t n, T* x_new) {
    const Row<T, kUnit> x(c.x, c.x_rows, r);
    const int64_t delta = c.delta.rows.offset(r);
    const bool alike = kUnit && c.delta.view.dtype == c.x.dtype && c.delta.view.step(-1) == 1;
    const auto value = [&](Pair v, Pair d, int64_t i) __attribute__((always_inline)) {
        return Pair{fma(d.lo, load(gate.factor + i), v.lo), fma(d.hi, load(gate.factor + i + kLanes), v.hi)};
    };
    int64_t i = 0;
    if (alike) {
        const T* const d = static_cast<const T*>(c.delta.view.data) + delta + from;
        for (; i + kPair <= n; i += kPair) store_pair(x_new + i, value(x.at(from + i), load_pair(d + i), i));
    }
    for (; i < n; i += kPair) {
        const int m = n - i < kPair ? static_cast<int>(n - i) : kPair, lo = m < kLanes ? m : kLanes;
        const Pair d = in_order(c.delta.load_at(delta, from + i, lo), c.delta.load_at(delta, from + i + lo, m - lo), T{});
        store_some(x_new + i, value(x.some(from + i, m), d, i), m);
    }
}

template <class T, bool kUnit>
void run(const Call& c, T* x_new, T* y, int64_t begin, int64_t end) {
    Affine<T> gate, affine;
    const int64_t columns = c.norm.columns, block = block_of(columns);
    const int64_t size = c.delta.view.dtype == DType::f32 ? 4 : 2;
    for (int64_t r = begin; r < end; ++r) {
        T* const to = x_new + r * columns;
        for (int64_t from = 0; from < columns; from += block) {
            const int64_t n = columns - from < block ? columns - from : block;
            gate.prepare(c.gate, r, from, n);
            update<T, kUnit>(c, gate, r, from, n, to + from);
        }
        const Row<T, true> row(to);
        const int64_t next = r + 1 < end ? r + 1 : r;
        const T* const next_x = Row<T, kUnit>(c.x, c.x_rows, next).p;
        const char* const next_delta = static_cast<const char*>(c.delta.view.data) + size * c.delta.rows.offset(next);
        modulate(c.norm, affine, r, row, moments(c.norm, row, y + r * columns), y + r * columns,
                 [=](int64_t i) __attribute__((always_inline)) {
                     if (!kUnit) return;
                     prefetch(next_x + i, kPair * sizeof(T));
                     prefetch(next_delta + i * size, kPair * size);
                 });
    }
}

Refusal gate_residual_norm(Stream, Views out, View x, View delta, Optional gate, Optional scale, Optional shift,
                           Optional weight, Optional bias, Text norm, double eps, Text eps_mode) {
    Call c{};
    if (out.count != 2) return "out: not x_new and y";
    for (int k = 0; k < 2; ++k)
        if (!out[k].same_shape(x) || !out[k].contiguous() || out[k].dtype != x.dtype)
            return "out: not contiguous, or not like x";
    if (Refusal why = describe(c.norm, out[0], scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (!rows_of(x, c.x_rows)) return "x: fewer than 1 or more than 8 dimensions";
    c.x = x;
    if (!delta.same_shape(x)) return "delta: not of x's shape";
    if (Refusal why = describe(c.delta, Optional{delta}, x)) return why;
    c.gate.columns = c.norm.columns;
    if (Refusal why = describe(c.gate.weight, gate, x)) return why;
    const int64_t total = x.numel();
    if (total == 0) return nullptr;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool((x.step(-1) == 1 && delta.step(-1) == 1) || c.norm.columns == 1, [&](auto unit) -> Refusal {
            T *const x_new = static_cast<T*>(out[0].data), *const y = static_cast<T*>(out[1].data);
            auto body = [&](int64_t begin, int64_t end) { run<T, decltype(unit)::value>(c, x_new, y, begin, end); };
            parallel_for(total / c.norm.columns, row_grain(c.norm.columns), body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::gate_residual_norm;
DK_ENTRY(gate_residual_norm, "out x delta gate scale shift weight bias norm eps eps_mode")
