// What CUDA's attention kernels share: a call, rows of a head, what hides keys, and where a tile of a packed call lies.
#pragma once

#include "../attention.h"
#include "../dispatch.h"
#include "tile.cuh"

namespace dk {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

struct Call {
    Attention a;
    void* o;           // [B, Sq, H, Dv]
    float* lse;        // [B, H, Sq]
    int32_t tiles;     // of queries, in a sample, or in all sequences
    int32_t piece[3];  // bytes that one copy moves of q, k, v: 16, 8, or an element's where that is all that can be had
    int32_t out;       // elements that one store moves
};

// Rows of one head.
template <class T>
struct Lines {
    const T* data;
    int64_t row, column;  // strides
    int piece;

    __device__ __forceinline__ Lines(const Lay& l, int piece, int64_t sample, int64_t first, int64_t head)
        : data(static_cast<const T*>(l.data) + sample * l.at[0] + first * l.at[1] + head * l.at[2]),
          row(l.at[1]),
          column(l.at[3]),
          piece(piece) {}
};

// What hides keys beside their number, at one query: bias and mask, and how their keys lie.
struct Hiding {
    const void* bias;
    const bool* mask;
    int64_t bias_step, mask_step;
    DType dtype;

    __device__ __forceinline__ Hiding(const Attention& a, int64_t sample, int64_t head, int64_t query)
        : bias(nullptr), mask(nullptr), bias_step(a.bias.at[3]), mask_step(a.mask.at[3]), dtype(a.bias.dtype) {
        if (dtype != DType::other)
            bias = static_cast<const char*>(a.bias.data) +
                   (sample * a.bias.at[0] + head * a.bias.at[1] + query * a.bias.at[2]) * (dtype == DType::f32 ? 4 : 2);
        if (a.mask.data)
            mask = static_cast<const bool*>(a.mask.data) + sample * a.mask.at[0] + head * a.mask.at[1] + query * a.mask.at[2];
    }
    // A score, in units of which a bias of 1 is `unit`, where the query sees the key; else -inf, whatever the score is.
    __device__ __forceinline__ float apply(float score, int key, float unit) const {
        if (mask && !mask[key * mask_step]) return -INFINITY;
        if (!bias) return score;
        const int64_t i = key * bias_step;
        float more;
        if (dtype == DType::f32)
            more = static_cast<const float*>(bias)[i];
        else if (dtype == DType::f16)
            more = widen(static_cast<const __half*>(bias)[i]);
        else
            more = widen(static_cast<const __nv_bfloat16*>(bias)[i]);
        return more == -INFINITY ? more : score + more * unit;
    }
};

// Which sequence a tile of a packed call belongs to, and its first query. Sequence i's tiles begin at cu_q[i] / rows + i: that
// leaves room for all of them, and the order is that of the sequences.
__device__ __forceinline__ int find(const Attention& a, int& tile, int rows) {
    int low = 0, high = static_cast<int>(a.samples);  // the last one that begins at `tile` or before
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (a.cu_q[middle] / rows + middle <= tile ? low : high) = middle;
    }
    tile -= a.cu_q[low] / rows + low;
    return low;
}

// The most bytes that divide where every row begins: 16, 8, or an element's.
DK_HOST_INLINE int32_t piece_of(const Lay& l, const View& t, int32_t element) {
    for (int32_t bytes = 16; bytes >= 8; bytes /= 2) {
        const int64_t each = bytes / element;
        if (reinterpret_cast<uintptr_t>(l.data) % bytes == 0 && l.at[3] == 1 && t.shape[3] % each == 0 && l.at[0] % each == 0 &&
            l.at[1] % each == 0 && l.at[2] % each == 0)
            return bytes;
    }
    return element;
}

// The first of a rising list that is d or more.
template <int... kDs>
DK_HOST_INLINE int built(Values<kDs...>, int64_t d) {
    int found = 0;
    ((found = found == 0 && d <= kDs ? kDs : found), ...);
    return found;
}

}  // namespace
}  // namespace dk
