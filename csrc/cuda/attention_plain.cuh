// Attention without tensor cores: float32, whose products they would round to 10 bits, and values of another width than keys.
//
// Idea: a block of 128 threads owns the queries of a tile and walks over the keys in tiles; everything lies in shared memory as
// float32. Eight threads share a query: each computes the scores of every eighth key, passes them on through shared memory,
// and owns every eighth four columns of o. In float32, cp.async fetches v's tile while the scores are computed, and k's next
// tile while v's is added up. The largest score is subtracted before the scale multiplies, so that it becomes exp2(0) exactly.
#pragma once

#include "../dispatch.h"
#include "attention.cuh"
#include "mma.cuh"

namespace dk {
namespace {

constexpr int kPlainThreads = 128;
constexpr int kDepth = 16;  // columns that one sum of a score takes

// What is built: for the larger one of q's and v's columns. q's depth is a run-time number; only o lies in registers.
using PlainHeads = Values<32, 64, 96, 128, 256>;

template <int kD>
struct Plain {
    static constexpr int own = kD <= 128 ? 4 : 2;  // queries of a thread, and keys of a tile whose scores it computes
    static constexpr int rows = 16 * own, keys = 8 * own;
    // Floats from a row to the next. q, k: an odd number of 16 bytes, so that eight rows lie in eight different 16-byte columns
    // of the 128 that shared memory gives in a cycle. Scores: 8 mod 16, so that a warp, which writes 8 numbers to each of
    // four rows, or reads 16 bytes of each, finds them in different banks.
    static constexpr int pitch = (kD / 4 | 1) * 4, score_pitch = keys + 8;
    static constexpr int bytes = ((rows + keys) * pitch + keys * kD + rows * score_pitch) * 4;
};

// kRows rows from `first` on to shared memory, a warp a row; zeros beyond the first `present` rows, and beyond the columns up
// to the next multiple of four. What lies further is never written, and reaches only columns of o that are not stored.
template <int kRows, int kPitch, class T>
__device__ __forceinline__ void fetch_plain(float* to, const Lines<T>& from, int64_t first, int present, int columns) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const T* const data = from.data + first * from.row;
    const auto each_row = [&](auto&& body) {
#pragma unroll 4
        for (int row = warp; row < kRows; row += kPlainThreads / 32)
            body(to + row * kPitch, data + row * from.row, row < present);
    };
    const int padded = (columns + 3) / 4 * 4;
    if constexpr (sizeof(T) == 4) {
        if (from.piece == 16)
            for (int i = lane * 4; i < columns; i += 128)
                each_row([&](float* y, const T* x, bool is) { copy_async<16>(shared_address(y + i), is ? x + i : data, is); });
        else
            for (int i = lane; i < padded; i += 32)
                each_row([&](float* y, const T* x, bool is) {
                    is = is && i < columns;
                    copy_async<4>(shared_address(y + i), is ? x + i * from.column : data, is);
                });
    } else {
        for (int i = lane; i < padded; i += 32)
            each_row([&](float* y, const T* x, bool is) { y[i] = is && i < columns ? widen(x[i * from.column]) : 0.0f; });
    }
}

template <class T, int kD>
__global__ void __launch_bounds__(kPlainThreads, 2) attend_plain(const __grid_constant__ Call c) {
    using S = Plain<kD>;
    // Chunks: of 4 columns of o that a thread owns. A group of them is added up at a time.
    constexpr int kOwn = S::own, kKeys = S::keys, kChunks = kD / 32, kGroup = kChunks % 2 ? kChunks : 2;
    extern __shared__ uint4 memory[];
    const Attention& a = c.a;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int tile = static_cast<int>(blockIdx.x % static_cast<uint32_t>(c.tiles));
    const int line = static_cast<int>(blockIdx.x / static_cast<uint32_t>(c.tiles)), heads = static_cast<int>(a.heads);
    const int head = line % heads, sample = a.cu_q.data ? find(a, tile, S::rows) : line / heads;
    const Sequence s = a.sequence(sample);
    const int queries = static_cast<int>(s.queries), d = static_cast<int>(a.d), dv = static_cast<int>(a.dv);
    if (tile < 0 || tile > (queries - 1) / S::rows || queries < 1) return;
    const auto seen = [&](int query) { return static_cast<int>(a.seen(s, query < queries ? query : queries - 1)); };
    const int first = tile * S::rows, mine = first + warp * 4 * kOwn;  // queries of the block, of the warp
    const int reach = seen(first + S::rows - 1), most = mine < queries ? seen(mine + 4 * kOwn - 1) : 0;  // of the keys
    const int all = seen(mine);                                                                          // every query of mine

    float *const q_tile = reinterpret_cast<float*>(memory), *const k_tile = q_tile + S::rows * S::pitch;
    float *const v_tile = k_tile + kKeys * S::pitch, *const scores = v_tile + kKeys * kD;
    const int own = warp * 4 * kOwn + lane / 8;  // the thread's queries of the tile: this one and every fourth from there
    const int64_t kv_head = head / static_cast<int>(a.group());
    const Lines<T> k(a.k, c.piece[1], s.k_sample, s.k_first, kv_head), v(a.v, c.piece[2], s.k_sample, s.k_first, kv_head);

    // total: of this thread's keys; less: what o shrinks by when the next tile comes.
    float o[kOwn][kChunks][4] = {}, total[kOwn] = {}, top[kOwn], less[kOwn];
#pragma unroll
    for (int m = 0; m < kOwn; ++m) top[m] = -INFINITY, less[m] = 1;
    // Scores are in units of `factor`: raw, unless something is added to them or their order turns.
    const bool hides = a.bias.dtype != DType::other || a.mask.data, raw = !hides && a.scale > 0;
    const float unit = raw ? 1.0f : a.scale, factor = raw ? a.scale * kLog2e : kLog2e;

    if (reach > 0) {
        const Lines<T> q(a.q, c.piece[0], s.q_sample, s.q_first, head);
        fetch_plain<S::rows, S::pitch>(q_tile, q, first, queries - first, d);
        fetch_plain<kKeys, S::pitch>(k_tile, k, 0, reach, d);
    }
#pragma unroll 1
    for (int from = 0; from < reach; from += kKeys) {
        copies_done();
        __syncthreads();  // k is here, and nobody reads the v before
        fetch_plain<kKeys, kD>(v_tile, v, from, reach - from, dv);
        if (from < most) {
            float p[kOwn][kOwn] = {};
            // By kDepth columns: a sum of sums rounds less than one long one.
#pragma unroll 1
            for (int piece = 0; piece < d; piece += kDepth) {
                float sum[kOwn][kOwn] = {};
                const int end = d - piece < kDepth ? d : piece + kDepth;
#pragma unroll 2
                for (int i = piece; i < end; i += 4) {
                    float x[kOwn][4], y[kOwn][4];
#pragma unroll
                    for (int m = 0; m < kOwn; ++m) load(q_tile + (own + m * 4) * S::pitch + i, x[m]);
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) load(k_tile + (lane % 8 + n * 8) * S::pitch + i, y[n]);
#pragma unroll
                    for (int e = 0; e < 4; ++e)
#pragma unroll
                        for (int m = 0; m < kOwn; ++m)
#pragma unroll
                            for (int n = 0; n < kOwn; ++n) sum[m][n] = fmaf(x[m][e], y[n][e], sum[m][n]);
                }
#pragma unroll
                for (int m = 0; m < kOwn; ++m)
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) p[m][n] += sum[m][n];
            }
#pragma unroll
            for (int m = 0; m < kOwn; ++m)
#pragma unroll
                for (int n = 0; n < kOwn; ++n) p[m][n] *= unit;
            if (hides || from + kKeys > all)
#pragma unroll
                for (int m = 0; m < kOwn; ++m) {
                    const int query = first + own + m * 4, end = seen(query);
                    const Hiding hiding(a, sample, head, query < queries ? query : queries - 1);
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) {
                        const int key = from + lane % 8 + n * 8;
                        p[m][n] = key < end ? hiding.apply(p[m][n], key, 1.0f) : -INFINITY;
                    }
                }
#pragma unroll
            for (int m = 0; m < kOwn; ++m) {
                float next = top[m];
#pragma unroll
                for (int n = 0; n < kOwn; ++n) next = fmaxf(next, p[m][n]);
#pragma unroll
                for (int offset = 4; offset > 0; offset /= 2) next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, offset));
                const float base = next == -INFINITY ? 0.0f : next;
                less[m] = exp2f((top[m] - base) * factor), top[m] = next;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                    const float x = exp2f((p[m][n] - base) * factor);
                    sum += x;
                    scores[(own + m * 4) * S::score_pitch + lane % 8 + n * 8] = x;
                }
                total[m] = fmaf(total[m], less[m], sum);
            }
        }
        copies_done();
        __syncthreads();  // v is here, and the scores, and nobody reads this k
        if (from + kKeys < reach) fetch_plain<kKeys, S::pitch>(k_tile, k, from + kKeys, reach - from - kKeys, d);
        if (from >= most) continue;
        // A tile's sum comes to o in one addition: thousands of keys, one by one, would round as many times.
