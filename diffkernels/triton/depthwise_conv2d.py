"""y[p, c] = sum over taps of x[p + tap, c] * weight[c, tap], + bias, + x: one program a block of pixels and channels.

Pixels are counted through the whole batch, so that small pictures fill a block, too. The taps of neighbours meet in L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm


@triton.jit
def _kernel(
    y,  # [B, H, W, C] contiguous
    x,
    weight,  # [KH * KW, C]
    bias,  # [C] or None
    x_sample, x_line, x_pixel, x_channel,
    H, W, C, pixels,
    KH: tl.constexpr, KW: tl.constexpr, RESIDUAL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    line, column = p // W % H, p % W
    x += (p // W // H * x_sample + line * x_line + column * x_pixel)[:, None] + (c.to(tl.int64) * x_channel)[None, :]
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for tap in range(KH * KW):
        i, j = tap // KW - KH // 2, tap % KW - KW // 2
        inside = (p < pixels) & (line + i >= 0) & (line + i < H) & (column + j >= 0) & (column + j < W)
        away = i * tl.cast(x_line, tl.int64) + j * tl.cast(x_pixel, tl.int64)
        v = tl.load(x + away, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total += v.to(tl.float32) * tl.load(weight + tap * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    mask = (p < pixels)[:, None] & (c < C)[None, :]
    if RESIDUAL:
        total += tl.load(x, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + p[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=mask)


def depthwise_conv2d(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> str | None:
    """The op of that name on the Triton rung."""
    if any(t is not None and t.dtype not in _norm.FLOATS for t in (x, weight, bias)):
        return "a tensor is not float32, float16 or bfloat16"
    if x.ndim != 4 or weight.ndim != 4 or (bias is not None and bias.shape != x.shape[3:]):
        return "x or weight: not four dimensions, or bias: not [C]"
    (_, height, width, channels), (kh, kw) = x.shape, weight.shape[2:]
    if tuple(weight.shape[:2]) != (channels, 1) or not kh % 2 or not kw % 2:
        return "weight: not [C, 1, odd, odd]"
    if x.numel() == 0:
        return None
    taps = weight.permute(2, 3, 1, 0).contiguous()  # small beside x
    pixels, per_block = x.numel() // channels, min(64, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(pixels, 32), triton.cdiv(channels, per_block))](
            y, x, taps, None if bias is None else bias.contiguous(), *x.stride(), height, width, channels, pixels,
            KH=kh, KW=kw, RESIDUAL=residual, PIXELS=32, CHANNELS=per_block,
        )  # fmt: skip
    return None
