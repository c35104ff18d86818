"""norm(x) * weight + bias, then * (1 + scale) + shift: one program a row.

A row of up to 16384 columns stays in registers; a wider one is walked three times, the second and third through the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _broadcast

KEPT = 16384  # columns that one program holds
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _affine(
    h, row, column, mask, a, a_row, a_repeat, b, b_row, b_repeat, ONE: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr
):
    """h * (ONE + a) + b, each absent or a row of its own."""
    if HAS_A:
        h = h * (ONE + tl.load(a + (row // a_repeat) * a_row + column, mask=mask, other=0.0).to(tl.float32))
    if HAS_B:
        h = h + tl.load(b + (row // b_repeat) * b_row + column, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _kernel(
    y,  # [R, D] contiguous
    x,  # [R, D]
    scale, scale_row, scale_repeat,
    shift, shift_row, shift_repeat,
    weight, weight_row, weight_repeat,
    bias, bias_row, bias_repeat,
    x_row, x_column, D, eps,
    LAYER: tl.constexpr, INSIDE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    y += row * D
    mean = 0.0
    rest = 0.0  # what rounding left of the mean
    if KEEP:
        inside = lane < D
        h = tl.load(x + lane * x_column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            mean = tl.sum(h, axis=0) / D
        e = tl.where(inside, h - mean, 0.0)
        if LAYER:
            rest = tl.sum(e, axis=0) / D
        ms = tl.sum(e * e, axis=0) / D - rest * rest
    else:
        if LAYER:
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, D, BLOCK):
                column = first + lane
                total += tl.load(x + column * x_column, mask=column < D, other=0.0).to(tl.float32)
            mean = tl.sum(total, axis=0) / D
        total = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for first in range(0, D, BLOCK):
            column = first + lane
            e = tl.load(x + column * x_column, mask=column < D, other=0.0).to(tl.float32) - mean
            e = tl.where(column < D, e, 0.0)
            total += e
            square += e * e
        if LAYER:
            rest = tl.sum(total, axis=0) / D
        ms = tl.sum(square, axis=0) / D - rest * rest
    ms = tl.where(ms < 0, 0.0, ms)  # rounding, where the columns are equal; a NaN stays
    divisor = tl.sqrt(ms + eps) if INSIDE else tl.sqrt(ms) + eps
    for first in range(0, D, BLOCK):
        column = first + lane
        mask = column < D
        if not KEEP:
            h = tl.load(x + column * x_column, mask=mask, other=0.0).to(tl.float32)
        v = (h - mean - rest) / divisor
        v = _affine(
            v, row, column, mask, weight, weight_row, weight_repeat, bias, bias_row, bias_repeat, 0.0, HAS_WEIGHT, HAS_BIAS
        )
        v = _affine(
            v, row, column, mask, scale, scale_row, scale_repeat, shift, shift_row, shift_repeat, 1.0, HAS_SCALE, HAS_SHIFT
        )
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
    for t in (x, *operands):
        if t is not None and t.dtype not in FLOATS:
            return "a tensor is not float32, float16 or bfloat16"
    if norm not in ("layer", "rms") or eps_mode not in ("inside", "outside") or not eps >= 0:
        return "norm, eps or eps_mode: not a known value"
    if x.ndim < 1 or any(t is not None and not _broadcast.matches(t, x) for t in operands):
        return "an operand's shape does not fit x"
    if x.numel() == 0:
        return None
    matrix = x.reshape(-1, x.shape[-1])
    flat = []
    for t in operands:
        rows, repeat = (matrix, 1) if t is None else _broadcast.rows(t, x)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()  # small beside x
        flat += [rows, rows.stride(0), repeat]
    columns = x.shape[-1]
    keep = columns <= KEPT
    block = triton.next_power_of_2(columns) if keep else 4096
    with torch.cuda.device_of(x):
        _kernel[(matrix.shape[0],)](
            y, matrix, *flat, matrix.stride(0), matrix.stride(1), columns, eps,
            LAYER=norm == "layer", INSIDE=eps_mode == "inside", KEEP=keep, BLOCK=block,
            HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return None
