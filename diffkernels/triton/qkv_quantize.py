"""`qkv_prep` with 8-bit codes for q and k: its kernel, told where their scales go."""

from __future__ import annotations

import torch
from torch import Tensor

from .qkv_prep import prepare, refusal


def qkv_quantize(
    out: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_shift: Tensor | None,
    k_shift: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    center: Tensor | None,
    rope: str,
    norm: str,
    across: bool,
    eps: float,
) -> str | None:
    """The op of that name on the Triton rung."""
    vectors = (q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift)
    why = refusal(q, k, v, vectors, cos, sin, rope, norm, across, eps)
    if why is None and center is not None and center.dtype != torch.float32:
        why = "center: not float32"
    if why is None:
        q_codes, q_scale, k_codes, k_scale, *rest = out
        prepare([q_codes, k_codes, *rest], q, k, v, vectors, cos, sin, rope, norm, across, eps, (q_scale, k_scale), center)
    return why
