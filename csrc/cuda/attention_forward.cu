// o = softmax(q kT scale + bias) v, lse = log of the sums of exponentials
//
// Idea: FlashAttention-2. A warp owns 16 or 32 queries of a head: its scores, its exponentials and its o never leave the
// registers. The block walks over the keys in tiles; cp.async fetches the next one while tensor cores work on this one. Head
// dimensions are exact in steps of 8: q's depth ends with an m16n8k8 step where need be. A row's result does not depend on how
// many warps share a block. Takes: float32, float16 or bfloat16, any strides, head dimensions up to 256, every mask; heads of
// k, v may be shared. float32, and v's of not as many columns as k's, are attention_plain.cuh's. Floor: 4 B H Sq Sk D floating
// point operations. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/attention_forward.cu
#include "../dispatch.h"
#include "attention.cuh"
#include "attention_plain.cuh"
#include "mma.cuh"

namespace dk {
namespace {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMostWarps = 4, kLeastWarps = 2;

// What is built. A head dimension that is not here runs in the next larger one, whose other columns are zeros.
using Heads = Values<32, 40, 64, 72, 80, 96, 128, 160, 256>;

// How the registers and the shared memory are spent on a head of kD columns.
template <int kD>
struct Shape {
    static constexpr int blocks = kD <= 128 ? 2 : 1;     // of 16 queries, a warp
    static constexpr int keys = kD <= 96 ? 64 : 32;      // a tile
    static constexpr bool kept = kD <= 72 || kD == 160;  // q stays in registers; else it is read again every tile
    static constexpr int rows = 16 * blocks;             // queries of a warp
    // Elements from a row of a tile to the next: an odd number of 16 bytes. The eight rows of a matrix, wherever it begins,
    // then lie in eight different 16-byte columns of the 128 bytes that shared memory gives in a cycle: no conflict.
    static constexpr int pitch = (kD / 8 | 1) * 8;
    static constexpr int tile = keys * pitch;
    static constexpr int bytes(int warps) { return (warps * rows * pitch + 4 * tile) * 2; }  // q, then two of k and v
};

// threadIdx.x, asked anew: what follows from it is computed where it is used, not kept in registers all along.
__device__ __forceinline__ int this_thread() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}

// A thread copies one piece of every so many rows.
template <int kBytes, int kD, class T>
__device__ __forceinline__ void fetch_pieces(T* to, const Lines<T>& from, const T* data, int rows, int present, int columns,
                                             int thread) {
    constexpr int kEach = kBytes / static_cast<int>(sizeof(T)), kPieces = kD / kEach;
    static_assert(kPieces <= kLeastWarps * 32);
    const int step = static_cast<int>(blockDim.x) / kPieces, column = thread % kPieces * kEach;
    int row = thread / kPieces;
    if (row >= step) return;
    present = column < columns ? present : 0;
    uint32_t at = shared_address(to + row * Shape<kD>::pitch + column);
    const T* p = data + row * from.row + column;
    const int64_t further = step * from.row;
#pragma unroll 2
    for (; row < rows; row += step, p += further, at += step * Shape<kD>::pitch * static_cast<int>(sizeof(T)))
        copy_async<kBytes>(at, row < present ? p : data, row < present);
}

// Rows [first, first + rows) to shared memory; zeros beyond the first `present` rows and the first `columns` columns.
template <int kD, class T>
__device__ __forceinline__ void fetch(T* to, const Lines<T>& from, int first, int rows, int present, int columns) {
    const T* const data = from.data + first * from.row;
    const int thread = this_thread();
    if (from.piece == 16) {
        fetch_pieces<16, kD>(to, from, data, rows, present, columns, thread);
    } else if (from.piece == 8) {
        fetch_pieces<8, kD>(to, from, data, rows, present, columns, thread);
    } else {
#pragma unroll 4
        for (int i = thread; i < rows * kD; i += static_cast<int>(blockDim.x)) {
            const int row = i / kD, column = i % kD;
            const bool inside = row < present && column < columns;
            to[row * Shape<kD>::pitch + column] = inside ? data[row * from.row + column * from.column] : T{};
        }
    }
}

template <class T, int kD, bool kHiding>
__global__ void __launch_bounds__(kMostWarps * 32) attend(const __grid_constant__ Call c) {
    using S = Shape<kD>;
    constexpr int kBlocks = S::blocks, kKeys = S::keys, kSteps = kD / 16, kRest = kD % 16 / 8, kBytes = sizeof(T);
    extern __shared__ uint4 memory[];
    const Attention& a = c.a;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int rows = static_cast<int>(blockDim.x) / 32 * S::rows;
    int tile = static_cast<int>(blockIdx.x % static_cast<uint32_t>(c.tiles));
    const int line = static_cast<int>(blockIdx.x / static_cast<uint32_t>(c.tiles)), heads = static_cast<int>(a.heads);
    const int head = line % heads, sample = a.cu_q.data ? find(a, tile, rows) : line / heads;
    const Sequence s = a.sequence(sample);
    const int queries = static_cast<int>(s.queries), keys = static_cast<int>(s.keys), columns = static_cast<int>(a.d);
    if (tile < 0 || tile > (queries - 1) / rows || queries < 1) return;
    const auto seen = [&](int query) { return static_cast<int>(a.seen({0, 0, queries, 0, 0, keys, false}, query)); };
    const int first = tile * rows, mine = first + warp * S::rows;  // queries of the block, of the warp
    const auto last = [&](int count, int from) { return (from + count < queries ? from + count : queries) - 1; };
    const int reach = seen(last(rows, first)), most = mine < queries ? seen(last(S::rows, mine)) : 0;  // of the keys
    const int all = seen(mine);                                                                        // every query of mine
    const bool bad = s.bad;

    T *const q_tile = reinterpret_cast<T*>(memory), *const k_tile = q_tile + rows * S::pitch;
    T* const own = q_tile + warp * S::rows * S::pitch;  // q, later o, of this warp alone
    const int64_t kv_head = head / static_cast<int>(a.group());
    const Lines<T> k(a.k, c.piece[1], s.k_sample, s.k_first, kv_head), v(a.v, c.piece[2], s.k_sample, s.k_first, kv_head);
    const auto fetch_keys = [&](int from, int stage) {
        T* const to = k_tile + stage * 2 * S::tile;
        fetch<kD>(to, k, from, kKeys, reach - from, columns);
        fetch<kD>(to + S::tile, v, from, kKeys, reach - from, columns);
    };

    const int q_sample = static_cast<int>(s.q_sample), q_first = static_cast<int>(s.q_first) + mine;

    float o[kBlocks][kD / 8][4], total[kBlocks][2], top[kBlocks][2];  // total: of this lane's keys
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
        top[m][0] = top[m][1] = -INFINITY, total[m][0] = total[m][1] = 0;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] = 0;
    }
    // Where the lane's row of a matrix lies: of q, and of v turned, rows first; of k, columns first; of k's last 8 columns,
    // rows.
    const uint32_t q_at = shared_address(own + lane % 16 * S::pitch + lane / 16 * 8);
    const uint32_t k_at = shared_address(k_tile + (lane / 16 * 8 + lane % 8) * S::pitch + lane / 8 % 2 * 8);
    const uint32_t rest_at = shared_address(k_tile + lane * S::pitch + kSteps * 16);
    const uint32_t v_at = shared_address(k_tile + S::tile + lane % 16 * S::pitch + lane / 16 * 8);
    uint32_t kept[S::kept ? kBlocks : 1][S::kept ? kSteps : 1][4], kept_rest[kBlocks][2];
    // Scores are in units of `factor`: raw, so that the largest becomes exp2(0) exactly, unless something is added to them
    // or their order turns.
    const bool raw = !kHiding && a.scale > 0;
    const float scale = a.scale * kLog2e, factor = raw ? scale : 1.0f;

    if (reach > 0) {
        const Lines<T> q(a.q, c.piece[0], s.q_sample, s.q_first, head);
        fetch<kD>(q_tile, q, first, rows, queries - first, columns);
        fetch_keys(0, 0);
        if constexpr (S::kept || kRest) {
            copies_done();
            __syncthreads();
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
                const uint32_t at = q_at + m * 16 * S::pitch * kBytes;
                if constexpr (S::kept)
#pragma unroll
                    for (int i = 0; i < kSteps; ++i) matrices<false>(kept[m][i], at + i * 16 * kBytes);
                if constexpr (kRest)  // lanes 16 and above are not asked
                    matrices<false>(kept_rest[m], at + kSteps * 16 * kBytes);
            }
        }
    }
    // The next kCount keys from `from` on; shift: how many bytes lie before them in the tiles.
    const auto step = [&](auto count, int from, uint32_t shift) __attribute__((always_inline)) {
        constexpr int kCount = decltype(count)::value;
        float p[kBlocks][kCount / 8][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
            for (int n = 0; n < kCount / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) p[m][n][e] = 0;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            uint32_t x[kBlocks][4];
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
                if constexpr (S::kept)
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[m][e] = kept[m][i][e];
                else
                    matrices<false>(x[m], q_at + (m * 16 * S::pitch + i * 16) * kBytes);
            }
#pragma unroll
            for (int n = 0; n < kCount / 8; n += 2) {
                uint32_t y[4];
                matrices<false>(y, k_at + shift + (n * 8 * S::pitch + i * 16) * kBytes);
#pragma unroll
                for (int m = 0; m < kBlocks; ++m) {
                    multiply(p[m][n], x[m], y[0], y[1], T{});
                    multiply(p[m][n + 1], x[m], y[2], y[3], T{});
                }
            }
        }
        if constexpr (kRest) {
            constexpr int kMost = kCount < 32 ? 2 : 4;  // matrices at a time
#pragma unroll
            for (int n = 0; n < kCount / 8; n += kMost) {
                uint32_t y[kMost];
                matrices<false>(y, rest_at + shift + n * 8 * S::pitch * kBytes);
#pragma unroll
                for (int m = 0; m < kBlocks; ++m)
#pragma unroll
                    for (int e = 0; e < kMost; ++e) multiply(p[m][n + e], kept_rest[m], y[e], T{});
            }
        }

        if (!raw)
