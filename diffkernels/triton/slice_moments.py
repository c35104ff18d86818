"""z = x * weight, the row's mean, and the sum of the squared differences from it: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._norm import operand, statistics, walked_statistics


@triton.jit
def _kernel(
    z, moments,  # [R, D] and [R, 2], contiguous
    x,  # (data, row stride, column stride)
    weight,  # operand
    D,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = x[0] + row * x[1]
    if KEEP:
        h = tl.load(at + lane * x[2], mask=lane < D, other=0.0).to(tl.float32)
        mean, rest, ms = statistics(h, lane < D, D, True)
    else:
        mean, rest, ms = walked_statistics(at, x[2], D, True, BLOCK)
    tl.store(moments + 2 * row, mean + rest)
    tl.store(moments + 2 * row + 1, ms * D)
    for first in range(0, D, BLOCK):
        column = first + lane
        mask = column < D
        if not KEEP:
            h = tl.load(at + column * x[2], mask=mask, other=0.0).to(tl.float32)
        v = h * operand(weight, row, column, mask)
        tl.store(z + row * D + column, v.to(z.dtype.element_ty), mask=mask)


def slice_moments(results: list[Tensor], x: Tensor, weight: Tensor) -> str | None:
    """The op of that name on the Triton rung."""
    why = _norm.refusal(x, [weight], "layer", 0.0, "inside")
    if why is not None or x.numel() == 0:
        return why
    keep, block = _norm.width(x.shape[-1])
    with torch.cuda.device_of(x):
        _kernel[(x.numel() // x.shape[-1],)](
            *results, _norm.matrix(x), _norm.meet(weight, x), x.shape[-1],
            KEEP=keep, BLOCK=block, num_warps=_norm.warps(block),
        )  # fmt: skip
    return None
