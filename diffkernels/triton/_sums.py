"""The second half of a sum over rows: programs left their parts in scratch, in order; here they are added up, in order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program adds at a time


@triton.jit
def _kernel(
    outs,  # tuple of [groups, D], contiguous
    parts,  # [number of outs, groups * count, D], contiguous
    counts, groups,
    size, D,
    OUTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """outs[j][i] = the sum of parts[j][i * count : (i + 1) * count]."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for j in tl.static_range(OUTS):
        if (tl.program_id(2) == j) & (i < groups[j]):
            total = tl.zeros([PARTS, BLOCK], tl.float32)
            for first in range(0, counts[j], PARTS):
                p = first + tl.arange(0, PARTS)
                at = j * tl.cast(size, tl.int64) + (i * counts[j] + p)[:, None] * D + column[None, :]
                total += tl.load(parts + at, mask=(p < counts[j])[:, None] & (column < D)[None, :], other=0.0)
            tl.store(outs[j] + i * D + column, tl.sum(total, axis=0).to(outs[j].dtype.element_ty), mask=column < D)


def add_up(outs: list[Tensor], parts: Tensor, columns: int) -> None:
    """`parts` is [len(outs), programs, columns]; an output of G rows takes programs / G of them for each, in order."""
    if not outs:
        return
    groups = tuple(t.numel() // columns for t in outs)
    counts = tuple(parts.shape[1] // g for g in groups)
    tile = min(32, triton.next_power_of_2(max(counts)))
    block = min(TILE // tile, triton.next_power_of_2(columns))
    _kernel[(max(groups), triton.cdiv(columns, block), len(outs))](
        tuple(outs), parts, counts, groups, parts.stride(0), columns, OUTS=len(outs), PARTS=tile, BLOCK=block
    )
