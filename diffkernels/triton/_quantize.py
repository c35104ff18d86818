"""What the ops that make 8-bit codes share: a row's rotation, its largest magnitude, its scale, its codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops._quantize import ROTATIONS
from . import _norm


@triton.jit
def magnitude(h, mask):
    """Without their signs floats are ordered as integers are, NaN behind infinity: the largest of these forgets no NaN."""
    return tl.where(mask, h.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def scale_of(largest, ROTATE: tl.constexpr):
    """Of a row's largest magnitude: amax / 127, over √ROTATE, and 127 / amax, 0 where the codes are 0 whatever h is."""
    amax = largest.to(tl.float32, bitcast=True)
    zero = amax <= 7.888609052210118e-31  # 2^-100
    coded = (amax > 7.888609052210118e-31) & (amax <= 3.4028234663852886e38)
    inverse = tl.where(coded, 127.0 / tl.where(coded, amax, 1.0), 0.0)
    norm: tl.constexpr = 0.125 if ROTATE == 64 else 0.08838834764831845 if ROTATE == 128 else 0.0625 if ROTATE == 256 else 1.0
    return tl.where(zero, 1.0, amax / 127.0 * norm), inverse


@triton.jit
def prepared(h, smooth, column, mask, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """h * smooth, which may be absent; then, where ROTATE isn't 0, its groups of so many columns times a Hadamard matrix of ±1.

    Sums and differences of columns 1 apart, then 2, 4, ...: the order of all rungs. Groups begin where blocks begin.
    """
    if smooth is not None:
        h = h * tl.load(smooth + column, mask=mask, other=0.0).to(tl.float32)
    if ROTATE > 0:
        for k in tl.static_range(8):
            if (1 << k) < ROTATE:
                pairs = tl.permute(tl.reshape(h, [BLOCK >> (k + 1), 2, 1 << k]), [0, 2, 1])
                a, b = tl.split(pairs)
                h = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [BLOCK])
    return h


@triton.jit
def put_codes(codes, h, inverse, mask):
    """To nearest even: what is added leaves no bit behind the point."""
    code = (h * inverse + 12582912.0) - 12582912.0
    tl.store(codes, tl.where(inverse > 0, code, 0.0).to(tl.int8), mask=mask)


def refusal(columns: int, smooth: Tensor | None, rotate: int) -> str | None:
    if columns < 1:
        return "no columns"
    if rotate and (rotate not in ROTATIONS or columns % rotate):
        return "rotate: not 0, 64, 128 or 256, or no divisor of the columns"
    if smooth is not None and (smooth.dtype not in _norm.FLOATS or smooth.shape != (columns,)):
        return "smooth: not [D] of float32, float16 or bfloat16"
    return None


def meet(smooth: Tensor | None) -> Tensor | None:
    return None if smooth is None else smooth.contiguous()
