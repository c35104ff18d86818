"""GroupNorm and SiLU with 8-bit codes for what they write: the input of a quantized convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _norm, _quantize

ACTIVATIONS = ("none", "silu")
LEAST = -1.2784645427610738  # where silu has its minimum, which is this plus 1


def _check(x, groups, weight, bias, scale, shift, smooth, activation, eps):  # type: ignore[no-untyped-def]
    if x.ndim < 2:
        raise ValueError(f"x: expected at least two dimensions, [B, ..., C]; got shape {list(x.shape)}")
    samples, channels = x.shape[0], x.shape[-1]
    per_sample = {"scale": (scale, (samples, channels)), "shift": (shift, (samples, channels))}
    operands = {"weight": (weight, (channels,)), "bias": (bias, (channels,)), **per_sample}
    for name, (t, shape) in {"x": (x, x.shape), **operands}.items():
        if t is None:
            continue
        if t.dtype not in _norm.FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    _quantize.check(x, channels, smooth, 0)
    if groups < 0 or (groups and channels % groups):
        raise ValueError(f"groups: expected 0, or a divisor of {channels} channels, got {groups}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def _allocate(x, groups, weight, bias, scale, shift, smooth, activation, eps):  # type: ignore[no-untyped-def]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return [codes, torch.empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)]


def _drawn(groups, affine=True, adaptive=False, smooth=False, **how):  # type: ignore[no-untyped-def]
    def make(draw, *shape):  # type: ignore[no-untyped-def]
        b, c = shape[0], shape[-1]
        given = {"x": draw(*shape), "groups": groups, **how}
        given |= {"weight": draw(c), "bias": draw(c)} if affine else {}
        given |= dict(zip(("scale", "shift"), draw(b, 2 * c).chunk(2, -1), strict=True)) if adaptive else {}
        return given | ({"smooth": draw(c)} if smooth else {})

    return make


def _nchw(draw, b, c, h, w):  # type: ignore[no-untyped-def]
    return {"x": draw(b, c, h, w).permute(0, 2, 3, 1), "groups": 4, "weight": draw(c), "bias": draw(c)}


def _padded(draw):  # type: ignore[no-untyped-def]
    return {"x": draw(2, 6, 7, 48)[:, 1:-1, 1:-1, 4:39], "groups": 5, "bias": draw(35), "smooth": draw(35)}


def _mixed(draw, b, n, c):  # type: ignore[no-untyped-def]
    operands = {"weight": draw.f32(c), "bias": draw(c), "scale": draw.f32(b, c), "shift": draw(b, c), "smooth": draw.f32(c)}
    return {"x": draw(b, n, c), "groups": 13, **operands}


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    pixels = pick.choice(([], [pick.size(300, 0)], [pick.size(20, 0), pick.size(20)], [2, pick.size(5), pick.size(9)]))
    groups = pick.choice((0, 1, 2, 8, 32, pick.size(40)))
    b, c = pick.size(3, 0), max(1, groups) * pick.size(max(1, 700 // max(1, groups)))
    shapes = {"weight": (c,), "bias": (c,), "scale": (b, c), "shift": (b, c), "smooth": (c,)}
    given = {name: pick.maybe(lambda shape=shape: pick.choice((draw, draw.f32))(*shape)) for name, shape in shapes.items()}
    how = {"activation": pick.choice(ACTIVATIONS), "eps": pick.choice((1e-6, 1e-5, 1e-2))}
    return {"x": draw(b, *pixels, c), "groups": groups, **given, **how}


def _eager(x, groups, weight, bias):  # type: ignore[no-untyped-def]
    h = F.silu(F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, 1e-5))  # channels last stay so
    code_scale = h.abs().amax((1, 2, 3), keepdim=True).float() / 127
    return (h / code_scale).round().to(torch.int8).permute(0, 2, 3, 1), code_scale.flatten()


def _flops(b, h, w, c):  # type: ignore[no-untyped-def]
    return 17 * b * h * w * c  # the statistics 5, the extremes 2, the affine map 3; one exponential, one division; the codes 2


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("resblock", _drawn(4), (2, 5, 6, 72)),
        Case("adaptive", _drawn(8, adaptive=True, smooth=True), (3, 4, 5, 40)),
        Case("adaptive-alone", _drawn(4, affine=False, adaptive=True, activation="none"), (2, 3, 3, 64)),
        Case("no-activation", _drawn(5, activation="none", smooth=True), (2, 3, 7, 35)),
        Case("no-norm", _drawn(0, adaptive=True, smooth=True), (2, 4, 4, 33)),
        Case("no-norm-plain", _drawn(0, affine=False, activation="none"), (2, 9, 65)),
        Case("one-group", _drawn(1), (2, 3, 5, 3)),
        Case("every-channel", _drawn(36, smooth=True), (2, 5, 5, 36)),
        Case("tokens", _drawn(2, affine=False), (2, 37, 4)),
        Case("rows", _drawn(4, adaptive=True), (5, 132)),
        Case("video", _drawn(3, eps=1e-3), (2, 2, 3, 4, 33)),
        Case("nchw", _nchw, (2, 20, 5, 7)),
        Case("padded", _padded),
        Case("mixed-dtypes", _mixed, (2, 11, 65)),
        Case("one-pixel", _drawn(2), (3, 1, 1, 34)),
        Case("one-channel", _drawn(1), (2, 9, 3, 1)),
        Case("no-samples", _drawn(4, smooth=True), (0, 4, 4, 16)),
        Case("no-pixels", _drawn(4, adaptive=True), (2, 0, 4, 16)),
        Case("long", _drawn(8, adaptive=True), (2, 67, 40, 40)),
        Case("wide", _drawn(32), (2, 3, 3, 2080)),
        Case("sd-512", _drawn(32), (2, 64, 64, 320), "Stable Diffusion 1.5's ResBlock at 512²", _eager, _flops),
        Case("sd-512-deep", _drawn(32), (2, 16, 16, 1280), "Stable Diffusion 1.5's inner ResBlock at 512²", _eager, _flops),
    ],
)
def group_norm_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-5,
) -> list[Tensor]:
    """8-bit codes, and one scale a sample, of activation((norm(x) · weight + bias) · (1 + scale) + shift) · smooth.

    h is float32 and is not rounded to x's dtype. A convolution sums over pixels, so that all pixels of a sample share a scale:
    codes = round(h · (127 / amax)), half to even; code_scale = amax / 127; h ≈ codes · code_scale.

    amax is found before h is made. What is activated, y, is an affine function of a channel's x, and so between its values y0
    and y1 at the channel's smallest and largest x. amax is the largest |activation(y) · smooth| of any y between them, over
    all channels: of "none" |y0| or |y1|; of "silu" |silu(y0)|, |silu(y1)| or, where -1.2785 lies between them, 0.2785, the
    magnitude of silu's minimum. That is max |h| itself wherever no channel gets more from the minimum than there is in h, as
    without `smooth` when max |h| >= 0.2785; else it is larger than max |h|, never smaller, and codes end below ±127.

    Args:
        x: [B, ..., C], channels last ([B, H, W, C], [B, S, C], [B, C]), float32, float16, bfloat16 (or float64, on the
            reference), C >= 1, any strides.
        groups: a divisor of C: each group of channels of a sample, over all pixels, is normalised as `F.group_norm` does it; or
            0: there is no norm, what follows it stays.
        weight, bias: [C]. scale, shift: [B, C]. smooth: [C], a factor a channel, the inverse of what the convolution's weight
            was multiplied by. Each of any of these dtypes.
        activation: "silu" or "none".
        eps: added to the variance.

    Returns:
        [codes, code_scale], contiguous: int8 of x's shape, in -127..127; float32 [B]. A sample with amax <= 2^-100 counts as
        zeros: codes 0, scale 1; so does one without pixels. Where amax is not finite, the sample's codes are 0 and its scale
        says so: NaN where a NaN is among what amax is taken of, else infinity. With groups what is not finite in x has a NaN
        in its group: its mean is not finite. Without, silu of minus infinity is NaN, as in PyTorch.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape, `groups`, `activation` or `eps` outside of the above.
        RuntimeError: a gradient is wanted; there is none.

    Source: Wu & He 2018, Group Normalization; Dhariwal & Nichol 2021 (adaptive); Xiao et al. 2023, SmoothQuant, eq. 3.
    """
    b, c, pixels = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    h = _norm.widen(x).reshape(b, pixels, c)
    if pixels == 0:
        return [x.to(torch.int8), h.new_ones(b)]
    ends = torch.stack([h.amin(1), h.amax(1)], 1)  # [B, 2, C]; NaN where one is
    if groups:
        grouped = h.unflatten(-1, (groups, -1))
        mean = grouped.mean((1, 3), keepdim=True)
        rstd = torch.rsqrt((grouped - mean).square().mean((1, 3), keepdim=True) + eps)
        h, ends = (((t.unflatten(-1, (groups, -1)) - mean) * rstd).flatten(2) for t in (h, ends))
    h, ends = (_affine(t, weight, bias, scale, shift) for t in (h, ends))
    low, high = ends.amin(1), ends.amax(1)
    if activation == "silu":
        h, ends = F.silu(h), F.silu(ends)
    reach = ends.abs().amax(1)
    if activation == "silu":
        reach = torch.where((low <= LEAST) & (high >= LEAST), reach.clamp(min=-1 - LEAST), reach)
    if smooth is not None:
        h, reach = h * smooth.to(h.dtype), reach * smooth.to(h.dtype).abs()
    codes, code_scale = _quantize.coded(h, reach.amax(-1)[:, None, None])
    return [codes.reshape(x.shape), code_scale.flatten()]


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """(h · weight + bias) · (1 + scale) + shift of h [B, ..., C] in three dimensions."""
    if weight is not None:
        h = h * weight.to(h.dtype)
    if bias is not None:
        h = h + bias.to(h.dtype)
    if scale is not None:
        h = h * (1 + scale.to(h.dtype)).unsqueeze(1)
    return h if shift is None else h + shift.to(h.dtype).unsqueeze(1)
