"""Attention of new tokens to a cache that they are appended to: a program a part of the cache, then one that merges.

A program has a block of the queries that share a head of k and v, and a part of the slots; it never reads a slot that a new
token is written to. The new tokens are the last part's: it takes them from the arguments, and its first block writes them.
How many parts there are depends on the shapes alone, so that a CUDA graph may be replayed at another index; a part that holds
nothing yet has nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._decode import MOST
from ..ops._rope import ROPES
from . import _attention
from ._attention import LOG2E, Tiles, against, line, nothing, plus, put, tile, times, weigh
from ._norm import FLOATS

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
LEAST = 128  # slots of a part
NEW = tl.constexpr(16)  # new tokens that a program takes at a time
MERGED = 16  # parts that the merge takes at a time

# By the largest head dimension: what fits into the registers.
TILES = {
    "HALF": {64: Tiles(32, 64, 8, 3), 128: Tiles(32, 32, 8, 3), 256: Tiles(16, 32, 4, 3)},
    "SINGLE": {128: Tiles(16, 32, 8, 2), 256: Tiles(16, 16, 8, 1)},
}


@triton.jit
def _cells(at, row, column, stride, mask, other):
    where = at + row.to(tl.int64)[:, None] + (column.to(tl.int64) * stride)[None, :]
    return tl.load(where, mask=mask, other=other).to(tl.float32)


@triton.jit
def _block(
    at, row, position, inside, stride, cos, sin,
    FIRST: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, WIDE)
    x = _cells(at, row, column, stride, inside[:, None] & (column < D)[None, :], 0.0)
    if FIRST < ROTARY:
        if INTERLEAVED:
            second, pair, other = column % 2 == 1, column // 2, column ^ 1
        else:
            second = column >= ROTARY // 2
            pair = tl.where(second, column - ROTARY // 2, column)
            other = tl.where(second, pair, column + ROTARY // 2)
        turned = inside[:, None] & (column < ROTARY)[None, :]
        y = _cells(at, row, other, stride, turned, 0.0)
        c = _cells(cos[0], position.to(tl.int64) * cos[1], pair, cos[2], turned, 1.0)
        s = _cells(sin[0], position.to(tl.int64) * sin[1], pair, sin[2], turned, 0.0)
        x = x * c + tl.where(second[None, :], y, -y) * s
    return x


@triton.jit
def _rotated(
    at, row, position, inside, stride, cos, sin,
    D: tl.constexpr, PARTS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A tile of q or k in float32, `row` the offset of each token from `at`, the first ROTARY columns turned."""
    found = (_block(at, row, position, inside, stride, cos, sin, 0, PARTS[0], D, ROTARY, INTERLEAVED),)
    if PARTS[1] > 0:
        more = _block(at, row, position, inside, stride, cos, sin, PARTS[0], PARTS[1], D, ROTARY, INTERLEAVED)
        found = (found[0], more)
    return found


@triton.jit
def _cast(t, like, PARTS: tl.constexpr):
    """The tile in the dtype of `like`, a pointer."""
    found = (t[0].to(like.dtype.element_ty),)
    if PARTS[1] > 0:
        found = (found[0], t[1].to(like.dtype.element_ty))
    return found


@triton.jit
def _rest(t, rounded, PARTS: tl.constexpr):
    """What rounding left, rounded."""
    found = ((t[0] - rounded[0].to(tl.float32)).to(rounded[0].dtype),)
    if PARTS[1] > 0:
        found = (found[0], (t[1] - rounded[1].to(tl.float32)).to(rounded[1].dtype))
    return found


