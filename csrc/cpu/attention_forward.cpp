// o = softmax(q kT scale + bias) v, lse = log of the sums of exponentials
//
// Idea: attention.h's blocks, kRows queries by 256 keys. Scores are one product, values another; between them each row's
// largest score, its exponentials in units of log2 and their sum. What a row has gathered so far is rescaled when its scores
// outgrow it. Half precision is widened while packing, so that all arithmetic is float32; but bfloat16 is multiplied as it is,
// in pairs or matrix tiles, where there are instructions for that.
// Takes: float32, float16 or bfloat16, any strides, head dimensions up to 256, every mask; heads of k, v may be shared.
// Floor: 4 B H Sq Sk D floating point operations.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/attention_forward.cpp
#include "attention_forward.h"

namespace dk {
namespace {

int64_t bytes(Stream, Views, View q, View k, View v, Optional bias, Optional mask, Optional key_lengths, Optional cu_q,
              Optional cu_k, Optional kv_index, Text causal, double scale) {
    Attention a;
    return parse(a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale) ? 0 : room_of(a);
}

Refusal attention_forward(Stream stream, Views out, View q, View k, View v, Optional bias, Optional mask, Optional key_lengths,
                          Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale) {
    Call c{};
    if (Refusal why = parse(c.a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)) return why;
    return attend<false>(c, out, q, v, stream.scratch);
}

}  // namespace
}  // namespace dk

using dk::attention_forward, dk::bytes;
DK_ENTRY_WITH_SCRATCH(attention_forward, "out q k v bias mask key_lengths cu_q cu_k kv_index causal scale", bytes)
