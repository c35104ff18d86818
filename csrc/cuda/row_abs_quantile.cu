// The q-quantile of |m| in every sample, m = gain sum_g A_g p_g + a x
//
// Idea: positive floats are ordered as their bits are, so the order statistic is found by three histograms, of 11, 10 and
// 10 bits, each of the elements that share the bits found so far; m is made anew for each and never written. The next one
// up lies in the last histogram or is the least of what lies above it. A short sample is one block's, and its histograms
// stay in shared memory. Of a long one each block counts a chunk and adds its counts to the sample's; the block that comes
// last goes a level down. Counts are exact, so the order of blocks changes nothing. A step outside of the table gives NaN.
// Takes: outputs float32, float16 or bfloat16, alike; the rest float32; any strides; q in [0, 1]. Floor: three walks of
// outputs and x, two of them through L2 where it holds them.
// Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/row_abs_quantile.cu
#include "../dispatch.h"
#include "../solver.h"
#include "samples.cuh"
#include "tile.cuh"

namespace dk {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kVector = 4;
constexpr int kLevels = 3, kBins = 1 << 11;               // 11, 10 and 10 of the 31 bits that |m| has
constexpr int64_t kAlone = 32 * 1024, kChunk = 8 * 1024;  // elements of one block's sample; of a chunk of a longer one
constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fffffffu;

// What blocks leave for each other of a long sample. All of it begins as 0.
struct Progress {
    uint32_t count[kLevels][kBins], done[kLevels];
    uint32_t least;         // bits of the least |m| above the last histogram, inverted
    uint32_t prefix, rank;  // the bits found so far, and the rank among those that share them
};

struct Device {
    Samples output[kMaxOutputs], x;
    float* out;
    Progress* progress;
    const int32_t* step;
    const float *coef, *gain;
    int64_t table, coef_step, coef_sample, coef_column, gain_sample;
    int64_t elements, guided;
    uint32_t chunks, rank;  // the rank below the quantile
    float fraction;         // how far it is to the next
    int32_t outputs;
    bool two_rows;
};

template <class T, int kVec>
__device__ __forceinline__ void read(const Samples& s, int64_t b, int64_t e, float (&out)[kVec]) {
    const T* p = static_cast<const T*>(s.data) + b * s.sample;
    load(p + (kVec > 1 || s.straight ? e : s.inner.offset(static_cast<uint32_t>(e))), out);
}

// use(bits of |m|) for this thread's elements of [begin, end). Every walk makes the same bits. k: the head of coef's row.
template <class T, int kVec, class Use>
__device__ __forceinline__ void walk(const Device& d, const float* k, int64_t b, int64_t begin, int64_t end, Use use) {
    const int rest = d.two_rows ? d.outputs : 0;
    const float ax = k[d.outputs + rest];
    for (int64_t e = begin + threadIdx.x * kVec; e < end; e += kThreads * kVec) {
        float p[kMaxOutputs][kVec], m[kVec];
        read<float>(d.x, b, e, m);
#pragma unroll
        for (int g = 0; g < kMaxOutputs; ++g)
            if (g < d.outputs) read<T>(d.output[g], b, e, p[g]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) m[i] *= ax;
#pragma unroll
        for (int g = 0; g < kMaxOutputs; ++g) {
            if (g >= d.outputs) break;
            const float first = k[g], second = k[g + rest];
#pragma unroll
            for (int i = 0; i < kVec; ++i) m[i] = fmaf(e + i < d.guided ? first : second, p[g][i], m[i]);
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            const uint32_t bits = __float_as_uint(fabsf(m[i]));
            use(bits > kInfinity ? kNan : bits);
        }
    }
}

// Levels [first, last) of a chunk, which is a whole sample where there is one a sample: then first = 0 and last = kLevels.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) look(const __grid_constant__ Device d, int first, int last) {
    __shared__ uint32_t count[kBins], totals[kWarps];
    __shared__ uint32_t prefix, rank, least, next, turn;
    __shared__ float k[2 * kMaxOutputs + 1];
    const int tid = threadIdx.x;
    const uint32_t b = blockIdx.x / d.chunks, chunk = blockIdx.x - b * d.chunks;
    const bool alone = d.chunks == 1;
    const int64_t begin = chunk * kChunk, end = alone || d.elements - begin < kChunk ? d.elements : begin + kChunk;
    Progress* const sample = alone ? nullptr : d.progress + b;
    const int rows = d.outputs * (d.two_rows ? 2 : 1);
    if (tid <= rows) {
        const int32_t step = *d.step;
        const float gain = d.gain && tid < rows ? d.gain[b * d.gain_sample] : 1.0f;
        const bool valid = step >= 0 && step < d.table;
        k[tid] = valid ? gain * d.coef[step * d.coef_step + b * d.coef_sample + tid * d.coef_column] : NAN;
    }
    if (tid == 0) prefix = first ? sample->prefix : 0, rank = first ? sample->rank : d.rank;

