"""`qkv_prep` with 8-bit codes for the queries and keys that it writes: what `attention_int8` multiplies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _attention, _qkv, _quantize


def _check(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, center, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    _qkv.check(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm, across, eps)
    if q.shape[3] > _attention.MAX_HEAD:
        raise ValueError(f"q: expected a head dimension of 1 to {_attention.MAX_HEAD}, got {q.shape[3]}")
    if center is None:
        return
    if center.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"center: expected float32 or float64, got {center.dtype}")
    b, _, h, d = k.shape
    if center.shape not in ((h, d), (b, h, d)):
        raise ValueError(f"center: expected [{h}, {d}] or [{b}, {h}, {d}], got {list(center.shape)}")


def _allocate(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, center, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    coded = [t for x in (q, k) for t in _quantize.empty(x, x.shape[-1])]
    return coded if v is None else [*coded, empty_like(v)]


def _centred(make: Callable[..., dict[str, Any]], samples: bool) -> Callable[..., dict[str, Any]]:
    def made(draw, *shape):  # type: ignore[no-untyped-def]
        given = make(draw, *shape)
        b, _, h, d = given["k"].shape
        return given | {"center": draw.f32(b, h, d) if samples else draw.f32(h, d)}

    return made


def _eager(prepare: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Codes of what `prepare` leaves, as users make them; its arguments, and the center."""

    def eager(center, **given):  # type: ignore[no-untyped-def]
        q, k = prepare(**given)
        return [*_quantize.eager(q), *_quantize.eager(k - center.to(k.dtype).unsqueeze(1))]

    names = [*inspect.signature(prepare).parameters, "center"]
    eager.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
    return eager


def _timed(case: Case) -> Case:
    prepare, flops = case.eager, case.flops
    assert prepare is not None and flops is not None
    coding = 8  # of q and k: the largest magnitude 1, the codes 2; the center 1

    def all_flops(b, s, h, d):  # type: ignore[no-untyped-def]
        return flops(b, s, h, d) + coding * b * s * h * d

    return replace(case, make=_centred(case.make, True), eager=_eager(prepare), flops=all_flops)


CENTRED = ("all", "all-half", "part-half", "odd", "cross", "turned")


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    given = _qkv.fuzz(draw, pick, _attention.MAX_HEAD)
    b, _, h, d = given["k"].shape
    return given | {"center": pick.maybe(lambda: pick.choice((draw.f32(h, d), draw.f32(b, h, d))))}


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        *(case for case in _qkv.CASES if case.model is None and case.name != "wider"),
        *(
            replace(case, name=f"{case.name}-centred", make=_centred(case.make, i % 2 == 0))
            for i, case in enumerate(case for case in _qkv.CASES if case.name in CENTRED)
        ),
        *(_timed(case) for case in _qkv.CASES if case.model is not None),
    ],
)
def qkv_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_shift: Tensor | None = None,
    k_shift: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    center: Tensor | None = None,
    rope: str = "interleaved",
    norm: str = "none",
    across: bool = False,
    eps: float = 1e-6,
) -> list[Tensor]:
    """8-bit codes, and one scale a row, of what `qkv_prep` makes of q and k, in the same pass; v with its bias.

    h is `qkv_prep`'s float32 result before it is rounded; of k less `center`. Of each row, a token's head, with amax = max |h|:
    codes = round(h · (127 / amax)), half to even; scale = amax / 127; h ≈ codes · scale.

    Args:
        center: [Hkv, D] or [B, Hkv, D], float32 (or float64, on the reference): taken off every key of a sample's head, which
            changes no attention weight, since all scores of a query fall alike. Keys share a large mean, and with it their
            scales: their mean, or that of the step before, is what to take off (SageAttention's smoothing).
        The others: as in `qkv_prep`, D up to 256.

    Returns:
        [q_codes, q_scale, k_codes, k_scale], and v where it is given: contiguous; int8 of q's and k's shape, in -127..127;
        float32 [B, S, H] and [B, Sk, Hkv]. A row of nothing larger than 2^-100 counts as zeros: codes 0, scale 1. Where h is
        not finite, the row's codes are 0 and its scale says so: NaN where a NaN is, else infinity.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape or value outside of the above. RuntimeError: a gradient is
        wanted; there is none.

    Source: Zhang et al. 2024 (SageAttention), section 4.2; `qkv_prep`'s; Dettmers et al. 2022 (absmax, by row).
    """
    found: list[Tensor] = []
    for t, bias, weight, shift, less in ((q, q_bias, q_weight, q_shift, None), (k, k_bias, k_weight, k_shift, center)):
        h = _qkv.prepared(t, bias, weight, shift, cos, sin, rope, norm, across, eps)
        if less is not None:
            h = h - less.to(h.dtype).unsqueeze(-3)
        found += _quantize.rows(h, None, 0)
    return found if v is None else [*found, _qkv.biased(v, v_bias).to(v.dtype, copy=True)]
