"""What the ops that make 8-bit codes share: a row's largest magnitude, its scale, its codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _norm


@triton.jit
def magnitude(h, mask):
    """Without their signs floats are ordered as integers are, NaN behind infinity: the largest of these forgets no NaN."""
    return tl.where(mask, h.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def scale_of(largest):
    """Of a row's largest magnitude: amax / 127, and its inverse, 0 where the codes are 0 whatever h is."""
    amax = largest.to(tl.float32, bitcast=True)
    zero = amax <= 7.888609052210118e-31  # 2^-100
    coded = (amax > 7.888609052210118e-31) & (amax <= 3.4028234663852886e38)
    inverse = tl.where(coded, 127.0 / tl.where(coded, amax, 1.0), 0.0)
    return tl.where(zero, 1.0, amax / 127.0), inverse


@triton.jit
def put_codes(codes, h, inverse, mask):
    """To nearest even: what is added leaves no bit behind the point."""
    code = (h * inverse + 12582912.0) - 12582912.0
    tl.store(codes, tl.where(inverse > 0, code, 0.0).to(tl.int8), mask=mask)


@triton.jit
def smoothed(h, smooth, column, mask):
    """h * smooth, which may be absent."""
    if smooth is not None:
        h = h * tl.load(smooth + column, mask=mask, other=0.0).to(tl.float32)
    return h


def refusal(columns: int, smooth: Tensor | None) -> str | None:
    if columns < 1:
        return "no columns"
    if smooth is not None and (smooth.dtype not in _norm.FLOATS or smooth.shape != (columns,)):
        return "smooth: not [D] of float32, float16 or bfloat16"
    return None


def meet(smooth: Tensor | None) -> Tensor | None:
    return None if smooth is None else smooth.contiguous()
