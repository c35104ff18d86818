// y = gelu(a) * b, gelu(a) = a (1 + erf(a / sqrt 2)) / 2, or a sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3))
//
// Idea: elementwise; the two halves of one Linear's answer are read as they lie; gelu is looked up in registers, or by AVX2
// a rational function (activation.h).
// Takes: a, b and y float32, float16 or bfloat16, alike; any strides.
// Floor: 2 reads and 1 write. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/geglu.cpp
#include "activation.h"
#include "norm.h"

namespace dk {
namespace {

struct Call {
    View a, b;
    Rows a_rows, b_rows;
    int64_t columns;
};

template <class T, bool kUnit, bool kTanh>
void run(const Call& c, T* y, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const Row<T, kUnit> a(c.a, c.a_rows, r), b(c.b, c.b_rows, r);
        const auto value = [](Pair u, Pair v) __attribute__((always_inline)) {
            return Pair{gelu<kTanh>(u.lo) * v.lo, gelu<kTanh>(u.hi) * v.hi};
        };
        T* const to = y + r * c.columns;
        int64_t i = 0;
        for (; i + kPair <= c.columns; i += kPair) store_pair(to + i, value(a.at(i), b.at(i)));
        if (const int n = static_cast<int>(c.columns - i)) store_some(to + i, value(a.some(i, n), b.some(i, n)), n);
    }
}

Refusal geglu(Stream, View y, View a, View b, Text approximate) {
    Call c{};
    if (!y.same_shape(a) || !y.contiguous() || y.dtype != a.dtype) return "y: not contiguous, or not like a";
    if (!b.same_shape(a) || b.dtype != a.dtype) return "b: not like a";
    if (!rows_of(a, c.a_rows) || !rows_of(b, c.b_rows)) return "a: fewer than 1 or more than 8 dimensions";
    const bool tanh = approximate == "tanh";
    if (!tanh && !(approximate == "none")) return "approximate: neither 'none' nor 'tanh'";
    c.a = a, c.b = b;
    c.columns = a.size(-1);
    const int64_t total = a.numel();
    if (total == 0) return nullptr;
    return for_value(Floats{}, a.dtype, "a: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool((a.step(-1) == 1 && b.step(-1) == 1) || c.columns == 1, [&](auto unit) {
            return for_bool(tanh, [&](auto form) -> Refusal {
                auto body = [&](int64_t begin, int64_t end) {
                    run<T, decltype(unit)::value, decltype(form)::value>(c, static_cast<T*>(y.data), begin, end);
                };
                parallel_for(total / c.columns, row_grain(c.columns), body);
                return nullptr;
            });
        });
    });
}

}  // namespace
}  // namespace dk

using dk::geglu;
DK_ENTRY(geglu, "out a b approximate")
