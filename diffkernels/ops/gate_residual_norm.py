"""The residual stream's update, its gate, and the next norm with its modulation, in one pass (DiT, PixArt, WAN, DiMR)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _broadcast, _norm
from .norm_backward import bits, norm_backward, unpack
from .norm_modulate import norm_modulate


def _check(x, delta, gate, scale, shift, weight, bias, norm, eps, eps_mode):  # type: ignore[no-untyped-def]
    _norm.check(x, norm, eps, eps_mode, scale=scale, shift=shift, weight=weight, bias=bias, gate=gate)
    _norm.like("delta", delta, x)


def _allocate(x, delta, gate, scale, shift, weight, bias, norm, eps, eps_mode):  # type: ignore[no-untyped-def]
    return [empty_like(x), empty_like(x)]


def _eager(x, delta, gate, scale, shift):  # type: ignore[no-untyped-def]
    x = x + gate.unsqueeze(1) * delta
    return x, F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _adaln(draw, b, n, d):  # type: ignore[no-untyped-def]
    _, _, gate, shift, scale, _ = draw(b, 6 * d).chunk(6, dim=-1)
    return {"x": draw(b, n, d), "delta": draw(b, n, d), "gate": gate, "scale": scale, "shift": shift}


def _flops(b, n, d):  # type: ignore[no-untyped-def]
    return 10 * b * n * d  # norm_modulate's 8, and gate and sum


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    shape, operand = _broadcast.drawn(draw, pick)
    operands = {name: pick.maybe(operand) for name in ("gate", "scale", "shift", "weight", "bias")}
    x, delta = (pick.choice((draw, draw, draw.f32))(*shape) for _ in range(2))
    return {"x": x, "delta": delta, **operands, **_norm.how(pick)}


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("adaln", _adaln, (2, 9, 72)),
        Case("no-gate", lambda d: {"x": d(3, 5, 64), "delta": d(3, 5, 64)}),
        Case("affine", lambda d: {"x": d(2, 7, 48), "delta": d(2, 7, 48), "weight": d(48), "bias": d(48), "eps": 1e-5}),
        Case("layer-scale", lambda d: {"x": d(2, 7, 40), "delta": d(2, 7, 40), "gate": d(40), "weight": d(40), "norm": "rms"}),
        Case(
            "per-token",
            lambda d: {"x": d(2, 6, 33), "delta": d(2, 6, 33), "gate": d(2, 6, 33), "scale": d(2, 6, 33), "weight": d(33)},
        ),
        Case(
            "per-frame",
            lambda d: {"x": d(2, 12, 40), "delta": d(2, 12, 40), "gate": d(2, 3, 1, 40), "shift": d(2, 4, 1, 40)},
        ),
        Case("wide-stream", lambda d: {"x": d.f32(2, 9, 65), "delta": d(2, 9, 65), "gate": d(2, 65), "scale": d(2, 65)}),
        Case("wide-delta", lambda d: {"x": d(2, 9, 64), "delta": d.f32(2, 9, 64), "gate": d.f32(2, 64)}),
        Case(
            "rms-outside",
            lambda d: {"x": d(4, 60), "delta": d(4, 60), "weight": d(60), "norm": "rms", "eps": 1e-8, "eps_mode": "outside"},
        ),
        Case("one-row", lambda d: {"x": d(257), "delta": d(257), "scale": d(257)}),
        Case("one-column", lambda d: {"x": d(5, 1), "delta": d(5, 1), "gate": d(5, 1)}),
        Case("no-samples", lambda d: {"x": d(0, 4, 16), "delta": d(0, 4, 16), "gate": d(0, 16)}),
        Case("no-tokens", lambda d: {"x": d(2, 0, 16), "delta": d(2, 0, 16), "scale": d(2, 16)}),
        Case("wide", lambda d: {"x": d(2, 8191), "delta": d(2, 8191), "gate": d(8191), "weight": d(8191), "norm": "rms"}),
        Case("widest", lambda d: {"x": d(1, 66816), "delta": d(1, 66816), "weight": d(66816), "bias": d(66816)}),
        Case("dit-xl-256", _adaln, (8, 256, 1152), "DiT-XL/2 at 256², batch 8", _eager, _flops, backward=True),
        Case("flux-1024", _adaln, (1, 4608, 3072), "FLUX at 1024²", _eager, _flops),
    ],
)
def gate_residual_norm(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    eps_mode: str = "inside",
) -> list[Tensor]:
    """x_new = x + gate · delta, then y = norm_modulate(x_new, …): two reads and two writes of the activation.

    Args:
        x: the residual stream, [..., D], float32, float16, bfloat16 (or float64, on the reference), any strides.
        delta: what the branch answers, of x's shape; its dtype may be another.
        gate: [D], [B, D], [B, S, D] or [B, F, 1, D], as `norm_modulate` takes scale; None is 1.
        scale, shift, weight, bias, norm, eps, eps_mode: of the next norm, as in `norm_modulate`.

    Returns:
        [x_new, y], contiguous, of x's shape and dtype. y is the norm of x_new as it was rounded; sums and statistics are
        float32.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape, `norm`, `eps` or `eps_mode` outside of the above.

    Source: Peebles & Xie 2023, adaLN-Zero; the next norm as in `norm_modulate`.
    """
    change = _norm.widen(delta)
    wide = torch.promote_types(_norm.widen(x).dtype, change.dtype)
    if gate is not None:
        change = change * _broadcast.align(gate, x).to(wide)
    x_new = (x.to(wide) + change).to(x.dtype)
    return [x_new, norm_modulate.op.body(x_new, scale, shift, weight, bias, norm, eps, eps_mode)]  # type: ignore[attr-defined]


@gate_residual_norm.op.backward(outputs=True, unsaved=("x",))  # type: ignore[attr-defined]
def _backward(inputs, outputs, grads, wanted):  # type: ignore[no-untyped-def]
    _, delta, gate, scale, shift, weight, bias, *how = inputs
    x_new, (residual, grad) = outputs[0], grads
    # d delta without a gate is d x itself
    order = (wanted[0] or (wanted[1] and gate is None), *wanted[3:7], wanted[1] and gate is not None, wanted[2])
    if grad is None:
        grad = torch.zeros_like(x_new)
    found = norm_backward(grad, x_new, scale, shift, weight, bias, *how, residual, delta, gate, bits(order))
    dx, *affine, d_delta, d_gate = unpack(found, order)
    if gate is None and wanted[1]:
        assert dx is not None
        d_delta = dx.to(delta.dtype)
    return dx if wanted[0] else None, d_delta, d_gate, *affine, None, None, None
