"""Attention of queries and keys in 8-bit codes with a scale a row: their products are exact, all else is as in `attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _attention
from .attention_forward import attention_forward


def _check(q, q_scale, k, k_scale, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale):  # type: ignore[no-untyped-def]
    _attention.check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, coded=True)
    for name, t, codes in (("q_scale", q_scale, q), ("k_scale", k_scale, k)):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {t.dtype}")
        if t.shape != codes.shape[:3]:
            raise ValueError(f"{name}: expected a scale a row, {list(codes.shape[:3])}; got {list(t.shape)}")


def _allocate(q, q_scale, k, k_scale, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale):  # type: ignore[no-untyped-def]
    b, s, h, _ = q.shape
    return [v.new_empty((b, s, h, v.shape[3])), v.new_empty((b, h, s), dtype=torch.promote_types(v.dtype, torch.float32))]


def _wide(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * scale.to(dtype).unsqueeze(-1)


def _eager(q, q_scale, k, k_scale, v, causal, scale):  # type: ignore[no-untyped-def]
    q, k = _wide(q, q_scale, v.dtype), _wide(k, k_scale, v.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal == "top-left", scale=scale).transpose(1, 2)


def _flops(b, h, sq, sk, d):  # type: ignore[no-untyped-def]
    return 4 * b * h * sq * sk * d


def _coded(draw, given: dict[str, Any]) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """A call of `attention_forward` with codes for q and k, and scales about as a row of normal numbers has."""

    def scales(shape):  # type: ignore[no-untyped-def]
        return draw.lay((torch.rand(shape, generator=draw.generator) * 0.02 + 0.01).to(draw.device))

    q, k = (draw.codes(*given.pop(name).shape) for name in "qk")
    return {"q": q, "q_scale": scales(q.shape[:3]), "k": k, "k_scale": scales(k.shape[:3])} | given


def _with_codes(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda draw, *shape: _coded(draw, make(draw, *shape))


def _packed(draw):  # type: ignore[no-untyped-def]
    """Codes and scales as views of what holds q's and k's, v turned."""
    (q, k), (q_scale, k_scale) = draw.codes(2, 33, 2, 3, 72).unbind(2), (draw.f32(2, 33, 2, 3).abs() / 60).unbind(2)
    given = _attention.dense(draw, 2, 3, 33, 33, 72) | {"v": draw(2, 3, 33, 72).transpose(1, 2)}
    return {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale} | {n: t for n, t in given.items() if n not in "qk"}


def _largest(draw):  # type: ignore[no-untyped-def]
    """Sums of products at their largest, of either sign."""
    given = _coded(draw, _attention.dense(draw, 1, 1, 9, 40, 256))
    given["q"], given["k"] = (torch.where(t < 0, -127, 127).to(torch.int8) for t in (given["q"], given["k"]))
    given["k"][:, ::2] = given["q"][:, :1]
    return given


@op(
    allocate=_allocate,
    check=_check,
    fuzz=lambda draw, pick: _coded(draw, _attention.fuzz(draw, pick)),
    c=2.0,
    gradient=False,
    cases=[
        *(Case(case.name, _with_codes(case.make), case.shape) for case in _attention.CASES),
        Case("views", _packed),
        Case("largest", _largest),
        *(Case(name, _with_codes(_attention.dense), shape, model, _eager, _flops) for name, shape, model in _attention.MODELS),
    ],
)
def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    causal: str,
    scale: float,
) -> list[Tensor]:
    """`attention_forward` of q · q_scale and k · k_scale, whose products are summed as integers: what `attention` runs with
    precision="int8", between `qkv_quantize` and the values.

    Args:
        q, k: int8 codes, -127..127, [B, Sq, H, D] and [B, Sk, Hk, D], any strides; q_scale, k_scale: float32 (or float64, on
            the reference), [B, Sq, H] and [B, Sk, Hk]. v: [B, Sk, Hk, Dv], float32, float16, bfloat16 (or float64, on the
            reference).
        bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale: as in `attention_forward`.

    Returns:
        [o, lse]: [B, Sq, H, Dv] of v's dtype and [B, H, Sq] float32, both contiguous. Where a scale is not finite, as
        `qkv_quantize` marks rows that are not, the row's query, or all queries that see the key, are NaN.

    Raises:
        TypeError, ValueError, IndexError: as in `attention`, and for a scale. RuntimeError: a gradient is wanted.

    Source: Zhang et al. 2024 (SageAttention), with a scale a row; `attention`'s.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    rest = (bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    o, lse = attention_forward.op.body(_wide(q, q_scale, wide), _wide(k, k_scale, wide), v.to(wide), *rest)  # type: ignore[attr-defined]
    return [o.to(v.dtype), lse]
