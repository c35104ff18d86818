"""o = softmax(q kᵀ scale + bias) v and its lse: one program a block of queries of a head, the keys in a loop.

What a row has gathered is rescaled to its highest score so far. Exponentials are exp2((s - highest) scale log2 e), the
difference first, so that the highest is exactly 1 however large it is; where there is a bias, or the scale turns the order
round, scores are in units of log2 e before they are compared. `attention_int8` runs it too: of codes the products are exact
integers, which their rows' scales make scores of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention
from ._attention import LOG2E, Tiles, against, extent, line, mine, nothing, plus, put, seen, tile, times, weigh

# By the largest head dimension: what fits into the registers, and into the 99 KiB of shared memory of every GPU since sm_80.
TILES = {
    "HALF": {128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "SINGLE": {
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 16, 8, 2),
    },  # no tensor cores
}


@triton.jit
def _gather(
    held, total, top, rows, row_scale,  # what the rows have gathered
    k, v, k_scale, k_at, v_at, scale_at, start, end,  # from these keys
    bias, mask, factor, sample, head, query, queries, keys, shift,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, CAUSES: tl.constexpr, SCALED: tl.constexpr,
    EDGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, KEYS):
        key = first + tl.arange(0, KEYS)
        s = against(rows, tile(k_at, key, key < keys, k, D, PARTS), PARTS)
        if k_scale is not None:
            column_scale = tl.load(scale_at + key.to(tl.int64) * k_scale[2], mask=key < keys, other=0.0)
            s = s.to(tl.float32) * column_scale[None, :] * row_scale[:, None]
        if SCALED:
            s = s * factor
        s = seen(s, bias, mask, LOG2E, sample, head, query[:, None], key[None, :], queries, keys, shift, EDGE, CAUSES)
        p, kept, total, top = weigh(s, total, top, factor, SCALED)
        held = plus(times(held, kept[:, None], V_PARTS), p, tile(v_at, key, key < keys, v, DV, V_PARTS), V_PARTS)
    return held, total, top


@triton.jit
def _kernel(
    o, lse,  # [B, Sq, H, Dv] and [B, H, Sq], contiguous
    q, k, v,  # (data, four strides)
    q_scale, k_scale,  # of codes: (data, three strides), or None
    bias, mask,  # the same, or None
    index,  # (key_lengths, cu_q, cu_k, kv_index), each may be None
    q_tokens, k_samples, k_tokens, samples, blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sample, first = mine(index[1], q_tokens, samples, blocks, QUERIES)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    q_row, q_first, queries, k_row, k_first, keys, bad = extent(sample, index, q_tokens, k_samples, k_tokens)
    query = first + tl.arange(0, QUERIES)
    inside = query < queries
    rows = tile(line(q, q_row, q_first, head), query, inside, q, D, PARTS)
    k_at, v_at = line(k, k_row, k_first, head // group), line(v, k_row, k_first, head // group)
    row_scale = None
    scale_at = None
    if k_scale is not None:
        row_scale = tl.load(line(q_scale, q_row, q_first, head) + query.to(tl.int64) * q_scale[2], mask=inside, other=0.0)
        scale_at = line(k_scale, k_row, k_first, head // group)
    shift = keys - queries if CAUSAL == _attention.BOTTOM_RIGHT else 0
    full, reach = keys, keys  # keys that every query of the block sees, and that one of them sees
    if CAUSAL > 0:
        full = tl.minimum(keys, tl.maximum(0, first + 1 + shift))
        reach = tl.minimum(keys, tl.maximum(0, tl.minimum(first + QUERIES, queries) + shift))
    full = full // KEYS * KEYS
    factor = scale * LOG2E
    held, total, top = nothing(QUERIES, V_PARTS), tl.zeros([QUERIES], tl.float32), tl.full([QUERIES], float("-inf"), tl.float32)
    for EDGE in tl.static_range(2):
        held, total, top = _gather(
            held, total, top, rows, row_scale, k, v, k_scale, k_at, v_at, scale_at,
            full if EDGE else 0, reach if EDGE else full, bias, mask, factor, sample, head, query, queries, keys, shift,
            D, DV, PARTS, V_PARTS, CAUSAL > 0, SCALED, EDGE > 0, KEYS,
        )  # fmt: skip
    none = total == 0  # queries that see no key
    logarithm = top * (1.0 / LOG2E if SCALED else scale) + tl.log(tl.where(none, 1.0, total))
    logarithm = tl.where(none, float("-inf"), logarithm)
    logarithm = tl.where(bad, float("nan"), logarithm)
    inverse = tl.where(bad, float("nan"), tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total)))
    token = q_first + query.to(tl.int64)
    at = (tl.cast(q_row, tl.int64) * q_tokens + token) * heads + head
    put(o, times(held, inverse[:, None], V_PARTS), at * DV, inside, DV, V_PARTS)
    tl.store(lse + (tl.cast(q_row, tl.int64) * heads + head) * q_tokens + token, logarithm, mask=inside)


def attend(out, q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, q_scale=None, k_scale=None):  # type: ignore[no-untyped-def]
    """A call that is not refused; with scales q and k are codes."""
    (b, queries, heads, d), (k_samples, keys, kv_heads, dv) = q.shape, v.shape
    tiles = _attention.widest(TILES, v.dtype, max(d, dv), bias is not None or mask is not None).cut(queries, keys)
    programs, samples, blocks = _attention.programs(cu_q, b, queries, tiles.queries)
    if programs * heads == 0:
        return
    full = (b, heads, queries, keys)
    scales = (None if t is None else (t, *t.stride()) for t in (q_scale, k_scale))
    with torch.cuda.device_of(q):
        _kernel[(programs, heads)](
            *out, *map(_attention.laid, (q, k, v)), *scales, _attention.laid(bias, *full), _attention.laid(mask, *full),
            _attention.flat(key_lengths, cu_q, cu_k, kv_index), queries, k_samples, keys, samples, blocks, heads // kv_heads,
            scale, D=d, DV=dv, PARTS=_attention.parts(d, 16 if q_scale is None else 32), V_PARTS=_attention.parts(dv),
            CAUSAL=_attention.CAUSAL.index(causal), SCALED=bias is not None or not 1e-30 < scale < 1e30,
            QUERIES=tiles.queries, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def attention_forward(
    out: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    causal: str,
    scale: float,
) -> str | None:
    """The op of that name on the Triton rung."""
    given = (q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    why = _attention.refusal(*given)
    if why is None:
        attend(out, *given)
    return why
