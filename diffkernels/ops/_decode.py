"""What decode_attention's declaration says of its arguments: their check, cases, and random calls."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from ._attention import MAX_HEAD
from ._norm import FLOATS
from ._rope import ROPES

MOST = 64  # new tokens


def check(q, k, v, k_cache, v_cache, index, cos, sin, rope, sinks, causal, scale):  # type: ignore[no-untyped-def]
    for name, t in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(
                f"{name}: expected {'[B, L, H, D]' if 'cache' in name else '[B, T, H, D]'}, got shape {list(t.shape)}"
            )
    b, tokens, heads, d = q.shape
    if not 1 <= tokens <= MOST:
        raise ValueError(f"q: expected 1 to {MOST} new tokens (more: ops.attention), got {tokens}")
    for name, n in (("q", d), ("v", v.shape[3])):
        if not 1 <= n <= MAX_HEAD:
            raise ValueError(f"{name}: expected a head dimension of 1 to {MAX_HEAD}, got {n}")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[2]}")
    for name, t, like in (("k", k, (b, tokens, k.shape[2], d)), ("v", v, (*k.shape[:3], v.shape[3]))):
        if tuple(t.shape) != like:
            raise ValueError(f"{name}: expected {list(like)}, got {list(t.shape)}")
    length = k_cache.shape[1]
    for name, t, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        if tuple(t.shape) != (b, length, *new.shape[2:]):
            raise ValueError(f"{name}: expected {[b, length, *new.shape[2:]]}, got {list(t.shape)}")
        if any(step == 0 and n > 1 for step, n in zip(t.stride(), t.shape, strict=True)):
            raise ValueError(f"{name}: expected memory of its own for every element, got strides {list(t.stride())}")
    if not 0 <= sinks <= length - tokens:
        raise ValueError(
            f"sinks: expected 0 to {length - tokens}, the cache's {length} tokens less the new {tokens}; got {sinks}"
        )
    if index.dtype != torch.int32:
        raise TypeError(f"index: expected int32, got {index.dtype}")
    if tuple(index.shape) != (b,):
        raise ValueError(f"index: expected shape [{b}], got {list(index.shape)}")
    for name, t, other in (("cos", cos, sin), ("sin", sin, cos)):
        if t is None and other is not None:
            raise ValueError(f"{name}: expected a tensor beside {'sin' if name == 'cos' else 'cos'}, got None")
    for name, t, other in (("cos", cos, sin), ("sin", sin, cos)):
        if t is None:
            continue
        if t.dtype not in (torch.float32, torch.float64):  # the second: what the oracle widens to
            raise TypeError(f"{name}: expected float32, got {t.dtype}")
        if t.ndim != 2 or t.shape[1] > d // 2 or t.shape != other.shape:
            raise ValueError(
                f"{name}: expected [P, up to {d // 2}], alike with {'sin' if name == 'cos' else 'cos'}, got {list(t.shape)}"
            )
    if rope not in ROPES:
        raise ValueError(f"rope: expected one of {', '.join(map(repr, ROPES))}; got {rope!r}")
    if scale is not None and math.isnan(scale):
        raise ValueError(f"scale: expected a number or None, got {scale}")
    if type(index) is Tensor and index.device.type == "cpu" and (wrong := bad(index, tokens, cos)).any():
        raise IndexError(f"index: expected 0 to {_end(cos) - tokens}, got {index[wrong][0]}")


def _end(cos):  # type: ignore[no-untyped-def]
    return 2**31 - 1 if cos is None else cos.shape[0]


def bad(index, tokens, cos):  # type: ignore[no-untyped-def]
    return (index < 0) | (index > _end(cos) - tokens)


def _call(draw, b, tokens, heads, length, d, index, *, kv_heads=0, dv=0, rotary=0, **more):  # type: ignore[no-untyped-def]
    """A call on a cache as most people lay it out, [B, H, L, D]; what is behind its tokens is NaN."""
    kv, table = kv_heads or heads, torch.arange(max(index, default=0) + tokens)[:, None] / 10 ** (torch.arange(rotary / 2) / 4)
    caches = [draw(b, kv, length, n).transpose(1, 2) for n in (d, dv or d)]
    caches = [t.contiguous() if 0 in t.stride() else t for t in caches]  # it is written to
    for t in caches:
        for sample, n in zip(t, index, strict=True):
            sample[n:] = torch.nan
    return {
        "q": draw(b, tokens, heads, d),
        "k": draw(b, tokens, kv, d),
        "v": draw(b, tokens, kv, dv or d),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "index": torch.tensor(index, dtype=torch.int32, device=draw.device),
        "cos": draw.lay(table.cos().to(draw.device)) if rotary else None,
        "sin": draw.lay(table.sin().to(draw.device)) if rotary else None,
    } | more


def full(draw, b, tokens, heads, length, d):  # type: ignore[no-untyped-def]
    return _call(draw, b, tokens, heads, length, d, [length - tokens] * b)


def eager(q, k, v, k_cache, v_cache, index):  # type: ignore[no-untyped-def]
    old = k_cache.shape[1] - k.shape[1]
    k, v = torch.cat([k_cache[:, :old], k], 1), torch.cat([v_cache[:, :old], v], 1)
    mask = None if q.shape[1] == 1 else torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(old)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def fuzz(draw, pick):  # type: ignore[no-untyped-def]
    b, kv, group, tokens = pick.size(3, 0), pick.size(2), pick.choice((1, 1, 2, 3)), pick.choice((1, 1, 2, 16, pick.size(MOST)))
    length, d = tokens + pick.size(600, 0), pick.choice((8, 16, 32, 40, 60, 64, 72, 80, 96, 128, pick.size(256)))
    rotary, most = pick.choice((0, d // 2 * 2, pick.size(d) // 2 * 2)), pick.choice((length - tokens, 3 * length))
    more = {"kv_heads": kv, "dv": pick.choice((d, d, pick.size(256))), "rotary": rotary, "rope": pick.choice(ROPES)}
    more |= {"sinks": pick.choice((0, pick.randint(0, length - tokens))), "causal": pick.random() < 0.7}
    index = [pick.randint(0, most) for _ in range(b)]
    return _call(draw, b, tokens, kv * group, length, d, index, **more, scale=pick.choice((None, None, 0.3, -0.2)))


CASES = [
    Case("first", lambda d: _call(d, 2, 1, 2, 20, 32, [0, 0])),
    Case("one-token", lambda d: _call(d, 3, 1, 2, 70, 64, [40, 0, 69])),
    Case("block", lambda d: _call(d, 2, 16, 2, 60, 40, [3, 44])),
    Case("not-causal", lambda d: _call(d, 2, 9, 2, 60, 60, [3, 44], causal=False)),
    Case("most", lambda d: _call(d, 1, 64, 1, 200, 72, [77])),
    Case("rope", lambda d: _call(d, 2, 5, 2, 40, 64, [7, 30], rotary=64)),
    Case("rope-half", lambda d: _call(d, 2, 3, 2, 40, 24, [7, 30], rotary=16, rope="half")),
    Case("grouped", lambda d: _call(d, 2, 3, 6, 50, 16, [11, 20], kv_heads=2, rotary=16)),
    Case("rolling", lambda d: _call(d, 3, 4, 2, 24, 32, [18, 21, 1000])),
    Case("rolling-sinks", lambda d: _call(d, 3, 5, 2, 24, 33, [2, 21, 100], sinks=4, rotary=32)),
    Case("rolling-not-causal", lambda d: _call(d, 2, 5, 2, 12, 40, [9, 31], sinks=7, causal=False)),
    Case("narrow-values", lambda d: _call(d, 1, 2, 2, 30, 80, [11], dv=33, scale=0.2)),
    Case("wide", lambda d: _call(d, 1, 2, 1, 40, 256, [30])),
    Case("one-column", lambda d: _call(d, 2, 2, 2, 9, 1, [3, 4])),
    Case("several-chunks", lambda d: _call(d, 1, 3, 2, 1100, 40, [1090])),
    Case("no-samples", lambda d: _call(d, 0, 1, 2, 20, 16, [])),
]
