// y = rotate(norm(x + bias) * weight + shift) of q and k; v + bias
//
// Idea: one launch for q, k and v, read as they lie. A row is a head, or all heads of a token where the norm goes across; it
// stays in registers, 16 bytes a load: 8, 16 or 32 threads a head, a block a token. The partner of a rotated column is in the
// same vector, or ("half") read again through the first cache. Rows that are wider, or not made of aligned 16-byte vectors,
// are walked by a warp. Takes: q, k and v float32, float16 or bfloat16, alike; biases, weights and shifts of any of these; any
// strides. Floor: a read and a write of each. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c
// csrc/cuda/qkv_prep.cu
#include "../qkv.h"
#include "norm.cuh"

namespace dk {
namespace {

constexpr int kWalkBlock = 128;

// q, k or v.
struct Side {
    const void* x;
    void* y;
    int64_t step[4];
    uint32_t rows, tokens, heads, columns, row_heads;  // row_heads: heads of one row, 1 or all
    Operand bias, weight, shift;
    bool norm;
    uint32_t half;  // R / 2, 0 without a rotation
};

struct Table {
    const float* data;
    int64_t sample, token, column;  // strides
};

struct Call {
    Side sides[3];
    Table cos, sin;
    bool center, across, apart;
    float eps;
};

// A row: where its x, y and tables begin, and which element is where.
template <class T>
struct Place {
    const Side& side;
    const T* x;
    T* y;
    const float *cos, *sin;
    uint32_t head;  // its first

    __device__ __forceinline__ Place(const Call& c, const Side& s, uint32_t row) : side(s) {
        const uint32_t rows_of_token = s.row_heads == 1 ? s.heads : 1, at = row / rows_of_token;
        const uint32_t sample = at / s.tokens, token = at - sample * s.tokens;
        head = row - at * rows_of_token;
        x = static_cast<const T*>(s.x) + sample * s.step[0] + token * s.step[1];
        y = static_cast<T*>(s.y) + static_cast<int64_t>(row) * (s.row_heads * s.columns);
        cos = c.cos.data + sample * c.cos.sample + token * c.cos.token;
        sin = c.sin.data + sample * c.sin.sample + token * c.sin.token;
    }
    // Columns [column, column + kCount) of a head, with their bias.
    template <int kCount>
    __device__ __forceinline__ void biased(uint32_t of, uint32_t column, float (&out)[kCount]) const {
        load(x + of * side.step[2] + column * (kCount > 1 ? 1 : side.step[3]), out);
        if (!side.bias.present) return;
        float t[kCount];
        read(side.bias, 0, static_cast<int64_t>(of) * side.columns + column, t);
#pragma unroll
        for (int v = 0; v < kCount; ++v) out[v] += t[v];
    }
    template <int kCount>
    __device__ __forceinline__ void affine(uint32_t of, uint32_t column, float (&h)[kCount]) const {
        const int64_t i = (side.row_heads == 1 ? 0 : static_cast<int64_t>(of) * side.columns) + column;
        float t[kCount];
        if (side.weight.present) {
            read(side.weight, 0, i, t);
#pragma unroll
            for (int v = 0; v < kCount; ++v) h[v] *= t[v];
        }
        if (side.shift.present) {
            read(side.shift, 0, i, t);
#pragma unroll
            for (int v = 0; v < kCount; ++v) h[v] += t[v];
        }
    }
};

// The pairs lie within h.
template <class T, int kVec>
__device__ __forceinline__ void rotate_neighbours(const Place<T>& at, uint32_t column, float (&h)[kVec]) {
    float cos[kVec / 2], sin[kVec / 2];
    load(at.cos + column / 2, cos);
    load(at.sin + column / 2, sin);
#pragma unroll
    for (int v = 0; v < kVec; v += 2) {
        const float a = h[v], b = h[v + 1];
        h[v] = a * cos[v / 2] - b * sin[v / 2];
        h[v + 1] = b * cos[v / 2] + a * sin[v / 2];
    }
}

// Their partners are `half` columns away.
template <class T, int kVec>
__device__ __forceinline__ void rotate_apart(const Place<T>& at, uint32_t of, uint32_t column, const Moments& m, float rstd,
                                             float (&h)[kVec]) {
    const uint32_t half = at.side.half;
    const bool second = column >= half;
    const uint32_t pair = second ? column - half : column;
    float other[kVec], cos[kVec], sin[kVec];
    at.biased(of, second ? pair : column + half, other);
#pragma unroll
    for (int v = 0; v < kVec; ++v) other[v] = (other[v] - m.mean - m.rest) * rstd;
    at.affine(of, second ? pair : column + half, other);
    load(at.cos + pair, cos);
    load(at.sin + pair, sin);
#pragma unroll
    for (int v = 0; v < kVec; ++v) h[v] = h[v] * cos[v] + other[v] * (second ? sin[v] : -sin[v]);
}

// kThreads threads hold a row of at most kThreads * kItems vectors.
template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T);
    const Side& side = c.sides[blockIdx.y];
    const uint32_t begin = blockIdx.x * kRows<kThreads>, mine = begin + threadIdx.x / kThreads;
    if (begin >= side.rows) return;
    const bool live = mine < side.rows;  // threads without a row take part in the warp's sums
    const Place<T> at(c, side, live ? mine : begin);
    const int lane = threadIdx.x % kThreads;
    const uint32_t of_head = side.columns / kVec, vectors = of_head * side.row_heads;