#pragma unroll
            for (int m = 0; m < kBlocks; ++m)
#pragma unroll
                for (int n = 0; n < kCount / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) p[m][n][e] *= scale;
        if (kHiding || from + kCount > all) {
            const int lane = this_thread() % 32;
#pragma unroll
            for (int m = 0; m < kBlocks; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int query = mine + m * 16 + h * 8 + lane / 4;
                    query = query < queries ? query : queries - 1;
                    const int key = from + lane % 4 * 2, end = seen(query) - key;
                    const Hiding hiding(a, sample, head, query);
#pragma unroll
                    for (int n = 0; n < kCount / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& x = p[m][n][h * 2 + e];
                            if (n * 8 + e >= end)
                                x = -INFINITY;
                            else if constexpr (kHiding)
                                x = hiding.apply(x, key + n * 8 + e, kLog2e);
                        }
                }
        }

#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float next = top[m][h];
#pragma unroll
                for (int n = 0; n < kCount / 8; ++n) next = fmaxf(next, fmaxf(p[m][n][h * 2], p[m][n][h * 2 + 1]));
                next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
                next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
                const float base = next == -INFINITY ? 0.0f : next;
                if (__any_sync(0xffffffffu, next != top[m][h])) {
                    const float less = exp2_approximate((top[m][h] - base) * factor);
                    top[m][h] = next;
                    total[m][h] *= less;
#pragma unroll
                    for (int n = 0; n < kD / 8; ++n) o[m][n][h * 2] *= less, o[m][n][h * 2 + 1] *= less;
                }
