"""x_new = x + gate * delta, then y = norm(x_new) * weight + bias, then * (1 + scale) + shift: one program a row.

A row of up to 16384 columns stays in registers; a wider x_new is written first, then walked as norm_modulate walks x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._norm import divide_by, modulate, operand, statistics, walked_statistics


@triton.jit
def _updated(x_new, x, delta, gate, row, column, D):
    """Stores these columns of x_new, and returns them as they were rounded."""
    mask = column < D
    change = tl.load(delta[0] + row * delta[1] + column * delta[2], mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        change = change * operand(gate, row, column, mask)
    h = tl.load(x[0] + row * x[1] + column * x[2], mask=mask, other=0.0).to(tl.float32) + change
    h = h.to(x_new.dtype.element_ty)
    tl.store(x_new + column, h, mask=mask)
    return h.to(tl.float32)


@triton.jit
def _kernel(
    x_new, y,  # [R, D] contiguous
    x, delta,  # (data, row stride, column stride)
    gate, scale, shift, weight, bias,  # operands or None
    D, eps,
    LAYER: tl.constexpr, INSIDE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    x_new += row * D
    y += row * D
    if KEEP:
        h = _updated(x_new, x, delta, gate, row, lane, D)
        mean, rest, ms = statistics(h, lane < D, D, LAYER)
    else:
        for first in range(0, D, BLOCK):
            _updated(x_new, x, delta, gate, row, first + lane, D)
        tl.debug_barrier()  # another thread may read what this one wrote
        mean, rest, ms = walked_statistics(x_new, 1, D, LAYER, BLOCK)
    divisor = divide_by(ms, eps, INSIDE)
    for first in range(0, D, BLOCK):
        column = first + lane
        mask = column < D
        if not KEEP:
            h = tl.load(x_new + column, mask=mask, other=0.0).to(tl.float32)
        v = modulate((h - mean - rest) / divisor, row, column, mask, scale, shift, weight, bias)
        tl.store(y + column, v.to(y.dtype.element_ty), mask=mask)


def gate_residual_norm(
    results: list[Tensor],
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
) -> str | None:
    """The op of that name on the Triton rung."""
    operands = [gate, scale, shift, weight, bias]
    why = _norm.refusal(x, operands, norm, eps, eps_mode)
    if why is not None:
        return why
    if delta.shape != x.shape or delta.dtype not in _norm.FLOATS:
        return "delta: not of x's shape, or not float32, float16 or bfloat16"
    if x.numel() == 0:
        return None
    keep, block = _norm.width(x.shape[-1])
    with torch.cuda.device_of(x):
        _kernel[(x.numel() // x.shape[-1],)](
            *results, _norm.matrix(x), _norm.matrix(delta), *(_norm.meet(t, x) for t in operands), x.shape[-1], eps,
            LAYER=norm == "layer", INSIDE=eps_mode == "inside", KEEP=keep, BLOCK=block, num_warps=_norm.warps(block),
        )  # fmt: skip
    return None
