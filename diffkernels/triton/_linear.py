"""Products over codes: a program a tile of the result. Products are summed, of codes in int32; then the epilogue follows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._linear import ACTIVATIONS, COLUMNS, DEPTH, DTYPES, MOST
from ..ops.linear_w4a8_lowrank import group_of
from . import _norm
from ._attention import INTERPRETED


@triton.jit
def _sigmoid(z):
    t = tl.exp(-tl.abs(z))  # can't overflow
    return tl.where(z < 0, t, 1.0) / (1.0 + t)


@triton.jit
def _kernel(
    y,  # [M, N] contiguous
    x,  # (data, row stride, column stride); of windows (data, strides of sample, line, pixel, channel)
    window,  # of a convolution (H, W, C, their lines and columns, kernel, stride, padding, dilation), or absent
    x_scale,  # of codes (data, stride), one a row, or of windows one a sample; absent where x is floats
    weight,  # pack_w8's, or with group_scale pack_w4's
    group_scale,  # of groups of GROUP inputs, or absent
    weight_scale, bias,  # (data, stride); bias may be absent
    low,  # (data, row stride, column stride), or absent
    up,
    gate, residual,  # operands, or absent
    M, N, K, R,
    GROUP: tl.constexpr, MIXED: tl.constexpr,
    GELU: tl.constexpr, TANH: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = row < M, column < N
    words = tl.cdiv(K, 4 if group_scale is None else 8)
    panel = (column // 64) * words * 256 + (column % 64) * 4
    sums = tl.zeros([ROWS, BLOCK], tl.float32 if x_scale is None else tl.int32)
    scaled = row
    if window is not None:
        scaled = row // window[4] // window[3]
        top, left = row // window[4] % window[3] * window[6] - window[7], row % window[4] * window[6] - window[7]
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        there = rows[:, None] & (k < K)[None, :]
        if window is None:
            at = row[:, None] * x[1] + k.to(tl.int64)[None, :] * x[2]
        else:
            tap, channel = k // window[2], (k % window[2]).to(tl.int64)
            v = top[:, None] + (tap // window[5] * window[8])[None, :]
            h = left[:, None] + (tap % window[5] * window[8])[None, :]
            there = there & (v >= 0) & (v < window[0]) & (h >= 0) & (h < window[1])
            at = (scaled * x[1])[:, None] + v * x[2] + h * x[3] + (channel * x[4])[None, :]
        a = tl.load(x[0] + at, mask=there, other=0)
        there = (k < K)[:, None] & columns[None, :]
        if group_scale is None:
            at = panel[None, :] + ((k // 4) * 256 + k % 4)[:, None]
            w = (tl.load(weight + at, mask=there, other=128) ^ 128).to(tl.int8, bitcast=True)
        else:
            at = panel[None, :] + ((k // 8) * 256 + k % 4)[:, None]
            q = (tl.load(weight + at, mask=there, other=0).to(tl.int32) >> (k // 4 % 2 * 4)[:, None]) & 15
            at = ((column // 64) * tl.cdiv(K, GROUP) * 64 + column % 64)[None, :] + (k // GROUP * 64)[:, None]
            w = ((q - 8) * (1 + (tl.load(group_scale + at, mask=there, other=0).to(tl.int32) & 15))).to(tl.int8)
        if x_scale is not None:
            sums = tl.dot(a, w, sums, out_dtype=tl.int32)
        elif INTERPRETED:  # which multiplies bfloat16's bits, as integers
            sums = tl.dot(a.to(tl.float32), w.to(tl.float32), sums, input_precision="ieee")
        else:  # exact in any of the three floats
            sums = tl.dot(a, w.to(a.dtype), sums, input_precision="ieee")
    h = sums.to(tl.float32)
    if x_scale is not None:
        h = h * tl.load(x_scale[0] + scaled * x_scale[1], mask=rows, other=0.0)[:, None]
    h = h * tl.load(weight_scale[0] + column * weight_scale[1], mask=columns, other=0.0)[None, :]
    if bias is not None:
        h += tl.load(bias[0] + column * bias[1], mask=columns, other=0.0).to(tl.float32)[None, :]
    if low is not None:
        for first in range(0, R, 16):
            r = (first + tl.arange(0, 16)).to(tl.int64)
            a = tl.load(low[0] + row[:, None] * low[1] + r[None, :] * low[2], mask=rows[:, None] & (r < R)[None, :], other=0.0)
            b = tl.load(
                up[0] + r[:, None] * up[1] + column[None, :] * up[2], mask=(r < R)[:, None] & columns[None, :], other=0.0
            )
            if MIXED or INTERPRETED:
                h = tl.dot(a.to(tl.float32), b.to(tl.float32), h, input_precision="ieee")
            else:
                h = tl.dot(a, b, h, input_precision="ieee")
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
        h += _norm.operand(residual, row[:, None], column[None, :], inside)
    tl.store(y + row[:, None] * N + column[None, :], h.to(y.dtype.element_ty), mask=inside)


def linear(y: Tensor, x: Tensor, x_scale: Tensor | None, *rest: Any) -> str | None:
    """`linear_w8a8`, or with `group_scale` `linear_w4a8_lowrank`, or then without `x_scale` `linear_w4a16`."""
    if x.ndim < 1 or y.shape[:-1] != x.shape[:-1] or (x_scale is not None and x_scale.shape != x.shape[:-1]):
        return "x_scale: not one a row of x"
    matrix = (x, 0, 0) if x.shape[-1] == 0 else _norm.matrix(x)
    return product(y, matrix, None, None if x_scale is None else x_scale.reshape(-1), x.shape[-1], *rest)


def product(
    y: Tensor,
    x: tuple[Any, ...],
    window: tuple[int, ...] | None,
    x_scale: Tensor | None,
    k: int,
    weight: Tensor,
    group_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: str,
) -> str | None:
    """y, whose rows are of x's rows or windows, k codes each, or without x_scale floats of y's dtype."""
    if (
        x[0].dtype != (torch.int8 if x_scale is not None else y.dtype)
        or weight.dtype != torch.uint8
        or not weight.is_contiguous()
    ):
        return "x or weight: not int8 or y's dtype, and uint8, or weight not contiguous"
    if any(t is not None and t.dtype != torch.float32 for t in (x_scale, weight_scale)) or y.dtype not in _norm.FLOATS:
        return "a scale is not float32, or the result float64"
    if any(t is not None and t.dtype not in _norm.FLOATS for t in (bias, low, up)):
        return "bias, low or up: not float32, float16 or bfloat16"
    if DTYPES.get(dtype) != y.dtype or activation not in ACTIVATIONS or weight_scale.ndim != 1:
        return "dtype, activation or weight_scale: not a known one"
    if x_scale is not None and k > MOST:
        return "x: rows whose products need more than 32 bits"
    n = weight_scale.shape[0]
    panels, group = triton.cdiv(n, COLUMNS), 1
    if group_scale is not None:
        if (found := group_of(group_scale, n, k)) is None or not group_scale.is_contiguous():
            return "group_scale: not pack_w4's of x's columns, or not contiguous"
        group = found
    if tuple(weight.shape) != (panels, triton.cdiv(k, DEPTH if group_scale is None else 2 * DEPTH), COLUMNS, DEPTH):
        return "weight: not packed for x's columns"
    if y.shape[-1] != n or (bias is not None and bias.shape != (n,)):
        return "bias: not of the result's columns"
    if window is None and residual is not None and residual.shape != y.shape:
        return "residual: not of the result's shape"
    if (low is None) != (up is None):
        return "low, up: one without the other"
    rank = 0 if up is None else up.shape[0]
    if low is not None and up is not None and (low.shape != (*y.shape[:-1], rank) or up.shape != (rank, n)):
        return "low or up: not [..., R] and [R, N]"
    if why := _norm.refusal(y, [gate, residual], "layer", 0.0, "inside"):
        return why
    if y.numel() == 0:
        return None
    m = y.numel() // n
    rows, block, step = (64, 64, 32) if m > 16 else (16, 64, 64 if x[0].dtype == torch.float32 else 128)  # as registers hold
    branch = low is not None and up is not None and rank > 0
    with torch.cuda.device_of(y):
        _kernel[(triton.cdiv(m, rows) * triton.cdiv(n, block),)](
            y, x, window, None if x_scale is None else (x_scale, x_scale.stride(0)),
            weight, group_scale, (weight_scale, weight_scale.stride(0)),
            None if bias is None else (bias, bias.stride(0)),
            _norm.matrix(low) if branch else None, (up, *up.stride()) if branch else None,
            _norm.meet(gate, y), _norm.meet(residual, y), m, n, k, rank,
            GROUP=group, MIXED=branch and low.dtype != up.dtype,
            GELU=activation == "gelu", TANH=activation == "gelu_tanh", SILU=activation == "silu",
            ROWS=rows, BLOCK=block, STEP=step, num_warps=8,
        )  # fmt: skip
    return None