#pragma unroll
        for (int group = 0; group < kChunks; group += kGroup) {
            float sum[kOwn][kGroup][4] = {};
#pragma unroll 1
            for (int i = 0; i < kKeys; i += 4) {
                float x[kOwn][4];
#pragma unroll
                for (int m = 0; m < kOwn; ++m) load(scores + (own + m * 4) * S::score_pitch + i, x[m]);
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int n = 0; n < kGroup; ++n) {
                        float y[4];
                        load(v_tile + (i + e) * kD + (group + n) * 32 + lane % 8 * 4, y);
#pragma unroll
                        for (int m = 0; m < kOwn; ++m)
#pragma unroll
                            for (int f = 0; f < 4; ++f) sum[m][n][f] = fmaf(x[m][e], y[f], sum[m][n][f]);
                    }
            }
#pragma unroll
            for (int m = 0; m < kOwn; ++m)
#pragma unroll
                for (int n = 0; n < kGroup; ++n)
#pragma unroll
                    for (int f = 0; f < 4; ++f) o[m][group + n][f] = fmaf(o[m][group + n][f], less[m], sum[m][n][f]);
        }
    }

    const int64_t token = s.q_first + first, step = a.heads * dv;
    T* const out = static_cast<T*>(c.o) + ((s.q_sample * a.q_tokens + token) * a.heads + head) * dv;
    float* const lse = c.lse + (s.q_sample * a.heads + head) * a.q_tokens + token;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
        const int row = own + m * 4;
        float sum = total[m];
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (s.bad) sum = NAN;
        const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
        if (first + row >= queries) continue;
        if (lane % 8 == 0) lse[row] = sum == 0 ? -INFINITY : fmaf(raw ? a.scale : 1.0f, top[m], logf(sum));