@triton.jit
def _gather(
    held, total, top, rows, rest, keys, values, shown, factor,
    PARTS: tl.constexpr, V_PARTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What the rows have gathered, and these keys; with a rest, the rows are halves of the queries."""
    s = against(rows, keys, PARTS)
    if rest is not None:
        s = (s + against(rest, keys, PARTS)) * 2
    if SCALED:
        s = s * factor
    s = tl.where(shown, s, float("-inf"))
    p, kept, total, top = weigh(s, total, top, factor, SCALED)
    return plus(times(held, kept[:, None], V_PARTS), p, values, V_PARTS), total, top


@triton.jit
def _kernel(
    o,  # [B, T, H, Dv], or [parts, B, T, H, Dv] in float32, of each part as it was gathered
    totals, tops,  # [parts, B, T, H], or None where there is but one
    q, k, v, k_cache, v_cache,  # (data, four strides)
    index,
    cos, sin,  # (data, two strides), or None
    end, tokens, length, sinks, slots, count, kv_heads, group, blocks, scale,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    at, part = tl.program_id(0), tl.program_id(1)
    block, kv_head, sample = at % blocks, at // blocks % kv_heads, at // blocks // kv_heads
    row = block * ROWS + tl.arange(0, ROWS)
    query, head = row // group, kv_head * group + row % group
    to = part * tl.cast(count, tl.int64) + (sample.to(tl.int64) * tokens + query) * (kv_heads * group) + head
    inside = query < tokens
    # A bad index leaves no token, old or new: then 0 / 0 is the NaN that is asked for.
    first = tl.load(index + sample)
    bad = (first < 0) | (first > end - tokens)
    first = tl.where(bad, 0, first)
    here = tl.where(bad, 0, tokens)
    start = part * slots
    stop = tl.minimum(tl.minimum(start + slots, length), first)
    last = part == tl.num_programs(1) - 1
    if totals is not None and (start >= stop) & ~last:
        tl.store(totals + to, tl.zeros([ROWS], tl.float32), mask=inside)
        tl.store(tops + to, tl.full([ROWS], float("-inf"), tl.float32), mask=inside)
        return
    x = _rotated(
        line(q, sample, 0, 0), query.to(tl.int64) * q[2] + head.to(tl.int64) * q[3], first + query, query < here, q[4],
        cos, sin, D, PARTS, ROTARY, INTERLEAVED,
    )  # fmt: skip
    factor = scale * LOG2E
    rest = None
    if ROTARY > 0 and k_cache[0].dtype.element_ty != tl.float32:
        # No half holds a rotated query: two do. Halved, so that none overflows where its cosine and sine add up.
        x = times(x, 0.5, PARTS)
        rows = _cast(x, k_cache[0], PARTS)
        rest = _rest(x, rows, PARTS)
    else:
        rows = _cast(x, k_cache[0], PARTS)
    held, total, top = nothing(ROWS, V_PARTS), tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)

    keys_at, values_at = line(k_cache, sample, 0, kv_head), line(v_cache, sample, 0, kv_head)
    ring = length - sinks
    turn = tl.maximum(first - sinks, 0) % ring  # how far the oldest token that rolls lies behind the sinks
    for one in range(start, stop, KEYS):
        slot = one + tl.arange(0, KEYS)
        ahead = slot - sinks - turn
        ahead = tl.where(ahead < 0, ahead + ring, ahead)
        old = (slot < stop) & ((slot < sinks) | (ahead >= tokens))  # not overwritten
        keys, values = tile(keys_at, slot, old, k_cache, D, PARTS), tile(values_at, slot, old, v_cache, DV, V_PARTS)
        held, total, top = _gather(
            held, total, top, rows, rest, keys, values, old[None, :], factor, PARTS, V_PARTS, SCALED
        )  # fmt: skip

    for one in tl.range(0, tl.where(last, here, 0), NEW, num_stages=1):  # few, and what turns them would fill the memory
        token = one + tl.arange(0, NEW)
        new = token < here
        position = first + token
        keys = _rotated(
            line(k, sample, 0, kv_head), token.to(tl.int64) * k[2], position, new, k[4],
            cos, sin, D, PARTS, ROTARY, INTERLEAVED,
        )  # fmt: skip
        keys, values = _cast(keys, k_cache[0], PARTS), tile(line(v, sample, 0, kv_head), token, new, v, DV, V_PARTS)
        slot = tl.where(position < length, position, sinks + (position - sinks) % ring).to(tl.int64)
        written = token < tl.where(block == 0, here, 0)
        put(keys_at, keys, slot * k_cache[2], written, D, PARTS, k_cache[4])
        put(values_at, values, slot * v_cache[2], written, DV, V_PARTS, v_cache[4])
        shown = new[None, :]
        if CAUSAL:
            shown = shown & (token[None, :] <= query[:, None])
        held, total, top = _gather(held, total, top, rows, rest, keys, values, shown, factor, PARTS, V_PARTS, SCALED)

    if totals is None:
        held = times(held, (1.0 / tl.where(total == 0, float("nan"), total))[:, None], V_PARTS)
    else:
        tl.store(totals + to, total, mask=inside)
        tl.store(tops + to, top, mask=inside)
    put(o, held, to * DV, inside, DV, V_PARTS)


@triton.jit
def _merge(
    o,  # [count, Dv]
    held,  # [parts, count, Dv]
    totals, tops,  # [parts, count]
    parts, count, factor,
    DV: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + part.to(tl.int64) * count + row, mask=part < parts, other=float("-inf")), axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    column = tl.arange(0, WIDE)
    total, out = tl.zeros([MERGED], tl.float32), tl.zeros([WIDE], tl.float32)
    for one in range(0, parts, MERGED):
        few = one + tl.arange(0, MERGED)
        at = few.to(tl.int64) * count + row
        own = tl.load(tops + at, mask=few < parts, other=float("-inf"))
        kept = tl.exp2((own - top) * factor)
        total += kept * tl.load(totals + at, mask=few < parts, other=0.0)
        there = (own > float("-inf"))[:, None] & (column < DV)[None, :]  # the others wrote nothing
        out += tl.sum(kept[:, None] * tl.load(held + at[:, None] * DV + column[None, :], mask=there, other=0.0), axis=0)
    total = tl.sum(total, axis=0)
    out = out / tl.where(total == 0, float("nan"), total)
    tl.store(o + row * DV + column, out.to(o.dtype.element_ty), mask=column < DV)


def _refusal(q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, scale) -> str | None:
    tensors = (q, k, v, k_cache, v_cache)
    if any(t.ndim != 4 for t in tensors):
        return "q, k, v or a cache: not four-dimensional"
    if q.dtype not in FLOATS or any(t.dtype != q.dtype for t in tensors):
        return "q, k, v and the caches: not alike, or not float32, float16 or bfloat16"
    (b, tokens, heads, d), kv_heads, dv, length = q.shape, k.shape[2], v.shape[3], k_cache.shape[1]
    if not 1 <= tokens <= MOST or not 1 <= d <= 256 or not 1 <= dv <= 256:
        return "q or v: new tokens or head dimension"
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        return "k: its heads do not divide q's"
    if k.shape != (b, tokens, kv_heads, d) or v.shape != (b, tokens, kv_heads, dv):
        return "k or v: not like q"
    if k_cache.shape != (b, length, kv_heads, d) or v_cache.shape != (b, length, kv_heads, dv):
        return "a cache: not like k or v"
    if any(step == 0 and n > 1 for t in (k_cache, v_cache) for step, n in zip(t.stride(), t.shape, strict=True)):
        return "a cache: elements that share memory"
    if not 0 <= sinks <= length - tokens or length >= 2**30:
        return "sinks or the cache's length"
    if index.dtype != torch.int32 or index.shape != (b,):
        return "index: not an int32 for each sample"
    if (cos is None) != (sin is None):
        return "cos, sin: one without the other"
    if cos is not None and any(t.dtype != torch.float32 or t.ndim != 2 or t.shape != cos.shape for t in (cos, sin)):
        return "cos, sin: not float32, or not alike"
    if cos is not None and cos.shape[1] > d // 2:
        return "cos, sin: more columns than a head has pairs"
    if rope not in ROPES or (scale is not None and scale != scale):
        return "rope or scale: not a known value"
    if b * kv_heads * MOST >= 2**31 or b * tokens * heads >= 2**31:
        return "more programs than a grid has"
    return None


def decode_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    rope: str,
    sinks: int,
    causal: bool,
    scale: float | None,
) -> str | None:
    """The op of that name on the Triton rung."""
    why = _refusal(q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, scale)
    if why is not None:
        return why
    (b, tokens, heads, d), (length, kv_heads, dv) = q.shape, v_cache.shape[1:]
    if b == 0:
        return None
    scale, group, end = d**-0.5 if scale is None else scale, heads // kv_heads, 2**31 - 1 if cos is None else cos.shape[0]
    tiles = _attention.widest(TILES, q.dtype, max(d, dv), False).cut(group * tokens, length)
    blocks, count = triton.cdiv(group * tokens, tiles.queries), b * tokens * heads
    parts = min(triton.cdiv(PROGRAMS, b * kv_heads * blocks), triton.cdiv(length, LEAST))
    slots = triton.cdiv(triton.cdiv(length, parts), tiles.keys) * tiles.keys
    parts = triton.cdiv(length, slots)
    scaled = not 1e-30 < scale < 1e30
    with torch.cuda.device_of(q):
        held, totals, tops = out, None, None
        if parts > 1:
            held = q.new_empty(parts, count, dv, dtype=torch.float32)
            totals, tops = q.new_empty(2, parts, count, dtype=torch.float32)
        _kernel[(b * kv_heads * blocks, parts)](
            held, totals, tops, *map(_attention.laid, (q, k, v, k_cache, v_cache)), *_attention.flat(index),
            *map(_attention.laid, (cos, sin)), end, tokens, length, sinks, slots, count, kv_heads, group, blocks, scale,
            D=d, DV=dv, PARTS=_attention.parts(d), V_PARTS=_attention.parts(dv), ROTARY=0 if cos is None else 2 * cos.shape[1],
            INTERLEAVED=rope == "interleaved", CAUSAL=causal, SCALED=scaled, ROWS=tiles.queries, KEYS=tiles.keys,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if parts > 1:
            _merge[(count,)](
                out, held, totals, tops, parts, count, 1.0 if scaled else scale * LOG2E.value, DV=dv,
                WIDE=triton.next_power_of_2(dv), PARTS=triton.next_power_of_2(parts), MERGED=MERGED, num_warps=1,
            )  # fmt: skip
    return None
