// A weight of 4-bit codes as pack_w4 leaves it: code + 8 of inputs 8i + j in the low half of byte j of a word, of 8i + 4 + j in
// its high half, [panel][i][64][4]; a scale - 1 in 0..15 of each group of inputs, [panel][group][64].
#pragma once

#include "linear.h"

namespace dk {
namespace {

struct PackedW4 {
    static constexpr int64_t kEight = 2 * kDepth, kRow = kPanel * kDepth;  // inputs, and bytes, of a row of words
    const uint8_t *data, *scales;
    int64_t group, groups, eights;

    Refusal describe(const Call& c, const View& weight, const View& group_scale) {
        eights = (c.depth + kEight - 1) / kEight;
        if (weight.dtype != DType::u8 || weight.ndim != 4 || weight.shape[0] != c.panels() || weight.shape[1] != eights ||
            weight.shape[2] != kPanel || weight.shape[3] != kDepth || !weight.contiguous())
            return "weight: not pack_w4's, or not contiguous";
        if (group_scale.dtype != DType::u8 || group_scale.ndim != 3 || group_scale.shape[0] != c.panels() ||
            group_scale.shape[2] != kPanel || !group_scale.contiguous())
            return "group_scale: not pack_w4's, or not contiguous";
        data = static_cast<const uint8_t*>(weight.data), scales = static_cast<const uint8_t*>(group_scale.data);
        groups = group_scale.shape[1];
        group = groups == (c.depth + 63) / 64 ? 64 : 128;
        return groups == (c.depth + group - 1) / group ? nullptr : "group_scale: not of groups of 64 or 128 inputs";
    }

    // Of n inputs from `first` on, whole groups or up to the last: f(j, scale) for each group and vector of columns j on gives
    // what is then called with (i, words) for each of its rows of words, the first input's being 0. What comes next is asked
    // for.
    template <class G>
    DK_INLINE void each(int64_t panel, int64_t first, int64_t n, G f) const {
        typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
        const uint8_t* const codes = data + panel * eights * kRow;
        const int64_t each = group / kEight, begin = first / kEight;
        for (int64_t g = first / group; g * group < first + n; ++g)
            for (int64_t j = 0; j < kPanel; j += kLanes) {
                Bytes stored;
                std::memcpy(&stored, scales + (panel * groups + g) * kPanel + j, sizeof stored);
                const auto of_group = f(j, (__builtin_convertvector(stored, U) & 15u) + 1);
                const int64_t end = eights < (g + 1) * each ? eights : (g + 1) * each;
                for (int64_t k = g * each; k < end; ++k) {
                    prefetch(codes + (k + 2 * each) * kRow + j * kDepth, sizeof(U));
                    U words;
                    std::memcpy(&words, codes + k * kRow + j * kDepth, sizeof words);
                    of_group(k - begin, words);
                }
            }
    }
};

}  // namespace
}  // namespace dk
