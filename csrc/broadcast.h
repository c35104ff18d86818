// The one rule by which a per-sample operand meets the rows of x [..., D]: it aligns left (diffkernels/ops/_broadcast.py).
#pragma once

#include "op.h"

namespace dk {
namespace {

constexpr int kMaxDims = 8;

// Where row r of a strided tensor [..., D] begins, in elements: r counts the leading dimensions in row-major order.
struct Rows {
    int ndim = 0;
    int64_t repeat = 1;  // this many consecutive rows of x share one row
    int64_t size[kMaxDims] = {};
    int64_t stride[kMaxDims] = {};

    // Index is wide enough for the number of rows: division by 32 bits is several times cheaper, on a GPU most of all.
    template <class Index>
    DK_INLINE int64_t offset(Index row) const {
        Index i = repeat == 1 ? row : row / static_cast<Index>(repeat);
        int64_t at = 0;
        for (int k = ndim - 1; k > 0; --k) {
            const Index q = i / static_cast<Index>(size[k]);
            at += static_cast<int64_t>(i - q * static_cast<Index>(size[k])) * stride[k];
            i = q;
        }
        return ndim ? at + static_cast<int64_t>(i) * stride[0] : 0;
    }
    DK_INLINE void push(int64_t n, int64_t step) {  // merges with the previous dimension where both are one walk
        if (ndim && stride[ndim - 1] == n * step) {
            size[ndim - 1] *= n;
            stride[ndim - 1] = step;
        } else {
            size[ndim] = n;
            stride[ndim++] = step;
        }
    }
};

// Elements of one sample of a tensor [B, ...].
DK_INLINE int64_t elements_of(const View& t) {
    int64_t n = 1;
    for (int k = 1; k < t.ndim; ++k) n *= t.shape[k];
    return n;
}

// False where x has more than kMaxDims dimensions.
DK_INLINE bool rows_of(const View& x, Rows& out) {
    if (x.ndim < 1 || x.ndim > kMaxDims) return false;
    for (int k = 0; k < x.ndim - 1; ++k)
        if (x.shape[k] != 1) out.push(x.shape[k], x.stride[k]);
    return true;
}

// False where the operand's shape does not fit x.
DK_INLINE bool rows_of(const View& t, const View& x, Rows& out) {
    if (t.ndim < 1 || t.ndim > kMaxDims || t.size(-1) != x.size(-1)) return false;
    int lead = t.ndim - 1;
    int64_t frames = 0;
    if (t.ndim == x.ndim + 1 && t.ndim >= 4 && t.size(-2) == 1) {  // [B, F, 1, D] beside [B, N, D]
        frames = t.size(-3);
        lead = t.ndim - 3;
        if (frames < 1 || x.size(-2) % frames) return false;
    }
    while (!frames && lead > 0 && t.shape[lead - 1] == 1) --lead;
    if (lead > x.ndim - 1) return false;
    for (int k = 0; k < lead; ++k) {
        if (t.shape[k] != x.shape[k]) return false;
        if (t.shape[k] != 1) out.push(t.shape[k], t.stride[k]);
    }
    for (int k = lead; k < x.ndim - 1; ++k) out.repeat *= x.shape[k];
    if (frames) {
        if (lead != x.ndim - 2) return false;
        out.push(frames, t.step(-3));
        out.repeat = x.size(-2) / frames;
    }
    if (out.repeat < 1) out.repeat = 1;  // x has no rows
    return true;
}

}  // namespace
}  // namespace dk
