// codes = round(h * 127 / amax), scale = amax / 127, h = norm_modulate's result * smooth, perhaps rotated, amax = max |h|
//
// Idea: as norm_modulate, but the second walk leaves h, in float32, in a line that the thread keeps in its caches, and finds
// the largest magnitude on its way; a third walk, over the line, rounds. A rotation is a walk over the line between them.
// Takes: x float32, float16 or bfloat16; operands of any of these; any strides, any D >= 1.
// Floor: a read of x and a byte an element. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c
// csrc/cpu/norm_quantize.cpp
#include "quantize.h"

namespace dk {
namespace {

template <class T, bool kUnit>
void normalize(const Norm& c, const Codes& q, float* line, int64_t begin, int64_t end) {
    Affine<T> affine;
    for (int64_t r = begin; r < end; ++r) {
        const Row<T, kUnit> row(c.x, c.x_rows, r);
        const T* const next = kUnit && r + 1 < end ? Row<T, kUnit>(c.x, c.x_rows, r + 1).p : row.p;
        Line<T> h(q, line);
        modulated(
            c, affine, r, row, moments(c, row, q.codes + r * c.columns),
            [&h](int64_t i, Pair v, int n) __attribute__((always_inline)) { h.put(i, v, n); },
            [next](int64_t i) __attribute__((always_inline)) { prefetch(next + i, kPair * sizeof(T)); });
        h.code(q, r);
    }
}

int64_t bytes(Stream, Views, View x, Optional, Optional, Optional, Optional, Optional, int64_t, Text, double, Text) {
    return x.ndim < 1 || x.size(-1) < 1 ? 0 : bytes_of(x.numel() / x.size(-1), x.size(-1));
}

Refusal norm_quantize(Stream stream, Views out, View x, Optional scale, Optional shift, Optional weight, Optional bias,
                      Optional smooth, int64_t rotate, Text norm, double eps, Text eps_mode) {
    Norm c{};
    Codes q{};
    Operand factor;
    if (Refusal why = describe(c, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (Refusal why = describe(q, factor, out, x, c.columns, smooth, rotate)) return why;
    if (q.rows == 0) return nullptr;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(x.step(-1) == 1 || c.columns == 1, [&](auto unit) -> Refusal {
            prepare<T>(q, factor, stream.scratch);
            q.each(
                [&](float* line, int64_t begin, int64_t end) { normalize<T, decltype(unit)::value>(c, q, line, begin, end); });
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::norm_quantize;
DK_ENTRY_WITH_SCRATCH(norm_quantize, "out x scale shift weight bias smooth rotate norm eps eps_mode", bytes)
