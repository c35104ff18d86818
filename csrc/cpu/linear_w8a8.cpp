// y = activation(x W^T * x_scale * weight_scale + bias + low up) * gate + residual over 8-bit codes of x and W
//
// Idea: linear_int8.h. The weight is read as it lies.
// Takes: codes and scales as the op does, any strides but the weight's; y, bias, low, up, gate and residual of any of the three
// floats.
// Floor: K multiply-adds a result.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/linear_w8a8.cpp
#include "linear_int8.h"

namespace dk {
namespace {

Refusal describe(Call& c, Packed& w, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional low,
                 Optional up, Optional gate, Optional residual) {
    if (Refusal why = describe(c, y, x, x_scale, weight_scale, bias, low, up, gate, residual)) return why;
    if (!packed(c, weight)) return "weight: not pack_w8's, or not contiguous";
    w.data = static_cast<const uint8_t*>(weight.data);
    return nullptr;
}

int64_t bytes(Stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional low, Optional up,
              Optional gate, Optional residual, Text, Text) {
    Call c{};
    Packed w{};
    return describe(c, w, y, x, x_scale, weight, weight_scale, bias, low, up, gate, residual) ? 0 : scratch_of(c);
}

Refusal linear_w8a8(Stream stream, View y, View x, View x_scale, View weight, View weight_scale, Optional bias, Optional low,
                    Optional up, Optional gate, Optional residual, Text activation, Text dtype) {
    Call c{};
    Packed w{};
    if (Refusal why = describe(c, w, y, x, x_scale, weight, weight_scale, bias, low, up, gate, residual)) return why;
    return linear_of_codes(stream, c, Matrix{}, w, activation, dtype);
}

}  // namespace
}  // namespace dk

using dk::linear_w8a8;
DK_ENTRY_WITH_SCRATCH(linear_w8a8, "out x x_scale weight weight_scale bias low up gate residual activation dtype", dk::bytes)
