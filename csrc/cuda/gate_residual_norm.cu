// x_new = x + gate * delta; y = norm_modulate(x_new, ...), over rows of D
//
// Idea: as norm_modulate: a row stays in registers, a warp or a block a row; x and delta are all in flight before the first
// use. x_new is rounded to its dtype, stored, and what was stored is normalised. Rows that are wider than a block's
// registers, or not made of aligned 16-byte vectors, are walked three times, x_new twice through the caches. Takes: x, x_new
// and y float32, float16 or bfloat16, alike; delta and operands of any of these; any strides, any D >= 1. Floor: 2 reads and
// 2 writes. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/gate_residual_norm.cu
#include "norm.cuh"

namespace dk {
namespace {

struct Call {
    Norm norm;
    Operand x, delta, gate;
    void *x_new, *y;
    bool alike;  // delta has x's dtype
};

// x + gate * delta as x's dtype rounds it; gate_at is where the row's gate begins.
template <class T, int kVec>
__device__ __forceinline__ void update(const Call& c, int64_t gate_at, int64_t column, float (&x)[kVec], float (&delta)[kVec]) {
    if (c.gate.present) {
        float t[kVec];
        read(c.gate, gate_at, column, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) delta[v] *= t[v];
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) x[v] = widen(narrow<T>(x[v] + delta[v]));
}

// kThreads threads hold a row of at most kThreads * kItems vectors.
template <class T, int kThreads, int kItems>
__global__ void __launch_bounds__(kBlock<kThreads>, 1) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T);
    using Vector = Pack<T, kVec>;
    const uint32_t row = blockIdx.x * kRows<kThreads> + threadIdx.x / kThreads;
    if (row >= c.norm.rows) return;  // a whole warp, or a whole block
    const int lane = threadIdx.x % kThreads, vectors = static_cast<int>(c.norm.columns / kVec);
    const int64_t begin = static_cast<int64_t>(row) * c.norm.columns;
    T *const x_new = static_cast<T*>(c.x_new) + begin, *const y = static_cast<T*>(c.y) + begin;
    const int64_t delta_at = c.delta.rows.offset(row), gate_at = c.gate.present ? c.gate.rows.offset(row) : 0;

    const T* const x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    float h[kItems][kVec];
    const auto finish = [&](int j, float (&delta)[kVec]) {
        const int i = lane + j * kThreads;
        update<T>(c, gate_at, static_cast<int64_t>(i) * kVec, h[j], delta);
        store(x_new + i * kVec, h[j]);
    };
    if (c.alike) {
        constexpr int kFlight = kItems > 5 ? kItems / 4 : kItems;  // vectors of each in flight: what the registers hold
        const T* const delta = static_cast<const T*>(c.delta.data) + delta_at;
#pragma unroll
        for (int j0 = 0; j0 < kItems; j0 += kFlight) {
            Vector raw[2][kFlight];
#pragma unroll
            for (int j = 0; j < kFlight; ++j) {
                const int i = lane + (j0 + j) * kThreads;
                if (i >= vectors) break;
                raw[0][j] = reinterpret_cast<const Vector*>(x)[i];
                raw[1][j] = reinterpret_cast<const Vector*>(delta)[i];
            }
#pragma unroll
            for (int j = 0; j < kFlight; ++j) {
                if (lane + (j0 + j) * kThreads >= vectors) break;
                float d[kVec];
#pragma unroll
                for (int v = 0; v < kVec; ++v) h[j0 + j][v] = widen(raw[0][j].v[v]), d[v] = widen(raw[1][j].v[v]);
                finish(j0 + j, d);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const int i = lane + j * kThreads;
            if (i >= vectors) break;
            float d[kVec];
            load(x + i * kVec, h[j]);
            read(c.delta, delta_at, static_cast<int64_t>(i) * kVec, d);
            finish(j, d);
        }
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j)
        if (lane + j * kThreads >= vectors)
#pragma unroll
            for (int v = 0; v < kVec; ++v) h[j][v] = 0;

    const Moments m = moments<kThreads>(static_cast<float>(c.norm.columns), c.norm.center, lane, vectors, h);
    const float rstd = 1.0f / divisor(c.norm, m.ms);
    const Starts at(c.norm, row);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int i = lane + j * kThreads;
        if (i >= vectors) break;
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[j][v] = (h[j][v] - m.rest) * rstd;
        affine(c.norm, at, static_cast<int64_t>(i) * kVec, h[j]);
        store(y + i * kVec, h[j]);
    }
}

