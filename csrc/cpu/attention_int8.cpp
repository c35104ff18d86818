// o = softmax(s + bias) v of s = (q kT) q_scale k_scale scale, q and k being 8-bit codes; lse = log of the sums of exponentials
//
// Idea: attention_forward's blocks. Products of codes are exact: k's code + 128 by q's in the instructions for bytes, less what
// the 128 added; where there is none, widened to float32, in which 256 of them are exact too. A score is scaled as it leaves
// the registers, and is in units of log2 from then on. All else is attention_forward.
// Takes: int8 q and k, any strides; v float32, float16 or bfloat16; head dimensions up to 256, every mask.
// Floor: 2 B H Sq Sk D operations of 8 bits and as many of v's dtype.
// Compile: g++ -std=c++20 -O3 -march=native -DDK_RUNG=native -Icsrc -c csrc/cpu/attention_int8.cpp
#include "attention_forward.h"

namespace dk {
namespace {

int64_t bytes(Stream, Views, View q, View, View k, View, View v, Optional bias, Optional mask, Optional key_lengths,
              Optional cu_q, Optional cu_k, Optional kv_index, Text causal, double scale) {
    Attention a;
    return parse(a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, true) ? 0 : room_of(a);
}

// The scales of a tensor's rows, [B, S, H].
Refusal lay(Lay& to, const View& scale, const View& codes) {
    const int64_t shape[] = {codes.shape[0], codes.shape[1], codes.shape[2]};
    if (!has(scale, shape, DType::f32)) return "q_scale, k_scale: not float32 [B, S, H]";
    to = {scale.data, {scale.stride[0], scale.stride[1], scale.stride[2], 0}, scale.dtype};
    return nullptr;
}

Refusal attention_int8(Stream stream, Views out, View q, View q_scale, View k, View k_scale, View v, Optional bias,
                       Optional mask, Optional key_lengths, Optional cu_q, Optional cu_k, Optional kv_index, Text causal,
                       double scale) {
    Call c{};
    if (Refusal why = parse(c.a, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, true)) return why;
    if (Refusal why = lay(c.q_scale, q_scale, q)) return why;
    if (Refusal why = lay(c.k_scale, k_scale, k)) return why;
    return attend<true>(c, out, q, v, stream.scratch);
}

}  // namespace
}  // namespace dk

using dk::attention_int8, dk::bytes;
DK_ENTRY_WITH_SCRATCH(attention_int8, "out q q_scale k k_scale v bias mask key_lengths cu_q cu_k kv_index causal scale", bytes)
