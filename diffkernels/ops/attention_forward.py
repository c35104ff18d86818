"""softmax(q kᵀ · scale + bias) v in one pass, without the score matrix: the op that `attention` runs."""

from __future__ import annotations

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
