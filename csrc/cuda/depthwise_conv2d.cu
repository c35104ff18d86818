// y[h, w, c] = bias[c] + sum_ij weight[c, i, j] x[h + i - kh/2, w + j - kw/2, c] (+ x[h, w, c]), channels last
//
// Idea: a thread has four channels of a strip of eight neighbouring pixels in registers: an input is read once for all taps
// of a row of the kernel that it meets, a tap's weights once for all eight pixels. A block brings the weights of its 128
// channels into the order of the taps, in shared memory, and goes over strips. Kernels that are not 3, 5 or 7 wide (or have
// more than 90 taps), and channels that do not come in aligned fours, go an element at a time. Takes: x and y float32,
// float16 or bfloat16, alike; weight and bias any of these; any strides; odd kernels. Floor: 1 read and 1 write, kh kw
// multiply-adds an element. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c
// csrc/cuda/depthwise_conv2d.cu
#include "norm.cuh"

namespace dk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPixels = 8, kVec = 4, kTile = 32 * kVec;  // of a strip; channels of a thread, and of a block
constexpr int kPitch = kTile + 4;                        // floats from one tap to the next: fewer conflicts on the way in
constexpr int kMaxTaps = 90;                             // 48 KiB hold so many, and the bias
constexpr int64_t kBlocks = 264;                         // two for each multiprocessor of an H100

struct Call {
    const void* x;
    void* y;
    int64_t x_step[4], weight_step[4];
    Operand weight, bias;
    int64_t total, channels, height, width;
    int32_t kh, kw;
    uint32_t strips, across, share;  // strips of the whole, of a line of pixels, and of a block
    bool residual;
};

__device__ __forceinline__ float weight_at(const Call& c, int64_t channel, int i, int j) {
    float v[1];
    read(c.weight, channel * c.weight_step[0] + i * c.weight_step[2] + j * c.weight_step[3], 0, v);
    return v[0];
}

__device__ __forceinline__ float bias_at(const Call& c, int64_t channel) {
    float v[1];
    read_or(c.bias, 0.0f, 0, channel, v);
    return v[0];
}