#pragma unroll
                for (int n = 0; n < kCount / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& x = p[m][n][h * 2 + e];
                        x = exp2_approximate((x - base) * factor);
                        total[m][h] += x;
                    }
            }

#pragma unroll
        for (int i = 0; i < kCount / 16; ++i) {
            uint32_t x[kBlocks][4];
#pragma unroll
            for (int m = 0; m < kBlocks; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float (&y)[4] = p[m][2 * i + e / 2];
                    x[m][e] = pair(y[e % 2 * 2], y[e % 2 * 2 + 1], T{});
                }
            const uint32_t at = v_at + shift + i * 16 * S::pitch * kBytes;
#pragma unroll
            for (int n = 0; n + 1 < kD / 8; n += 2) {
                uint32_t y[4];
                matrices<true>(y, at + n * 8 * kBytes);
#pragma unroll
                for (int m = 0; m < kBlocks; ++m) {
                    multiply(o[m][n], x[m], y[0], y[1], T{});
                    multiply(o[m][n + 1], x[m], y[2], y[3], T{});
                }
            }
            if constexpr (kRest) {
                uint32_t y[2];
                matrices<true>(y, at + kSteps * 16 * kBytes);
#pragma unroll
                for (int m = 0; m < kBlocks; ++m) multiply(o[m][kD / 8 - 1], x[m], y[0], y[1], T{});
            }
        }
    };
