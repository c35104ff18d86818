"""GroupNorm and SiLU as 8-bit codes and a scale a sample: chunks of pixels, groups, samples, and chunks again.

The first kernel finds each channel's moments and extremes by chunks, the second what y = (x - center) · factor + offset is and
how large h may be by groups, the third a sample's scale; the last reads x once more and writes codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm, _quantize
from ._quantize import magnitude, put_codes, scale_of
from .act_quantize import _sigmoid

KEPT = 4096  # elements that a program holds
CHANNELS = 64  # of them, at most, so many channels
TILE = 1024  # numbers of parts that a program takes at a time


@triton.jit
def _tile(x, b, first, column, P, C, x_sample, x_pixel, x_channel, PIXELS: tl.constexpr):
    """[PIXELS, channels] of a sample, as float32; where there is an element; and their place."""
    pixel = first + tl.arange(0, PIXELS)
    mask = (pixel < P)[:, None] & (column < C)[None, :]
    at = b * x_sample + pixel[:, None] * x_pixel + column[None, :] * x_channel
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, pixel


@triton.jit
def _look(
    parts,  # [B, chunks, 5, C]: mean, what rounding left of it, squares about both, least, largest
    x,
    x_sample, x_pixel, x_channel,
    P, C, chunks,
    NORM: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    first = (item % chunks) * PIXELS
    column = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    h, mask, _ = _tile(x, item // chunks, first, column, P, C, x_sample, x_pixel, x_channel, PIXELS)
    part = parts + item * 5 * C + column
    inside = column < C
    if NORM:
        n = tl.minimum(P - first, PIXELS).to(tl.float32)
        mean = tl.sum(h, axis=0) / n
        d = tl.where(mask, h - mean[None, :], 0.0)
        rest = tl.sum(d, axis=0) / n
        d = tl.where(mask, d - rest[None, :], 0.0)
        tl.store(part, mean, mask=inside)
        tl.store(part + C, rest, mask=inside)
        tl.store(part + 2 * C, tl.sum(d * d, axis=0), mask=inside)
    else:  # forgets no NaN
        tl.store(part, tl.max(magnitude(h, mask), axis=0).to(tl.float32, bitcast=True), mask=inside)
    tl.store(part + 3 * C, tl.min(tl.where(mask, h, float("inf")), axis=0), mask=inside)
    tl.store(part + 4 * C, tl.max(tl.where(mask, h, float("-inf")), axis=0), mask=inside)


@triton.jit
def _parts(parts, b, k, i, row, from_channel, n, C, chunks):
    """Row `row` of chunks k and channels i of a unit, zeros where there are none; and where there are some."""
    mask = (k < chunks)[:, None] & (i < n)[None, :]
    at = ((b * chunks + k) * 5 + row)[:, None] * C + (from_channel + i)[None, :]
    return tl.load(parts + at, mask=mask, other=0.0), mask


@triton.jit
def _operand(a, column, mask):
    return tl.load(a + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _silu(y):
    return y * _sigmoid(y)


@triton.jit
def _fold(
    coefs, largest,  # [B, 3, C]; [B, units] as float32's bits
    parts,
    weight, bias, smooth,  # [C] or None
    scale, shift,  # [B, C] or None
    P, C, chunks, unit, units, eps,
    NORM: tl.constexpr, SILU: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b = item // units
    begin = item % units * unit
    n = tl.minimum(C - begin, unit)
    lane = tl.arange(0, CHANNELS).to(tl.int64)
    rank = tl.arange(0, CHUNKS).to(tl.int64)
    mean = tl.full([], 0.0, tl.float64)
    rstd = tl.full([], 1.0, tl.float64)
    if NORM:
        elements = tl.cast(P, tl.float64) * n.to(tl.float64)
        total = tl.zeros([CHUNKS, CHANNELS], tl.float64)
        for i in range(0, n, CHANNELS):
            for k in range(0, chunks, CHUNKS):
                count = tl.minimum(P - (k + rank) * PIXELS, PIXELS).to(tl.float64)[:, None]
                head, _ = _parts(parts, b, k + rank, i + lane, 0, begin, n, C, chunks)
                rest, _ = _parts(parts, b, k + rank, i + lane, 1, begin, n, C, chunks)
                total += count * (head.to(tl.float64) + rest)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / elements
        total = tl.zeros([CHUNKS, CHANNELS], tl.float64)
        for i in range(0, n, CHANNELS):
            for k in range(0, chunks, CHUNKS):
                count = tl.minimum(P - (k + rank) * PIXELS, PIXELS).to(tl.float64)[:, None]
                head, mask = _parts(parts, b, k + rank, i + lane, 0, begin, n, C, chunks)
                rest, _ = _parts(parts, b, k + rank, i + lane, 1, begin, n, C, chunks)
                squares, _ = _parts(parts, b, k + rank, i + lane, 2, begin, n, C, chunks)
                apart = head.to(tl.float64) + rest - mean
                total += tl.where(mask, squares.to(tl.float64) + count * apart * apart, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=1), axis=0) / elements + eps)
    center = mean.to(tl.float32)
    less = ((center.to(tl.float64) - mean) * rstd).to(tl.float32)
    most = tl.zeros([CHANNELS], tl.int32)
    for i in range(0, n, CHANNELS):
        column = begin + i + lane
        inside = i + lane < n
        low = tl.full([CHANNELS], float("inf"), tl.float32)
        high = tl.full([CHANNELS], float("-inf"), tl.float32)
        seen = tl.zeros([CHANNELS], tl.int32)
        for k in range(0, chunks, CHUNKS):
            part, mask = _parts(parts, b, k + rank, i + lane, 3, begin, n, C, chunks)
            low = tl.minimum(low, tl.min(tl.where(mask, part, float("inf")), axis=0))
            part, mask = _parts(parts, b, k + rank, i + lane, 4, begin, n, C, chunks)
            high = tl.maximum(high, tl.max(tl.where(mask, part, float("-inf")), axis=0))
            if not NORM:
                part, mask = _parts(parts, b, k + rank, i + lane, 0, begin, n, C, chunks)
                seen = tl.maximum(seen, tl.max(magnitude(part, mask), axis=0))
        gain = tl.full([CHANNELS], 1.0, tl.float32)
        plus = tl.zeros([CHANNELS], tl.float32)
        if weight is not None:
            gain = _operand(weight, column, inside)
        if bias is not None:
            plus = _operand(bias, column, inside)
        if scale is not None:
            more = 1.0 + _operand(scale, b * C + column, inside)
            gain = gain * more
            plus = plus * more
        if shift is not None:
            plus += _operand(shift, b * C + column, inside)
        factor = gain * rstd.to(tl.float32)
        offset = plus + tl.where(tl.abs(gain) < float("inf"), gain * less, 0.0)  # not 0 * infinity
        tl.store(coefs + b * 3 * C + column, tl.full([CHANNELS], 0.0, tl.float32) + center, mask=inside)
        tl.store(coefs + (b * 3 + 1) * C + column, factor, mask=inside)
        tl.store(coefs + (b * 3 + 2) * C + column, offset, mask=inside)
        y0 = tl.fma(low - center, factor, offset)
        y1 = tl.fma(high - center, factor, offset)
        crossed = (y0 < -1.27846454276) != (y1 < -1.27846454276)
        if SILU:
            y0 = _silu(y0)
            y1 = _silu(y1)
        reach = tl.maximum(magnitude(y0, inside), magnitude(y1, inside))
        if SILU:
            reach = tl.where(crossed & (reach < 0x3E8E92E8), 0x3E8E92E8, reach)  # 0.2785
        reach = tl.maximum(reach, tl.where(seen > 0x7F800000, seen, 0))
        largest_h = reach.to(tl.float32, bitcast=True)
        if smooth is not None:
            largest_h = largest_h * _operand(smooth, column, inside)
        most = tl.maximum(most, magnitude(largest_h, inside))
    tl.store(largest + item, tl.max(most, axis=0))


@triton.jit
def _scale(scales, inverses, largest, units, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for first in range(0, units, BLOCK):
        most = tl.maximum(most, tl.load(largest + b * units + first + lane, mask=first + lane < units, other=0))
    code_scale, inverse = scale_of(tl.max(most, axis=0), 0)
    tl.store(scales + b, code_scale)
    tl.store(inverses + b, inverse)


@triton.jit
def _codes(
    codes,  # [B, P, C], contiguous
    x,
    x_sample, x_pixel, x_channel,
    coefs, inverses, smooth,
    P, C, chunks,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b = item // chunks
    column = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    h, mask, pixel = _tile(x, b, item % chunks * PIXELS, column, P, C, x_sample, x_pixel, x_channel, PIXELS)
    inside = column < C
    coef = coefs + b * 3 * C + column
    center = tl.load(coef, mask=inside, other=0.0)
    factor = tl.load(coef + C, mask=inside, other=0.0)
    offset = tl.load(coef + 2 * C, mask=inside, other=0.0)
    shape: tl.constexpr = [PIXELS, CHANNELS]
    h = tl.fma(h - center[None, :], tl.broadcast_to(factor[None, :], shape), tl.broadcast_to(offset[None, :], shape))
    if SILU:
        h = _silu(h)
    if smooth is not None:
        h = h * _operand(smooth, column, inside)[None, :]
    put_codes(codes + (b * P + pixel)[:, None] * C + column[None, :], h, tl.load(inverses + b), mask)


def group_norm_quantize(
    out: list[Tensor],
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    smooth: Tensor | None,
    activation: str,
    eps: float,
) -> str | None:
    """The op of that name on the Triton rung."""
    if x.ndim < 2 or activation not in ("none", "silu") or not eps >= 0:
        return "x has fewer than 2 dimensions, or activation or eps is no known value"
    b, c, pixels = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    shapes = (x.shape, (c,), (c,), (b, c), (b, c))
    for t, shape in zip((x, weight, bias, scale, shift), shapes, strict=True):
        if t is not None and (t.dtype not in _norm.FLOATS or t.shape != shape):
            return "a tensor is not float32, float16 or bfloat16, or an operand's shape does not fit x"
    if groups < 0 or (groups and c % groups) or c >= 2**21 or pixels >= 2**31:
        return "groups: no divisor of the channels; or x too large"
    if (why := _quantize.refusal(c, smooth, 0)) is not None:
        return why
    if x.numel() == 0:
        out[1].fill_(1)
        return None
    rows = x.reshape(b, pixels, c)
    wide = min(CHANNELS, triton.next_power_of_2(c))
    block = min(KEPT // wide, triton.next_power_of_2(pixels))
    chunks, unit = triton.cdiv(pixels, block), c // groups if groups else CHANNELS
    units = triton.cdiv(c, unit)
    channels = min(CHANNELS, triton.next_power_of_2(unit))
    parts, coefs = (torch.empty(b, *n, c, dtype=torch.float32, device=x.device) for n in ((chunks, 5), (3,)))
    largest = torch.empty(b, units, dtype=torch.int32, device=x.device)
    inverses = torch.empty(b, dtype=torch.float32, device=x.device)
    weight, bias, scale, shift, smooth = map(_quantize.meet, (weight, bias, scale, shift, smooth))
    grid = (b * chunks, triton.cdiv(c, wide))
    with torch.cuda.device_of(x):
        _look[grid](
            parts, rows, *rows.stride(), pixels, c, chunks,
            NORM=groups > 0, PIXELS=block, CHANNELS=wide, num_warps=4,
        )  # fmt: skip
        _fold[(b * units,)](
            coefs, largest, parts, weight, bias, smooth, scale, shift, pixels, c, chunks, unit, units, eps,
            NORM=groups > 0, SILU=activation == "silu", PIXELS=block,
            CHUNKS=min(TILE // channels, triton.next_power_of_2(chunks)), CHANNELS=channels, num_warps=8,
        )  # fmt: skip
        _scale[(b,)](out[1], inverses, largest, units, BLOCK=min(1024, triton.next_power_of_2(units)), num_warps=1)
        _codes[grid](
            out[0], rows, *rows.stride(), coefs, inverses, smooth, pixels, c, chunks,
            SILU=activation == "silu", PIXELS=block, CHANNELS=wide, num_warps=4,
        )  # fmt: skip
    return None
