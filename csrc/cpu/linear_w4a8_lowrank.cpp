// y = activation(x W^T * x_scale * weight_scale + bias + low up) * gate + residual over 8-bit codes of x and 4-bit codes of W
//
// Idea: linear_int8.h. A code of 4 bits times its group's whole scale is a code of 8 bits: a panel is unpacked to pack_w8's
// bytes once for a block of x's rows, and meets the same product. q - 8 in -8..7 and a scale in 1..16 give (q - 8) s + 128 = q
// s + 128 - 8 s, where neither q s nor the sum leaves its byte: two products of 16-bit lanes unpack eight codes a lane of 32.
// Takes: as linear_w8a8, and scales as pack_w4 leaves them.
// Floor: K multiply-adds a result; of few rows, half a byte of the weight each.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/linear_w4a8_lowrank.cpp
#include "linear_int8.h"
#include "pack_w4.h"

namespace dk {
namespace {

typedef uint16_t Halves __attribute__((vector_size(sizeof(U))));

struct Weight : PackedW4 {
    // As pack_w8 has it.
    __attribute__((noinline)) const uint8_t* panel(const Call&, int64_t p, int64_t first, int64_t n, uint8_t* to) const {
        each(p, first, n, [&](int64_t j, U scale) __attribute__((always_inline)) {
            const U zero = (128 - 8 * scale) * 0x01010101u;
            const Halves twice = bit_cast<Halves>(scale * 0x00010001u);
            return [=](int64_t i, U words) __attribute__((always_inline)) {
                const U lo = bit_cast<U>(bit_cast<Halves>(words & 0x0f0f0f0fu) * twice) + zero,
                        hi = bit_cast<U>(bit_cast<Halves>(words >> 4 & 0x0f0f0f0fu) * twice) + zero;
                std::memcpy(to + 2 * i * kRow + j * kDepth, &lo, sizeof lo);
                std::memcpy(to + (2 * i + 1) * kRow + j * kDepth, &hi, sizeof hi);
            };
        });
        return to;
    }
};

Refusal describe(Call& c, Weight& w, View y, View x, View x_scale, View weight, View group_scale, View weight_scale,
                 Optional bias, Optional low, Optional up, Optional gate, Optional residual) {
    if (Refusal why = describe(c, y, x, x_scale, weight_scale, bias, low, up, gate, residual)) return why;
    c.panel_room = 2 * ((c.depth + w.kEight - 1) / w.kEight) * w.kRow;
    return w.describe(c, weight, group_scale);
}

int64_t bytes(Stream, View y, View x, View x_scale, View weight, View group_scale, View weight_scale, Optional bias,
              Optional low, Optional up, Optional gate, Optional residual, Text, Text) {
    Call c{};
    Weight w{};
    if (describe(c, w, y, x, x_scale, weight, group_scale, weight_scale, bias, low, up, gate, residual)) return 0;
    return scratch_of(c);
}

Refusal linear_w4a8_lowrank(Stream stream, View y, View x, View x_scale, View weight, View group_scale, View weight_scale,
                            Optional bias, Optional low, Optional up, Optional gate, Optional residual, Text activation,
                            Text dtype) {
    Call c{};
    Weight w{};
    if (Refusal why = describe(c, w, y, x, x_scale, weight, group_scale, weight_scale, bias, low, up, gate, residual))
        return why;
    return linear_of_codes(stream, c, Matrix{}, w, activation, dtype);
}

}  // namespace
}  // namespace dk

using dk::linear_w4a8_lowrank;
DK_ENTRY_WITH_SCRATCH(linear_w4a8_lowrank,
                      "out x x_scale weight group_scale weight_scale bias low up gate residual activation dtype", dk::bytes)