#pragma unroll
        for (int n = 0; n < kChunks; ++n) {
            const int column = n * 32 + lane % 8 * 4;
            T* const y = out + row * step + column;
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] *= inverse;
            if (c.out >= 4) {
                if (column < dv) store(y, o[m][n]);
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (column + e < dv) y[e] = narrow<T>(o[m][n][e]);
            }
        }
    }
}

Refusal attention_plain(Call& c, DType dtype, Stream stream) {
    const Attention& a = c.a;
    return for_value(Floats{}, dtype, "q: its dtype", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_value(PlainHeads{}, built(PlainHeads{}, a.d > a.dv ? a.d : a.dv), "q, v: head dimension", [&](auto head) {
            constexpr int kD = decltype(head)::value;
            using S = Plain<kD>;
            static_assert(S::bytes <= 99 * 1024);  // what every GPU from sm_80 on has for a block
            const auto kernel = attend_plain<T, kD>;
            const bool packed = a.cu_q.data;
            const int64_t others = (packed ? 1 : a.samples) * a.heads;
            c.tiles = static_cast<int32_t>(packed ? a.q_tokens / S::rows + a.samples : (a.q_tokens + S::rows - 1) / S::rows);
            // Where a call of the runtime fails, the guard around this call sees its error and says so.
            if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes) == cudaSuccess)
                kernel<<<static_cast<unsigned>(c.tiles * others), kPlainThreads, S::bytes,
                         static_cast<cudaStream_t>(stream.handle)>>>(c);
            return Refusal{};
        });
    });
}

}  // namespace
}  // namespace dk