    for (int level = first; level < last; ++level) {
        const int bits = level == 0 ? 11 : 10, shift = 20 - 10 * level;
        for (int i = tid; i < kBins; i += kThreads) count[i] = 0;
        if (tid == 0) least = UINT32_MAX, next = kBins;
        __syncthreads();
        const uint32_t found = prefix;
        uint32_t above = UINT32_MAX;
        walk<T, kVec>(d, k, b, begin, end, [&](uint32_t v) {
            const uint32_t top = v >> shift >> bits;
            if (top == found) atomicAdd(&count[v >> shift & ((1u << bits) - 1)], 1u);
            if (top > found) above = min(above, v);
        });
        above = __reduce_min_sync(0xffffffffu, above);
        if (tid % 32 == 0 && above != UINT32_MAX) atomicMin(&least, above);
        __syncthreads();

        if (!alone) {
            for (int i = tid; i < kBins; i += kThreads)
                if (count[i]) atomicAdd(&sample->count[level][i], count[i]);
            if (tid == 0 && level == kLevels - 1) atomicMax(&sample->least, ~least);
            __threadfence();  // this thread's counts are there before the block is counted
            __syncthreads();
            if (tid == 0) turn = atomicAdd(&sample->done[level], 1u);
            __syncthreads();
            if (turn != d.chunks - 1) return;
            __threadfence();
            for (int i = tid; i < kBins; i += kThreads) count[i] = __ldcg(&sample->count[level][i]);
            if (tid == 0 && level == kLevels - 1) least = ~__ldcg(&sample->least);
            __syncthreads();
        }

        // The two bins of each thread, and how many elements lie below them.
        const uint32_t one = count[2 * tid], both = one + count[2 * tid + 1];
        uint32_t upto = both;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const uint32_t v = __shfl_up_sync(0xffffffffu, upto, offset);
            if (tid % 32 >= offset) upto += v;
        }
        if (tid % 32 == 31) totals[tid / 32] = upto;
        // NaNs come last, in a bin of their own: where there is one, the last element is sought
        const uint32_t sought = level == 0 && count[kBins - 1] ? static_cast<uint32_t>(d.elements - 1) : rank;
        __syncthreads();
        uint32_t below = upto - both;
        for (int w = 0; w < tid / 32; ++w) below += totals[w];
        if (sought >= below && sought - below < both) {  // in one thread
            const bool second = sought - below >= one;
            prefix = found << bits | static_cast<uint32_t>(2 * tid + second);
            rank = sought - below - (second ? one : 0);
        }
        __syncthreads();
        if (level == kLevels - 1) {
            const int bin = static_cast<int>(prefix & ((1u << bits) - 1));
            const bool twice = rank + 1 < count[bin];
            int candidate = kBins;
            if (2 * tid + 1 > bin && both != one) candidate = 2 * tid + 1;
            if (2 * tid > bin && one) candidate = 2 * tid;
            candidate = __reduce_min_sync(0xffffffffu, candidate);
            if (tid % 32 == 0 && candidate < kBins) atomicMin(&next, static_cast<uint32_t>(candidate));
            __syncthreads();
            if (tid == 0) {
                const float low = __uint_as_float(prefix);
                const uint32_t up = twice ? prefix : next < kBins ? (found << bits | next) : least;
                const float high = __uint_as_float(up);
                d.out[b] = d.fraction == 0 || low == high ? low : fmaf(d.fraction, high - low, low);
            }
        } else if (!alone && tid == 0) {
            sample->prefix = prefix, sample->rank = rank;
        }
        __syncthreads();  // the counts have been read
    }
}

int64_t chunks_of(int64_t elements) { return elements <= kAlone ? 1 : (elements + kChunk - 1) / kChunk; }

int64_t bytes(Stream, View, Views, View x, View, View, Optional, double, int64_t) {
    if (x.ndim < 1 || x.numel() == 0 || chunks_of(x.numel() / x.shape[0]) == 1) return 0;
    return x.shape[0] * static_cast<int64_t>(sizeof(Progress));
}

Refusal row_abs_quantile(Stream stream, View out, Views outputs, View x, View coef, View step, Optional gain, double q,
                         int64_t guided_channels) {
    Mix c{};
    if (Refusal why = describe(c, outputs, x, coef, step, gain, guided_channels)) return why;
    if (!per_sample(out, c.batch, DType::f32) || !out.contiguous()) return "out: not contiguous float32 [B]";
    if (!(q >= 0 && q <= 1) || c.elements == 0) return "q: not 0 to 1, or no elements";
    if (c.elements > 0x7fffffff) return "more than 2^31 - 1 elements a sample";
    Device d{};
    bool vectors = whole_vectors(x, c.elements, kVector);
    d.x = samples(x);
    for (int g = 0; g < c.outputs; ++g) {
        d.output[g] = samples(c.output[g]);
        vectors = vectors && whole_vectors(c.output[g], c.elements, kVector);
    }
    const int64_t blocks = c.batch * chunks_of(c.elements);
    if (blocks == 0) return nullptr;
    if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
    const double place = q * static_cast<double>(c.elements - 1);
    d.rank = static_cast<uint32_t>(place);
    d.fraction = static_cast<float>(place - d.rank);
    d.out = static_cast<float*>(out.data);
    d.progress = static_cast<Progress*>(stream.scratch);
    d.step = static_cast<const int32_t*>(step.data);
    d.table = coef.shape[0];
    d.coef = c.coef, d.coef_step = coef.stride[0], d.coef_sample = c.coef_sample, d.coef_column = c.coef_column;
    d.gain = c.gain, d.gain_sample = c.gain_sample;
    d.elements = c.elements, d.guided = c.guided;
    d.chunks = static_cast<uint32_t>(chunks_of(c.elements));
    d.outputs = c.outputs, d.two_rows = c.two_rows;
    return for_value(Floats{}, outputs[0].dtype, "outputs: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto levels = [&](int first, int last) {
            if (vectors)
                look<T, kVector><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(d, first, last);
            else
                look<T, 1><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(d, first, last);
        };
        if (d.chunks == 1) {
            levels(0, kLevels);
            return nullptr;
        }
        cudaMemsetAsync(d.progress, 0, c.batch * sizeof(Progress), queue);
        for (int level = 0; level < kLevels; ++level) levels(level, level + 1);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::row_abs_quantile;
DK_ENTRY_WITH_SCRATCH(row_abs_quantile, "out outputs x coef step gain q guided_channels", dk::bytes)
