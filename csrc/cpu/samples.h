// Samples of a tensor [B, ...] as contiguous runs of elements, whatever its strides.
#pragma once

#include "../broadcast.h"
#include "simd.h"

namespace dk {
namespace {

// Elements [begin, begin + n) of sample b as a contiguous run: where they lie, or copied to `buffer`.
template <class T>
const T* run_of(const View& t, int64_t b, int64_t begin, int64_t n, T* buffer) {
    const T* sample = static_cast<const T*>(t.data) + b * t.stride[0];
    if (t.contiguous(1)) return sample + begin;
    int64_t index[kMaxDims];
    for (int64_t k = t.ndim - 1, i = begin; k > 0; --k) {
        index[k] = i % t.shape[k];
        i /= t.shape[k];
    }
    int64_t at = 0;
    for (int k = 1; k < t.ndim; ++k) at += index[k] * t.stride[k];
    for (int64_t i = 0; i < n; ++i) {
        buffer[i] = sample[at];
        for (int k = t.ndim - 1; k > 0; --k) {
            at += t.stride[k];
            if (++index[k] < t.shape[k]) break;
            at -= t.shape[k] * t.stride[k];
            index[k] = 0;
        }
    }
    return buffer;
}

}  // namespace
}  // namespace dk
