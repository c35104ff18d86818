// G = (dh - mean(dh) - k h mean(dh h)) / d + residual, dh = grad (1 + scale) weight; the operands' gradients are sums over rows
//
// Idea: a block takes a chunk of consecutive rows that share all their operands. Groups of its threads hold a row each, the
// next row in flight meanwhile; one sum over the row gives its mean, a second all the rest. P = sum grad, Q = sum grad h and
// E = sum G delta stay in registers over the chunk and make the operands' gradients: d shift = P, d scale = weight Q + bias P,
// d bias = (1 + scale) P, d weight = (1 + scale) Q, d gate = E. A sum that goes beyond its chunk leaves its part in scratch;
// a second kernel adds the parts up, in their order. Chunks depend on the shapes alone: any GPU gives the same bits.
// Everything else (rows that are wide, or not made of aligned 16-byte vectors; operands that change from row to row) goes
// through three kernels: a block walks a row for d x and its statistics; a thread walks a column down a chunk of rows, and
// finishes the sums that lie within; the rest as above. Takes: grad, x, residual and d x float32, float16 or bfloat16, alike;
// delta and operands of any of these; any strides. Floor: a read of grad, x (residual, delta), a write of d x (d delta).
// Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/norm_backward.cu
#include "norm.cuh"

namespace dk {
namespace {

constexpr int kSums = 5;  // scale, shift, weight, bias, gate
constexpr int kScale = 0, kShift = 1, kWeight = 2, kBias = 3, kGate = 4;

struct Sum {
    void* out;  // nullptr: not wanted
    int64_t repeat, groups;
    DType dtype;
    int32_t slot;  // which of the wanted ones
};

// What the general path keeps of a row.
struct Row {
    float mean, rest, rstd, mean_dh, slope;
};

struct Call {
    Norm norm;
    Operand grad, x, residual, delta, gate;
    void *dx, *d_delta;
    Sum sums[kSums];
    int32_t wanted;  // sums
    int32_t slots;   // parts of a chunk
    bool alike;      // delta is read, and has x's dtype
    bool gated;      // there is more to do than the norm's own gradient
    bool vectors, fast;
    int64_t span, per, chunk, chunks;  // `span` rows are cut into `per` chunks of at most `chunk`
    float* parts;                      // [chunks, slots, columns]
    Row* rows;

