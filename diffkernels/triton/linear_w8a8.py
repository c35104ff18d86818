"""linear_w8a8: one program a tile of the result; the products of codes are summed in int32, then the epilogue follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.linear_w8a8 import ACTIVATIONS, COLUMNS, DEPTH, DTYPES, MOST
from . import _norm


@triton.jit
def _sigmoid(z):
    t = tl.exp(-tl.abs(z))  # can't overflow
    return tl.where(z < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _kernel(
    y,  # [M, N] contiguous
    x,  # codes: (data, row stride, column stride)
    x_scale,  # (data, stride)
    weight,  # pack_w8's
    weight_scale, bias,  # (data, stride); bias may be absent
    gate,  # an operand, or absent
    residual,  # (data, row stride, column stride), or absent
    M, N, K,
    GELU: tl.constexpr, TANH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = row < M, column < N
    words = tl.cdiv(K, 4)
    panel = (column // 64) * words * 256 + (column % 64) * 4
    sums = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        codes = tl.load(x[0] + row[:, None] * x[1] + k[None, :] * x[2], mask=rows[:, None] & (k < K)[None, :], other=0)
        at = panel[None, :] + ((k // 4) * 256 + k % 4)[:, None]
        w = tl.load(weight + at, mask=(k < K)[:, None] & columns[None, :], other=128)
        sums = tl.dot(codes, (w ^ 128).to(tl.int8, bitcast=True), sums, out_dtype=tl.int32)
    h = sums.to(tl.float32) * tl.load(x_scale[0] + row * x_scale[1], mask=rows, other=0.0)[:, None]
    h = h * tl.load(weight_scale[0] + column * weight_scale[1], mask=columns, other=0.0)[None, :]
    if bias is not None:
        h += tl.load(bias[0] + column * bias[1], mask=columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        h = h * (0.5 + 0.5 * tl.erf(h * 0.7071067811865476))
    if TANH:
        h = h * _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # 2 sqrt(2 / pi)
    if SILU:
        h = h * _sigmoid(h)
    inside = rows[:, None] & columns[None, :]
    if gate is not None:
        h *= _norm.operand(gate, row[:, None], column[None, :], inside)
    if residual is not None:
        at = row[:, None] * residual[1] + column[None, :] * residual[2]
        h += tl.load(residual[0] + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * N + column[None, :], h.to(y.dtype.element_ty), mask=inside)


def linear_w8a8(
    y: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: str,
) -> str | None:
    """The op of that name on the Triton rung."""
    if x.dtype != torch.int8 or weight.dtype != torch.uint8 or not weight.is_contiguous():
        return "x or weight: not int8 and uint8, or weight not contiguous"
    if x_scale.dtype != torch.float32 or weight_scale.dtype != torch.float32 or y.dtype not in _norm.FLOATS:
        return "a scale is not float32, or the result float64"
    if any(t is not None and t.dtype not in _norm.FLOATS for t in (bias, gate, residual)):
        return "bias, gate or residual: not float32, float16 or bfloat16"
    if (
        DTYPES.get(dtype) != y.dtype
        or activation not in ACTIVATIONS
        or x.ndim < 1
        or weight_scale.ndim != 1
        or x.shape[-1] > MOST
    ):
        return "dtype, activation, x or weight_scale: not a known one"
    n, k = weight_scale.shape[0], x.shape[-1]
    if tuple(weight.shape) != (triton.cdiv(n, COLUMNS), triton.cdiv(k, DEPTH), COLUMNS, DEPTH):
        return "weight: not pack_w8's of x's columns"
    if x_scale.shape != x.shape[:-1] or y.shape != (*x.shape[:-1], n):
        return "x_scale: not one a row of x"
    if (bias is not None and bias.shape != (n,)) or (residual is not None and residual.shape != y.shape):
        return "bias or residual: not of the result's shape"
    if gate is not None and (why := _norm.refusal(y, [gate], "layer", 0.0, "inside")):
        return why
    m = x_scale.numel()
    if m * n == 0:
        return None
    codes = (x, 0, 0) if k == 0 else _norm.matrix(x)
    scale = x_scale.reshape(-1)
    rows, block, step = (64, 64, 32) if m > 16 else (16, 64, 128)
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(m, rows) * triton.cdiv(n, block),)](
            y, codes, (scale, scale.stride(0)), weight, (weight_scale, weight_scale.stride(0)),
            None if bias is None else (bias, bias.stride(0)), _norm.meet(gate, y),
            None if residual is None else _norm.matrix(residual), m, n, k,
            GELU=activation == "gelu", TANH=activation == "gelu_tanh", SILU=activation == "silu",
            ROWS=rows, BLOCK=block, STEP=step, num_warps=8,
        )  # fmt: skip
    return None
