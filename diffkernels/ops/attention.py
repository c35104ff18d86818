"""Attention of every shape that diffusion models use: softmax(q kᵀ · scale + bias) v in one pass, without the score matrix."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _attention
from .attention_forward import attention_forward
from .attention_int8 import attention_int8
from .qkv_quantize import qkv_quantize

SAMPLED = 64  # keys, about, whose mean is taken off all: any vector may be


def _center(k: Tensor, key_lengths: Tensor | None) -> Tensor:
    """[B, Hk, D]: about the mean of a sample's keys, in k's wide dtype; zeros where there are none."""
    step = max(1, k.shape[1] // SAMPLED)
    some = k[:, ::step].to(torch.promote_types(k.dtype, torch.float32))
    if key_lengths is None:
        return some.mean(1) if some.shape[1] else some.sum(1)
    held = torch.arange(0, k.shape[1], step, device=k.device) < key_lengths.unsqueeze(1)
    return some.masked_fill(~held[:, :, None, None], 0).sum(1) / held.sum(1).clamp(min=1)[:, None, None]


def _coded(t: Tensor, center: Tensor | None = None) -> list[Tensor]:
    """Codes and their scales: q and k may differ in batch, which one call of `qkv_quantize` does not take."""
    return qkv_quantize(t[:, :0], t, center=center)[2:]


def _in_8_bits(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, lse):  # type: ignore[no-untyped-def]
    """[o, lse] by `qkv_quantize` and `attention_int8`."""
    _attention.check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    # Where samples share keys of different lengths, none of them says which keys there are.
    center = None if kv_index is not None and key_lengths is not None else _center(k, key_lengths)
    rest = (bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    o, sums = attention_int8(*_coded(q), *_coded(k, center), v, *rest)
    if lse and center is not None:  # what was taken off the keys is missing in the scores
        off = center if kv_index is None else center[kv_index.long()]
        off = off.repeat_interleave(q.shape[2] // k.shape[2], 1)
        sums = sums + scale * torch.einsum("bshd,bhd->bhs", q.to(off.dtype), off)
    return o, sums


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = ...,
    causal: bool | str = ...,
    scale: float | None = ...,
    *,
    bias: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_q: Tensor | None = ...,
    cu_k: Tensor | None = ...,
    kv_index: Tensor | None = ...,
    lse: Literal[False] = ...,
    precision: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = ...,
    causal: bool | str = ...,
    scale: float | None = ...,
    *,
    bias: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_q: Tensor | None = ...,
    cu_k: Tensor | None = ...,
    kv_index: Tensor | None = ...,
    lse: Literal[True],
    precision: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    kv_index: Tensor | None = None,
    lse: bool = False,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale + bias) v, without the matrix of scores. Differentiable, lse too; deterministic.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, Hk, D]; v: [B, Sk, Hk, Dv]; float32, float16 or bfloat16 (or float64, on the reference),
            alike; any strides: `[B, H, S, D].transpose(1, 2)` and the parts of a packed qkv are read as they lie. D and Dv are
            1 to 256. Hk divides H: query head h reads head h // (H / Hk).
        mask: bool, True where a query sees a key, or a float that is added to the scores; broadcasts to [B, H, Sq, Sk].
        causal: "bottom-right" (or True): query i sees keys up to i + Sk - Sq, so that the last one sees all; "top-left": up to
            i, as PyTorch's is_causal; "none" (or False).
        scale: None is 1 / sqrt(D).
        bias: as a float mask, for use beside a bool one.
        key_lengths: [B] int32: sample b has that many keys; what lies behind them is never read. Bottom-right aligns with it.
        cu_q, cu_k: [N + 1] int32, rising from 0 to T: N sequences, packed as [T, H, D] (or [1, T, H, D]) each.
        kv_index: [B] int32: sample b reads row kv_index[b] of k and v, whose batch may be another (UniCon's joint attention).
        lse: also return the logarithm of the sums of exponentials.
        precision: None, or "int8": q and k, less about its mean, are rounded to 8-bit codes with a scale a row (token and head)
            and multiplied as integers; the rest is as without. A relative error of 1 % or so, and no gradient.

    Returns:
        o: q's shape with Dv columns, of q's dtype, contiguous; and with `lse` [B, H, Sq] ([H, T] for [T, H, D]), float32. A
        query that sees no key has o = 0 and lse = -inf. A NaN or an infinity in k or v reaches the queries of its sample and
        head, of those that a mask hides it from possibly some, since 0 · NaN is NaN.

    Raises:
        TypeError, ValueError: dtype, shape or value outside of the above. IndexError: what cu_q, cu_k, key_lengths or kv_index
            hold, on a CPU. On a GPU, a sample with a bad key_lengths or kv_index is NaN; bad cu_q, cu_k are never read beyond
            q, k, v, but the result is unspecified. RuntimeError: precision="int8", and a gradient is wanted.

    Source: Vaswani et al. 2017; computed as by Dao 2023 (FlashAttention-2); "int8" after Zhang et al. 2024 (SageAttention).
    """
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        if bias is not None:
            raise ValueError("mask: expected bool beside a bias")
        mask, bias = None, mask
    if isinstance(causal, bool):
        causal = "bottom-right" if causal else "none"
    if scale is None:
        scale = q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.ndim and q.shape[-1] else 1.0
    flat = cu_q is not None and all(isinstance(t, Tensor) and t.ndim == 3 for t in (q, k, v))
    if flat:
        q, k, v = q[None], k[None], v[None]
    rest = (bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    if precision is None:
        o, sums = attention_forward(q, k, v, *rest)
    elif precision == "int8":
        o, sums = _in_8_bits(q, k, v, *rest, lse=lse)
    else:
        raise ValueError(f"precision: expected None or 'int8', got {precision!r}")
    if flat:
        o, sums = o[0], sums[0]
    return (o, sums) if lse else o