    float h[kItems][kVec];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const uint32_t i = lane + j * kThreads, of = at.head + i / of_head;
        if (i < vectors) {
            at.biased(of, i % of_head * kVec, h[j]);
        } else {
#pragma unroll
            for (int v = 0; v < kVec; ++v) h[j][v] = 0;
        }
    }
    Moments m{0, 0, 0};
    float rstd = 1;
    if (side.norm) {
        m = moments<kThreads>(static_cast<float>(side.columns * side.row_heads), c.center, lane, static_cast<int>(vectors), h);
        rstd = 1.0f / sqrtf(m.ms + c.eps);
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const uint32_t i = lane + j * kThreads, of = at.head + i / of_head, column = i % of_head * kVec;
        if (i >= vectors || !live) break;
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[j][v] = (h[j][v] - m.rest) * rstd;
        at.affine(of, column, h[j]);
        if (column < 2 * side.half) {
            if (c.apart)
                rotate_apart(at, of, column, m, rstd, h[j]);
            else
                rotate_neighbours(at, column, h[j]);
        }
        store(at.y + static_cast<int64_t>(i) * kVec, h[j]);
    }
}

// A warp walks the row three times; any stride and alignment.
template <class T>
__global__ void __launch_bounds__(kWalkBlock) walked(const __grid_constant__ Call c) {
    const Side& side = c.sides[blockIdx.y];
    const uint32_t row = blockIdx.x * (kWalkBlock / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= side.rows) return;
    const Place<T> at(c, side, row);
    const uint32_t elements = side.columns * side.row_heads;
    const auto biased = [&](uint32_t i) {
        float h[1];
        at.biased(at.head + i / side.columns, i % side.columns, h);
        return h[0];
    };
    Moments m{0, 0, 0};
    float rstd = 1;
    if (side.norm) {
        const float count = static_cast<float>(elements);
        if (c.center) {
            float total[1] = {0};
            for (uint32_t i = lane; i < elements; i += 32) total[0] += biased(i);
            sum<32>(total);
            m.mean = total[0] / count;
        }
        float of[2] = {0, 0};  // the differences: their sum, and the sum of their squares
        for (uint32_t i = lane; i < elements; i += 32) {
            const float e = biased(i) - m.mean;
            of[0] += e;
            of[1] += e * e;
        }
        sum<32>(of);
        m.rest = c.center ? of[0] / count : 0.0f;
        m.ms = variance(of[1] / count, m.rest);
        rstd = 1.0f / sqrtf(m.ms + c.eps);
    }
    const auto value = [&](uint32_t i) {
        float h[1] = {(biased(i) - m.mean - m.rest) * rstd};
        at.affine(at.head + i / side.columns, i % side.columns, h);
        return h[0];
    };
    for (uint32_t i = lane; i < elements; i += 32) {
        const uint32_t column = i % side.columns, half = side.half;
        float h[1] = {value(i)};
        if (column < 2 * half) {
            const bool second = c.apart ? column >= half : column % 2;
            const uint32_t away = c.apart ? half : 1, pair = c.apart ? column - (second ? half : 0) : column / 2;
            const float sin = at.sin[pair * c.sin.column];
            h[0] = h[0] * at.cos[pair * c.cos.column] + value(second ? i - away : i + away) * (second ? sin : -sin);
        }
        store(at.y + i, h);
    }
}

Operand vector_of(const Optional& t) {
    Operand o{};
    if (t) o.data = t.data, o.stride = t.stride[0], o.dtype = t.dtype, o.present = true;
    return o;
}

Table table_of(const Optional& t) {
    if (!t) return {};
    return {static_cast<const float*>(t.data), t.ndim == 3 ? t.stride[0] : 0, t.step(-2), t.step(-1)};
}