template <class T, int kW>
__global__ void __launch_bounds__(kThreads, 2) strips(const __grid_constant__ Call c) {
    extern __shared__ float4 shared[];  // [taps + 1, kPitch]: the last row is the bias
    float* const taps = reinterpret_cast<float*>(shared);
    const int count = c.kh * kW;
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * kTile;
    for (int n = threadIdx.x; n < count * kTile; n += kThreads) {
        const int channel = n / count, tap = n - channel * count;
        taps[tap * kPitch + channel] = tile + channel < c.channels ? weight_at(c, tile + channel, tap / kW, tap % kW) : 0.0f;
    }
    for (int n = threadIdx.x; n < kTile; n += kThreads)
        taps[count * kPitch + n] = tile + n < c.channels ? bias_at(c, tile + n) : 0.0f;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int64_t channel = tile + lane * kVec;
    if (channel >= c.channels) return;

    const uint32_t end = min(c.strips, (blockIdx.x + 1) * c.share);
    for (uint32_t s = blockIdx.x * c.share + threadIdx.x / 32; s < end; s += kWarps) {
        const uint32_t line = s / c.across, sample = line / static_cast<uint32_t>(c.height);
        const int64_t h = line - sample * static_cast<uint32_t>(c.height);
        const int64_t w = static_cast<int64_t>(s - line * c.across) * kPixels, left = w - kW / 2;
        uint32_t valid = 0;  // bit q: column left + q lies inside
#pragma unroll
        for (int q = 0; q < kPixels + kW - 1; ++q) valid |= (left + q >= 0 && left + q < c.width ? 1u : 0u) << q;
        const T* const x = static_cast<const T*>(c.x) + sample * c.x_step[0] + left * c.x_step[2] + channel;
        float total[kPixels][kVec];
        const float4 bias = shared[(count * kPitch) / 4 + lane];
#pragma unroll
        for (int p = 0; p < kPixels; ++p)
            total[p][0] = bias.x, total[p][1] = bias.y, total[p][2] = bias.z, total[p][3] = bias.w;
        for (int i = 0; i < c.kh; ++i) {
            const int64_t row = h + i - c.kh / 2;
            if (row < 0 || row >= c.height) continue;
            const T* const from = x + row * c.x_step[1];
            float4 tap[kW];
#pragma unroll
            for (int j = 0; j < kW; ++j) tap[j] = shared[(i * kW + j) * (kPitch / 4) + lane];
#pragma unroll
            for (int q = 0; q < kPixels + kW - 1; ++q) {
                float v[kVec] = {0, 0, 0, 0};
                if (valid >> q & 1) load(from + q * c.x_step[2], v);
#pragma unroll
                for (int j = 0; j < kW; ++j) {
                    const int p = q - j;
                    if (p < 0 || p >= kPixels) continue;
                    total[p][0] = fmaf(tap[j].x, v[0], total[p][0]);
                    total[p][1] = fmaf(tap[j].y, v[1], total[p][1]);
                    total[p][2] = fmaf(tap[j].z, v[2], total[p][2]);
                    total[p][3] = fmaf(tap[j].w, v[3], total[p][3]);
                }
            }
        }
        T* const y = static_cast<T*>(c.y) + (static_cast<int64_t>(line) * c.width + w) * c.channels + channel;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
            if (w + p >= c.width) break;
            if (c.residual) {
                float v[kVec];
                load(x + h * c.x_step[1] + (p + kW / 2) * c.x_step[2], v);
#pragma unroll
                for (int n = 0; n < kVec; ++n) total[p][n] += v[n];
            }
            store(y + p * c.channels, total[p]);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) elements(const __grid_constant__ Call c) {
    const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (e >= c.total) return;
    const int64_t pixel = e / c.channels, channel = e - pixel * c.channels;
    const int64_t line = pixel / c.width, w = pixel - line * c.width;
    const int64_t sample = line / c.height, h = line - sample * c.height;
    const T* const x = static_cast<const T*>(c.x) + sample * c.x_step[0] + channel * c.x_step[3];
    float total[1] = {bias_at(c, channel)};
    for (int i = 0; i < c.kh; ++i) {
        const int64_t row = h + i - c.kh / 2;
        if (row < 0 || row >= c.height) continue;
        for (int j = 0; j < c.kw; ++j) {
            const int64_t column = w + j - c.kw / 2;
            if (column < 0 || column >= c.width) continue;
            total[0] = fmaf(weight_at(c, channel, i, j), widen(x[row * c.x_step[1] + column * c.x_step[2]]), total[0]);
        }
    }
    if (c.residual) total[0] += widen(x[h * c.x_step[1] + w * c.x_step[2]]);
    store(static_cast<T*>(c.y) + e, total);
}

bool whole_fours(const View& t) {
    bool whole =
        reinterpret_cast<uintptr_t>(t.data) % (kVec * size_of(t.dtype)) == 0 && t.step(3) == 1 && t.size(3) % kVec == 0;
    for (int k = 0; k < 3; ++k) whole = whole && (t.size(k) == 1 || t.step(k) % kVec == 0);
    return whole;
}

Refusal depthwise_conv2d(Stream stream, View y, View x, View weight, Optional bias, bool residual) {
    Call c{};
    if (!y.same_shape(x) || !y.contiguous() || y.dtype != x.dtype) return "y: not contiguous, or not like x";
    if (x.ndim != 4) return "x: not [B, H, W, C]";
    if (weight.ndim != 4 || weight.size(0) != x.size(3) || weight.size(1) != 1 || !(weight.size(2) & 1) ||
        !(weight.size(3) & 1))
        return "weight: not [C, 1, odd, odd]";
    if (bias && (bias.ndim != 1 || bias.size(0) != x.size(3))) return "bias: not [C]";
    if (weight.dtype > DType::bf16 || (bias && bias.dtype > DType::bf16))
        return "weight or bias: not float32, float16 or bfloat16";
    if (weight.size(2) > 4096 || weight.size(3) > 4096) return "weight: more than 4096 taps along a side";
    c.x = x.data, c.y = y.data;
    for (int k = 0; k < 4; ++k) c.x_step[k] = x.step(k), c.weight_step[k] = weight.step(k);
    c.weight.data = weight.data, c.weight.dtype = weight.dtype, c.weight.present = true;
    if (bias) c.bias.data = bias.data, c.bias.dtype = bias.dtype, c.bias.stride = bias.step(0), c.bias.present = true;
    c.total = x.numel();
    c.height = x.size(1), c.width = x.size(2), c.channels = x.size(3);
    c.kh = static_cast<int32_t>(weight.size(2)), c.kw = static_cast<int32_t>(weight.size(3));
    c.residual = residual;
    if (c.total == 0) return nullptr;
    const int64_t across = (c.width + kPixels - 1) / kPixels, strip_count = x.size(0) * c.height * across;
    const int64_t tiles = (c.channels + kTile - 1) / kTile;
    const bool fours =
        whole_fours(x) && whole_fours(y) && c.kh * c.kw <= kMaxTaps && strip_count <= 0x3fffffff && tiles <= 65535;
    const int64_t blocks = (c.total + kThreads - 1) / kThreads;
    if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
    const int64_t rounds = (strip_count * tiles + kWarps * kBlocks - 1) / (kWarps * kBlocks);  // strips of a warp
    c.strips = static_cast<uint32_t>(strip_count), c.across = static_cast<uint32_t>(across);
    c.share = static_cast<uint32_t>(kWarps * (rounds < 16 ? rounds : 16));
    return for_value(Floats{}, x.dtype, "x: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const auto tiled = [&](auto width) -> Refusal {
            const dim3 grid((c.strips + c.share - 1) / c.share, static_cast<unsigned>(tiles));
            const auto bytes = static_cast<size_t>(c.kh * c.kw + 1) * kPitch * sizeof(float);
            strips<T, decltype(width)::value><<<grid, kThreads, bytes, queue>>>(c);
            return nullptr;
        };
        if (fours && !for_value(Values<3, 5, 7>{}, c.kw, "another width", tiled)) return nullptr;
        elements<T><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(c);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::depthwise_conv2d;
DK_ENTRY(depthwise_conv2d, "out x weight bias residual")
