"""A convolution of 8-bit codes, channels last: a Linear over windows of pixels, whose sums are exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _broadcast, _linear
from ._linear import DEPTH, MOST
from .linear_w8a8 import pack_w8, unpack_w8


def _size(pixels, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return (pixels + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _shape(x, weight_scale, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    high, wide = (_size(n, kernel, stride, padding, dilation) for n in x.shape[1:3])
    return x.shape[0], high, wide, weight_scale.shape[0]


def _check(x, x_scale, weight, weight_scale, bias, gate, residual, kernel, stride, padding, dilation, activation, dtype):  # type: ignore[no-untyped-def]
    if x.dtype != torch.int8:
        raise TypeError(f"x: expected int8 codes, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, H, W, C], got shape {list(x.shape)}")
    for name, value in {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}.items():
        least = 0 if name == "padding" else 1
        if not least <= value < 2**31:
            raise ValueError(f"{name}: expected {least} or more, below 2^31, got {value}")
    if min(x.shape[1:3]) + 2 * padding <= dilation * (kernel - 1):
        raise ValueError(
            f"x: expected pictures of {dilation * (kernel - 1) + 1} pixels or more with their padding of {padding}, got shape "
            f"{list(x.shape)}"
        )
    if x.shape[-1] * kernel**2 > MOST:
        raise ValueError(f"x: expected kernel · kernel · C up to {MOST}, got {kernel} · {kernel} · {x.shape[-1]}")
    _linear.check_scales(weight_scale, x_scale=x_scale)
    if tuple(x_scale.shape) != (x.shape[0],):
        raise ValueError(f"x_scale: expected one a sample, [{x.shape[0]}], got shape {list(x_scale.shape)}")
    out = x.new_empty(_shape(x, weight_scale, kernel, stride, padding, dilation), device="meta")
    _linear.check_dtype(dtype)
    _linear.check_epilogue(out, activation, bias=bias, gate=gate, residual=residual)
    if residual is not None and not _broadcast.matches(residual, out):
        raise ValueError(f"residual: expected {_broadcast.expected(out)}, got shape {list(residual.shape)}")
    _linear.check_packed(weight, weight_scale.shape[0], kernel**2 * x.shape[-1], DEPTH, "pack_w8")


def _allocate(x, x_scale, weight, weight_scale, bias, gate, residual, kernel, stride, padding, dilation, activation, dtype):  # type: ignore[no-untyped-def]
    shape = _shape(x, weight_scale, kernel, stride, padding, dilation)
    return x.new_empty(shape, dtype=_linear.result(x_scale, dtype))


def _drawn(draw, b, h, w, c, n, kernel=3, **more):  # type: ignore[no-untyped-def]
    """The scales make results of the size of 1."""
    k = kernel**2 * c
    codes = torch.randint(-127, 128, (n, k), generator=draw.generator, dtype=torch.int8)
    return {
        "x": draw.codes(b, h, w, c),
        "x_scale": draw.f32(b).abs() / 73,
        "weight": pack_w8(codes).to(draw.device),
        "weight_scale": draw.f32(n).abs() / (73 * max(1, k) ** 0.5),
        "kernel": kernel,
        "padding": kernel // 2,
        "dtype": _linear.named(draw),
        **more,
    }


def _resnet(draw, b, h, w, c, n):  # type: ignore[no-untyped-def]
    return _drawn(draw, b, h, w, c, n, bias=draw(n), residual=draw(b, h, w, n))


def _turned(draw, b, h, w, c, n):  # type: ignore[no-untyped-def]
    """Codes with their channels first in memory."""
    return _drawn(draw, b, h, w, c, n) | {"x": draw.codes(b, c, h, w).permute(0, 2, 3, 1)}


def _eager(x, x_scale, weight, weight_scale, bias, residual):  # type: ignore[no-untyped-def]
    """What an eager user does, who has no integer convolution: widen the codes, then a pass a line."""
    n, c = weight_scale.shape[0], x.shape[-1]
    w = unpack_w8(weight, n, 9 * c).view(n, 3, 3, c).permute(0, 3, 1, 2).to(residual.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2).to(residual.dtype), w, padding=1).permute(0, 2, 3, 1).float()
    return (y * x_scale[:, None, None, None] * weight_scale + bias + residual).to(residual.dtype)


def _flops(b, h, w, c, n):  # type: ignore[no-untyped-def]
    return 18 * b * h * w * c * n


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    b, c, n, kernel = pick.size(3, 0), pick.size(70, 0), pick.size(140, 0), pick.choice((1, 2, 3, 3, 5))
    stride, padding, dilation = pick.choice((1, 1, 2, 3)), pick.randrange(4), pick.choice((1, 1, 2))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    given = _drawn(draw, b, least + pick.size(9) - 1, least + pick.size(9) - 1, c, n, kernel)
    given |= {"stride": stride, "padding": padding, "dilation": dilation, "activation": pick.choice(tuple(_linear.ACTIVATIONS))}
    high, wide = (_size(s, kernel, stride, padding, dilation) for s in given["x"].shape[1:3])
    meets = ((n,), (b, n), (b, high, wide, n))
    return given | {
        "bias": pick.maybe(lambda: pick.choice((draw, draw.f32))(n)),
        "gate": pick.maybe(lambda: draw(*pick.choice(meets))),
        "residual": pick.maybe(lambda: pick.choice((draw, draw.f32))(*pick.choice(meets))),
    }


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("plain", lambda d: _drawn(d, 2, 6, 5, 64, 64)),
        Case("tails", lambda d: _drawn(d, 2, 7, 9, 35, 67, bias=d(67), activation="silu")),
        Case("resnet", _resnet, (1, 8, 8, 40, 48)),
        Case("embedded", lambda d: _drawn(d, 3, 4, 6, 20, 70, bias=d(70), residual=d(3, 70))),
        Case("layer-scale", lambda d: _drawn(d, 2, 5, 5, 16, 24, gate=d.f32(24), residual=d.f32(2, 5, 5, 24))),
        Case("gated", lambda d: _drawn(d, 2, 4, 5, 8, 33, gate=d(2, 33), activation="gelu_tanh")),
        Case("latents", lambda d: _drawn(d, 2, 9, 8, 4, 96, bias=d(96))),
        Case("pictures", lambda d: _drawn(d, 1, 11, 6, 3, 16, kernel=7)),
        Case("one-tap", lambda d: _drawn(d, 2, 3, 7, 72, 40, kernel=1, bias=d(40), activation="gelu")),
        Case("one-tap-apart", lambda d: _drawn(d, 2, 6, 7, 9, 12, kernel=1, stride=2)),
        Case("downsample", lambda d: _drawn(d, 1, 9, 10, 24, 24, stride=2)),
        Case("asymmetric", lambda d: _drawn(d, 1, 9, 9, 12, 8, stride=2, padding=0)),
        Case("dilated", lambda d: _drawn(d, 1, 9, 8, 16, 20, padding=2, dilation=2)),
        Case("padded", lambda d: _drawn(d, 1, 2, 1, 5, 9, padding=3)),
        Case("even", lambda d: _drawn(d, 1, 4, 6, 8, 8, kernel=2, stride=2, padding=0)),
        Case("turned", _turned, (2, 6, 7, 20, 40)),
        Case("cut", lambda d: _drawn(d, 2, 5, 6, 16, 8) | {"x": d.codes(2, 7, 9, 32)[:, 1:6, 2:8, 16:]}),
        Case("deep", lambda d: _drawn(d, 1, 3, 3, 1283, 5)),
        Case("no-samples", lambda d: _drawn(d, 0, 4, 4, 16, 8)),
        Case("no-channels", lambda d: _drawn(d, 1, 4, 4, 0, 8, bias=d(8))),
        Case("no-outputs", lambda d: _drawn(d, 1, 4, 4, 8, 0)),
        Case("only-padding", lambda d: _drawn(d, 2, 0, 3, 8, 8, padding=2)),
        Case("sd-64", _resnet, (1, 64, 64, 320, 320), "SD 1.5 at 512²: its first ResBlocks", _eager, _flops, arithmetic="int8"),
        Case("sd-32", _resnet, (1, 32, 32, 640, 640), "SD 1.5 at 512²: its second", _eager, _flops, arithmetic="int8"),
        Case("sd-16", _resnet, (1, 16, 16, 1280, 1280), "SD 1.5 at 512²: its third", _eager, _flops, arithmetic="int8"),
    ],
)
def conv2d_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    activation: str = "none",
    dtype: str = "bfloat16",
) -> Tensor:
    """activation(conv(x, W) · x_scale · weight_scale + bias) · gate + residual, of int8 codes, whose sums are exact.

    Args:
        x: int8 codes [B, H, W, C], any strides, kernel · kernel · C up to 131 071. Zeros lie around the pictures.
        x_scale: float32 [B], one a sample, for a window mixes pixels.
        weight: uint8 [⌈N/64⌉, ⌈kernel·kernel·C/4⌉, 64, 4], what `pack_w8` makes of int8 codes [N, kernel, kernel, C], flattened
            to [N, kernel·kernel·C].
        weight_scale: float32 [N], one an output.
        bias: [N].
        gate, residual: [N] shared, [B, N] per sample (a ResBlock's time embedding) or [B, H', W', N]; bias, gate and residual
            are float32, float16 or bfloat16.
        kernel, stride, padding, dilation: in pixels, for both directions, as `torch.nn.Conv2d` has them.
        activation: "none", "gelu", "gelu_tanh" or "silu".
        dtype: the result's, "float32", "float16" or "bfloat16".

    Returns:
        A contiguous tensor [B, H', W', N], H' = (H + 2 padding - dilation (kernel - 1) - 1) // stride + 1. The epilogue is
        float32, rounded once.

    Raises:
        TypeError, ValueError: an argument outside of the above. RuntimeError: a gradient is wanted; there is none.

    Source: Jacob et al. 2018 (arXiv 1712.05877), integer convolutions; scales as for `linear_w8a8`.
    """
    n, (b, _, _, c) = weight_scale.shape[0], x.shape
    span = dilation * (kernel - 1) + 1
    padded = F.pad(x, (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, span, stride).unfold(2, span, stride)[..., ::dilation, ::dilation]  # [B, H', W', C, ky, kx]
    rows = windows.permute(0, 1, 2, 4, 5, 3).reshape(b, windows.shape[1], windows.shape[2], kernel**2 * c)
    codes, scales = unpack_w8(weight, n, kernel**2 * c), x_scale[:, None, None].expand(rows.shape[:-1])
    return _linear.define(codes, rows, scales, weight_scale, bias, None, None, gate, residual, activation, dtype)
