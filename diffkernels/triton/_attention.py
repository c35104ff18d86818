"""What attention's kernels share: what a program is given, tiles of q, k and v, which keys a query sees, what is refused.

A head dimension is cut in two parts, each a power of two, so that 72 columns cost 80 and not 128: a tile is a tuple of
one or two blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._norm import FLOATS

LOG2E = tl.constexpr(1.4426950408889634)
CAUSAL = ("none", "bottom-right", "top-left")
BOTTOM_RIGHT = tl.constexpr(1)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def mine(cu, tokens, samples, blocks, BLOCK: tl.constexpr):
    """The sample, or packed sequence, that this program works on, and the first of its tokens.

    A sample has `blocks` programs. Sequence i has those from cu[i] // BLOCK + i on, enough wherever it begins; a number in
    cu that is out of bounds leads to some sequence.
    """
    at = tl.program_id(0)
    if cu is None:
        sample, block = at // blocks, at % blocks
    else:
        sample = tl.cast(0, tl.int32)
        end = tl.cast(samples, tl.int32)
        while end - sample > 1:
            middle = (sample + end) // 2
            later = _start(cu, middle, tokens, BLOCK) > at
            end = tl.where(later, middle, end)
            sample = tl.where(later, sample, middle)
        block = tl.maximum(at - _start(cu, sample, tokens, BLOCK), 0)
    return sample, block * BLOCK


@triton.jit
def _start(cu, i, tokens, BLOCK: tl.constexpr):
    return tl.minimum(tl.maximum(tl.load(cu + i), 0), tokens) // BLOCK + i


@triton.jit
def extent(sample, index, q_tokens, k_samples, k_tokens):
    """Of a sample, or a packed sequence: its row of q, first query and number of queries; the same of k; whether it is bad.

    `index` is (key_lengths, cu_q, cu_k, kv_index). An index out of bounds leaves nothing to read.
    """
    q_row = sample
    k_row = sample
    q_first = tl.cast(0, tl.int32)
    k_first = tl.cast(0, tl.int32)
    queries = tl.cast(q_tokens, tl.int32)
    keys = tl.cast(k_tokens, tl.int32)
    bad = sample < 0
    if index[1] is not None:
        q_row = tl.cast(0, tl.int32)
        k_row = tl.cast(0, tl.int32)
        q_first, q_end = tl.load(index[1] + sample), tl.load(index[1] + sample + 1)
        k_first, k_end = tl.load(index[2] + sample), tl.load(index[2] + sample + 1)
        bad = (q_first < 0) | (q_end < q_first) | (q_end > q_tokens) | (k_first < 0) | (k_end < k_first) | (k_end > k_tokens)
        queries = tl.where(bad, 0, q_end - q_first)
        keys = tl.where(bad, 0, k_end - k_first)
    if index[3] is not None:
        k_row = tl.load(index[3] + sample)
        bad = (k_row < 0) | (k_row >= k_samples)
        keys = tl.where(bad, 0, keys)
    if index[0] is not None:
        length = tl.load(index[0] + sample)
        bad = bad | (length < 0) | (length > k_tokens)
        keys = tl.where(bad, 0, length)
    return q_row, q_first, queries, k_row, k_first, keys, bad


@triton.jit
def line(t, row, first, head):
    """The pointer to a sequence's first token, of a head; `t` is (data, four strides)."""
    return t[0] + tl.cast(row, tl.int64) * t[1] + tl.cast(first, tl.int64) * t[2] + tl.cast(head, tl.int64) * t[3]


