"""A depthwise convolution of channels-last pictures, with its bias and the residual (ConvNeXt's and DiMR's 7×7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import alike, op
from . import _norm


def _check(x, weight, bias, residual):  # type: ignore[no-untyped-def]
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in _norm.FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, H, W, C], got shape {list(x.shape)}")
    c = x.shape[-1]
    if weight.ndim != 4 or tuple(weight.shape[:2]) != (c, 1) or not weight.shape[2] % 2 or not weight.shape[3] % 2:
        raise ValueError(f"weight: expected [{c}, 1, odd, odd], got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"bias: expected [{c}], got {list(bias.shape)}")


def _drawn(draw, b, h, w, c, k, bias=True, residual=True):  # type: ignore[no-untyped-def]
    bias = draw(c) if bias else None
    return {"x": draw(b, h, w, c), "weight": draw(c, 1, k, k), "bias": bias, "residual": residual}


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    b, h, w, c = pick.size(3, 0), pick.size(9, 0), pick.size(9, 0), pick.size(130)
    weight = pick.choice((draw, draw.f32))(c, 1, *pick.choices((1, 3, 5, 7), k=2))
    bias = pick.maybe(lambda: pick.choice((draw, draw.f32))(c))
    return {"x": draw(b, h, w, c), "weight": weight, "bias": bias, "residual": pick.choice((False, True))}


def _eager(x, weight, bias):  # type: ignore[no-untyped-def]
    pad = (weight.shape[2] // 2, weight.shape[3] // 2)
    return x + F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=pad, groups=x.shape[-1]).permute(0, 2, 3, 1)


@op(
    allocate=alike,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("convnext", _drawn, (2, 9, 8, 40, 7)),
        Case("plain", _drawn, (1, 5, 4, 33, 3, False, False)),
        Case("wider-than-x", _drawn, (1, 2, 3, 16, 7, True, False)),
        Case("one-tap", _drawn, (1, 3, 3, 8, 1)),
        Case("long", lambda d: {"x": d(1, 3, 21, 17), "weight": d(17, 1, 3, 5), "bias": d.f32(17)}),
        Case("large", _drawn, (1, 5, 9, 37, 21)),
        Case("tiles", _drawn, (1, 19, 45, 70, 5)),
        Case("no-samples", _drawn, (0, 4, 4, 16, 3)),
        Case("no-pixels", _drawn, (2, 0, 4, 16, 3)),
        Case(
            "dimr-xl",
            _drawn,
            (8, 32, 32, 480, 7),
            "DiMR-XL/2R's ConvNeXt stage, batch 8",
            _eager,
            lambda b, h, w, c, k: 2 * b * h * w * c * (k * k + 1),
        ),
    ],
)
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: bool = False) -> Tensor:
    """The convolution of each channel with its own kernel, + bias, + x itself with `residual`. "Same" zero padding.

    Args:
        x: [B, H, W, C], channels last, float32, float16, bfloat16 (or float64, on the reference), any strides.
        weight: [C, 1, kh, kw] as `nn.Conv2d(groups=C)` has it, kh and kw odd; any of these dtypes.
        bias: [C] or None.

    Returns:
        A contiguous tensor of x's shape and dtype; sums are float32, rounded once.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape outside of the above.

    Source: ConvNeXt (Liu et al. 2022); DiMR (arXiv 2406.09416), which has no norm before it.
    """
    if 0 in x.shape[1:3]:  # PyTorch's convolution refuses pictures without pixels
        return x.clone()
    h = _norm.widen(x).permute(0, 3, 1, 2)
    pad = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype), padding=pad, groups=x.shape[-1])
    return ((y + h) if residual else y).permute(0, 2, 3, 1).to(x.dtype)
