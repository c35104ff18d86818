"""norm(x) * weight + bias, then * (1 + scale) + shift: one program a row.

A row of up to 16384 columns stays in registers; a wider one is walked three times, the second and third through the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._norm import divide_by, modulate, statistics, walked_statistics


@triton.jit
def _kernel(
    y,  # [R, D] contiguous
    x,  # (data, row stride, column stride)
    scale, shift, weight, bias,  # operands or None
    D, eps,
    LAYER: tl.constexpr, INSIDE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = x[0] + row * x[1]
    y += row * D
    if KEEP:
        h = tl.load(at + lane * x[2], mask=lane < D, other=0.0).to(tl.float32)
        mean, rest, ms = statistics(h, lane < D, D, LAYER)
    else:
        mean, rest, ms = walked_statistics(at, x[2], D, LAYER, BLOCK)
    divisor = divide_by(ms, eps, INSIDE)
    for first in range(0, D, BLOCK):
        column = first + lane
        mask = column < D
        if not KEEP:
            h = tl.load(at + column * x[2], mask=mask, other=0.0).to(tl.float32)
        v = modulate((h - mean - rest) / divisor, row, column, mask, scale, shift, weight, bias)
        tl.store(y + column, v.to(y.dtype.element_ty), mask=mask)


def norm_modulate(
    y: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
) -> str | None:
    """The op of that name on the Triton rung."""
    operands = [scale, shift, weight, bias]
    why = _norm.refusal(x, operands, norm, eps, eps_mode)
    if why is not None or x.numel() == 0:
        return why
    keep, block = _norm.width(x.shape[-1])
    with torch.cuda.device_of(x):
        _kernel[(x.numel() // x.shape[-1],)](
            y, _norm.matrix(x), *(_norm.meet(t, x) for t in operands), x.shape[-1], eps,
            LAYER=norm == "layer", INSIDE=eps_mode == "inside", KEEP=keep, BLOCK=block, num_warps=_norm.warps(block),
        )  # fmt: skip
    return None
