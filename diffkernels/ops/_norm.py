"""What the norms' definitions share: the arguments' check, and the normalisation itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _broadcast

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEFAULTS = ("layer", 1e-6, "inside")  # norm, eps, eps_mode


def check(x: Tensor, norm: str, eps: float, eps_mode: str, **operands: Tensor | None) -> None:
    """Raises TypeError or ValueError; `operands` meet x as `_broadcast` says."""
    if x.ndim < 1:
        raise ValueError(f"x: expected at least one dimension, [..., D]; got shape {list(x.shape)}")
    for name, t in {"x": x, **operands}.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t is not x and not _broadcast.matches(t, x):
            raise ValueError(f"{name}: expected shape {_broadcast.expected(x)}; got {list(t.shape)}")
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm: expected 'layer' or 'rms', got {norm!r}")
    if eps_mode not in ("inside", "outside"):
        raise ValueError(f"eps_mode: expected 'inside' or 'outside' (of the root), got {eps_mode!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def how(pick: Any) -> dict[str, Any]:
    """For fuzzing: the norm's kind."""
    return {
        "norm": pick.choice(("layer", "rms")),
        "eps": pick.choice((1e-8, 1e-6, 1e-5, 1e-2)),
        "eps_mode": pick.choice(("inside", "outside")),
    }


def like(name: str, t: Tensor, x: Tensor) -> None:
    """Raises where `t` has another shape than x, or is no float."""
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
    if t.shape != x.shape:
        raise ValueError(f"{name}: expected x's shape {list(x.shape)}, got {list(t.shape)}")


def widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def centred(h: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Wide h, centred for "layer", and the mean of its squares over the last dimension."""
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    return h, h.square().mean(-1, keepdim=True)


def modulated(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """(norm(x) · weight + bias) · (1 + scale) + shift, wide: not yet rounded to x's dtype."""
    h, ms = centred(widen(x), norm)
    h = h * torch.rsqrt(ms + eps) if eps_mode == "inside" else h / (ms.sqrt() + eps)
    if weight is not None:
        h = h * _broadcast.align(weight, x).to(h.dtype)
    if bias is not None:
        h = h + _broadcast.align(bias, x).to(h.dtype)
    if scale is not None:
        h = h * (1 + _broadcast.align(scale, x).to(h.dtype))
    if shift is not None:
        h = h + _broadcast.align(shift, x).to(h.dtype)
    return h
