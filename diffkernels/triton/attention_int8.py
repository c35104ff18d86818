"""`attention_forward` of 8-bit codes: its kernel, told the scales of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention
from .attention_forward import attend


def attention_int8(
    out: list[Tensor],
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    causal: str,
    scale: float,
) -> str | None:
    """The op of that name on the Triton rung."""
    given = (q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    why = _attention.refusal(*given, coded=True)
    for t, codes in ((q_scale, q), (k_scale, k)):
        if why is None and (t.dtype != torch.float32 or t.shape != codes.shape[:3]):
            why = "q_scale, k_scale: not float32 [B, S, H]"
    if why is None:
        attend(out, *given, q_scale, k_scale)
    return why
