// out[t, p] = p1 + s (p0 - p1), s = sigmoid(tau[t] (1 + w) + b), and the gradients of all five
//
// Idea: a thread holds 16 bytes of each parameter and goes over the times; where there are few parameters, blocks share the
// times out. The gradients of the parameters add up over the times in registers; d tau adds up over a warp's columns, into
// scratch, and a second kernel adds up the warps, in one fixed order. Takes: parameters and grad float32, float16 or
// bfloat16, alike; tau any of these; any strides. Floor: 4 reads of P and a write of T P; backward a read of T P, 4 reads and
// 4 writes of P. Compile: nvcc -std=c++20 -arch=sm_90 -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/td_params.cu
#include "norm.cuh"

namespace dk {
namespace {

constexpr int kThreads = 128, kBlocks = 528;  // four blocks for each multiprocessor of an H100
constexpr int kParameters = 4;                // p0, p1, w, b

struct Call {
    const void* parameter[kParameters];
    int64_t stride[kParameters];
    Operand tau;  // element t is row t
    int64_t times, columns;
    bool vectors;
};

struct Forward : Call {
    void* out;
};

struct Backward : Call {
    const void* grad;
    int64_t grad_row, grad_column;
    void* gradient[kParameters];  // nullptr: not wanted
    float* part;                  // of d tau: [times, warps], or nullptr
    int64_t warps;
};

__device__ __forceinline__ float time_at(const Operand& tau, int64_t t) {
    float v[1];
    read(tau, t * tau.stride, 0, v);
    return v[0];
}

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

template <class T, int kVec>
__device__ __forceinline__ void parameters(const Call& c, int64_t column, float (&p)[kParameters][kVec]) {
#pragma unroll
    for (int k = 0; k < kParameters; ++k)
        load(static_cast<const T*>(c.parameter[k]) + column * (kVec > 1 ? 1 : c.stride[k]), p[k]);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ Forward c) {
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    if (column >= c.columns) return;
    float p[kParameters][kVec];
    parameters<T>(c, column, p);
    for (int64_t t = blockIdx.y; t < c.times; t += gridDim.y) {
        const float tau = time_at(c.tau, t);
        float y[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[v] = p[1][v] + sigmoid(tau * (1.0f + p[2][v]) + p[3][v]) * (p[0][v] - p[1][v]);
        store(static_cast<T*>(c.out) + t * c.columns + column, y);
    }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Backward c) {
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    const bool inside = column < c.columns;  // the others stay for the warp's sum, with zeros
    float p[kParameters][kVec] = {}, d[kParameters][kVec] = {}, g[kVec] = {};
    if (inside) parameters<T>(c, column, p);
    for (int64_t t = 0; t < c.times; ++t) {
        if (inside) load(static_cast<const T*>(c.grad) + t * c.grad_row + column * (kVec > 1 ? 1 : c.grad_column), g);
        const float tau = time_at(c.tau, t);
        float d_tau[1] = {0};
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            const float s = sigmoid(tau * (1.0f + p[2][v]) + p[3][v]);
            const float dz = g[v] * (p[0][v] - p[1][v]) * s * (1.0f - s);
            d[0][v] += g[v] * s;
            d[1][v] += g[v] * (1.0f - s);
            d[2][v] += dz * tau;
            d[3][v] += dz;
            d_tau[0] += inside ? dz * (1.0f + p[2][v]) : 0.0f;
        }
        if (c.part) {
            sum<32>(d_tau);
            if (threadIdx.x % 32 == 0)
                c.part[t * c.warps + static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32] = d_tau[0];
        }
    }
    if (!inside) return;
#pragma unroll
    for (int k = 0; k < kParameters; ++k)
        if (c.gradient[k]) store(static_cast<T*>(c.gradient[k]) + column, d[k]);
}

// A block adds up the parts of one time.
__global__ void __launch_bounds__(kThreads) join(const float* part, int64_t warps, void* out, DType dtype) {
    const int64_t t = blockIdx.x;
    float total[1] = {0};
#pragma unroll 4
    for (int64_t w = threadIdx.x; w < warps; w += kThreads) total[0] += part[t * warps + w];
    sum<kThreads>(total);
    if (threadIdx.x == 0) emit(out, dtype, t, total);
}

Refusal describe(Call& c, const View& p0, const View& p1, const View& w, const View& b, const View& tau) {
    const View* const all[kParameters] = {&p0, &p1, &w, &b};
    if (p0.dtype > DType::bf16) return "p0: not float32, float16 or bfloat16";
    c.vectors = true;
    for (int k = 0; k < kParameters; ++k) {
        if (all[k]->ndim != 1 || !all[k]->same_shape(p0) || all[k]->dtype != p0.dtype) return "p0, p1, w, b: not alike";
        c.parameter[k] = all[k]->data;
        c.stride[k] = all[k]->step(0);
        c.vectors = c.vectors && whole_vectors(all[k]->data, Rows{}, c.stride[k], p0.size(0), p0.dtype);
    }
    if (tau.ndim != 1 || tau.dtype > DType::bf16) return "tau: not one dimension of float32, float16 or bfloat16";
    c.tau.data = tau.data, c.tau.stride = tau.step(0), c.tau.dtype = tau.dtype, c.tau.present = true;
    c.times = tau.size(0);
    c.columns = p0.size(0);
    return nullptr;
}

int64_t blocks_of(const Call& c, DType dtype) {
    const int64_t each = kThreads * (c.vectors ? 16 / size_of(dtype) : 1);
    return (c.columns + each - 1) / each;
}

Refusal td_params(Stream stream, View out, View p0, View p1, View w, View b, View tau) {
    Forward c{};
    if (Refusal why = describe(c, p0, p1, w, b, tau)) return why;
    if (out.ndim != 2 || out.size(0) != c.times || out.size(1) != c.columns || out.dtype != p0.dtype || !out.contiguous())
        return "out: not contiguous [T, P] like p0";
    c.out = out.data;
    c.vectors = c.vectors && aligned16(c.out);
    const int64_t blocks = blocks_of(c, p0.dtype);
    if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
    if (!blocks || !c.times) return nullptr;
    const int64_t share = blocks < kBlocks ? kBlocks / blocks : 1;
    return for_value(Floats{}, p0.dtype, "p0: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(share < c.times ? share : c.times));
        if (c.vectors)
            forward<T, 16 / sizeof(T)><<<grid, kThreads, 0, queue>>>(c);
        else
            forward<T, 1><<<grid, kThreads, 0, queue>>>(c);
        return nullptr;
    });
}

Refusal describe(Backward& c, const Views& out, const View& grad, const View& p0, const View& p1, const View& w, const View& b,
                 const View& tau, int64_t wanted) {
    if (Refusal why = describe(static_cast<Call&>(c), p0, p1, w, b, tau)) return why;
    if (grad.ndim != 2 || grad.size(0) != c.times || grad.size(1) != c.columns || grad.dtype != p0.dtype)
        return "grad: not [T, P] like p0";
    if (wanted < 0 || wanted > 31) return "wanted: not 0 to 31";
    c.grad = grad.data, c.grad_row = grad.step(0), c.grad_column = grad.step(1);
    Rows rows{};
    if (c.times > 1) rows.push(c.times, c.grad_row);
    c.vectors = c.vectors && whole_vectors(c.grad, rows, c.grad_column, c.columns, grad.dtype);
    const View* const inputs[] = {&p0, &p1, &w, &b, &tau};
    int64_t count = 0;
    for (int k = 0; k < 5; ++k) {
        if (!(wanted >> k & 1)) continue;
        if (count == out.count || !out[count].same_shape(*inputs[k]) || out[count].dtype != inputs[k]->dtype ||
            !out[count].contiguous())
            return "out: not contiguous, or not like what is wanted";
        if (k < kParameters) {
            c.gradient[k] = out[count].data;
            c.vectors = c.vectors && aligned16(out[count].data);
        }
        ++count;
    }
    if (count != out.count) return "out: more than what is wanted";
    c.warps = blocks_of(c, p0.dtype) * (kThreads / 32);
    return nullptr;
}

int64_t bytes(Stream, Views out, View grad, View p0, View p1, View w, View b, View tau, int64_t wanted) {
    Backward c{};
    if (describe(c, out, grad, p0, p1, w, b, tau, wanted) || !(wanted & 16)) return 0;
    return c.times * c.warps * static_cast<int64_t>(sizeof(float));
}

Refusal td_params_backward(Stream stream, Views out, View grad, View p0, View p1, View w, View b, View tau, int64_t wanted) {
    Backward c{};
    if (Refusal why = describe(c, out, grad, p0, p1, w, b, tau, wanted)) return why;
    const int64_t blocks = blocks_of(c, p0.dtype);
    if (blocks > 0x7fffffff || c.times > 0x7fffffff) return "more than 2^31 - 1 blocks";
    if (wanted & 16) c.part = static_cast<float*>(stream.scratch);
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    return for_value(Floats{}, p0.dtype, "p0: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        if (blocks && c.vectors)
            backward<T, 16 / sizeof(T)><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(c);
        else if (blocks)
            backward<T, 1><<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(c);
        if (wanted & 16 && c.times) {
            const View& d_tau = out[out.count - 1];
            join<<<static_cast<unsigned>(c.times), kThreads, 0, queue>>>(c.part, c.warps, d_tau.data, d_tau.dtype);
        }
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::bytes;
using dk::td_params;
using dk::td_params_backward;
DK_ENTRY(td_params, "out p0 p1 w b tau")
DK_ENTRY_WITH_SCRATCH(td_params_backward, "out grad p0 p1 w b tau wanted", bytes)