#pragma unroll 1
    for (int from = 0, stage = 0; from < reach; from += kKeys, stage ^= 1) {
        copies_done();
        __syncthreads();  // this tile is here, and nobody reads the one before
        if (from + kKeys < reach) fetch_keys(from + kKeys, stage ^ 1);
        const uint32_t shift = stage * 2 * S::tile * kBytes;
        if (most - from > kKeys / 2)
            step(Tag<kKeys>{}, from, shift);
        else  // few, or, as causality may have it, none: in steps of 16
#pragma unroll 1
            for (int i = 0; i < most - from; i += 16) step(Tag<16>{}, from + i, shift + i * S::pitch * kBytes);
    }

    // o goes through the place where q was, so that a store moves 16 bytes.
    if (mine >= queries) return;
    __syncwarp();
    T* const out = static_cast<T*>(c.o) + ((q_sample * a.q_tokens + q_first) * a.heads + head) * columns;
    float* const lse = c.lse + (q_sample * a.heads + head) * a.q_tokens + q_first;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m * 16 + h * 8 + lane / 4;
            float sum = total[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (bad) sum = NAN;
            const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
            if (lane % 4 == 0 && mine + row < queries)
                lse[row] = sum == 0 ? -INFINITY : fmaf(raw ? a.scale : kLn2, top[m][h], logf(sum));
#pragma unroll
            for (int n = 0; n < kD / 8; ++n)
                *reinterpret_cast<uint32_t*>(own + row * S::pitch + n * 8 + lane % 4 * 2) =
                    pair(o[m][n][h * 2] * inverse, o[m][n][h * 2 + 1] * inverse, T{});
        }
    __syncwarp();
    const auto give = [&](auto each) {
        constexpr int kEach = decltype(each)::value;
        using Piece = Pack<T, kEach>;
        for (int i = lane; i < S::rows * (kD / kEach); i += 32) {
            const int row = i / (kD / kEach), column = i % (kD / kEach) * kEach;
            if (mine + row < queries && column < columns)
                *reinterpret_cast<Piece*>(out + row * a.heads * columns + column) =
                    *reinterpret_cast<const Piece*>(own + row * S::pitch + column);
        }
    };
    if (c.out == 8)
        give(Tag<8>{});
    else if (c.out == 4)
        give(Tag<4>{});
    else
        give(Tag<1>{});
}

