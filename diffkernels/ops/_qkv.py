"""What `qkv_prep` and `qkv_quantize` share: the arithmetic, the arguments' check, the cases, the fuzz."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from . import _norm, _rope
from ._norm import FLOATS
from ._rope import ROPES

NORMS = ("none", "rms", "layer")


def check(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    """Raises TypeError or ValueError."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {t.dtype}")
        if t.ndim != 4 or t.shape[3] < 1:
            raise ValueError(f"{name}: expected [B, S, H, D], D >= 1, got shape {list(t.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected q's batch and head dimension, [{q.shape[0]}, Sk, Hkv, {q.shape[3]}]; got {list(k.shape)}"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected k's batch, length and heads {list(k.shape[:3])}, got {list(v.shape[:3])}")
    for name, value, known in (("rope", rope, ROPES), ("norm", norm, NORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    affine = (("q_weight", q_weight, q), ("k_weight", k_weight, k), ("q_shift", q_shift, q), ("k_shift", k_shift, k))
    for name, t, x in (("q_bias", q_bias, q), ("k_bias", k_bias, k), ("v_bias", v_bias, v), *affine):
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if x is None:
            raise ValueError(f"{name}: expected None without v")
        whole = across or "bias" in name
        if "bias" not in name and norm == "none":
            raise ValueError(f"{name}: expected None where norm is 'none'")
        size = x.shape[2] * x.shape[3] if whole else x.shape[3]
        if t.ndim != 1 or t.shape[0] != size:
            raise ValueError(f"{name}: expected shape [{size}], {'H · D' if whole else 'D'}; got {list(t.shape)}")
    _check_table(q, k, cos, sin)


def _check_table(q, k, cos, sin):  # type: ignore[no-untyped-def]
    for name, t, other in (("cos", cos, sin), ("sin", sin, cos)):
        if t is None:
            if other is not None:
                raise ValueError(f"{name}: expected a tensor beside {'sin' if name == 'cos' else 'cos'}, got None")
            continue
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {t.dtype}")
        b, s, _, d = q.shape
        half = t.shape[-1] if t.ndim else 0
        if not 1 <= half <= d // 2 or t.shape not in ((s, half), (b, s, half)):
            raise ValueError(f"{name}: expected [{s}, R/2] or [{b}, {s}, R/2], R from 2 to {d}; got {list(t.shape)}")
        if k.shape[1] != s:
            raise ValueError(f"{name}: expected None where k has another length than q, {k.shape[1]} and {s}")
    if cos is not None and sin.shape != cos.shape:
        raise ValueError(f"sin: expected cos's shape {list(cos.shape)}, got {list(sin.shape)}")


def biased(t: Tensor, bias: Tensor | None) -> Tensor:
    h = _norm.widen(t)
    return h if bias is None else h + bias.to(h.dtype).view(t.shape[2:])


def _normed(h: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str, across: bool, eps: float) -> Tensor:
    if norm == "none":
        return h
    rows, ms = _norm.centred(h.flatten(2) if across else h, norm)
    rows = rows * torch.rsqrt(ms + eps)
    if weight is not None:
        rows = rows * weight.to(h.dtype)
    if shift is not None:
        rows = rows + shift.to(h.dtype)
    return rows.view(h.shape)


def prepared(t, bias, weight, shift, cos, sin, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    """What becomes of q or k, wide."""
    return _rope.rotated(_normed(biased(t, bias), weight, shift, norm, across, eps), cos, sin, rope)


def _packed(draw, b, s, h, d, *, table=0, weight=False, value=False, **more):  # type: ignore[no-untyped-def]
    """q, k (and v) as views of one projection; `table` columns of cos and sin, [S, R/2]."""
    q, k, v = draw(b, s, 3, h, d).unbind(2)
    given = {"q": q, "k": k, "v": v} if value else {"q": q, "k": k}
    if weight:
        size = h * d if more.get("across") else d
        given |= {"q_weight": draw(size), "k_weight": draw(size)}
    if table:
        given |= {"cos": draw.f32(s, table), "sin": draw.f32(s, table)}
    return given | more


def _all(draw):  # type: ignore[no-untyped-def]
    """Every argument; fewer heads of keys, values of another width."""
    given = {"q": draw(2, 5, 4, 24), "k": draw(2, 5, 2, 24), "v": draw(2, 5, 2, 17)}
    given |= {"q_bias": draw(96), "k_bias": draw.f32(48), "v_bias": draw(34)}
    given |= {name: draw(24) for name in ("q_weight", "k_weight", "q_shift", "k_shift")}
    return given | {"cos": draw.f32(2, 5, 10), "sin": draw.f32(2, 5, 10), "norm": "layer", "eps": 1e-5}


def _all_across(draw):  # type: ignore[no-untyped-def]
    wide = {name: draw(size) for name, size in (("q_weight", 96), ("k_weight", 48), ("q_shift", 96), ("k_shift", 48))}
    return _all(draw) | wide | {"across": True}


def _apart(draw, b, s, sk, h, hk, d, **more):  # type: ignore[no-untyped-def]
    """Tensors of their own; another number of keys."""
    return {"q": draw(b, s, h, d), "k": draw(b, sk, hk, d)} | more


def _turned(draw):  # type: ignore[no-untyped-def]
    """[B, H, S, D] tensors, turned."""
    return {"q": draw(2, 3, 9, 16).transpose(1, 2), "k": draw(2, 3, 9, 16).transpose(1, 2), "norm": "rms"}


def _rotated(t, cos, sin):  # type: ignore[no-untyped-def]
    a, b = t.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(t.dtype)


def _eager(q, k, q_weight, k_weight):  # type: ignore[no-untyped-def]
    return [F.rms_norm(t, t.shape[-1:], w, 1e-6) for t, w in ((q, q_weight), (k, k_weight))]


def _eager_rope(q, k, q_weight, k_weight, cos, sin):  # type: ignore[no-untyped-def]
    return [_rotated(t, cos, sin) for t in _eager(q, k, q_weight, k_weight)]


def _eager_across(q, k, q_weight, k_weight, cos, sin):  # type: ignore[no-untyped-def]
    normed = _eager(q.flatten(2), k.flatten(2), q_weight, k_weight)
    return [_rotated(t.unflatten(2, q.shape[2:]), cos, sin) for t in normed]


def _flops(b, s, h, d):  # type: ignore[no-untyped-def]
    return 2 * 4 * b * s * h * d  # of q and of k: square and sum 2, normalisation 1, weight 1


def _flops_rope(b, s, h, d):  # type: ignore[no-untyped-def]
    return 2 * 7 * b * s * h * d  # and 3 of the rotation


def _flux(draw, b, s, h, d):  # type: ignore[no-untyped-def]
    return _packed(draw, b, s, h, d, table=d // 2, weight=True, norm="rms")


def _sd3(draw, b, s, h, d):  # type: ignore[no-untyped-def]
    return _packed(draw, b, s, h, d, weight=True, norm="rms")


def _wan(draw, b, s, h, d):  # type: ignore[no-untyped-def]
    return _packed(draw, b, s, h, d, table=d // 2, weight=True, norm="rms", across=True)


CASES = [
    Case("packed", lambda d: _packed(d, 2, 9, 3, 64, table=32, weight=True, norm="rms")),
    Case("half", lambda d: _packed(d, 2, 9, 3, 64, table=32, weight=True, norm="rms", rope="half")),
    Case("all", _all),
    Case("all-half", lambda d: _all(d) | {"rope": "half", "norm": "rms"}),
    Case("across", lambda d: _packed(d, 2, 7, 3, 40, table=20, weight=True, norm="rms", across=True)),
    Case("across-layer", _all_across),
    Case("across-wide", lambda d: _packed(d, 1, 3, 40, 128, weight=True, norm="rms", across=True)),
    Case("part", lambda d: _packed(d, 1, 11, 2, 72, table=5, norm="layer")),
    Case("part-half", lambda d: _packed(d, 1, 11, 2, 72, table=21, rope="half")),
    Case("odd", lambda d: _packed(d, 2, 5, 2, 33, weight=True, norm="layer", eps=1e-5)),
    Case("odd-part", lambda d: _packed(d, 2, 5, 2, 33, table=16, norm="rms")),
    Case("dimr", lambda d: _packed(d, 1, 9, 3, 60, norm="rms", value=True)),
    Case("dit", lambda d: _packed(d, 1, 9, 3, 72, table=36, value=True, v_bias=d(216))),
    Case("bias", lambda d: _packed(d, 2, 7, 3, 16, q_bias=d(48), k_bias=d(48))),
    Case("one-column", lambda d: _packed(d, 2, 5, 3, 1, norm="layer", weight=True)),
    Case("widest", lambda d: _packed(d, 1, 5, 2, 256, table=128, weight=True, norm="rms", rope="half")),
    Case("wider", lambda d: _packed(d, 1, 2, 1, 1100, table=500, norm="layer", rope="half")),
    Case("grouped", lambda d: _apart(d, 1, 5, 5, 6, 2, 32, norm="rms", cos=d.f32(5, 16), sin=d.f32(5, 16))),
    Case("cross", lambda d: _apart(d, 2, 9, 4, 2, 2, 40, norm="rms", q_weight=d.f32(40), k_weight=d(40))),
    Case("more-keys", lambda d: _apart(d, 2, 3, 8, 2, 2, 40, norm="layer", v=d(2, 8, 2, 24))),
    Case("turned", _turned),
    Case("per-sample", lambda d: _packed(d, 3, 4, 2, 32, cos=d.f32(3, 4, 16), sin=d.f32(3, 4, 16))),
    Case("no-tokens", lambda d: _packed(d, 2, 0, 3, 16, table=8, weight=True, norm="rms", value=True)),
    Case("no-samples", lambda d: _apart(d, 0, 5, 5, 3, 3, 16, norm="rms", cos=d.f32(5, 8), sin=d.f32(5, 8))),
    Case("no-queries", lambda d: _apart(d, 2, 0, 4, 2, 2, 16, norm="rms")),
    Case("flux-1024", _flux, (1, 4608, 24, 128), "FLUX at 1024²", _eager_rope, _flops_rope),
    Case("sd3-1024", _sd3, (2, 4250, 24, 64), "SD 3 at 1024², batch 2", _eager, _flops),
    Case("wan-480p-chunk", _wan, (1, 1560, 12, 128), "Wan 1.3B at 480p, one latent frame", _eager_across, _flops_rope),
    Case("starflow", _flux, (8, 1024, 32, 64), "STARFlow, batch 8", _eager_rope, _flops_rope),
]  # fmt: skip


def fuzz(draw, pick, widest=300):  # type: ignore[no-untyped-def]
    b, s, h, hk, d = (
        pick.size(3, 0),
        pick.size(40, 0),
        pick.size(5),
        pick.size(3),
        pick.choice((64, 72, 128, pick.size(widest))),
    )
    sk = s if pick.random() < 0.8 else pick.size(40, 0)
    norm, across, value = pick.choice(NORMS), pick.random() < 0.3, pick.random() < 0.5
    given = {"q": draw(b, s, h, d), "k": draw(b, sk, hk, d), "v": draw(b, sk, hk, pick.size(80)) if value else None}
    if sk == s and h == hk and pick.random() < 0.5:
        given |= dict(zip("qk", draw(b, s, 2, h, d).unbind(2), strict=True))
    vector = pick.choice((draw, draw, draw.f32))
    for name, x in (("q", given["q"]), ("k", given["k"]), ("v", given["v"])):
        if x is not None:
            given[name + "_bias"] = pick.maybe(lambda x=x: vector(x.shape[2] * x.shape[3]))
        if name != "v" and norm != "none":
            size = x.shape[2] * d if across else d
            given |= {name + which: pick.maybe(lambda size=size: vector(size)) for which in ("_weight", "_shift")}
    if sk == s and d > 1 and pick.random() < 0.7:
        half = pick.choice((d // 2, pick.randint(1, d // 2)))
        shape = pick.choice(((s, half), (b, s, half)))
        given |= {"cos": draw.f32(*shape), "sin": draw.f32(*shape)}
    how = {"rope": pick.choice(ROPES), "norm": norm, "across": across, "eps": pick.choice((1e-8, 1e-6, 1e-5, 1e-2))}
    return given | how
