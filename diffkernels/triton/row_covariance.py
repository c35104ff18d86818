"""mean((t_i - mean t_i) (t_j - mean t_j)) over a sample: a program a chunk of it, then one for each two of the tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._solver import MAX_OUTPUTS
from .solver_step import FLOATS, flattened

CHUNK = 4096  # elements that a program holds
MERGED = 64  # chunks that a program takes at a time


@triton.jit
def _kernel(
    parts,  # [B, chunks, COUNT + COUNT * COUNT] float64: means, and the sums of products about them
    tensors,  # tuple of [B, E] tensors, contiguous within a sample
    tensor_samples,
    chunks, E,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < E
    n = tl.minimum(E - first, BLOCK).to(tl.float64)
    part = parts + tl.program_id(0).to(tl.int64) * (COUNT + COUNT * COUNT)
    centred = ()
    lacking = ()
    for i in tl.static_range(COUNT):
        x = tl.load(tensors[i] + b * tensor_samples[i] + e, mask=inside, other=0.0).to(tl.float32)
        head = tl.load(tensors[i] + b * tensor_samples[i] + first).to(tl.float32)
        # differences from the first element: a constant sample is exactly its mean
        mean = head + tl.sum(tl.where(inside, x - head, 0.0), axis=0) / n.to(tl.float32)
        d = tl.where(inside, x - mean, 0.0)
        off = tl.sum(d, axis=0).to(tl.float64) / n  # what rounding left
        centred += (d,)
        lacking += (off,)
        tl.store(part + i, mean.to(tl.float64) + off)
        for j in tl.static_range(i + 1):
            product = tl.sum(d * centred[j], axis=0).to(tl.float64) - n * off * lacking[j]
            tl.store(part + COUNT + i * COUNT + j, product)


@triton.jit
def _mean(part, chunks, E, WORDS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of a sample, by differences from its first chunk's mean: equal ones give it back exactly."""
    head = tl.load(part)
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, chunks, TILE):
        c = first + tl.arange(0, TILE).to(tl.int64)
        n = tl.minimum(E - c * BLOCK, BLOCK).to(tl.float64)
        total += tl.where(c < chunks, n * (tl.load(part + c * WORDS, mask=c < chunks, other=0.0) - head), 0.0)
    return head + tl.sum(total, axis=0) / tl.cast(E, tl.float64)


@triton.jit
def _merge(
    out, parts, chunks, E,  # out: [B, COUNT, COUNT]
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    words: tl.constexpr = COUNT + COUNT * COUNT
    b = (tl.program_id(0) // (COUNT * COUNT)).to(tl.int64)
    i = tl.program_id(0) % (COUNT * COUNT) // COUNT
    j = tl.program_id(0) % COUNT
    if j <= i:
        part = parts + b * chunks * words
        a = _mean(part + i, chunks, E, words, BLOCK, TILE)
        z = _mean(part + j, chunks, E, words, BLOCK, TILE)
        total = tl.zeros([TILE], tl.float64)
        for first in range(0, chunks, TILE):
            c = first + tl.arange(0, TILE).to(tl.int64)
            n = tl.minimum(E - c * BLOCK, BLOCK).to(tl.float64)
            own = part + c * words
            product = tl.load(own + COUNT + i * COUNT + j, mask=c < chunks, other=0.0)
            apart = (tl.load(own + i, mask=c < chunks, other=0.0) - a) * (tl.load(own + j, mask=c < chunks, other=0.0) - z)
            total += tl.where(c < chunks, product + n * apart, 0.0)
        value = (tl.sum(total, axis=0) / tl.cast(E, tl.float64)).to(tl.float32)
        tl.store(out + (b * COUNT + i) * COUNT + j, value)
        tl.store(out + (b * COUNT + j) * COUNT + i, value)


def row_covariance(out: Tensor, tensors: list[Tensor]) -> str | None:
    """The op of that name on the Triton rung."""
    count = len(tensors)
    if not 1 <= count <= MAX_OUTPUTS or tensors[0].ndim < 1:
        return "tensors: not 1 to 4 of [B, ...]"
    first = tensors[0]
    if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors) or first.dtype not in FLOATS:
        return "tensors: not float32, float16 or bfloat16, alike"
    elements = first.shape[1:].numel()
    if not 0 < elements < 2**31:
        return "tensors: too many elements, or none"
    if first.shape[0] == 0:
        return None
    flat = [flattened(t) for t in tensors]
    block = min(CHUNK, max(128, triton.next_power_of_2(elements)))
    chunks = triton.cdiv(elements, block)
    parts = out.new_empty(first.shape[0] * chunks * (count + count * count), dtype=torch.float64)
    with torch.cuda.device_of(first):
        _kernel[(first.shape[0] * chunks,)](
            parts, tuple(flat), tuple(t.stride(0) for t in flat), chunks, elements,
            COUNT=count, BLOCK=block, num_warps=8 if block == CHUNK else 4,
        )  # fmt: skip
        tile = min(MERGED, triton.next_power_of_2(chunks))
        _merge[(out.numel(),)](out, parts, chunks, elements, COUNT=count, BLOCK=block, TILE=tile, num_warps=1)
    return None
