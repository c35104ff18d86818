"""What attention's definitions share: the arguments' check, which keys a query sees, and the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._case import Case
from ._norm import FLOATS

CAUSAL = ("none", "bottom-right", "top-left")
MAX_HEAD = 256
ROOM = 1 << 26  # scores that the definition holds at a time


def check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, coded=False):  # type: ignore[no-untyped-def]
    """Raises TypeError or ValueError; and IndexError for what index tensors hold, where they can be read: on a CPU. `coded`:
    q and k are codes."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if coded and name != "v":
            if t.dtype != torch.int8:
                raise TypeError(f"{name}: expected int8, got {t.dtype}")
        elif t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        elif not coded and t.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(f"{name}: expected [B, S, H, D], got shape {list(t.shape)}")
    for name, t in (("k", k), ("v", v)):
        if not 1 <= t.shape[3] <= MAX_HEAD:
            raise ValueError(f"{name}: expected a head dimension of 1 to {MAX_HEAD}, got {t.shape[3]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected q's head dimension {q.shape[3]}, got {k.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected k's batch, length and heads {list(k.shape[:3])}, got {list(v.shape[:3])}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[2]}, got {k.shape[2]}")
    packed = cu_q is not None
    if packed != (cu_k is not None):
        raise ValueError(f"{'cu_k' if packed else 'cu_q'}: expected a tensor beside {'cu_q' if packed else 'cu_k'}, got None")
    indices = (("key_lengths", key_lengths, q.shape[0]), ("kv_index", kv_index, q.shape[0]), ("cu_q", cu_q, None))
    for name, t, n in (*indices, ("cu_k", cu_k, None)):
        if t is None:
            continue
        if t.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {t.dtype}")
        if t.ndim != 1 or (t.shape[0] < 1 if n is None else t.shape[0] != n):
            raise ValueError(f"{name}: expected shape [{'N + 1' if n is None else n}], got {list(t.shape)}")
    if packed:
        if cu_k.shape != cu_q.shape:
            raise ValueError(f"cu_k: expected as many sequences as cu_q has, {cu_q.shape[0] - 1}; got {cu_k.shape[0] - 1}")
        for name, t in (("q", q), ("k", k)):
            if t.shape[0] != 1:
                raise ValueError(f"{name}: expected [1, T, H, D] beside cu_{name}, got {list(t.shape)}")
        for name, t in (("bias", bias), ("mask", mask), ("key_lengths", key_lengths), ("kv_index", kv_index)):
            if t is not None:
                raise ValueError(f"{name}: expected None beside cu_q")
    elif kv_index is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected q's batch {q.shape[0]} (or a kv_index), got {k.shape[0]}")
    if bias is not None and bias.dtype not in FLOATS:
        raise TypeError(f"bias: expected float32, float16, bfloat16 or float64, got {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and (t.ndim > 4 or any(n not in (1, m) for n, m in zip(t.shape[::-1], full[::-1], strict=False))):
            raise ValueError(f"{name}: expected a shape that broadcasts to [B, H, Sq, Sk] = {list(full)}, got {list(t.shape)}")
    if math.isnan(scale):
        raise ValueError(f"scale: expected a number, got {scale}")
    if causal not in CAUSAL:
        raise ValueError(f"causal: expected one of {', '.join(map(repr, CAUSAL))}; got {causal!r}")
    for name, t, expected, bad in _indices(q, k, key_lengths, cu_q, cu_k, kv_index):
        if type(t) is Tensor and t.device.type == "cpu" and bad.any():
            raise IndexError(f"{name}: expected {expected}, got {t[bad][0]}")


def _indices(q, k, key_lengths, cu_q, cu_k, kv_index) -> Iterator[tuple[str, Tensor, str, Tensor]]:  # type: ignore[no-untyped-def]
    """Every index tensor, what it may hold, and where it does not."""
    if key_lengths is not None:
        yield "key_lengths", key_lengths, f"0 to {k.shape[1]}", (key_lengths < 0) | (key_lengths > k.shape[1])
    if kv_index is not None:
        yield "kv_index", kv_index, f"0 to {k.shape[0] - 1}", (kv_index < 0) | (kv_index >= k.shape[0])
    for name, cu, most in (("cu_q", cu_q, q.shape[1]), ("cu_k", cu_k, k.shape[1])):
        if cu is not None:
            falls = torch.cat([cu[:1] != 0, cu[1:] < cu[:-1]])
            last = torch.arange(1, len(cu) + 1, device=cu.device) == len(cu)
            yield name, cu, f"offsets that rise from 0 to {most}", falls | (last & (cu != most))


class Spread(NamedTuple):
    """A call with everything in the shape of the scores, [b, Hk, H / Hk, n, m], or broadcasting to it."""

    q: Tensor  # [b, Hk, H / Hk, n, D], wide
    k: Tensor  # [b, Hk, 1, m, D]; keys that no query sees are zero, whatever they hold
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    queries: tuple[Tensor, Tensor]  # [n, 1]: the sequence that a query belongs to, and its place there, from the end if need be
    keys: tuple[Tensor, Tensor]  # [m]
    lengths: Tensor  # [b, 1, 1, 1, 1]: how many keys there are
    bad: Tensor | None  # [b]: samples whose index is out of bounds, on a GPU, where nobody can be told but by a NaN

    def blocks(self) -> Iterator[slice]:
        """Some queries at a time, so that their scores fit into `ROOM`."""
        n = self.q.shape[-2]
        step = max(1, ROOM // max(1, self.q[..., :1, 0].numel() * self.k.shape[-2]))
        return (slice(i, min(i + step, n)) for i in range(0, max(1, n), step))

    def scores(self, rows: slice, causal: str, scale: float) -> Tensor:
        """Of the queries in `rows`: -inf where a query does not see a key, or its bias says so."""
        found = self.q[..., rows, :] @ self.k.mT * scale
        (sequence, place), (of, at) = (t[rows] for t in self.queries), self.keys
        hidden = (sequence != of) | (at >= self.lengths)
        if causal != "none":
            hidden = hidden | (at > (place + self.lengths if causal == "bottom-right" else place))
        if self.bias is not None:
            more = self.bias[..., rows, :].to(found.dtype)
            hidden, found = hidden | (more == -torch.inf), found + more
        if self.mask is not None:
            hidden = hidden | ~self.mask[..., rows, :]
        return found.masked_fill(hidden, -torch.inf)

    def marked(self, t: Tensor) -> Tensor:
        """NaN in bad samples of [b, ...]."""
        return t if self.bad is None else t.masked_fill(self.bad.view(-1, *[1] * (t.ndim - 1)), torch.nan)


def spread(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal):  # type: ignore[no-untyped-def]
    """The call, spread. On a GPU a bad key_lengths or kv_index marks its sample."""
    wide = torch.promote_types(q.dtype, torch.float32)
    n, m, group = q.shape[1], k.shape[1], (k.shape[2], q.shape[2] // k.shape[2])
    place, at = (torch.arange(size, device=q.device) for size in (n, m))
    sequence, of = torch.zeros_like(place), torch.zeros_like(at)
    lengths = torch.full((q.shape[0],), m, device=q.device)
    bad = torch.zeros_like(lengths, dtype=torch.bool)
    wrong = {name: found for name, *_, found in _indices(q, k, key_lengths, cu_q, cu_k, kv_index)}
    if key_lengths is not None:
        lengths, bad = key_lengths, bad | wrong["key_lengths"]
    if kv_index is not None:
        rows, bad = kv_index.long().masked_fill(wrong["kv_index"], 0), bad | wrong["kv_index"]
        k, v = k[rows], v[rows]
    if cu_q is not None:
        sequence, of = (torch.searchsorted(cu[1:], t, right=True, out_int32=True) for cu, t in ((cu_q, place), (cu_k, at)))
        place, at = place - cu_q[sequence], at - cu_k[of]
        if causal == "bottom-right":  # from the end of the keys
            place = place - cu_q.diff()[sequence] + cu_k.diff()[sequence] - m
    elif causal == "bottom-right":
        place = place - n
    q, k, v = (t.to(wide).transpose(1, 2) for t in (q, k, v))
    beyond = torch.arange(m, device=q.device) >= lengths.view(-1, 1, 1, 1)
    k, v = (t.masked_fill(beyond.mT, 0).unsqueeze(2) for t in (k, v))
    full = (q.shape[0], q.shape[1], n, m)
    bias, mask = (None if t is None else t.expand(full).unflatten(1, group) for t in (bias, mask))
    places = (sequence[:, None], place[:, None]), (of, at)
    return Spread(q.unflatten(1, group), k, v, bias, mask, *places, lengths.view(-1, 1, 1, 1, 1), bad if bad.is_cuda else None)


def sum_like(pieces: list[Tensor], bias: Tensor) -> Tensor:
    """The gradient of bias: each piece, [b, H, n, m] of some queries, summed over what bias was broadcast along."""
    full = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    over = [d for d in range(4) if full[d] == 1]
    pieces = [p.sum(over, keepdim=True) if over else p for p in pieces]
    return (sum(pieces[1:], pieces[0]) if full[2] == 1 else torch.cat(pieces, 2)).reshape(bias.shape)


def dense(draw, b, h, sq, sk, d, *, heads=0, dv=0, causal="none", scale=0.0, **more):  # type: ignore[no-untyped-def]
    """The arguments of a call; `heads` of k and v, `dv` their columns, where they are not q's."""
    rest = dict.fromkeys(("bias", "mask", "key_lengths", "cu_q", "cu_k", "kv_index")) | more
    rows = b if rest["kv_index"] is None else 3
    q, k, v = draw(b, sq, h, d), draw(rows, sk, heads or h, d), draw(rows, sk, heads or h, dv or d)
    return {"q": q, "k": k, "v": v} | rest | {"causal": causal, "scale": scale or 1 / math.sqrt(d)}


def _seen(draw, *shape):  # type: ignore[no-untyped-def]
    """A bool mask that hides about a fifth."""
    return draw.lay(torch.rand(shape, generator=draw.generator) < 0.8).to(draw.device)


def _whole(draw, *numbers):  # type: ignore[no-untyped-def]
    return torch.tensor(numbers, dtype=torch.int32, device=draw.device)


def _qkv(draw, b, n, h, d, **more):  # type: ignore[no-untyped-def]
    """Views of one packed projection, [3, H, D]."""
    q, k, v = draw(b, n, 3, h, d).unbind(2)
    return dense(draw, b, h, n, n, d, **more) | {"q": q, "k": k, "v": v}


CASES = [
    Case("self", dense, (2, 2, 35, 35, 24)),
    Case("cross", dense, (2, 2, 37, 77, 40)),
    Case("dimr", lambda d: _qkv(d, 1, 33, 3, 60)),
    Case("dit", lambda d: _qkv(d, 2, 65, 2, 72)),
    Case("turned", lambda d: dense(d, 1, 2, 9, 17, 64) | {"q": d(1, 2, 9, 64).transpose(1, 2)}),
    Case("grouped", lambda d: dense(d, 2, 6, 5, 33, 16, heads=2)),
    Case("one-head", lambda d: dense(d, 1, 1, 40, 300, 8)),
    Case("one-query", lambda d: dense(d, 2, 2, 1, 130, 64)),
    Case("one-key", lambda d: dense(d, 2, 2, 7, 1, 32)),
    Case("one-column", lambda d: dense(d, 1, 2, 5, 6, 1)),
    Case("narrow-values", lambda d: dense(d, 1, 2, 12, 19, 80, dv=33)),
    Case("wide", lambda d: dense(d, 1, 1, 26, 65, 256)),
    Case("odd", lambda d: dense(d, 1, 2, 25, 49, 111)),
    Case("causal", lambda d: dense(d, 1, 2, 50, 50, 32, causal="bottom-right")),
    Case("causal-longer", lambda d: dense(d, 1, 2, 9, 41, 32, causal="bottom-right")),
    Case("causal-shorter", lambda d: dense(d, 1, 2, 41, 9, 32, causal="bottom-right")),
    Case("causal-top-left", lambda d: dense(d, 1, 2, 30, 19, 40, causal="top-left")),
    Case("mask", lambda d: dense(d, 2, 2, 20, 34, 32, mask=_seen(d, 2, 2, 20, 34))),
    Case("key-mask", lambda d: dense(d, 2, 3, 20, 77, 40, mask=_seen(d, 2, 1, 1, 77))),
    Case("nothing-seen", lambda d: dense(d, 2, 2, 8, 20, 16, mask=_whole(d, 0, 1).bool().view(2, 1, 1, 1))),
    Case("relative-bias", lambda d: dense(d, 3, 2, 40, 40, 32, bias=d.f32(2, 40, 40))),
    Case("bias", lambda d: dense(d, 2, 2, 19, 23, 32, bias=d(2, 1, 19, 1), mask=_seen(d, 23))),
    Case("lengths", lambda d: dense(d, 3, 2, 20, 50, 24, key_lengths=_whole(d, 50, 0, 17))),
    Case("lengths-causal", lambda d: dense(d, 2, 2, 20, 50, 24, key_lengths=_whole(d, 33, 5), causal="bottom-right")),
    Case("indexed", lambda d: dense(d, 4, 2, 9, 20, 24, kv_index=_whole(d, 2, 0, 2, 1))),
    Case("packed", lambda d: dense(d, 1, 2, 70, 90, 24, cu_q=_whole(d, 0, 5, 5, 40, 70), cu_k=_whole(d, 0, 33, 50, 50, 90))),
    Case(
        "packed-causal",
        lambda d: dense(d, 1, 2, 40, 50, 16, cu_q=_whole(d, 0, 17, 40), cu_k=_whole(d, 0, 20, 50), causal="bottom-right"),
    ),
    Case("wide-logits", lambda d: dense(d, 1, 2, 30, 300, 64, scale=2.0)),
    Case("negative-scale", lambda d: dense(d, 1, 2, 9, 40, 32, scale=-0.3)),
    Case("several-chunks", lambda d: dense(d, 1, 1, 30, 1025, 40)),
    Case("no-samples", lambda d: dense(d, 0, 2, 4, 5, 16)),
    Case("no-queries", lambda d: dense(d, 2, 2, 0, 5, 16)),
    Case("no-keys", lambda d: dense(d, 2, 2, 4, 0, 16)),
]  # fmt: skip

# name, (B, H, Sq, Sk, D), origin
MODELS = [
    ("dit-xl-256", (2, 16, 256, 256, 72), "DiT-XL/2 at 256², batch 2"),
    ("dit-xl-512", (2, 16, 1024, 1024, 72), "DiT-XL/2 at 512², batch 2"),
    ("pixart-1024", (1, 16, 4096, 4096, 72), "PixArt-α at 1024²"),
    ("pixart-cross", (1, 16, 4096, 120, 72), "PixArt-α at 1024², its text"),
    ("dit-b-256", (2, 12, 256, 256, 64), "DiT-B/2 at 256², batch 2"),
    ("dit-l-512", (2, 16, 1024, 1024, 64), "DiT-L/2 at 512², batch 2"),
    ("flux-512", (1, 24, 1024, 1024, 128), "FLUX's heads at 512²"),
    ("dimr-xl", (2, 16, 257, 257, 60), "DiMR-XL/2R, batch 2"),
    ("sd15-512", (1, 8, 4096, 4096, 40), "SD 1.5 at 512²"),
    ("sd15-cross", (1, 8, 4096, 77, 40), "SD 1.5 at 512², its text"),
    ("sd15-mid", (2, 8, 1024, 1024, 80), "SD 1.5 at 512², second level"),
    ("sd15-256", (2, 8, 256, 256, 160), "SD 1.5 at 512², third level"),
    ("lfdm-temporal", (1024, 8, 40, 40, 32), "LFDM's temporal attention"),
    ("pcdm-prior", (8, 32, 6, 6, 64), "PCDMs' prior"),
]
TRAINED = ("dit-xl-256", "dit-l-512")  # timed with their gradients too


def fuzz(draw, pick):  # type: ignore[no-untyped-def]
    b, heads, group = pick.size(3, 0), pick.size(2), pick.choice((1, 1, 1, 2, 3))
    sq, sk = pick.size(300, 0), pick.size(600, 0)
    d = pick.choice((8, 16, 32, 40, 60, 64, 72, 80, 96, 128, pick.size(256)))
    h, more = heads * group, {"causal": pick.choice(("none", *CAUSAL)), "heads": heads}
    if pick.random() < 0.15:
        ends = [sorted(pick.randint(0, n) for _ in range(2)) for n in (sq, sk)]
        more |= {"cu_q": _whole(draw, 0, *ends[0], sq), "cu_k": _whole(draw, 0, *ends[1], sk)}
        return dense(draw, 1, h, sq, sk, d, **more)
    shapes = ((sk,), (sq, sk), (h, 1, sk), (1, h, sq, sk), (b, 1, 1, sk), (b, h, sq, 1), (b, 1, sq, sk))
    more["bias"] = pick.maybe(lambda: pick.choice((draw, draw.f32))(*pick.choice(shapes)), 0.2)
    more["mask"] = pick.maybe(lambda: _seen(draw, *pick.choice(shapes)), 0.2)
    more["key_lengths"] = pick.maybe(lambda: _whole(draw, *(pick.randint(0, sk) for _ in range(b))), 0.2)
    more["kv_index"] = pick.maybe(lambda: _whole(draw, *(pick.randrange(3) for _ in range(b))), 0.15)
    more["scale"] = pick.choice((0.0, 0.0, 0.0, 1.0, -0.2))
    more["dv"] = pick.maybe(lambda: pick.size(256), 0.15) or 0
    return dense(draw, b, h, sq, sk, d, **more)
