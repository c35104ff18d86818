"""Attention of every shape that diffusion models use: softmax(q kᵀ · scale + bias) v in one pass, without the score matrix."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _attention
from .attention_backward import attention_backward
from .norm_backward import bits, unpack


def _check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale):  # type: ignore[no-untyped-def]
    _attention.check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)


def _allocate(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale):  # type: ignore[no-untyped-def]
    b, s, h, _ = q.shape
    return [q.new_empty((b, s, h, v.shape[3])), q.new_empty((b, h, s), dtype=torch.promote_types(q.dtype, torch.float32))]


def _eager(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale):  # type: ignore[no-untyped-def]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal == "top-left", scale=scale).transpose(1, 2)


def _flops(b, h, sq, sk, d):  # type: ignore[no-untyped-def]
    return 4 * b * h * sq * sk * d


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_attention.fuzz,
    c=2.0,
    cases=[
        *_attention.CASES,
        *(
            Case(name, _attention.dense, shape, model, _eager, _flops, backward=name in _attention.TRAINED)
            for name, shape, model in _attention.MODELS
        ),
    ],
)
def attention_forward(
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
) -> list[Tensor]:
    """What `attention` runs: arguments as there, but a mask is bool, a bias is added, and packed tensors are [1, T, H, D].

    Returns:
        [o, lse]: [B, Sq, H, Dv] of q's dtype and [B, H, Sq] float32, both contiguous.

    Raises:
        TypeError, ValueError, IndexError: as in `attention`.
    """
    call = _attention.spread(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal)
    outs, sums = [], []
    for rows in call.blocks():
        p = call.scores(rows, causal, scale)
        top = p.detach().amax(-1, keepdim=True) if p.shape[-1] else p.new_zeros((*p.shape[:-1], 1))
        top = top.masked_fill(top == -torch.inf, 0)
        p = (p - top).exp()
        total = p.sum(-1, keepdim=True)
        none = total == 0  # a query that sees no key
        outs.append(p / total.masked_fill(none, 1) @ call.v)
        sums.append((top + total.masked_fill(none, 1).log()).masked_fill(none, -torch.inf).squeeze(-1))
    o, lse = torch.cat(outs, -2).flatten(1, 2).transpose(1, 2), torch.cat(sums, -1).flatten(1, 2)
    return [call.marked(o).to(q.dtype), call.marked(lse)]


@attention_forward.op.backward(outputs=True)  # type: ignore[attr-defined]
def _backward(inputs, outputs, grads, wanted):  # type: ignore[no-untyped-def]
    grad = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0]
    found = attention_backward(grad, grads[1], *inputs[:3], *outputs, *inputs[3:], bits(wanted[:4]))
    return (*unpack(found, wanted[:4]), *[None] * 7)


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

    Returns:
        o: q's shape with Dv columns, of q's dtype, contiguous; and with `lse` [B, H, Sq] ([H, T] for [T, H, D]), float32. A
        query that sees no key has o = 0 and lse = -inf. A NaN or an infinity in k or v reaches the queries of its sample and
        head, of those that a mask hides it from possibly some, since 0 · NaN is NaN.

    Raises:
        TypeError, ValueError: dtype, shape or value outside of the above. IndexError: what cu_q, cu_k, key_lengths or kv_index
            hold, on a CPU. On a GPU, a sample with a bad key_lengths or kv_index is NaN; bad cu_q, cu_k are never read beyond
            q, k, v, but the result is unspecified.

    Source: Vaswani et al. 2017; computed as by Dao 2023 (FlashAttention-2).
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
    o, sums = attention_forward(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    if flat:
        o, sums = o[0], sums[0]
    return (o, sums) if lse else o