    DK_INLINE uint32_t begin(uint32_t k) const {
        return static_cast<uint32_t>(k / static_cast<uint32_t>(per) * span + k % static_cast<uint32_t>(per) * chunk);
    }
    DK_INLINE uint32_t end(uint32_t k) const {
        const int64_t all = (k / static_cast<uint32_t>(per) + 1) * span, own = begin(k) + chunk;
        return static_cast<uint32_t>(own < all ? own : all);
    }
    DK_INLINE float* part(int64_t k, int slot) const { return parts + (k * slots + slot) * norm.columns; }
    // The chunks that hold the rows of one of a sum's groups.
    DK_INLINE int64_t first(const Sum& s, int64_t group) const {
        return fast ? group * (s.repeat / span) * per : group * s.repeat / chunk;
    }
    DK_INLINE int64_t last(const Sum& s, int64_t group) const {
        return fast ? (group + 1) * (s.repeat / span) * per - 1 : ((group + 1) * s.repeat - 1) / chunk;
    }
};

// dh = grad * factor
template <int kCount>
__device__ __forceinline__ void factor(const Norm& c, int64_t weight, int64_t scale, int64_t column, float (&out)[kCount]) {
    float t[kCount];
    read_or(c.weight, 1.0f, weight, column, out);
    read_or(c.scale, 0.0f, scale, column, t);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] *= 1.0f + t[i];
}

// From a row's mean and the sums of e, e^2, dh and dh e, where e = x - mean.
__device__ __forceinline__ Row row_of(const Norm& c, float mean, const float (&of)[4]) {
    const float inverse = 1.0f / static_cast<float>(c.columns);
    const float rest = c.center ? of[0] * inverse : 0.0f;
    const float ms = variance(of[1] * inverse, rest), d = divisor(c, ms), rstd = 1.0f / d;
    const float kink = c.inside ? 1.0f : ms == 0.0f ? 0.0f : d / sqrtf(ms);
    return {mean, rest, rstd, c.center ? of[2] * inverse : 0.0f, kink * ((of[3] - rest * of[2]) * rstd * inverse)};
}

// Rows::offset for at most two dimensions: in a loop over rows, more divisions cost as much as the rest.
__device__ __forceinline__ int64_t start(const Rows& rows, uint32_t row) {
    if (rows.ndim < 2) return row * rows.stride[0];
    const uint32_t inner = static_cast<uint32_t>(rows.size[1]), i = row / inner;
    return i * rows.stride[0] + (row - i * inner) * rows.stride[1];
}

// How many blocks a multiprocessor is to hold: what their registers allow.
template <int kThreads, bool kGated>
constexpr int kResident = kThreads > 256 ? 1 : (kThreads == 256 ? 2 : 3) - kGated;

// kThreads threads hold a row of at most kThreads * kItems vectors. kGated: there is a residual, or delta matters.
template <class T, int kThreads, int kItems, bool kGated>
__global__ void __launch_bounds__(kBlock<kThreads>, kResident<kThreads, kGated>) kept(const __grid_constant__ Call c) {
    constexpr int kVec = 16 / sizeof(T), kAll = kBlock<kThreads>, kGroups = kAll / kThreads;
    constexpr int kHalves = kVec / 4, kQuads = kItems * kHalves * kThreads;  // float4s of a vector, and of a row
    constexpr int kMine = (kQuads + kAll - 1) / kAll;
    constexpr bool kAhead = !kGated || kThreads < 512;  // the registers hold the next row, too
    // A row of floats lies as [item][half][lane], so that neighbours read neighbouring 16 bytes.
    __shared__ float4 shared[kGroups * kQuads];
    const auto column_of = [](int f) {
        return (f / (kHalves * kThreads) * kThreads + f % kThreads) * kVec + f / kThreads % kHalves * 4;
    };
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    const int columns = static_cast<int>(c.norm.columns), vectors = columns / kVec;
    const uint32_t begin = c.begin(blockIdx.x), end = c.end(blockIdx.x);
    const Starts at(c.norm, begin);
    const int64_t gate_at = kGated && c.gate.present ? c.gate.rows.offset(begin) : 0;

    for (int f = threadIdx.x; f < kQuads; f += kAll) {
        const int column = column_of(f);
        float t[4] = {0, 0, 0, 0};
        if (column < columns) factor(c.norm, at.weight, at.scale, column, t);
        shared[f] = make_float4(t[0], t[1], t[2], t[3]);
    }
    float p[kItems][kVec] = {}, q[kItems][kVec] = {}, of_gate[kGated ? kItems : 1][kVec] = {};
    uint4 next_x[kItems] = {}, next_g[kItems] = {};  // beyond the row's end: zeros, always
    const auto from_row = [](const Operand& o, uint32_t row) {
        return reinterpret_cast<const uint4*>(static_cast<const T*>(o.data) + start(o.rows, row));
    };
    const auto fetch = [&](const Operand& o, uint32_t row, uint4(&to)[kItems]) {
        const uint4* const from = from_row(o, row);
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const int i = lane + j * kThreads;
            if (i < vectors) to[j] = from[i];
        }
    };
    uint32_t row = begin + group;
    if (kAhead && row < end) fetch(c.x, row, next_x), fetch(c.grad, row, next_g);
    __syncthreads();  // `shared` holds the factors