bool whole_vectors(const Table& t) { return aligned16(t.data) && t.sample % 4 == 0 && t.token % 4 == 0 && t.column == 1; }

bool whole_vectors(const Side& s, int64_t vec) {
    const bool steps = s.step[0] % vec == 0 && s.step[1] % vec == 0 && s.step[2] % vec == 0 && s.step[3] == 1;
    return steps && aligned16(s.x) && aligned16(s.y) && s.columns % vec == 0 && whole_vectors(s.bias, s.columns) &&
           whole_vectors(s.weight, s.columns) && whole_vectors(s.shift, s.columns);
}

// body(threads, items): how many threads hold a row of `vectors` vectors, and how many each; false where it is too wide.
template <class F>
bool for_row(int64_t vectors, F&& body) {
    if (vectors <= 8)
        body(Tag<8>{}, Tag<1>{});
    else if (vectors <= 16)
        body(Tag<16>{}, Tag<1>{});
    else if (vectors <= 32)
        body(Tag<32>{}, Tag<1>{});
    else if (vectors <= 32 * 2)
        body(Tag<32>{}, Tag<2>{});
    else if (vectors <= 128 * 3)
        body(Tag<128>{}, Tag<3>{});
    else if (vectors <= 512 * 4)
        body(Tag<512>{}, Tag<4>{});
    else
        return false;
    return true;
}

Refusal qkv_prep(Stream stream, Views out, View q, View k, Optional v, Optional q_bias, Optional k_bias, Optional v_bias,
                 Optional q_weight, Optional k_weight, Optional q_shift, Optional k_shift, Optional cos, Optional sin,
                 Text rope, Text norm, bool across, double eps) {
    Qkv given{};
    if (Refusal why = describe(given, out, q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin,
                               rope, norm, across, eps))
        return why;
    Call c{};
    c.cos = table_of(cos), c.sin = table_of(sin);
    c.center = given.center, c.across = across, c.apart = given.apart, c.eps = given.eps;
    const int64_t vec = 16 / size_of(q.dtype);
    const bool pairs =
        given.half == 0 || (whole_vectors(c.cos) && whole_vectors(c.sin) && (c.apart ? given.half : 2 * given.half) % vec == 0);
    bool vectors = pairs;
    int64_t rows = 0, widest = 0;
    for (int i = 0; i < given.count; ++i) {
        const Part& p = given.parts[i];
        Side& s = c.sides[i];
        const int64_t heads = across ? 1 : p.heads(), all = q.shape[0] * p.tokens() * heads, wide = p.heads() * p.columns();
        if (all > 0x7fffffff || wide > 0x7fffffff) return "more than 2^31 - 1 rows, or columns of a row";
        s.x = p.x.data, s.y = p.y;
        for (int d = 0; d < 4; ++d) s.step[d] = p.x.shape[d] > 1 || d == 3 ? p.x.stride[d] : 0;
        if (p.columns() == 1) s.step[3] = 1;
        s.rows = wide ? static_cast<uint32_t>(all) : 0;
        s.tokens = static_cast<uint32_t>(p.tokens()), s.heads = static_cast<uint32_t>(p.heads());
        s.columns = static_cast<uint32_t>(p.columns()), s.row_heads = across ? s.heads : 1;
        s.bias = vector_of(p.bias), s.weight = vector_of(p.weight), s.shift = vector_of(p.shift);
        s.norm = p.main && given.norm, s.half = p.main ? static_cast<uint32_t>(given.half) : 0;
        vectors = vectors && whole_vectors(s, vec);
        rows = s.rows > rows ? s.rows : rows;
        widest = s.columns * s.row_heads > widest ? s.columns * s.row_heads : widest;
    }
    if (rows == 0) return nullptr;
    return for_value(Floats{}, q.dtype, "q: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto count = static_cast<unsigned>(given.count);
        const auto launch = [&](auto threads, auto items) {
            constexpr int kThreads = decltype(threads)::value, kItems = decltype(items)::value;
            const auto blocks = static_cast<unsigned>((rows + kRows<kThreads> - 1) / kRows<kThreads>);
            kept<T, kThreads, kItems><<<dim3(blocks, count), kBlock<kThreads>, 0, queue>>>(c);
        };
        if (!vectors || !for_row(widest / vec, launch))
            walked<T><<<dim3(static_cast<unsigned>((rows + 3) / 4), count), kWalkBlock, 0, queue>>>(c);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::qkv_prep;
DK_ENTRY(qkv_prep, "out q k v q_bias k_bias v_bias q_weight k_weight q_shift k_shift cos sin rope norm across eps")
