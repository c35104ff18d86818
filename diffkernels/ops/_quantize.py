"""What the ops that make 8-bit codes share: a row's codes and their scale, the outputs, the check of `smooth`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _norm

LEAST = 2.0**-100  # a row of nothing larger counts as zeros: 127 / amax is a number, and far from the largest


def check(x: Tensor, columns: int, smooth: Tensor | None) -> None:
    """Raises TypeError or ValueError; x has been checked, `columns` are those of the codes."""
    if columns < 1:
        raise ValueError(f"x: expected at least one column of codes, got shape {list(x.shape)}")
    if smooth is None:
        return
    if smooth.dtype not in _norm.FLOATS:
        raise TypeError(f"smooth: expected float32, float16, bfloat16 or float64, got {smooth.dtype}")
    if smooth.shape != (columns,):
        raise ValueError(f"smooth: expected shape [{columns}], got {list(smooth.shape)}")


def empty(x: Tensor, columns: int) -> list[Tensor]:
    """Codes and their scales, not filled in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = torch.empty(*x.shape[:-1], columns, dtype=torch.int8, device=x.device)
    return [codes, torch.empty(x.shape[:-1], dtype=wide, device=x.device)]


def rows(h: Tensor, smooth: Tensor | None) -> list[Tensor]:
    """The codes of wide h · smooth, in -127..127 by the largest magnitude of each row, and their scales."""
    if smooth is not None:
        h = h * smooth.to(h.dtype)
    amax = h.abs().amax(-1, keepdim=True)  # NaN where one is
    inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be 127 times the rounded 1 / amax
    codes = (h * inverse).round()  # half to even
    codes = torch.where((amax > LEAST) & amax.isfinite(), codes, torch.zeros_like(codes)).to(torch.int8)
    return [codes, torch.where(amax <= LEAST, torch.ones_like(amax), amax / 127).squeeze(-1)]