    for (uint32_t first = begin; first < end; first += kGroups, row += kGroups) {
        const bool live = row < end;  // all groups stay for the barriers; what one without a row computes is dropped
        float e[kItems][kVec], mean[1] = {0};
        uint4 g[kItems], residual[kItems], delta[kItems];
        if (!kAhead && live) fetch(c.x, row, next_x), fetch(c.grad, row, next_g);
#pragma unroll
        for (int j = 0; j < kItems; ++j) g[j] = next_g[j], unpack(next_x[j], e[j], T());
        if (kAhead && row + kGroups < end) fetch(c.x, row + kGroups, next_x), fetch(c.grad, row + kGroups, next_g);
        if constexpr (kGated && kAhead) {
            if (live && c.residual.present) fetch(c.residual, row, residual);
            if (live && c.alike) fetch(c.delta, row, delta);
        }
        if (c.norm.center) {
#pragma unroll
            for (int j = 0; j < kItems; ++j)
#pragma unroll
                for (int v = 0; v < kVec; ++v) mean[0] += e[j][v];
            sum<kThreads, kAll, false>(mean);  // the sum of four stands between this and the next
            mean[0] /= static_cast<float>(columns);
        } else if (kThreads > 32) {
            __syncthreads();  // stands for that sum's
        }
        float of[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const bool inside = lane + j * kThreads < vectors;
            float gv[kVec];
            unpack(g[j], gv, T());
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const float4 quad = shared[(j * kHalves + half) * kThreads + lane];
                const float a[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int v = half * 4 + i;
                    e[j][v] = inside ? e[j][v] - mean[0] : 0.0f;
                    const float dh = gv[v] * a[i];
                    of[0] += e[j][v];
                    of[1] += e[j][v] * e[j][v];
                    of[2] += dh;
                    of[3] += dh * e[j][v];
                }
            }
        }
        sum<kThreads, kAll, false>(of);
        const Row r = row_of(c.norm, mean[0], of);
        if (!live) continue;  // the group has had its last row
        const int64_t out = static_cast<int64_t>(row) * columns;
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const int i = lane + j * kThreads;
            if (i >= vectors) break;
            float G[kVec], t[kVec];
            unpack(g[j], t, T());
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const float4 quad = shared[(j * kHalves + half) * kThreads + lane];
                const float a[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int v = half * 4 + i;
                    const float h = (e[j][v] - r.rest) * r.rstd;
                    p[j][v] += t[v];
                    q[j][v] += t[v] * h;
                    G[v] = (t[v] * a[i] - r.mean_dh - h * r.slope) * r.rstd;
                }
            }
            if constexpr (kGated) {
                if (c.residual.present) {
                    if (!kAhead) residual[j] = from_row(c.residual, row)[i];
                    unpack(residual[j], t, T());
#pragma unroll
                    for (int v = 0; v < kVec; ++v) G[v] += t[v];
                }
            }
            if (c.dx) store(static_cast<T*>(c.dx) + out + i * kVec, G);
            if constexpr (kGated) {
                if (c.sums[kGate].out) {
                    if (kAhead && c.alike)
                        unpack(delta[j], t, T());
                    else
                        read(c.delta, start(c.delta.rows, row), i * kVec, t);
#pragma unroll
                    for (int v = 0; v < kVec; ++v) of_gate[j][v] += G[v] * t[v];
                }
                if (c.d_delta) {
                    read_or(c.gate, 1.0f, gate_at, i * kVec, t);
#pragma unroll
                    for (int v = 0; v < kVec; ++v) G[v] *= t[v];
                    emit(c.d_delta, c.delta.dtype, out + i * kVec, G);
                }
            }
        }
    }
    if (c.wanted == 0) return;

    // Over the groups, in their order: thread t has the float4s t, t + kAll, … of the row.
    const auto gather = [&](const float (&own)[kItems][kVec], float (&to)[kMine][4]) {
        __syncthreads();  // what was there has been read
#pragma unroll
        for (int j = 0; j < kItems; ++j)
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
                shared[group * kQuads + (j * kHalves + half) * kThreads + lane] =
                    make_float4(own[j][half * 4], own[j][half * 4 + 1], own[j][half * 4 + 2], own[j][half * 4 + 3]);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < kMine; ++m) {
            const int f = threadIdx.x + m * kAll;
            float4 total = make_float4(0, 0, 0, 0);
            if (f < kQuads)
#pragma unroll
                for (int n = 0; n < kGroups; ++n) {
                    const float4 v = shared[n * kQuads + f];
                    total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
                }
            to[m][0] = total.x, to[m][1] = total.y, to[m][2] = total.z, to[m][3] = total.w;
        }
    };
    const auto finish = [&](int which, const float (&sp)[4], const float (&sq)[4], int column) {
        const Sum& s = c.sums[which];
        float v[4], w[4], b[4];
        if (which == kScale) {
            read_or(c.norm.weight, 1.0f, at.weight, column, w);
            read_or(c.norm.bias, 0.0f, at.bias, column, b);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = w[i] * sq[i] + b[i] * sp[i];
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = which == kWeight ? sq[i] : sp[i];
        }
        if (which == kWeight || which == kBias) {
            read_or(c.norm.scale, 0.0f, at.scale, column, w);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] *= 1.0f + w[i];
        }
        if (s.repeat == c.chunk && c.per == 1)  // the whole sum
            emit(s.out, s.dtype, static_cast<int64_t>(blockIdx.x) * columns + column, v);
        else
            store(c.part(blockIdx.x, s.slot) + column, v);
    };
    float sp[kMine][4], sq[kMine][4];
    gather(p, sp), gather(q, sq);
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
        const int f = threadIdx.x + m * kAll, column = column_of(f);
        if (f >= kQuads || column >= columns) continue;
