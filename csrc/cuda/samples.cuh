// A tensor [B, ...] as samples of E elements, whatever its strides.
#pragma once

#include "../broadcast.h"
#include "tile.cuh"

namespace dk {
namespace {

struct Samples {
    const void* data;
    Rows inner;      // where element e lies
    int64_t sample;  // from one sample to the next
    bool straight;   // contiguous within a sample: element e lies at e
};

inline Samples samples(const View& t) {
    Samples s{};
    s.data = t.data;
    s.sample = t.stride[0];
    s.straight = t.contiguous(1);
    for (int k = 1; k < t.ndim; ++k)
        if (t.shape[k] != 1) s.inner.push(t.shape[k], t.stride[k]);
    return s;
}

// Whether samples are made of aligned vectors: a vector's elements are side by side, and never end in the next sample.
inline bool whole_vectors(const View& t, int64_t elements, int64_t vector) {
    const bool aligned = reinterpret_cast<uintptr_t>(t.data) % (vector * size_of(t.dtype)) == 0;
    return aligned && t.contiguous(1) && elements % vector == 0 && (t.shape[0] == 1 || t.stride[0] % vector == 0);
}

}  // namespace
}  // namespace dk
