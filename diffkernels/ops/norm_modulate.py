"""Normalisation, affine and adaptive modulation in one pass (DiT's adaLN, PixArt, DiMR, WAN; Ba et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import alike, op
from . import _broadcast, _norm
from .norm_backward import bits, norm_backward, unpack


def _check(x, scale, shift, weight, bias, norm, eps, eps_mode):  # type: ignore[no-untyped-def]
    _norm.check(x, norm, eps, eps_mode, scale=scale, shift=shift, weight=weight, bias=bias)


def _eager(x, scale, shift):  # type: ignore[no-untyped-def]
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _eager_rms(x, weight):  # type: ignore[no-untyped-def]
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8) * weight


def _adaln(draw, b, n, d):  # type: ignore[no-untyped-def]
    scale, shift, *_ = draw(b, 6 * d).chunk(6, dim=-1)
    return {"x": draw(b, n, d), "scale": scale, "shift": shift}


def _rms_outside(draw, n, d):  # type: ignore[no-untyped-def]
    return {"x": draw(n, d), "weight": draw(d), "norm": "rms", "eps": 1e-8, "eps_mode": "outside"}


def _flops(b, n, d):  # type: ignore[no-untyped-def]
    return 8 * b * n * d  # mean, variance, normalisation, modulation: 1 + 3 + 2 + 2 an element


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    shape, operand = _broadcast.drawn(draw, pick)
    operands = {name: pick.maybe(operand) for name in ("scale", "shift", "weight", "bias")}
    return {"x": draw(*shape), **operands, **_norm.how(pick)}


@op(
    allocate=alike,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("adaln", _adaln, (2, 9, 72)),
        Case("plain", lambda draw: {"x": draw(3, 5, 64)}),
        Case("affine", lambda draw: {"x": draw(2, 7, 48), "weight": draw(48), "bias": draw(48), "eps": 1e-5}),
        Case(
            "per-token",
            lambda draw: {"x": draw(2, 6, 33), "scale": draw(2, 6, 33), "shift": draw(2, 6, 33), "weight": draw(33)},
        ),
        Case("per-frame", lambda draw: {"x": draw(2, 12, 40), "scale": draw(2, 3, 1, 40), "shift": draw(2, 3, 1, 40)}),
        Case("per-frame-4d", lambda draw: {"x": draw(2, 3, 4, 40), "scale": draw(2, 3, 1, 40), "shift": draw(2, 40)}),
        Case("mixed-dtypes", lambda draw: {"x": draw(2, 4, 65), "scale": draw.f32(2, 65), "weight": draw.f32(65)}),
        Case("rms-outside", _rms_outside, (4, 60)),
        Case("rms", lambda draw: {"x": draw(2, 3, 2, 31), "weight": draw(31), "norm": "rms"}),
        Case("layer-outside", lambda draw: {"x": draw(3, 130), "eps": 1e-3, "eps_mode": "outside"}),
        Case("one-row", lambda draw: {"x": draw(257), "scale": draw(257)}),
        Case("one-column", lambda draw: {"x": draw(5, 1), "shift": draw(5, 1)}),
        Case("no-samples", lambda draw: {"x": draw(0, 4, 16), "scale": draw(0, 16), "weight": draw(16)}),
        Case("no-tokens", lambda draw: {"x": draw(2, 0, 16), "scale": draw(2, 16), "shift": draw(2, 16)}),
        Case("wide", lambda draw: {"x": draw(2, 8191), "weight": draw(8191), "norm": "rms"}),
        Case("widest", lambda draw: {"x": draw(1, 66816), "weight": draw(66816), "bias": draw(66816)}),
        Case("dit-xl-256", _adaln, (8, 256, 1152), "DiT-XL/2 at 256², batch 8", _eager, _flops, backward=True),
        Case("pixart-1024", _adaln, (2, 4096, 1152), "PixArt-α at 1024², batch 2", _eager, _flops),
        Case("flux-1024", _adaln, (1, 4608, 3072), "FLUX at 1024²", _eager, _flops),
        Case("wan-480p", _adaln, (1, 32760, 1536), "Wan 1.3B at 480p, 81 frames", _eager, _flops),
        Case(
            "dimr-g-cascade",
            _rms_outside,
            (512, 66816),
            "DiMR-G/2R's widest row, as RMSNorm, 512 tokens",
            _eager_rms,
            lambda n, d: 4 * n * d,
        ),
    ],
)
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    eps_mode: str = "inside",
) -> Tensor:
    """norm(x) · weight + bias, then · (1 + scale) + shift, in one pass.

    The norm runs over the last dimension with the biased variance. `norm="layer"`: (x - mean) / d; `norm="rms"`: x / d,
    without centring; d = sqrt(ms + eps) for `eps_mode="inside"`, sqrt(ms) + eps for `"outside"` (DiMR's TDRMSNorm), where
    ms is the variance or the mean square.

    Args:
        x: [..., D], float32, float16, bfloat16 (or float64, on the reference), D >= 1, any strides.
        scale, shift: the adaptive form. [D] shared, [B, D] per sample, [B, S, D] per token, or [B, F, 1, D] per frame;
            leading dimensions match x's from the left and 1s go before D. Views such as `chunk(6)` are read as they are.
        weight, bias: the plain form, of the same shapes.
        eps: >= 0.

    Returns:
        A contiguous tensor of x's shape and dtype. Statistics and arithmetic are float32, rounded once at the end.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape, `norm`, `eps` or `eps_mode` outside of the above.

    Source: Ba et al. 2016, eq. 3; Zhang & Sennrich 2019, eq. 4; Peebles & Xie 2023 (adaLN); DiMR (arXiv 2406.09416).
    """
    return _norm.modulated(x, scale, shift, weight, bias, norm, eps, eps_mode).to(x.dtype)


@norm_modulate.op.backward()  # type: ignore[attr-defined]
def _backward(inputs, outputs, grads, wanted):  # type: ignore[no-untyped-def]
    x, scale, shift, weight, bias, *how = inputs
    found = norm_backward(grads[0], x, scale, shift, weight, bias, *how, None, None, None, bits(wanted[:5]))
    return *unpack(found, wanted[:5]), None, None, None