#pragma unroll
        for (int which = 0; which < kGate; ++which)
            if (c.sums[which].out) finish(which, sp[m], sq[m], column);
    }
    if constexpr (kGated) {
        if (!c.sums[kGate].out) return;
        gather(of_gate, sp);
#pragma unroll
        for (int m = 0; m < kMine; ++m) {
            const int f = threadIdx.x + m * kAll, column = column_of(f);
            if (f < kQuads && column < columns) finish(kGate, sp[m], sp[m], column);
        }
    }
}

// A block walks a row: its statistics, d x and d delta; kVec = 1 takes any stride and alignment.
template <class T, int kVec>
__global__ void __launch_bounds__(kWalkers, 1) walked(const __grid_constant__ Call c) {
    const uint32_t row = blockIdx.x;
    const int64_t columns = c.norm.columns, out = static_cast<int64_t>(row) * columns;
    const int64_t begin = static_cast<int64_t>(threadIdx.x) * kVec, step = static_cast<int64_t>(kWalkers) * kVec;
    const T* const x = static_cast<const T*>(c.x.data) + c.x.rows.offset(row);
    const T* const grad = static_cast<const T*>(c.grad.data) + c.grad.rows.offset(row);
    const Starts at(c.norm, row);
    float h[kVec], g[kVec], t[kVec], mean[1] = {0};
    if (c.norm.center) {
        for (int64_t i = begin; i < columns; i += step) {
            load(x + i * c.x.stride, h);
#pragma unroll
            for (int v = 0; v < kVec; ++v) mean[0] += h[v];
        }
        sum<kWalkers>(mean);
        mean[0] /= static_cast<float>(columns);
    }
    float of[4] = {0, 0, 0, 0};
    for (int64_t i = begin; i < columns; i += step) {
        load(x + i * c.x.stride, h);
        load(grad + i * c.grad.stride, g);
        factor(c.norm, at.weight, at.scale, i, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            const float e = h[v] - mean[0], dh = g[v] * t[v];
            of[0] += e;
            of[1] += e * e;
            of[2] += dh;
            of[3] += dh * e;
        }
    }
    sum<kWalkers>(of);
    const Row r = row_of(c.norm, mean[0], of);
    if (c.wanted && threadIdx.x == 0) c.rows[row] = r;
    if (!c.dx && !c.d_delta) return;
    const int64_t residual_at = c.residual.present ? c.residual.rows.offset(row) : 0;
    const int64_t gate_at = c.gate.present ? c.gate.rows.offset(row) : 0;
    for (int64_t i = begin; i < columns; i += step) {
        load(x + i * c.x.stride, h);
        load(grad + i * c.grad.stride, g);
        factor(c.norm, at.weight, at.scale, i, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) g[v] = (g[v] * t[v] - r.mean_dh - (h[v] - r.mean - r.rest) * r.rstd * r.slope) * r.rstd;
        read_or(c.residual, 0.0f, residual_at, i, t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) g[v] += t[v];
        if (c.dx) store(static_cast<T*>(c.dx) + out + i, g);
        if (c.d_delta) {
            read_or(c.gate, 1.0f, gate_at, i, t);
#pragma unroll
            for (int v = 0; v < kVec; ++v) g[v] *= t[v];
            emit(c.d_delta, c.delta.dtype, out + i, g);
        }
    }
}

