"""The q-quantile of |m|, m = gain sum A p + a x: one program a sample finds the bits of its order statistic, 8 at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .solver_step import combined, flattened, refusal, table

TILE = 2048  # elements that a program looks at at a time


@triton.jit
def _bits(
    b, e, outputs, output_samples, x, x_sample, row, coef_column, valid, gain, E, guided,
    OUTPUTS: tl.constexpr, TWO_ROWS: tl.constexpr,
):  # fmt: skip
    """Of |m| at elements e of sample b, and -1 beyond the sample's end: positive floats are ordered as their bits are."""
    inside = e < E
    state = tl.load(x + b * x_sample + e, mask=inside, other=0.0)
    m = combined(b, e, inside, outputs, output_samples, state, row, coef_column, gain, guided, OUTPUTS, TWO_ROWS)
    m = tl.where(valid, tl.abs(m), float("nan"))
    bits = tl.where(m != m, 0x7FFFFFFF, m.to(tl.int32, bitcast=True))
    return tl.where(inside, bits, -1)


@triton.jit
def _kernel(
    out,
    outputs,  # tuple of [B, E] tensors, contiguous within a sample
    output_samples,
    x, x_sample,
    coef, coef_step, coef_sample, coef_column, T,
    step, gain,  # gain: one a sample, or None
    E, guided,
    rank, fraction,  # the rank below the quantile, and how far it is to the next
    OUTPUTS: tl.constexpr, TWO_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    now = tl.load(step)
    valid = (now >= 0) & (now < T)
    row = coef + tl.where(valid, now, 0).to(tl.int64) * coef_step + b * coef_sample
    bins = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int32)
    left = tl.zeros([], tl.int32) + rank  # the rank among the elements that begin with `prefix`
    largest = tl.full([BLOCK], -1, tl.int32)
    above = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for level in tl.static_range(4):  # 8, 8, 8 and 7 bits
        shift = 23 - 8 * level if level < 3 else 0
        wide = 8 if level < 3 else 7
        count = tl.zeros([256], tl.int32)
        for first in range(0, E, BLOCK):
            e = first + tl.arange(0, BLOCK).to(tl.int64)
            v = _bits(
                b, e, outputs, output_samples, x, x_sample, row, coef_column, valid, gain, E, guided, OUTPUTS, TWO_ROWS
            )  # fmt: skip
            top = (v >> shift) >> wide
            count += tl.histogram((v >> shift) & ((1 << wide) - 1), 256, mask=top == prefix)  # of no element: -1
            if level == 0:
                largest = tl.maximum(largest, v)
            if level == 3:
                above = tl.minimum(above, tl.where(top > prefix, v, 0x7FFFFFFF))
        upto = tl.cumsum(count, axis=0)
        bin = tl.sum((upto <= left).to(tl.int32), axis=0)
        left -= tl.max(tl.where(upto <= left, upto, 0), axis=0)
        if level == 3:
            same = tl.sum(tl.where(bins == bin, count, 0), axis=0)
            next = tl.min(tl.where((bins > bin) & (count > 0), bins, 256), axis=0)
            up = tl.where(next < 256, (prefix << wide) | next, tl.min(above, axis=0))
            prefix = (prefix << wide) | bin
            up = tl.where(left + 1 < same, prefix, up)
        else:
            prefix = (prefix << wide) | bin
    low = prefix.to(tl.float32, bitcast=True)
    high = up.to(tl.float32, bitcast=True)
    value = tl.where((fraction == 0) | (low == high), low, low + fraction * (high - low))
    tl.store(out + b, tl.where(tl.max(largest, axis=0) == 0x7FFFFFFF, float("nan"), value))


def row_abs_quantile(
    out: Tensor,
    outputs: list[Tensor],
    x: Tensor,
    coef: Tensor,
    step: Tensor,
    gain: Tensor | None,
    q: float,
    guided_channels: int,
) -> str | None:
    """The op of that name on the Triton rung."""
    two_rows = guided_channels != -1
    why = refusal(outputs, x, coef, step, gain, guided_channels, len(outputs) * (1 + two_rows) + 1)
    if why is not None:
        return why
    elements = x.shape[1:].numel()
    if not 0 <= q <= 1 or not 0 < elements < 2**31:
        return "q: not 0 to 1, or too many elements, or none"
    if x.shape[0] == 0:
        return None
    flat, state = [flattened(t) for t in outputs], flattened(x)
    place = q * (elements - 1)
    block = min(TILE, max(128, triton.next_power_of_2(elements)))
    with torch.cuda.device_of(x):
        _kernel[(x.shape[0],)](
            out, tuple(flat), tuple(t.stride(0) for t in flat), state, state.stride(0),
            *table(coef), step, gain if gain is None else gain.contiguous(),
            elements, elements // x.shape[1] * guided_channels if two_rows else elements,
            int(place), place - int(place),
            OUTPUTS=len(outputs), TWO_ROWS=two_rows, BLOCK=block, num_warps=8 if block == TILE else 4,
            enable_fp_fusion=False,  # every walk makes the same bits
        )  # fmt: skip
    return None
