"""The gradients of attention: P and dS computed anew, tile by tile, and nothing added up by two programs.

    delta = rowsum(dO O) - d lse,    P = exp(S - lse),    dS = P (dO Vᵀ - delta)

One kernel writes delta. Another takes a block of keys and walks the queries that see them: dV = Pᵀ dO, dK = scale dSᵀ Q. The
third takes a block of queries and walks their keys: dQ = scale dS K. A fourth takes a block of a bias and walks what it was
broadcast along: the sum of dS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention
from ._attention import LOG2E, Tiles, against, extent, line, mine, nothing, plus, put, seen, tile, times

# As in attention_forward.
TILES = {
    "HALF": {64: Tiles(64, 64, 8, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 2)},
    "SINGLE": {64: Tiles(32, 32, 8, 2), 128: Tiles(32, 16, 8, 2), 256: Tiles(16, 16, 8, 2)},
}
ROWS = 16


@triton.jit
def _delta(
    delta,  # [B, H, Sq] contiguous
    grad, o, grad_lse,  # (data, strides); the last may be None
    tokens, heads, count,
    DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    head, token, sample = row % heads, row // heads % tokens, row // heads // tokens
    column = tl.arange(0, WIDE).to(tl.int64)[None, :]
    mask = inside[:, None] & (column < DV)
    of_grad = (sample * grad[1] + token * grad[2] + head * grad[3])[:, None] + column * grad[4]
    of_o = (sample * o[1] + token * o[2] + head * o[3])[:, None] + column * o[4]
    product = tl.load(grad[0] + of_grad, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(o[0] + of_o, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(product, axis=1)
    if grad_lse is not None:
        at = sample * grad_lse[1] + head * grad_lse[2] + token * grad_lse[3]
        total -= tl.load(grad_lse[0] + at, mask=inside, other=0.0)
    tl.store(delta + (sample * heads + head) * tokens + token, total, mask=inside)


@triton.jit
def _numbers(t, row, first, head, query, inside):
    """One for each query: t is (data, three strides) of [B, H, Sq]."""
    at = t[0] + tl.cast(row, tl.int64) * t[1] + tl.cast(head, tl.int64) * t[2]
    return tl.load(at + (first + query.to(tl.int64)) * t[3], mask=inside, other=0.0)


@triton.jit
def _probabilities(s, lse, scale, bias, mask, sample, head, query, key, queries, keys, shift, CAUSES: tl.constexpr):
    s = seen(s * scale, bias, mask, 1.0, sample, head, query, key, queries, keys, shift, True, CAUSES)
    return tl.exp2((s - tl.where(lse == float("-inf"), 0.0, lse)) * LOG2E)


@triton.jit
def _keys(
    dk, dv,  # contiguous, or None
    q, k, v, grad,  # (data, four strides)
    lse, delta,  # (data, three strides)
    bias, mask, index,  # as in attention_forward
    q_tokens, k_samples, k_tokens, q_samples, samples, blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, first = mine(index[2], k_tokens, samples, blocks, KEYS)  # a row of k, or a packed sequence
    kv_head = tl.program_id(1)
    key = first + tl.arange(0, KEYS)
    k_row, k_first, own = row, 0, k_tokens
    if index[2] is not None:
        k_row, k_first, own = extent(row, index, q_tokens, k_samples, k_tokens)[3:6]
    k_tile = tile(line(k, k_row, k_first, kv_head), key, key < own, k, D, PARTS)
    v_tile = tile(line(v, k_row, k_first, kv_head), key, key < own, v, DV, V_PARTS)
    of_k, of_v = nothing(KEYS, PARTS), nothing(KEYS, V_PARTS)
    spoiled = row < 0
    start, stop = row, row + 1
    if index[3] is not None:  # any sample may read this row
        start, stop = 0, q_samples
    for sample in range(start, stop):
        here = extent(sample, index, q_tokens, k_samples, k_tokens)
        q_row, q_first, queries, keys = here[0], here[1], here[2], here[5]
        reads = here[3] == k_row
        spoiled = spoiled | (reads & here[6])
        shift = keys - queries if CAUSAL == _attention.BOTTOM_RIGHT else 0
        begin = tl.maximum(0, first - shift) // QUERIES * QUERIES if CAUSAL > 0 else 0
        end = tl.where(reads & (first < keys), queries, 0)
        for member in range(group):
            head = kv_head * group + member
            q_at, grad_at = line(q, q_row, q_first, head), line(grad, q_row, q_first, head)
            for i in range(begin, end, QUERIES):
                query = i + tl.arange(0, QUERIES)
                inside = query < queries
                q_tile = tile(q_at, query, inside, q, D, PARTS)
                grad_tile = tile(grad_at, query, inside, grad, DV, V_PARTS)
                p = _probabilities(
                    against(k_tile, q_tile, PARTS), _numbers(lse, q_row, q_first, head, query, inside)[None, :], scale,
                    bias, mask, sample, head, query[None, :], key[:, None], queries, keys, shift, CAUSAL > 0,
                )  # fmt: skip
                if dv is not None:
                    of_v = plus(of_v, p, grad_tile, V_PARTS)
                if dk is not None:
                    ds = against(v_tile, grad_tile, V_PARTS)
                    ds = p * (ds - _numbers(delta, q_row, q_first, head, query, inside)[None, :])
                    of_k = plus(of_k, ds, q_tile, PARTS)
    at = (tl.cast(k_row, tl.int64) * k_tokens + k_first + key) * tl.num_programs(1) + kv_head
    if dk is not None:
        put(dk, times(of_k, tl.where(spoiled, float("nan"), scale), PARTS), at * D, key < own, D, PARTS)
    if dv is not None:
        put(dv, times(of_v, tl.where(spoiled, float("nan"), 1.0), V_PARTS), at * DV, key < own, DV, V_PARTS)


@triton.jit
def _queries(
    dq,  # contiguous
    q, k, v, grad, lse, delta, bias, mask, index,
    q_tokens, k_samples, k_tokens, samples, blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sample, first = mine(index[1], q_tokens, samples, blocks, QUERIES)
    head = tl.program_id(1)
    q_row, q_first, queries, k_row, k_first, keys, bad = extent(sample, index, q_tokens, k_samples, k_tokens)
    query = first + tl.arange(0, QUERIES)
    inside = query < queries
    q_tile = tile(line(q, q_row, q_first, head), query, inside, q, D, PARTS)
    grad_tile = tile(line(grad, q_row, q_first, head), query, inside, grad, DV, V_PARTS)
    sums = _numbers(lse, q_row, q_first, head, query, inside)[:, None]
    less = _numbers(delta, q_row, q_first, head, query, inside)[:, None]
    k_at, v_at = line(k, k_row, k_first, head // group), line(v, k_row, k_first, head // group)
    shift = keys - queries if CAUSAL == _attention.BOTTOM_RIGHT else 0
    reach = keys
    if CAUSAL > 0:
        reach = tl.minimum(keys, tl.maximum(0, tl.minimum(first + QUERIES, queries) + shift))
    of_q = nothing(QUERIES, PARTS)
    for i in range(0, reach, KEYS):
        key = i + tl.arange(0, KEYS)
        k_tile = tile(k_at, key, key < keys, k, D, PARTS)
        p = _probabilities(
            against(q_tile, k_tile, PARTS), sums, scale,
            bias, mask, sample, head, query[:, None], key[None, :], queries, keys, shift, CAUSAL > 0,
        )  # fmt: skip
        ds = p * (against(grad_tile, tile(v_at, key, key < keys, v, DV, V_PARTS), V_PARTS) - less)
        of_q = plus(of_q, ds, k_tile, PARTS)
    at = (tl.cast(q_row, tl.int64) * q_tokens + q_first + query) * tl.num_programs(1) + head
    put(dq, times(of_q, tl.where(bad, float("nan"), scale), PARTS), at * D, inside, D, PARTS)


@triton.jit
def _bias(
    d_bias,  # (data, four strides), 0 along what bias is broadcast along
    q, k, v, grad, lse, delta, bias, mask, index,
    q_tokens, k_samples, k_tokens, q_samples, heads, own_heads, q_blocks, k_blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, V_PARTS: tl.constexpr, CAUSAL: tl.constexpr,
    ALONG: tl.constexpr,  # whether it is broadcast along samples, heads, queries, keys
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    block, own = at % (q_blocks * k_blocks), at // (q_blocks * k_blocks)
    own_sample, own_head = own // own_heads, own % own_heads
    own_query, own_key = block // k_blocks * QUERIES, block % k_blocks * KEYS
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for sample in range(0 if ALONG[0] else own_sample, q_samples if ALONG[0] else own_sample + 1):
        _, _, queries, k_row, _, keys, _ = extent(sample, index, q_tokens, k_samples, k_tokens)
        shift = keys - queries if CAUSAL == _attention.BOTTOM_RIGHT else 0
        for head in range(0 if ALONG[1] else own_head, heads if ALONG[1] else own_head + 1):
            k_at, v_at = line(k, k_row, 0, head // group), line(v, k_row, 0, head // group)
            for i in range(0 if ALONG[2] else own_query, q_tokens if ALONG[2] else own_query + 1, QUERIES):
                query = i + tl.arange(0, QUERIES)
                inside = query < queries
                q_tile = tile(line(q, sample, 0, head), query, inside, q, D, PARTS)
                grad_tile = tile(line(grad, sample, 0, head), query, inside, grad, DV, V_PARTS)
                sums = _numbers(lse, sample, 0, head, query, inside)[:, None]
                less = _numbers(delta, sample, 0, head, query, inside)[:, None]
                for j in range(0 if ALONG[3] else own_key, k_tokens if ALONG[3] else own_key + 1, KEYS):
                    key = j + tl.arange(0, KEYS)
                    p = _probabilities(
                        against(q_tile, tile(k_at, key, key < keys, k, D, PARTS), PARTS), sums, scale,
                        bias, mask, sample, head, query[:, None], key[None, :], queries, keys, shift, CAUSAL > 0,
                    )  # fmt: skip
                    v_tile = tile(v_at, key, key < keys, v, DV, V_PARTS)
                    total += p * (against(grad_tile, v_tile, V_PARTS) - less)
    query = own_query + tl.arange(0, 1 if ALONG[2] else QUERIES)
    key = own_key + tl.arange(0, 1 if ALONG[3] else KEYS)
    if ALONG[2]:
        total = tl.sum(total, axis=0, keep_dims=True)
    if ALONG[3]:
        total = tl.sum(total, axis=1, keep_dims=True)
    to = line(d_bias, own_sample, own_head, 0) + query.to(tl.int64)[:, None] * d_bias[3] + key.to(tl.int64)[None, :] * d_bias[4]
    tl.store(to, total.to(d_bias[0].dtype.element_ty), mask=(query < q_tokens)[:, None] & (key < k_tokens)[None, :])


def attention_backward(
    out: list[Tensor],
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    causal: str,
    scale: float,
    wanted: int,
) -> str | None:
    """The op of that name on the Triton rung."""
    why = _attention.refusal(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    if why is not None:
        return why
    (b, queries, heads, d), (k_samples, keys, kv_heads, dv) = q.shape, v.shape
    for t, like, shape in ((grad, q, (b, queries, heads, dv)), (o, q, (b, queries, heads, dv))):
        if t.dtype != like.dtype or t.shape != shape:
            return "grad or o: not like the forward op's o"
    for t in (lse, grad_lse):
        if t is not None and (t.dtype != torch.float32 or t.shape != (b, heads, queries)):
            return "lse or grad_lse: not like the forward op's lse"
    if not 0 <= wanted < 16 or len(out) != wanted.bit_count() or (wanted & 8 and bias is None):
        return "wanted: not the outputs, or the gradient of a bias that is None"
    found = iter(out)
    dq, dk, dv_, d_bias = (next(found) if wanted >> i & 1 else None for i in range(4))
    tiles = _attention.widest(TILES, q.dtype, max(d, dv), bias is not None or mask is not None).cut(queries, keys)
    how = {"D": d, "DV": dv, "PARTS": _attention.parts(d), "V_PARTS": _attention.parts(dv)}
    how |= {"CAUSAL": _attention.CAUSAL.index(causal), "QUERIES": tiles.queries, "KEYS": tiles.keys}
    how |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    full, group = (b, heads, queries, keys), heads // kv_heads
    with torch.cuda.device_of(q):
        delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
        _run(
            _delta, (triton.cdiv(delta.numel(), ROWS),), delta, *map(_attention.laid, (grad, o, grad_lse)), queries, heads,
            delta.numel(), DV=dv, ROWS=ROWS, WIDE=triton.next_power_of_2(dv),
        )  # fmt: skip
        shown = (_attention.laid(t, *full) for t in (bias, mask))
        index = _attention.flat(key_lengths, cu_q, cu_k, kv_index)
        given = (*map(_attention.laid, (q, k, v, grad, lse, delta)), *shown, index, queries, k_samples, keys)
        if dq is not None:
            programs, samples, blocks = _attention.programs(cu_q, b, queries, tiles.queries)
            _run(_queries, (programs, heads), dq, *given, samples, blocks, group, scale, **how)
        if dk is not None or dv_ is not None:
            programs, samples, blocks = _attention.programs(cu_k, k_samples, keys, tiles.keys)
            _run(_keys, (programs, kv_heads), dk, dv_, *given, b, samples, blocks, group, scale, **how)
        if d_bias is not None:
            shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
            blocks = triton.cdiv(shape[2], tiles.queries), triton.cdiv(shape[3], tiles.keys)
            _run(
                _bias, (shape[0] * shape[1] * blocks[0] * blocks[1],), _attention.laid(d_bias, *full), *given, b, heads,
                shape[1], *blocks, group, scale, ALONG=tuple(n == 1 for n in shape), **how,
            )  # fmt: skip
    return None


def _run(kernel, grid, *args, **more):
    """Launches a kernel, unless there is nothing to do."""
    if all(grid):
        kernel[grid](*args, **more)
