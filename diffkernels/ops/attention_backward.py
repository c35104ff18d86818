"""The gradient of attention: the scores once more, and no matrix of them either."""

from __future__ import annotations

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _attention

WANTED = ("q", "k", "v", "bias")  # the bits of `wanted`, lowest first


def _targets(q, k, v, bias, wanted):  # type: ignore[no-untyped-def]
    """The inputs whose gradients are wanted."""
    return [t for i, t in enumerate((q, k, v, bias)) if wanted >> i & 1]


def _check(  # type: ignore[no-untyped-def]
    grad, grad_lse, q, k, v, o, lse, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, wanted
):
    _attention.check(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale)
    b, s, h, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    like_o, like_lse = ((b, s, h, v.shape[3]), q.dtype), ((b, h, s), wide)
    given = (("grad", grad, like_o), ("o", o, like_o), ("lse", lse, like_lse), ("grad_lse", grad_lse, like_lse))
    for name, t, (shape, dtype) in given:
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if not 0 <= wanted < 1 << len(WANTED):
        raise ValueError(f"wanted: expected 0 to {(1 << len(WANTED)) - 1}, a bit each for {', '.join(WANTED)}; got {wanted}")
    if any(t is None for t in _targets(q, k, v, bias, wanted)):
        raise ValueError(f"wanted: {wanted:#b} asks for the gradient of a bias that is None")


def _allocate(  # type: ignore[no-untyped-def]
    grad, grad_lse, q, k, v, o, lse, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal, scale, wanted
):
    return [empty_like(t) for t in _targets(q, k, v, bias, wanted)]


def _given(draw, args, wanted):  # type: ignore[no-untyped-def]
    """The arguments of a backward call, from those of a forward one: o and lse are the definition's."""
    from .attention_forward import attention_forward  # it stands on this op

    o, lse = attention_forward.op.body(*args.values())  # type: ignore[attr-defined]
    rest = dict(list(args.items())[3:])
    first = {"grad": draw(*o.shape), "grad_lse": draw.f32(*lse.shape) if wanted & 16 else None}
    return first | {"q": args["q"], "k": args["k"], "v": args["v"], "o": o, "lse": lse} | rest | {"wanted": wanted & 15}


def _case(case: Case) -> Case:
    def make(draw, *shape):  # type: ignore[no-untyped-def]
        args = case.make(draw, *shape)
        return _given(draw, args, 31 if args["bias"] is not None else 23)

    return Case(case.name, make, case.shape)


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    draw.nan = None  # the definition carries one into every key's gradient, as 0 · NaN; a kernel only where it looks
    args = _attention.fuzz(draw, pick)
    most = 8 if args["bias"] is not None else 4
    return _given(draw, args, pick.choice((7, pick.randrange(2 * most))) % (2 * most) | pick.choice((0, 16)))


@op(allocate=_allocate, check=_check, fuzz=_fuzz, c=3.0, cases=[_case(c) for c in _attention.CASES])
def attention_backward(
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
) -> list[Tensor]:
    """The gradients of `attention_forward`. With P = exp(S - lse), S the scores:

        dV = Pᵀ dO,  dS = P (dO Vᵀ - rowsum(dO O) + d lse),  dQ = scale dS K,  dK = scale dSᵀ Q,  d bias = dS

    each summed over the queries' heads that share a head of k, v, the samples that share a row of them, and the dimensions
    that bias was broadcast along. Deterministic.

    Args:
        grad: [B, Sq, H, Dv], the gradient of o, of q's dtype. grad_lse: [B, H, Sq] float32, the gradient of lse, or None.
        o, lse: what the forward op returned. The others: as they were given to it.
        wanted: the sum of the bits of the gradients to compute: 1 q, 2 k, 4 v, 8 bias.

    Returns:
        The wanted gradients in that order, each contiguous, with the shape and dtype of its input.

    Raises:
        TypeError, ValueError, IndexError: dtype, shape or value outside of the above.

    Source: Dao et al. 2022, FlashAttention, appendix B.2.
    """
    call = _attention.spread(q, k, v, bias, mask, key_lengths, cu_q, cu_k, kv_index, causal)
    group = call.q.shape[1:3]
    g, out = (t.to(call.q.dtype).transpose(1, 2).unflatten(1, group) for t in (grad, o))
    delta, sums = (g * out).sum(-1, keepdim=True), lse.unflatten(1, group).unsqueeze(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.unflatten(1, group).unsqueeze(-1)
    dq, d_bias, dk, dv = [], [], torch.zeros_like(call.k), torch.zeros_like(call.v)
    for rows in call.blocks():
        top = sums[..., rows, :]
        p = (call.scores(rows, causal, scale) - top.masked_fill(top == -torch.inf, 0)).exp()
        ds = p * (g[..., rows, :] @ call.v.mT - delta[..., rows, :])
        dq.append(ds @ call.k * scale)
        dk = dk + (ds.mT @ call.q[..., rows, :]).sum(2, keepdim=True) * scale
        dv = dv + (p.mT @ g[..., rows, :]).sum(2, keepdim=True)
        d_bias.append(ds.flatten(1, 2))
    d_keys = [t.squeeze(2).transpose(1, 2) for t in (dk, dv)]
    if kv_index is not None:
        d_keys = [t.new_zeros((k.shape[0], *t.shape[1:])).index_add(0, kv_index.clamp(0, len(k) - 1), t) for t in d_keys]
    found = [call.marked(torch.cat(dq, -2).flatten(1, 2).transpose(1, 2)), *d_keys]
    if bias is not None:
        found.append(_attention.sum_like(d_bias, bias))
    chosen = [total for i, total in enumerate(found) if wanted >> i & 1]
    return [total.to(t.dtype, copy=True) for t, total in zip(_targets(q, k, v, bias, wanted), chosen, strict=True)]
