"""What the ops that make 8-bit codes share: a row's codes and their scale, the outputs, the checks of `smooth` and `rotate`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _norm

ROTATIONS = (64, 128, 256)  # columns that a Hadamard matrix mixes
LEAST = 2.0**-100  # a row of nothing larger counts as zeros: 127 / amax is a number, and far from the largest


def check(x: Tensor, columns: int, smooth: Tensor | None, rotate: int) -> None:
    """Raises TypeError or ValueError; x has been checked, `columns` are those of the codes."""
    if columns < 1:
        raise ValueError(f"x: expected at least one column of codes, got shape {list(x.shape)}")
    check_rotation(columns, rotate)
    if smooth is None:
        return
    if smooth.dtype not in _norm.FLOATS:
        raise TypeError(f"smooth: expected float32, float16, bfloat16 or float64, got {smooth.dtype}")
    if smooth.shape != (columns,):
        raise ValueError(f"smooth: expected shape [{columns}], got {list(smooth.shape)}")


def check_rotation(columns: int, rotate: int) -> None:
    """Raises ValueError."""
    if rotate and (rotate not in ROTATIONS or columns % rotate):
        raise ValueError(f"rotate: expected 0, 64, 128 or 256, and a divisor of {columns} columns, got {rotate}")


def empty(x: Tensor, columns: int) -> list[Tensor]:
    """Codes and their scales, not filled in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = torch.empty(*x.shape[:-1], columns, dtype=torch.int8, device=x.device)
    return [codes, torch.empty(x.shape[:-1], dtype=wide, device=x.device)]


def rotated(h: Tensor, columns: int) -> Tensor:
    """h by groups of so many columns, times their Hadamard matrix of ±1 (Sylvester's), in the order that all rungs add in."""
    groups, step = h.unflatten(-1, (-1, columns)), 1
    while step < columns:
        a, b = groups.unflatten(-1, (-1, 2, step)).unbind(-2)
        groups, step = torch.stack([a + b, a - b], -2).flatten(-3), 2 * step
    return groups.flatten(-2)


def eager(h: Tensor, rotate: int = 0) -> tuple[Tensor, Tensor]:
    """The codes and their scales as users write them; a rotation is a product with the orthonormal matrix."""
    if rotate:
        matrix = rotated(torch.eye(rotate, dtype=h.dtype, device=h.device), rotate) * rotate**-0.5
        h = (h.unflatten(-1, (-1, rotate)) @ matrix).flatten(-2)
    code_scale = h.abs().amax(-1, keepdim=True).float() / 127
    return (h / code_scale).round().to(torch.int8), code_scale.squeeze(-1)


def rows(h: Tensor, smooth: Tensor | None, rotate: int) -> list[Tensor]:
    """The codes of wide h · smooth, rotated or not, in -127..127 by each row's largest magnitude, and their scales."""
    if smooth is not None:
        h = h * smooth.to(h.dtype)
    if rotate:
        h = rotated(h, rotate)
    codes, scale = coded(h, h.abs().amax(-1, keepdim=True), (rotate or 1) ** -0.5)  # NaN where one is
    return [codes, scale.squeeze(-1)]


def coded(h: Tensor, amax: Tensor, norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """The codes of wide h, no larger than amax [..., 1], and amax / 127 · norm; where amax is not finite the codes are 0."""
    inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be 127 times the rounded 1 / amax
    codes = (h * inverse).round()  # half to even
    codes = torch.where((amax > LEAST) & amax.isfinite(), codes, torch.zeros_like(codes)).to(torch.int8)
    return codes, torch.where(amax <= LEAST, torch.ones_like(amax), amax / 127 * norm)