@triton.jit
def _block(at, token, inside, token_stride, stride, FIRST: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr):
    column = FIRST + tl.arange(0, WIDE)
    where = at + (token.to(tl.int64) * token_stride)[:, None] + (column.to(tl.int64) * stride)[None, :]
    return tl.load(where, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def tile(at, token, inside, t, D: tl.constexpr, PARTS: tl.constexpr):
    """Tokens of a tensor with t's strides, zero where they are not inside."""
    found = (_block(at, token, inside, t[2], t[4], 0, PARTS[0], D),)
    if PARTS[1] > 0:
        found = (found[0], _block(at, token, inside, t[2], t[4], PARTS[0], PARTS[1], D))
    return found


@triton.jit
def nothing(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """A tile to add to."""
    found = (tl.zeros([ROWS, PARTS[0]], tl.float32),)
    if PARTS[1] > 0:
        found = (found[0], tl.zeros([ROWS, PARTS[1]], tl.float32))
    return found


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:  # where a product of bfloat16 is one of their bits, as integers; codes' are exact in float32 too
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def against(a, b, PARTS: tl.constexpr):
    """a bᵀ"""
    s = _dot(a[0], tl.trans(b[0]), None)
    if PARTS[1] > 0:
        s = _dot(a[1], tl.trans(b[1]), s)
    return s


@triton.jit
def plus(total, p, b, PARTS: tl.constexpr):
    """total + p b, p rounded to b's dtype."""
    p = p.to(b[0].dtype)
    found = (_dot(p, b[0], total[0]),)
    if PARTS[1] > 0:
        found = (found[0], _dot(p, b[1], total[1]))
    return found


@triton.jit
def times(t, factor, PARTS: tl.constexpr):
    found = (t[0] * factor,)
    if PARTS[1] > 0:
        found = (found[0], t[1] * factor)
    return found


@triton.jit
def weigh(s, total, top, factor, SCALED: tl.constexpr):
    """exp2((s - the highest so far) factor), what of all that was gathered is kept, and the new total and highest.

    SCALED says that s has its factor already.
    """
    higher = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    less, kept = s - base[:, None], top - base
    if not SCALED:
        less, kept = less * factor, kept * factor
    p, kept = tl.exp2(less), tl.exp2(kept)
    return p, kept, total * kept + tl.sum(p, axis=1), higher


@triton.jit
def put(to, t, row, inside, D: tl.constexpr, PARTS: tl.constexpr, stride=1):
    """Stores a tile; `row` is the offset of each row from `to`, `stride` that of a column from the last."""
    column = tl.arange(0, PARTS[0])
    where = to + row[:, None] + (column.to(tl.int64) * stride)[None, :]
    tl.store(where, t[0].to(to.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    if PARTS[1] > 0:
        column = PARTS[0] + tl.arange(0, PARTS[1])
        where = to + row[:, None] + (column.to(tl.int64) * stride)[None, :]
        tl.store(where, t[1].to(to.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def seen(s, bias, mask, unit, sample, head, query, key, queries, keys, shift, EDGE: tl.constexpr, CAUSES: tl.constexpr):
    """The scores with their bias, in units of `unit`, and exactly -inf where a query does not see a key.

    `query` and `key` are indices that broadcast to the shape of s; `shift` is how many keys more than its own number a query
    sees, under CAUSES. EDGE says that not every key may be seen.
    """
    inside = (query < queries) & (key < keys)
    if bias is not None:
        at = bias[0] + tl.cast(sample, tl.int64) * bias[1] + tl.cast(head, tl.int64) * bias[2]
        more = tl.load(at + query.to(tl.int64) * bias[3] + key.to(tl.int64) * bias[4], mask=inside, other=0.0).to(tl.float32)
        s = tl.where(more == float("-inf"), float("-inf"), s + more * unit)
    if mask is not None:
        at = mask[0] + tl.cast(sample, tl.int64) * mask[1] + tl.cast(head, tl.int64) * mask[2]
        shown = tl.load(at + query.to(tl.int64) * mask[3] + key.to(tl.int64) * mask[4], mask=inside, other=0)
        s = tl.where(shown != 0, s, float("-inf"))
    if EDGE:
        if CAUSES:
            inside = inside & (key <= query + shift)
        s = tl.where(inside, s, float("-inf"))
    return s


class Tiles(NamedTuple):
    """Queries and keys of a block, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int

    def cut(self, queries: int, keys: int) -> Tiles:
        """No larger than the call; a smaller block has fewer warps, so that a thread holds as much as before."""
        q = min(self.queries, max(16, triton.next_power_of_2(queries)))
        k = min(self.keys, max(16, triton.next_power_of_2(keys)))
        return Tiles(q, k, max(1, self.warps * q * k // (self.queries * self.keys)), self.stages)


def widest(tables: dict[str, dict[int, Tiles]], dtype: torch.dtype, columns: int, shown: bool) -> Tiles:
    """The tiles for a head of so many columns; half as many keys beside a bias or a mask."""
    table = tables["SINGLE" if dtype == torch.float32 else "HALF"]
    tiles = next(tiles for most, tiles in table.items() if columns <= most)
    return tiles._replace(keys=max(16, tiles.keys // 2)) if shown else tiles


def parts(columns: int, least: int = 16) -> tuple[int, int]:
    """The widths of a head's two parts; 0: there is but one. tl.dot wants 16 of them, or 32 bytes."""
    whole = max(least, triton.next_power_of_2(columns))
    half = whole // 2
    rest = max(least, triton.next_power_of_2(max(1, columns - half)))
    return (half, rest) if whole > least and half + rest < whole else (whole, 0)


def refusal(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, coded=False) -> str | None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return "q, k, v: not four-dimensional"
    if v.dtype not in FLOATS or k.dtype != q.dtype or q.dtype != (torch.int8 if coded else v.dtype):
        return "q, k, v: not alike (or q and k not int8), or not float32, float16 or bfloat16"
    if not 1 <= q.shape[3] <= 256 or not 1 <= v.shape[3] <= 256 or k.shape[3] != q.shape[3]:
        return "q, k, v: head dimension"
    if v.shape[:3] != k.shape[:3] or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        return "v: not like k, or k's heads do not divide q's"
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for t in (bias, mask):
        if t is not None and (t.ndim > 4 or any(n not in (1, m) for n, m in zip(t.shape[::-1], full[::-1], strict=False))):
            return "bias or mask: its shape"
    if (bias is not None and not bias.is_floating_point()) or (mask is not None and mask.dtype != torch.bool):
        return "bias or mask: its dtype"
    packed = cu_q is not None
    if packed != (cu_k is not None) or (packed and (cu_q.shape != cu_k.shape or q.shape[0] != 1 or k.shape[0] != 1)):
        return "cu_q, cu_k: not alike"
    if packed and any(t is not None for t in (bias, mask, key_lengths, kv_index)):
        return "cu_q, cu_k: beside what is not packed"
    if not packed and kv_index is None and k.shape[0] != q.shape[0]:
        return "k: its batch"
    for t, n in ((key_lengths, q.shape[0]), (kv_index, q.shape[0]), (cu_q, None), (cu_k, None)):
        if t is not None and (t.dtype != torch.int32 or t.ndim != 1 or (t.shape[0] < 1 if n is None else t.shape[0] != n)):
            return "key_lengths, kv_index, cu_q or cu_k: dtype or shape"
    if causal not in CAUSAL or scale != scale:
        return "causal or scale: not a known value"
    if max(q.shape[1], k.shape[1]) >= 2**30 or q.shape[2] > 65535 or max(q.shape[0], k.shape[0]) * max(full[2:]) >= 2**34:
        return "more programs than a grid has"
    return None


def laid(t: Tensor | None, *full: int) -> tuple[Tensor, int, int, int, int] | None:
    """(data, four strides), of a bias or a mask expanded to `full`; a bool is a byte."""
    if t is None:
        return None
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    return t, *(t.expand(full) if full else t).stride()


def flat(*indices: Tensor | None) -> tuple[Tensor | None, ...]:
    """Index tensors, whose numbers lie side by side."""
    return tuple(None if t is None else t.contiguous() for t in indices)


def programs(cu: Tensor | None, samples: int, tokens: int, block: int) -> tuple[int, int, int]:
    """Of `mine`: how many programs there are, the samples or sequences, and the blocks of a sample."""
    blocks = triton.cdiv(tokens, block)
    if cu is None:
        return samples * blocks, samples, blocks
    sequences = len(cu) - 1
    return (tokens // block + sequences if sequences else 0), sequences, blocks
