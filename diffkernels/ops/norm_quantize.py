"""`norm_modulate` with 8-bit codes for what it writes: the input of a quantized Linear, in the pass that makes it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _broadcast, _norm, _quantize


def _check(x, scale, shift, weight, bias, smooth, rotate, norm, eps, eps_mode):  # type: ignore[no-untyped-def]
    _norm.check(x, norm, eps, eps_mode, scale=scale, shift=shift, weight=weight, bias=bias)
    _quantize.check(x, x.shape[-1], smooth, rotate)


def _allocate(x, scale, shift, weight, bias, smooth, rotate, norm, eps, eps_mode):  # type: ignore[no-untyped-def]
    return _quantize.empty(x, x.shape[-1])


def _eager(x, scale, shift):  # type: ignore[no-untyped-def]
    return _quantize.eager(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


def _eager_rotated(x, scale, shift, rotate):  # type: ignore[no-untyped-def]
    h = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return _quantize.eager(h, rotate)


def _adaln(draw, b, n, d):  # type: ignore[no-untyped-def]
    scale, shift, *_ = draw(b, 6 * d).chunk(6, dim=-1)
    return {"x": draw(b, n, d), "scale": scale, "shift": shift}


def _rotated(draw, b, n, d):  # type: ignore[no-untyped-def]
    return _adaln(draw, b, n, d) | {"rotate": 128}


def _flops(b, n, d):  # type: ignore[no-untyped-def]
    return 11 * b * n * d  # norm_modulate's 8; the largest magnitude 1, the codes 2


def _flops_rotated(b, n, d):  # type: ignore[no-untyped-def]
    return 18 * b * n * d  # and a sum a column and step


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    rotate = pick.choice((0, 0, 0, *_quantize.ROTATIONS))
    shape, operand = _broadcast.drawn(draw, pick, multiple=rotate or 1)
    operands = {name: pick.maybe(operand) for name in ("scale", "shift", "weight", "bias")}
    smooth = pick.maybe(lambda: pick.choice((draw, draw.f32))(shape[-1]))
    return {"x": draw(*shape), **operands, "smooth": smooth, "rotate": rotate, **_norm.how(pick)}


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("adaln", _adaln, (2, 9, 72)),
        Case("plain", lambda draw: {"x": draw(3, 5, 64)}),
        Case("affine", lambda draw: {"x": draw(2, 7, 48), "weight": draw(48), "bias": draw(48), "eps": 1e-5}),
        Case("smooth", lambda draw: {"x": draw(2, 5, 65), "scale": draw(2, 65), "smooth": draw.f32(65)}),
        Case(
            "per-token",
            lambda draw: {"x": draw(2, 6, 33), "scale": draw(2, 6, 33), "shift": draw(2, 6, 33), "smooth": draw(33)},
        ),
        Case("per-frame", lambda draw: {"x": draw(2, 12, 40), "scale": draw(2, 3, 1, 40), "shift": draw(2, 3, 1, 40)}),
        Case("mixed-dtypes", lambda draw: {"x": draw(2, 4, 65), "scale": draw.f32(2, 65), "weight": draw.f32(65)}),
        Case("rms", lambda draw: {"x": draw(2, 3, 2, 31), "weight": draw(31), "smooth": draw.f32(31), "norm": "rms"}),
        Case("rms-outside", lambda draw: {"x": draw(4, 60), "norm": "rms", "eps": 1e-8, "eps_mode": "outside"}),
        Case("layer-outside", lambda draw: {"x": draw(3, 130), "eps": 1e-3, "eps_mode": "outside"}),
        Case("skip-token", lambda draw: {"x": draw(2, 6, 48)[:, 1:], "bias": draw(48)}),
        Case("one-row", lambda draw: {"x": draw(257), "scale": draw(257)}),
        Case("one-column", lambda draw: {"x": draw(5, 1), "shift": draw(5, 1)}),
        Case("no-samples", lambda draw: {"x": draw(0, 4, 16), "scale": draw(0, 16), "smooth": draw(16)}),
        Case("no-tokens", lambda draw: {"x": draw(2, 0, 16), "scale": draw(2, 16), "shift": draw(2, 16)}),
        Case("rotated-64", lambda draw: {"x": draw(2, 3, 192), "smooth": draw.f32(192), "rotate": 64}),
        Case("rotated-128", _rotated, (2, 5, 384)),
        Case("rotated-256", lambda draw: {"x": draw(3, 256), "weight": draw(256), "norm": "rms", "rotate": 256}),
        Case("rotated-widest", lambda draw: {"x": draw(1, 20224), "bias": draw(20224), "rotate": 256}),
        Case("wide", lambda draw: {"x": draw(2, 8191), "weight": draw(8191), "smooth": draw(8191), "norm": "rms"}),
        Case("widest", lambda draw: {"x": draw(1, 20001), "weight": draw(20001), "bias": draw(20001)}),
        Case("dit-xl-512", _adaln, (1, 1024, 1152), "DiT-XL/2 at 512²", _eager, _flops),
        Case("dit-xl-512-rotated", _rotated, (1, 1024, 1152), "DiT-XL/2 at 512², rotated", _eager_rotated, _flops_rotated),
        Case("flux-1024", _adaln, (1, 4608, 3072), "FLUX at 1024²", _eager, _flops),
    ],
)
def norm_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    norm: str = "layer",
    eps: float = 1e-6,
    eps_mode: str = "inside",
) -> list[Tensor]:
    """8-bit codes, and one scale a row, of norm(x) · weight + bias, then · (1 + scale) + shift, then · smooth, in one pass.

    h is `norm_modulate`'s float32 result before it is rounded to x's dtype, times smooth. Of each row (the last dimension),
    with amax = max |h|: codes = round(h · (127 / amax)), half to even; code_scale = amax / 127; h ≈ codes · code_scale.
    With `rotate` h is H h, H orthonormal: blocks of a Hadamard matrix of ±1 over √rotate, the root going to code_scale alone.

    Args:
        x: [..., D], float32, float16, bfloat16 (or float64, on the reference), D >= 1, any strides.
        scale, shift, weight, bias, norm, eps, eps_mode: as in `norm_modulate`.
        smooth: [D], a factor a column, of any of these dtypes: the inverse of what the Linear's weight was multiplied by.
        rotate: 0, or 64, 128 or 256, a divisor of D: columns that are mixed, by groups of so many, so that no outlier sets a
            row's scale alone. The weight was rotated alike: W h = (W H)(H h), H being its own inverse.

    Returns:
        [codes, code_scale], contiguous: int8 of x's shape, in -127..127; float32 of shape x.shape[:-1]. A row of nothing larger
        than 2^-100 (rotated: before the root) counts as zeros: codes 0, scale 1. Where h is not finite, the row's codes are 0
        and its scale says so: NaN where a NaN is (rotated: or two infinities meet), else infinity.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape, `rotate`, `norm`, `eps` or `eps_mode` outside of the above.
        RuntimeError: a gradient is wanted; there is none.

    Source: Dettmers et al. 2022 (absmax, by row); Xiao et al. 2023, SmoothQuant, eq. 3; Ashkboos et al. 2024, QuaRot
    (rotations); `norm_modulate`'s.
    """
    return _quantize.rows(_norm.modulated(x, scale, shift, weight, bias, norm, eps, eps_mode), smooth, rotate)
