// z = x * weight; moments = (mean, sum (x - mean)^2), over rows of D
//
// Idea: as norm_modulate: the weight is folded once for the rows that share it, the statistics are one walk about the first
// columns' mean, z another through the first cache, which asks for the next row.
// Takes: x and z float32, float16 or bfloat16, alike; weight any of these; moments float32; any strides, any D >= 1.
// Floor: 1 read and 1 write. Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/slice_moments.cpp
#include "norm.h"

namespace dk {
namespace {

template <class T, bool kUnit>
void run(const Norm& c, T* z, float* moments_of, int64_t begin, int64_t end) {
    Affine<T> affine;
    const Moments whole{0, 0, 0, 1};  // z is not normalised: that is the row's, not the slice's
    for (int64_t r = begin; r < end; ++r) {
        const Row<T, kUnit> row(c.x, c.x_rows, r);
        const T* const next = kUnit && r + 1 < end ? Row<T, kUnit>(c.x, c.x_rows, r + 1).p : row.p;
        T* const to = z + r * c.columns;
        const Moments m = moments(c, row, to);
        moments_of[2 * r] = m.center + m.rest;
        moments_of[2 * r + 1] = m.ms * static_cast<float>(c.columns);
        modulate(c, affine, r, row, whole, to,
                 [next](int64_t i) __attribute__((always_inline)) { prefetch(next + i, kPair * sizeof(T)); });
    }
}

Refusal slice_moments(Stream, Views out, View x, View weight) {
    Norm c{};
    if (out.count != 2 || !out[0].same_shape(x) || !out[0].contiguous() || out[0].dtype != x.dtype)
        return "out: not z and moments, or z not contiguous and like x";
    const Optional none{{nullptr, nullptr, nullptr, -1, DType::other}};
    if (Refusal why = describe(c, x, none, none, Optional{weight}, none, Text{"layer", 5}, 0, Text{"inside", 6})) return why;
    const View& m = out[1];
    const int64_t total = x.numel();
    if (m.dtype != DType::f32 || m.ndim != x.ndim || m.size(-1) != 2 || !m.contiguous() || m.numel() * c.columns != 2 * total)
        return "moments: not contiguous float32 [..., 2]";
    if (total == 0) return nullptr;
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_bool(x.step(-1) == 1 || c.columns == 1, [&](auto unit) -> Refusal {
            T* const z = static_cast<T*>(out[0].data);
            auto* const moments_of = static_cast<float*>(m.data);
            auto body = [&](int64_t begin, int64_t end) { run<T, decltype(unit)::value>(c, z, moments_of, begin, end); };
            parallel_for(total / c.columns, row_grain(c.columns), body);
            return nullptr;
        });
    });
}

}  // namespace
}  // namespace dk

using dk::slice_moments;
DK_ENTRY(slice_moments, "out x weight")
