"""Attention of a few new tokens to a cache that they are appended to (TARFlow, STARFlow, streaming video)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._case import Case
from .._op import op
from . import _decode, _rope


def _allocate(q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, causal, scale):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _flops(b, tokens, heads, length, d):  # type: ignore[no-untyped-def]
    return 4 * b * heads * tokens * length * d


@op(
    allocate=_allocate,
    check=_decode.check,
    fuzz=_decode.fuzz,
    c=2.0,
    writes=("k_cache", "v_cache"),
    cases=[
        *_decode.CASES,
        Case("starflow", _decode.full, (1, 1, 32, 1024, 64), "STARFlow, one token to 1023", _decode.eager, _flops),
        Case("starflow-jacobi", _decode.full, (1, 16, 32, 1024, 64), "STARFlow, a block of 16", _decode.eager, _flops),
    ],
)
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope: str = "interleaved",
    sinks: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Rotates the new tokens' q and k, writes k and v to the cache, and attends to what the cache then holds.

    The token at position p lies in slot p, or, from p = L on, in slot sinks + (p - sinks) mod (L - sinks): the first `sinks`
    tokens stay, the others roll. A cache long enough for all never rolls. Writing the same positions again overwrites them,
    so that Jacobi iterations and speculation just repeat an index. Nothing is differentiable, and nothing is read of slots
    that no token has reached.

    Args:
        q: [B, T, H, D], k: [B, T, Hk, D], v: [B, T, Hk, Dv], of T = 1 to 64 new tokens; float32, float16 or bfloat16 (or
            float64, on the reference), alike; any strides. D and Dv are 1 to 256. Hk divides H.
        k_cache, v_cache: [B, L, Hk, D] and [B, L, Hk, Dv], of q's dtype, any strides ([B, Hk, L, D] transposed is the fastest
            on a CPU); written in place. Keys lie rotated.
        index: [B] int32, on q's device, so that a replayed CUDA graph follows it: the position of the first new token, that
            is, how many tokens came before. The caller adds T to it.
        cos, sin: [P, R / 2] float32, R <= D: the table that position p's row rotates the first R columns of q and k by.
        rope: "interleaved" rotates columns (2i, 2i + 1), "half" columns (i, i + R / 2).
        sinks: how many tokens never roll out; sinks + T <= L.
        causal: a new token sees new tokens up to itself; False: all of them, as the frames of a video's chunk do.
        scale: None is 1 / sqrt(D).

    Returns:
        o: [B, T, H, Dv] of q's dtype, contiguous.

    Raises:
        TypeError, ValueError: dtype, shape or value outside of the above. IndexError: an index below 0 or beyond the table, on
            a CPU; on a GPU such a sample's o is NaN, and its cache as it was. RuntimeError: a gradient is wanted.

    Source: Zhai et al. 2024 (TARFlow); Gu et al. 2025 (STARFlow); Xiao et al. 2023 (attention sinks); Su et al. 2021 (RoPE).
    """
    b, tokens, _, d = q.shape
    length, wide = k_cache.shape[1], torch.promote_types(q.dtype, torch.float32)
    ring, bad = length - sinks, _decode.bad(index, tokens, cos)
    last = index.long().masked_fill(bad, 0)[:, None] + (tokens - 1)
    place = last - (tokens - 1) + torch.arange(tokens, device=q.device)  # [B, T]
    q, new = q.to(wide), k.to(wide)
    if cos is not None and sin is not None:
        q, new = (_rope.rotated(t, cos[place], sin[place], rope) for t in (q, new))
    sample, slots = (
        torch.arange(b, device=q.device)[:, None],
        torch.where(place < length, place, sinks + (place - sinks) % ring),
    )
    for cache, t in ((k_cache, new), (v_cache, v)):
        cache[sample, slots] = torch.where(bad.view(-1, 1, 1, 1), cache[sample, slots], t.to(cache.dtype))
    slot = torch.arange(length, device=q.device)
    at = torch.where(slot < sinks, slot, last - (last - slot) % ring)  # [B, L]: the position of what a slot holds
    there = (at <= last) & (slot < sinks) | (at >= sinks) & (slot >= sinks)
    seen = there[:, None] & (at[:, None] <= place[:, :, None]) if causal else there[:, None].expand(-1, tokens, -1)
    keys, values = (
        t.to(wide).masked_fill(~there[:, :, None, None], 0).transpose(1, 2).unsqueeze(2) for t in (k_cache, v_cache)
    )
    q = q.transpose(1, 2).unflatten(1, (keys.shape[1], -1))  # [B, Hk, H / Hk, T, D]
    scores = (q @ keys.mT * (d**-0.5 if scale is None else scale)).masked_fill(~seen[:, None, None], -torch.inf)
    o = (scores.softmax(-1) @ values).masked_fill(bad.view(-1, 1, 1, 1, 1), torch.nan)
    return o.flatten(1, 2).transpose(1, 2).to(k_cache.dtype)