// A thread walks kVec columns down a chunk of rows, once `walked` has left the rows' statistics. What a sum's group has in
// this chunk goes to its output where all of it lies here; else to part 0 if the group began before, or to part 1.
constexpr int kDown = 128;
template <class T, int kVec>
__global__ void __launch_bounds__(kDown) down(const __grid_constant__ Call c, uint32_t tiles) {
    const int64_t columns = c.norm.columns, k = blockIdx.x / tiles;
    const int64_t i = (static_cast<int64_t>(blockIdx.x % tiles) * kDown + threadIdx.x) * kVec;
    if (i >= columns) return;
    const uint32_t begin = c.begin(static_cast<uint32_t>(k)), end = c.end(static_cast<uint32_t>(k));
    float total[kSums][kVec] = {};
    for (uint32_t row = begin; row < end; ++row) {
        const Row r = c.rows[row];
        const Starts at(c.norm, row);
        float h[kVec], g[kVec], s[kVec], w[kVec], t[kVec];
        load(static_cast<const T*>(c.x.data) + c.x.rows.offset(row) + i * c.x.stride, h);
        load(static_cast<const T*>(c.grad.data) + c.grad.rows.offset(row) + i * c.grad.stride, g);
        read_or(c.norm.weight, 1.0f, at.weight, i, w);
        read_or(c.norm.scale, 0.0f, at.scale, i, s);
#pragma unroll
        for (int v = 0; v < kVec; ++v) h[v] = (h[v] - r.mean - r.rest) * r.rstd, s[v] += 1.0f;
        if (c.sums[kScale].out) {
            read_or(c.norm.bias, 0.0f, at.bias, i, t);
#pragma unroll
            for (int v = 0; v < kVec; ++v) total[kScale][v] += g[v] * (h[v] * w[v] + t[v]);
        }
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            total[kShift][v] += g[v];
            total[kWeight][v] += g[v] * s[v] * h[v];
            total[kBias][v] += g[v] * s[v];
        }
        if (c.sums[kGate].out) {
            read_or(c.residual, 0.0f, c.residual.rows.offset(row), i, t);
#pragma unroll
            for (int v = 0; v < kVec; ++v) h[v] = (g[v] * s[v] * w[v] - r.mean_dh - h[v] * r.slope) * r.rstd + t[v];
            read(c.delta, c.delta.rows.offset(row), i, t);
#pragma unroll
            for (int v = 0; v < kVec; ++v) total[kGate][v] += h[v] * t[v];
        }
#pragma unroll
        for (int which = 0; which < kSums; ++which) {
            const Sum& to = c.sums[which];
            if (!to.out) continue;
            const auto repeat = static_cast<uint32_t>(to.repeat);
            const uint32_t group = row / repeat, from = group * repeat;
            const bool complete = row - from + 1 == repeat;
            if (!complete && row + 1 < end) continue;
            if (complete && from >= begin)
                emit(to.out, to.dtype, group * columns + i, total[which]);
            else
                emit(c.part(k, 2 * to.slot + (from >= begin)), DType::f32, i, total[which]);
#pragma unroll
            for (int v = 0; v < kVec; ++v) total[which][v] = 0;
        }
    }
}

// The sums that go over several chunks: a warp takes every kJoin-th chunk's part of 32 columns, then the warps add up in order.
constexpr int kJoin = 16;
__global__ void __launch_bounds__(32 * kJoin) join(const __grid_constant__ Call c, uint32_t tiles) {
    __shared__ float partial[kJoin][32];
    int64_t group = blockIdx.x / tiles;
    int which = 0;
    for (; which < kSums; ++which) {
        const int64_t groups = c.sums[which].out && c.sums[which].repeat > 1 ? c.sums[which].groups : 0;
        if (group < groups) break;
        group -= groups;
    }
    if (which == kSums) return;
    const Sum& s = c.sums[which];
    const int64_t k0 = c.first(s, group), k1 = c.last(s, group);
    if (k0 == k1) return;  // its chunk finished it
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t i = static_cast<int64_t>(blockIdx.x % tiles) * 32 + lane;
    float total[1] = {0};
    if (i < c.norm.columns)
#pragma unroll 4
        for (int64_t k = k0 + warp; k <= k1; k += kJoin) total[0] += c.part(k, c.fast ? s.slot : 2 * s.slot + (k == k0))[i];
    partial[warp][lane] = total[0];
    __syncthreads();
    if (warp || i >= c.norm.columns) return;
    total[0] = 0;
#pragma unroll
    for (int w = 0; w < kJoin; ++w) total[0] += partial[w][lane];
    emit(s.out, s.dtype, group * c.norm.columns + i, total);
}

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamped(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : v > hi ? hi : v; }

