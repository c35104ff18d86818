// y = gelu(a) * b, gelu(a) = a (1 + erf(a / sqrt 2)) / 2, or a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))) / 2
//
// Idea: elementwise, 16 bytes of a and of b a thread, both in flight before the first use; the two halves of one Linear's
// answer are read as they lie. What is not made of aligned 16-byte vectors goes an element at a time. Takes: a, b and y
// float32, float16 or bfloat16, alike; any strides. Floor: 2 reads and 1 write. Compile: nvcc -std=c++20 -arch=sm_90
// -DDK_RUNG=cuda -Icsrc -Xptxas -v -c csrc/cuda/geglu.cu
#include "norm.cuh"

namespace dk {
namespace {

constexpr int kThreads = 256;

struct Call {
    Operand a, b;
    void* y;
    int64_t total, columns;
};

template <bool kTanh>
__device__ __forceinline__ float gelu(float x) {
    if constexpr (kTanh) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return 0.5f * x * (1.0f + erff(0.7071067812f * x));
}

// Element e of the whole, counted row by row. Index is wide enough for their number.
template <class T, int kVec, class Index, bool kTanh>
__global__ void __launch_bounds__(kThreads) gate(const __grid_constant__ Call c) {
    const Index e = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
    if (e >= static_cast<Index>(c.total)) return;
    const Index row = e / static_cast<Index>(c.columns), column = e - row * static_cast<Index>(c.columns);
    float a[kVec], b[kVec];
    load(static_cast<const T*>(c.a.data) + c.a.rows.offset(row) + column * c.a.stride, a);
    load(static_cast<const T*>(c.b.data) + c.b.rows.offset(row) + column * c.b.stride, b);
#pragma unroll
    for (int v = 0; v < kVec; ++v) a[v] = gelu<kTanh>(a[v]) * b[v];
    store(static_cast<T*>(c.y) + e, a);
}

template <class T, int kVec, class Index>
void launch(const Call& c, bool tanh, cudaStream_t queue) {
    const auto blocks = static_cast<unsigned>((c.total / kVec + kThreads - 1) / kThreads);
    if (tanh)
        gate<T, kVec, Index, true><<<blocks, kThreads, 0, queue>>>(c);
    else
        gate<T, kVec, Index, false><<<blocks, kThreads, 0, queue>>>(c);
}

Refusal geglu(Stream stream, View y, View a, View b, Text approximate) {
    Call c{};
    if (!y.same_shape(a) || !y.contiguous() || y.dtype != a.dtype) return "y: not contiguous, or not like a";
    if (b.dtype != a.dtype) return "b: not of a's dtype";
    if (Refusal why = describe_like(c.a, a, a)) return why;
    if (Refusal why = describe_like(c.b, b, a)) return why;
    const bool tanh = approximate == "tanh";
    if (!tanh && !(approximate == "none")) return "approximate: neither 'none' nor 'tanh'";
    c.y = y.data;
    c.columns = a.size(-1);
    c.total = a.numel();
    if (c.total == 0) return nullptr;
    const bool vectors = whole_vectors(c.a, c.columns) && whole_vectors(c.b, c.columns) && aligned16(c.y);
    const int64_t vector = vectors ? 16 / size_of(a.dtype) : 1;
    if ((c.total / vector + kThreads - 1) / kThreads > 0x7fffffff) return "more than 2^31 - 1 blocks";
    return for_value(Floats{}, a.dtype, "a: not float32, float16 or bfloat16", [&](auto tag) -> Refusal {
        using T = typename TypeOf<decltype(tag)::value>::type;
        constexpr int kVec = 16 / sizeof(T);
        const auto queue = static_cast<cudaStream_t>(stream.handle);
        const bool narrow_index = c.total <= 0x7fffffff;
        if (vectors && narrow_index)
            launch<T, kVec, uint32_t>(c, tanh, queue);
        else if (vectors)
            launch<T, kVec, uint64_t>(c, tanh, queue);
        else if (narrow_index)
            launch<T, 1, uint32_t>(c, tanh, queue);
        else
            launch<T, 1, uint64_t>(c, tanh, queue);
        return nullptr;
    });
}

}  // namespace
}  // namespace dk

using dk::geglu;
DK_ENTRY(geglu, "out a b approximate")
