"""GEGLU's gate: gelu(a) · b in one pass (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import alike, op
from . import _norm


def _check(a, b, approximate):  # type: ignore[no-untyped-def]
    for name, t in (("a", a), ("b", b)):
        if t.dtype not in _norm.FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
    if a.ndim < 1:
        raise ValueError(f"a: expected at least one dimension, got shape {list(a.shape)}")
    if b.shape != a.shape or b.dtype != a.dtype:
        raise ValueError(f"b: expected a's shape {list(a.shape)} and dtype {a.dtype}, got {list(b.shape)}, {b.dtype}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")


def _drawn(draw, *shape):  # type: ignore[no-untyped-def]
    return {"a": draw(*shape), "b": draw(*shape)}


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    shape = [pick.size(3, 0), pick.size(9, 0), pick.size(3000, 0)][pick.randrange(3) :]
    pair = _drawn(draw, *shape) if pick.random() < 0.5 else dict(zip("ab", draw(*shape, 2).unbind(-1), strict=True))
    return pair | {"approximate": pick.choice(("none", "tanh"))}


@op(
    allocate=alike,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("two", _drawn, (2, 9, 72)),
        Case("halves", lambda d: dict(zip("ab", d(2, 9, 130).chunk(2, dim=-1), strict=True))),
        Case("tanh", lambda d: {"a": d(3, 65), "b": d(3, 65), "approximate": "tanh"}),
        Case("tails", lambda d: {"a": 4 * d(7, 33), "b": d(7, 33)}),
        Case("vector", _drawn, (257,)),
        Case("no-samples", _drawn, (0, 4, 16)),
        Case("no-columns", _drawn, (2, 0)),
        Case(
            "dimr-xl",
            _drawn,
            (8, 257, 1920),
            "DiMR-XL/2R, batch 8",
            lambda a, b: F.gelu(a) * b,
            lambda b, n, d: 25 * b * n * d,  # erf by a polynomial and one exponential
        ),
    ],
)
def geglu(a: Tensor, b: Tensor, approximate: str = "none") -> Tensor:
    """gelu(a) · b.

    Args:
        a, b: one shape and dtype, [..., D], float32, float16, bfloat16 (or float64, on the reference), any strides: the
            halves of one Linear's answer are read as they are.
        approximate: "none", x · Φ(x) by erf (DiMR, U-ViT, diffusers); "tanh" (Gemma, STARFlow).

    Returns:
        A contiguous tensor of a's shape and dtype; arithmetic is float32, rounded once.

    Raises:
        TypeError: a dtype outside the list. ValueError: shapes or dtypes that differ, or an unknown `approximate`.

    Source: Shazeer 2020, GLU Variants Improve Transformer; Hendrycks & Gimpel 2016.
    """
    h = _norm.widen(a)
    return (F.gelu(h, approximate=approximate) * b.to(h.dtype)).to(a.dtype)