// A block walks the row: x_new, then norm_modulate's walks over it. A thread reads back only what it wrote.
template <class T, int kVec>
__global__ void __launch_bounds__(kWalkers, 1) walked(const __grid_constant__ Call c) {
    const uint32_t row = blockIdx.x;
    const int64_t columns = c.norm.columns, begin = static_cast<int64_t>(row) * columns;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(kWalkers) * kVec;
    const T* const x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    T *const x_new = static_cast<T*>(c.x_new) + begin, *const y = static_cast<T*>(c.y) + begin;
    const int64_t delta_at = c.delta.rows.offset(row), gate_at = c.gate.present ? c.gate.rows.offset(row) : 0;
    for (int64_t i = first; i < columns; i += step) {
        float h[kVec], d[kVec];
        load(x + i * c.x.stride, h);
        read(c.delta, delta_at, i, d);
        update<T>(c, gate_at, i, h, d);
        store(x_new + i, h);
    }
    const Moments m = walked_moments<kVec>(columns, c.norm.center, [&](int64_t i, float (&h)[kVec]) { load(x_new + i, h); });
    const float rstd = 1.0f / divisor(c.norm, m.ms);
    const Starts at(c.norm, row);
    for (int64_t i = first; i < columns; i += step) {
        float h[kVec];
        load(x_new + i, h);
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[v] = (h[v] - m.mean - m.rest) * rstd;
        affine(c.norm, at, i, h);
        store(y + i, h);
    }
}

Refusal gate_residual_norm(Stream stream, Views out, View x, View delta, Optional gate, Optional scale, Optional shift,
                           Optional weight, Optional bias, Text norm, double eps, Text eps_mode) {
    Call c{};
    if (out.count != 2) return "out: not x_new and y";
    for (int k = 0; k < 2; ++k)
        if (!out[k].same_shape(x) || !out[k].contiguous() || out[k].dtype != x.dtype)
            return "out: not contiguous, or not like x";
    if (Refusal why = describe(c.norm, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (Refusal why = describe_like(c.x, x, x)) return why;
    if (Refusal why = describe_like(c.delta, delta, x)) return why;
    if (Refusal why = describe(c.gate, gate, x)) return why;
    c.x_new = out[0].data, c.y = out[1].data;
    c.alike = delta.dtype == x.dtype;
    if (c.norm.rows == 0) return nullptr;
    bool vectors = whole_vectors(c.norm) && aligned16(c.x_new) && aligned16(c.y);
    for (const Operand* o : {&c.x, &c.delta, &c.gate}) vectors = vectors && whole_vectors(*o, c.norm.columns);
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto rows = static_cast<unsigned>(c.norm.rows);
        const auto launch = [&](auto threads, auto items) {
            constexpr int kThreads = decltype(threads)::value, kItems = decltype(items)::value;
            const unsigned blocks = (rows + kRows<kThreads> - 1) / kRows<kThreads>;
            kept<T, kThreads, kItems><<<blocks, kBlock<kThreads>, 0, queue>>>(c);
        };
        if (!vectors)
            walked<T, 1><<<rows, kWalkers, 0, queue>>>(c);
        else if (!for_kept(c.norm.columns / kVec, launch))
            walked<T, kVec><<<rows, kWalkers, 0, queue>>>(c);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::gate_residual_norm;
DK_ENTRY(gate_residual_norm, "out x delta gate scale shift weight bias norm eps eps_mode")
