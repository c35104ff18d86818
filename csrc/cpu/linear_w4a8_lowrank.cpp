// y = activation(x W^T * x_scale * weight_scale + bias + low up) * gate + residual over 8-bit codes of x and 4-bit codes of W
//
// Idea: linear.h. A code of 4 bits times its group's whole scale is a code of 8 bits: a panel is unpacked to pack_w8's bytes
// once for a block of x's rows, and meets the same product. q - 8 in -8..7 and a scale in 1..16 give (q - 8) s + 128 = q s +
// 128 - 8 s, where neither q s nor the sum leaves its byte: two products of 16-bit lanes unpack eight codes a lane of 32.
// Takes: as linear_w8a8, and scales as pack_w4 leaves them.
// Floor: K multiply-adds a result; of few rows, half a byte of the weight each.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/linear_w4a8_lowrank.cpp
#include "linear.h"

namespace dk {
namespace {

typedef uint16_t Halves __attribute__((vector_size(sizeof(U))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

struct Weight {
    const uint8_t *data, *scales;
    int64_t group, groups;

    // As pack_w8 has it.
    __attribute__((noinline)) const uint8_t* panel(const Call& c, int64_t p, uint8_t* to) const {
        constexpr int64_t kRow = kPanel * kDepth;
        const int64_t eights = (c.words + 1) / 2, each = group / (2 * kDepth);
        const uint8_t* const codes = data + p * eights * kRow;
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t j = 0; j < kPanel; j += kLanes) {
                Bytes stored;
                std::memcpy(&stored, scales + (p * groups + g) * kPanel + j, sizeof stored);
                const U scale = (__builtin_convertvector(stored, U) & 15u) + 1;
                const U zero = (128 - 8 * scale) * 0x01010101u;
                const Halves twice = bit_cast<Halves>(scale * 0x00010001u);
                const int64_t end = eights < (g + 1) * each ? eights : (g + 1) * each;
                for (int64_t k = g * each; k < end; ++k) {
                    prefetch(codes + (k + 2 * each) * kRow + j * kDepth, sizeof(U));
                    U both;
                    std::memcpy(&both, codes + k * kRow + j * kDepth, sizeof both);
                    const U lo = bit_cast<U>(bit_cast<Halves>(both & 0x0f0f0f0fu) * twice) + zero,
                            hi = bit_cast<U>(bit_cast<Halves>(both >> 4 & 0x0f0f0f0fu) * twice) + zero;
                    std::memcpy(to + 2 * k * kRow + j * kDepth, &lo, sizeof lo);
                    std::memcpy(to + (2 * k + 1) * kRow + j * kDepth, &hi, sizeof hi);
                }
            }
        return to;
    }
};

Refusal describe(Call& c, Weight& w, View y, View x, View x_scale, View weight, View group_scale, View weight_scale,
                 Optional bias, Optional low, Optional up, Optional gate, Optional residual) {
    if (Refusal why = describe(c, y, x, x_scale, weight_scale, bias, low, up, gate, residual)) return why;
    const int64_t eights = (c.words + 1) / 2;
    if (weight.dtype != DType::u8 || weight.ndim != 4 || weight.shape[0] != c.panels() || weight.shape[1] != eights ||
        weight.shape[2] != kPanel || weight.shape[3] != kDepth || !weight.contiguous())
        return "weight: not pack_w4's, or not contiguous";
    if (group_scale.dtype != DType::u8 || group_scale.ndim != 3 || group_scale.shape[0] != c.panels() ||
        group_scale.shape[2] != kPanel || !group_scale.contiguous())
        return "group_scale: not pack_w4's, or not contiguous";
    w.data = static_cast<const uint8_t*>(weight.data), w.scales = static_cast<const uint8_t*>(group_scale.data);
    w.groups = group_scale.shape[1];
    w.group = w.groups == (c.depth + 63) / 64 ? 64 : 128;
    if (w.groups != (c.depth + w.group - 1) / w.group) return "group_scale: not of groups of 64 or 128 inputs";
    c.panel_room = 2 * eights * kPanel * kDepth;
    return nullptr;
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
    return linear(stream, c, Matrix{}, w, activation, dtype);
}

}  // namespace
}  // namespace dk

using dk::linear_w4a8_lowrank;
DK_ENTRY_WITH_SCRATCH(linear_w4a8_lowrank,
                      "out x x_scale weight group_scale weight_scale bias low up gate residual activation dtype", dk::bytes)
