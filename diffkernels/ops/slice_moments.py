"""One slice of a row that is normalised as a whole: a norm over concatenated tensors without the concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _broadcast, _norm


def _check(x, weight):  # type: ignore[no-untyped-def]
    _norm.check(x, *_norm.DEFAULTS, weight=weight)


def _allocate(x, weight):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(x.dtype, torch.float32)
    return [empty_like(x), torch.empty(*x.shape[:-1], 2, dtype=wide, device=x.device)]


def _drawn(draw, b, n, d):  # type: ignore[no-untyped-def]
    return {"x": draw(b, n, d), "weight": draw(d)}


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    shape, operand = _broadcast.drawn(draw, pick)
    return {"x": draw(*shape), "weight": operand()}


def _eager(x, weight):  # type: ignore[no-untyped-def]
    return x * weight, torch.var_mean(x, dim=-1, correction=0)


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("shared", _drawn, (2, 9, 72)),
        Case("per-sample", lambda d: {"x": d(3, 5, 65), "weight": d(3, 65)}),
        Case("skip-token", lambda d: {"x": d(2, 6, 48)[:, 1:], "weight": d.f32(48)}),
        Case("one-row", lambda d: {"x": d(257), "weight": d(257)}),
        Case("one-column", lambda d: {"x": d(5, 1), "weight": d(1)}),
        Case("no-samples", lambda d: {"x": d(0, 4, 16), "weight": d(16)}),
        Case("no-tokens", lambda d: {"x": d(2, 0, 16), "weight": d(2, 16)}),
        Case("wide", lambda d: {"x": d(2, 8191), "weight": d(8191)}),
        Case("dimr-xl", _drawn, (8, 256, 960), "DiMR-XL/2R, batch 8", _eager, lambda b, n, d: 5 * b * n * d),
    ],
)
def slice_moments(x: Tensor, weight: Tensor) -> list[Tensor]:
    """z = x · weight for the Linear that follows the norm, and what the norm must know of this slice of its row.

    `nn.ConcatNormLinear` adds the slices up: the moments to the row's mean and variance, z through the Linear's columns.

    Args:
        x: [..., D], float32, float16, bfloat16 (or float64, on the reference), any strides.
        weight: the norm's weight for these D columns; [D], [B, D], … as in `norm_modulate`.

    Returns:
        [z, moments]: z of x's shape and dtype; moments [..., 2], float32: the mean over D, and the sum of the squared
        differences from it.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape outside of the above.

    Source: Chan, Golub & LeVeque 1983 (merging of variances).
    """
    h = _norm.widen(x)
    z = h * _broadcast.align(weight, x).to(h.dtype)
    mean = h.mean(-1, keepdim=True)
    return [z.to(x.dtype), torch.cat([mean, (h - mean).square().sum(-1, keepdim=True)], dim=-1)]
