"""What the norms' kernels share: how an operand meets a row, the row's statistics, and what is refused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import _broadcast

KEPT = 16384  # columns that one program holds
WALKED = 4096  # columns that it takes at a time of a wider row
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Operand = tuple[Tensor, int, int] | None


@triton.jit
def operand(a, row, column, mask):
    """What meets these columns of a row of x; `a` is (data, stride of its rows, rows of x that share one)."""
    return tl.load(a[0] + (row // a[2]) * a[1] + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def modulate(h, row, column, mask, scale, shift, weight, bias):
    """(h * weight + bias) * (1 + scale) + shift, each absent or an operand."""
    if weight is not None:
        h = h * operand(weight, row, column, mask)
    if bias is not None:
        h = h + operand(bias, row, column, mask)
    if scale is not None:
        h = h * (1.0 + operand(scale, row, column, mask))
    if shift is not None:
        h = h + operand(shift, row, column, mask)
    return h


@triton.jit
def statistics(h, inside, D, LAYER: tl.constexpr):
    """Of a row in registers: the mean in two parts (the second is what rounding left), and the mean square about it."""
    mean = 0.0
    rest = 0.0
    if LAYER:
        mean = tl.sum(h, axis=0) / D
    e = tl.where(inside, h - mean, 0.0)
    if LAYER:
        rest = tl.sum(e, axis=0) / D
    ms = tl.sum(e * e, axis=0) / D - rest * rest
    return mean, rest, tl.where(ms < 0, 0.0, ms)  # below 0 by rounding, where the columns are equal; a NaN stays


@triton.jit
def walked_statistics(x, x_column, D, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row in memory, walked twice."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    mean = 0.0
    rest = 0.0
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
    return mean, rest, tl.where(ms < 0, 0.0, ms)


@triton.jit
def divide_by(ms, eps, INSIDE: tl.constexpr):
    """The norm's divisor."""
    return tl.sqrt(ms + eps) if INSIDE else tl.sqrt(ms) + eps


def refusal(x: Tensor, operands: list[Tensor | None], norm: str, eps: float, eps_mode: str) -> str | None:
    for t in (x, *operands):
        if t is not None and t.dtype not in FLOATS:
            return "a tensor is not float32, float16 or bfloat16"
    if norm not in ("layer", "rms") or eps_mode not in ("inside", "outside") or not eps >= 0:
        return "norm, eps or eps_mode: not a known value"
    if x.ndim < 1 or any(t is not None and not _broadcast.matches(t, x) for t in operands):
        return "an operand's shape does not fit x"
    return None


def meet(t: Tensor | None, x: Tensor) -> Operand:
    """What `operand` takes."""
    if t is None:
        return None
    rows, repeat = _broadcast.rows(t, x)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()  # small beside x
    return rows, rows.stride(0), repeat


def matrix(t: Tensor) -> tuple[Tensor, int, int]:
    """[R, D]: data, stride of the rows, stride of the columns."""
    rows = t.reshape(-1, t.shape[-1])
    return rows, rows.stride(0), rows.stride(1)


def width(columns: int) -> tuple[bool, int]:
    """Whether a program keeps a row of so many columns, and how many it takes at a time."""
    return (True, triton.next_power_of_2(columns)) if columns <= KEPT else (False, WALKED)


def warps(block: int) -> int:
    return min(16, max(1, block // 512))
