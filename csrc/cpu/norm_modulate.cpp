// y = ((x - mean) / d * weight + bias) * (1 + scale) + shift over rows of D
//
// Idea: weight, bias, scale and shift fold into one pair (a, b) a column, kept in L1 while rows share it. A row is walked
// twice: for its statistics, about a value near its mean, while y's lines are asked for; then for y, while the next row's
// lines are. Streaming stores were slower at every size.
// Takes: x and y float32, float16 or bfloat16, alike; operands of any of these; any strides, any D >= 1.
// Floor: 2 walks over memory. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/norm_modulate.cpp
#include "norm.h"

namespace dk {
namespace {

template <class T, bool kUnit>
void normalize(const Norm& c, View y, int64_t begin, int64_t end) {
    Affine<T> affine;
    for (int64_t r = begin; r < end; ++r) {
        const Row<T, kUnit> row(c.x, c.x_rows, r);
        const T* const next = kUnit && r + 1 < end ? Row<T, kUnit>(c.x, c.x_rows, r + 1).p : row.p;
        T* const to = static_cast<T*>(y.data) + r * c.columns;
        // The statistics keep the memory waiting, so the next row is asked for in the second walk.
        modulate(c, affine, r, row, moments(c, row, to), to,
                 [next](int64_t i) __attribute__((always_inline)) { prefetch(next + i, kPair * sizeof(T)); });
    }
}

Refusal norm_modulate(Stream, View y, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
                      double eps, Text eps_mode) {
    Norm c{};
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (Refusal why = describe(c, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    const int64_t total = x.numel();
    if (total == 0) return nullptr;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(x.step(-1) == 1 || c.columns == 1, [&](auto unit) -> Refusal {
            auto body = [&](int64_t begin, int64_t end) { normalize<T, decltype(unit)::value>(c, y, begin, end); };
            parallel_for(total / c.columns, row_grain(c.columns), body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::norm_modulate;
DK_ENTRY(norm_modulate, "out x scale shift weight bias norm eps eps_mode")
