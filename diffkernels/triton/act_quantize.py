"""activation(x) * smooth, or activation(a) * b * smooth, perhaps rotated, as 8-bit codes and a scale a row: one program a row.

A row of up to 16384 codes stays in registers; a wider one is walked twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm, _quantize
from ._quantize import magnitude, prepared, put_codes, scale_of

KINDS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
GATED = {"geglu": 1, "geglu_tanh": 2, "swiglu": 3}


@triton.jit
def _sigmoid(z):
    """By an exponential that can't overflow."""
    t = tl.exp(-tl.abs(z))
    return tl.where(z < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _value(at, step, column, smooth, D, KIND: tl.constexpr, GATED: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    mask = column < D
    h = tl.load(at + column * step, mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        h = h * (0.5 + 0.5 * tl.erf(h * 0.7071067811865476))
    elif KIND == 2:  # (1 + tanh z) / 2 = sigmoid(2 z)
        h = h * _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # 2 sqrt(2 / pi)
    elif KIND == 3:
        h = h * _sigmoid(h)
    if GATED:
        h = h * tl.load(at + (D + column) * step, mask=mask, other=0.0).to(tl.float32)
    return prepared(h, smooth, column, mask, ROTATE, BLOCK)


@triton.jit
def _kernel(
    codes, scales,  # [R, D] and [R], contiguous
    x,  # (data, row stride, column stride)
    smooth,  # [D] or None
    D,
    KIND: tl.constexpr, GATED: tl.constexpr, ROTATE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = x[0] + row * x[1]
    codes += row * D
    if KEEP:
        h = _value(at, x[2], lane, smooth, D, KIND, GATED, ROTATE, BLOCK)
        code_scale, inverse = scale_of(tl.max(magnitude(h, lane < D), axis=0), ROTATE)
        put_codes(codes + lane, h, inverse, lane < D)
    else:
        largest = tl.zeros([BLOCK], tl.int32)
        for first in range(0, D, BLOCK):
            column = first + lane
            h = _value(at, x[2], column, smooth, D, KIND, GATED, ROTATE, BLOCK)
            largest = tl.maximum(largest, magnitude(h, column < D))
        code_scale, inverse = scale_of(tl.max(largest, axis=0), ROTATE)
        for first in range(0, D, BLOCK):
            column = first + lane
            h = _value(at, x[2], column, smooth, D, KIND, GATED, ROTATE, BLOCK)
            put_codes(codes + column, h, inverse, column < D)
    tl.store(scales + row, code_scale)


def act_quantize(out: list[Tensor], x: Tensor, activation: str, smooth: Tensor | None, rotate: int) -> str | None:
    """The op of that name on the Triton rung."""
    gated, kind = activation in GATED, (KINDS | GATED).get(activation)
    if kind is None or x.dtype not in _norm.FLOATS or x.ndim < 1 or (gated and x.shape[-1] % 2):
        return "an unknown activation, or x not float32, float16 or bfloat16 of such columns"
    columns = x.shape[-1] // 2 if gated else x.shape[-1]
    why = _quantize.refusal(columns, smooth, rotate)
    if why is not None or x.numel() == 0:
        return why
    keep, block = _norm.width(columns)
    with torch.cuda.device_of(x):
        _kernel[(x.numel() // x.shape[-1],)](
            *out, _norm.matrix(x), _quantize.meet(smooth), columns,
            KIND=kind, GATED=gated, ROTATE=rotate, KEEP=keep, BLOCK=block, num_warps=_norm.warps(block),
        )  # fmt: skip
    return None