template <class T, int kD, bool kHiding>
void launch(Call& c, Stream stream) {
    using S = Shape<kD>;
    const Attention& a = c.a;
    int processors = 0;
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device) != cudaSuccess) return;
    const bool packed = a.cu_q.data;
    const auto tiles = [&](int warps) {
        const int64_t rows = warps * S::rows;
        return packed ? a.q_tokens / rows + a.samples : (a.q_tokens + rows - 1) / rows;
    };
    const int64_t others = (packed ? 1 : a.samples) * a.heads;
    // Large blocks read k and v less often; small ones reach more processors.
    const bool large = a.q_tokens > kLeastWarps * S::rows && tiles(kMostWarps) * others >= 2 * processors;
    const int warps = large ? kMostWarps : kLeastWarps;
    const auto kernel = attend<T, kD, kHiding>;
    const int bytes = S::bytes(warps);
    static_assert(S::bytes(kMostWarps) <= 99 * 1024);  // what every GPU from sm_80 on has for a block
    // Where a call of the runtime fails, the guard around this call sees its error and says so.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes(kMostWarps)) != cudaSuccess) return;
    c.tiles = static_cast<int32_t>(tiles(warps));
    kernel<<<static_cast<unsigned>(c.tiles * others), warps * 32, bytes, static_cast<cudaStream_t>(stream.handle)>>>(c);
}

Refusal attention_forward(Stream stream, Views out, View q, View k, View v, Optional bias, Optional mask, Optional key_lengths,
                          Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale) {
    Call c{};
    Attention& a = c.a;
    if (Refusal why = parse(a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return why;
    const int64_t o_shape[] = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]},
                  lse_shape[] = {q.shape[0], q.shape[2], q.shape[1]};
    if (out.count != 2 || !has(out[0], o_shape, q.dtype) || !has(out[1], lse_shape, DType::f32) || !out[0].contiguous() ||
        !out[1].contiguous())
        return "out: not o and lse";
    if (a.q_tokens > 1 << 30 || a.k_tokens > 1 << 30) return "q, k: more than 2^30 tokens";
    if (a.samples == 0 || a.heads == 0 || a.q_tokens == 0) return nullptr;
    // The smallest block of queries is 32 long, and the grid's limit 2^31 - 1.
    if ((a.q_tokens / 32 + 1 + a.samples) * a.heads > 0x7fffffff / (cu_q ? 1 : a.samples)) return "q: too many tiles";
    c.o = out[0].data, c.lse = static_cast<float*>(out[1].data);
    const int32_t element = static_cast<int32_t>(size_of(q.dtype));
    c.piece[0] = piece_of(a.q, q, element), c.piece[1] = piece_of(a.k, k, element), c.piece[2] = piece_of(a.v, v, element);
    const auto place = reinterpret_cast<uintptr_t>(c.o);
    c.out = a.dv % 8 == 0 && place % 16 == 0 ? 8 : a.dv % 4 == 0 && place % (4 * element) == 0 ? 4 : 1;
    if (q.dtype == DType::f32 || a.d != a.dv) return attention_plain(c, q.dtype, stream);
    return for_value(Values<DType::f16, DType::bf16>{}, q.dtype, "q: not float16 or bfloat16", [&](auto tag) {
        using T = typename TypeOf<decltype(tag)::value>::type;
        return for_value(Heads{}, built(Heads{}, a.d), "q: head dimension", [&](auto head) {
            return for_bool(bias || mask, [&](auto hiding) -> Refusal {
                launch<T, decltype(head)::value, decltype(hiding)::value != 0>(c, stream);
                return nullptr;
            });
        });
    });
}

}  // namespace
}  // namespace dk

using dk::attention_forward;
DK_ENTRY(attention_forward, "out q k v bias mask key_lengths cu_q cu_k kv_index causal scale")
