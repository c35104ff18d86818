"""norm_modulate's result, times smooth, perhaps rotated, as 8-bit codes and a scale a row: one program a row.

A row of up to 16384 columns stays in registers; a wider one is walked four times, all but the first through the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm, _quantize
from ._norm import divide_by, modulate, statistics, walked_statistics
from ._quantize import magnitude, prepared, put_codes, scale_of


@triton.jit
def _kernel(
    codes, scales,  # [R, D] and [R], contiguous
    x,  # (data, row stride, column stride)
    scale, shift, weight, bias,  # operands or None
    smooth,  # [D] or None
    D, eps,
    ROTATE: tl.constexpr, LAYER: tl.constexpr, INSIDE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = x[0] + row * x[1]
    codes += row * D
    if KEEP:
        mask = lane < D
        h = tl.load(at + lane * x[2], mask=mask, other=0.0).to(tl.float32)
        mean, rest, ms = statistics(h, mask, D, LAYER)
        h = modulate((h - mean - rest) / divide_by(ms, eps, INSIDE), row, lane, mask, scale, shift, weight, bias)
        h = prepared(h, smooth, lane, mask, ROTATE, BLOCK)
        code_scale, inverse = scale_of(tl.max(magnitude(h, mask), axis=0), ROTATE)
        put_codes(codes + lane, h, inverse, mask)
    else:
        mean, rest, ms = walked_statistics(at, x[2], D, LAYER, BLOCK)
        divisor = divide_by(ms, eps, INSIDE)
        largest = tl.zeros([BLOCK], tl.int32)
        for first in range(0, D, BLOCK):
            column = first + lane
            mask = column < D
            h = tl.load(at + column * x[2], mask=mask, other=0.0).to(tl.float32)
            h = modulate((h - mean - rest) / divisor, row, column, mask, scale, shift, weight, bias)
            largest = tl.maximum(largest, magnitude(prepared(h, smooth, column, mask, ROTATE, BLOCK), mask))
        code_scale, inverse = scale_of(tl.max(largest, axis=0), ROTATE)
        for first in range(0, D, BLOCK):
            column = first + lane
            mask = column < D
            h = tl.load(at + column * x[2], mask=mask, other=0.0).to(tl.float32)
            h = modulate((h - mean - rest) / divisor, row, column, mask, scale, shift, weight, bias)
            put_codes(codes + column, prepared(h, smooth, column, mask, ROTATE, BLOCK), inverse, mask)
    tl.store(scales + row, code_scale)


def norm_quantize(
    out: list[Tensor],
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    smooth: Tensor | None,
    rotate: int,
    norm: str,
    eps: float,
    eps_mode: str,
) -> str | None:
    """The op of that name on the Triton rung."""
    operands = [scale, shift, weight, bias]
    why = _norm.refusal(x, operands, norm, eps, eps_mode) or _quantize.refusal(x.shape[-1], smooth, rotate)
    if why is not None or x.numel() == 0:
        return why
    keep, block = _norm.width(x.shape[-1])
    with torch.cuda.device_of(x):
        _kernel[(x.numel() // x.shape[-1],)](
            *out, _norm.matrix(x), *(_norm.meet(t, x) for t in operands), _quantize.meet(smooth), x.shape[-1], eps,
            ROTATE=rotate, LAYER=norm == "layer", INSIDE=eps_mode == "inside", KEEP=keep, BLOCK=block,
            num_warps=_norm.warps(block),
        )  # fmt: skip
    return None