int64_t gcd(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

// Which path, and how the rows are cut: by the arguments alone.
void plan(Call& c) {
    const int64_t rows = c.norm.rows, columns = c.norm.columns;
    c.span = rows;
    for (const Operand* o : {&c.norm.weight, &c.norm.bias, &c.norm.scale, &c.norm.shift, &c.gate})
        if (o->present) c.span = gcd(c.span, o->rows.repeat);
    c.fast = c.vectors && columns <= (c.x.dtype == DType::f32 ? 6144 : 8192) && (c.span >= 8 || c.span == rows);
    for (const Operand* o : {&c.x, &c.grad, &c.residual, &c.delta}) c.fast = c.fast && o->rows.ndim <= 2;
    if (c.fast) {
        c.chunk = clamped(over(rows, 512), 8, 64);
    } else {
        c.span = rows;
        c.chunk = clamped(over(rows * over(columns, 1024), 1024), 8, 64);
    }
    c.per = over(c.span, c.chunk);
    c.chunk = over(c.span, c.per);
    c.chunks = rows / c.span * c.per;
    c.slots = c.fast ? c.wanted : 2 * c.wanted;
}

Refusal describe(Call& c, const Views& out, const View& grad, const View& x, const Optional& scale, const Optional& shift,
                 const Optional& weight, const Optional& bias, const Text& norm, double eps, const Text& eps_mode,
                 const Optional& residual, const Optional& delta, const Optional& gate, int64_t wanted) {
    if (Refusal why = describe(c.norm, x, scale, shift, weight, bias, norm, eps, eps_mode)) return why;
    if (Refusal why = describe_like(c.x, x, x)) return why;
    if (Refusal why = describe_like(c.grad, grad, x)) return why;
    if (grad.dtype != x.dtype || (residual && residual.dtype != x.dtype)) return "grad or residual: not of x's dtype";
    if (residual)
        if (Refusal why = describe_like(c.residual, residual, x)) return why;
    if (delta)
        if (Refusal why = describe_like(c.delta, delta, x)) return why;
    if (gate && !delta) return "gate: without delta";
    if (Refusal why = describe(c.gate, gate, x)) return why;
    if (wanted < 0 || wanted >> 7) return "wanted: not 0 to 127";
    c.vectors = whole_vectors(c.norm);
    for (const Operand* o : {&c.x, &c.grad, &c.residual, &c.delta, &c.gate})
        c.vectors = c.vectors && whole_vectors(*o, c.norm.columns);
    // The bits of `wanted`: which input, what it is beside x's rows, and which sum it is.
    const Optional same{x};
    const Optional* const inputs[] = {&same, &scale, &shift, &weight, &bias, &delta, &gate};
    const Operand* const operands[] = {nullptr, &c.norm.scale, &c.norm.shift, &c.norm.weight, &c.norm.bias, nullptr, &c.gate};
    constexpr int kWhich[] = {-1, kScale, kShift, kWeight, kBias, -1, kGate};
    int64_t count = 0;
    for (int k = 0; k < 7; ++k) {
        if (!(wanted >> k & 1)) continue;
        const Optional& t = *inputs[k];
        if (!t) return "wanted: the gradient of an input that is absent";
        if (count == out.count || !out[count].same_shape(t) || out[count].dtype != t.dtype || !out[count].contiguous())
            return "out: not contiguous, or not like what is wanted";
        const View& o = out[count++];
        c.vectors = c.vectors && aligned16(o.data);
        if (k == 0) c.dx = o.data;
        if (k == 5) c.d_delta = o.data;
        if (kWhich[k] < 0) continue;
        const int64_t repeat = operands[k]->rows.repeat;
        c.sums[kWhich[k]] = {o.data, repeat, c.norm.rows / repeat, o.dtype, c.wanted++};
    }
    if (count != out.count) return "out: more than what is wanted";
    c.alike = c.sums[kGate].out && delta.dtype == x.dtype;
    c.gated = residual || c.sums[kGate].out || c.d_delta;
    if (c.norm.rows) plan(c);
    return nullptr;
}

int64_t part_bytes(const Call& c) {
    const int64_t floats = c.chunks * c.slots * c.norm.columns;
    return over(floats, 16) * 64;
}

int64_t bytes(Stream, Views out, View grad, View x, Optional scale, Optional shift, Optional weight, Optional bias, Text norm,
              double eps, Text eps_mode, Optional residual, Optional delta, Optional gate, int64_t wanted) {
    Call c{};
    if (describe(c, out, grad, x, scale, shift, weight, bias, norm, eps, eps_mode, residual, delta, gate, wanted)) return 0;
    if (!c.norm.rows || !c.wanted) return 0;
    return part_bytes(c) + (c.fast ? 0 : c.norm.rows * static_cast<int64_t>(sizeof(Row)));
}

template <class T, bool kGated>
void launch_fast(const Call& c, cudaStream_t queue) {
    constexpr int kVec = 16 / sizeof(T), kItems = kVec == 8 ? 3 : 4, kWide = kVec == 8 ? 2 : 3;
    const int64_t n = c.norm.columns / kVec;
    const auto blocks = static_cast<unsigned>(c.chunks);
    if (n <= 32 * kItems)
        kept<T, 32, kItems, kGated><<<blocks, kBlock<32>, 0, queue>>>(c);
    else if (n <= 64 * kItems)
        kept<T, 64, kItems, kGated><<<blocks, kBlock<64>, 0, queue>>>(c);
    else if (n <= 128 * kItems)
        kept<T, 128, kItems, kGated><<<blocks, kBlock<128>, 0, queue>>>(c);
    else if (n <= 256 * kWide)
        kept<T, 256, kWide, kGated><<<blocks, kBlock<256>, 0, queue>>>(c);
    else
        kept<T, 512, kWide, kGated><<<blocks, kBlock<512>, 0, queue>>>(c);
}

template <class T, int kVec>
void launch_general(const Call& c, uint32_t tiles, cudaStream_t queue) {
    walked<T, kVec><<<static_cast<unsigned>(c.norm.rows), kWalkers, 0, queue>>>(c);
    if (c.wanted) down<T, kVec><<<static_cast<unsigned>(c.chunks * tiles), kDown, 0, queue>>>(c, tiles);
}

Refusal norm_backward(Stream stream, Views out, View grad, View x, Optional scale, Optional shift, Optional weight,
                      Optional bias, Text norm, double eps, Text eps_mode, Optional residual, Optional delta, Optional gate,
                      int64_t wanted) {
    Call c{};
    if (Refusal why = describe(c, out, grad, x, scale, shift, weight, bias, norm, eps, eps_mode, residual, delta, gate, wanted))
        return why;
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    if (!c.norm.rows) {  // sums of nothing
        for (int64_t k = 0; k < out.count; ++k)
            if (const int64_t n = out[k].numel()) cudaMemsetAsync(out[k].data, 0, n * size_of(out[k].dtype), queue);
        return nullptr;
    }
    if (out.count == 0) return nullptr;
    int64_t shared_sums = 0;  // those that may go over several chunks
    for (const Sum& s : c.sums)
        if (s.out && s.repeat > 1 && (!c.fast || c.per > 1 || s.repeat > c.span)) shared_sums += s.groups;
    c.parts = static_cast<float*>(stream.scratch);
    c.rows = reinterpret_cast<Row*>(static_cast<char*>(stream.scratch) + part_bytes(c));
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const int64_t down_tiles = over(c.norm.columns, kDown * (c.vectors ? kVec : 1)), tiles = over(c.norm.columns, 32);
        int64_t items = 0;
        for (const Sum& s : c.sums) items += s.out && s.repeat > 1 ? s.groups : 0;
        if (c.chunks * down_tiles > 0x7fffffff || items * tiles > 0x7fffffff) return "more than 2^31 - 1 blocks";
        if (c.fast)
            c.gated ? launch_fast<T, true>(c, queue) : launch_fast<T, false>(c, queue);
        else if (c.vectors)
            launch_general<T, kVec>(c, static_cast<uint32_t>(down_tiles), queue);
        else
            launch_general<T, 1>(c, static_cast<uint32_t>(down_tiles), queue);
        if (shared_sums) join<<<static_cast<unsigned>(items * tiles), 32 * kJoin, 0, queue>>>(c, static_cast<uint32_t>(tiles));
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::norm_backward;
DK_ENTRY_WITH_SCRATCH(norm_backward, "out grad x scale shift weight bias norm eps eps_mode residual delta gate wanted", bytes)
