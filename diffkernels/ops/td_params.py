"""Time-dependent parameters of a whole network at once (DiMR's TD-LN and TD-RMSNorm)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _norm
from .norm_backward import bits, unpack


def _check(p0, p1, w, b, tau):  # type: ignore[no-untyped-def]
    for name, t in (("p0", p0), ("p1", p1), ("w", w), ("b", b), ("tau", tau)):
        if t.dtype not in _norm.FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {list(t.shape)}")
        if t is not tau and (t.shape != p0.shape or t.dtype != p0.dtype):
            raise ValueError(f"{name}: expected {list(p0.shape)} of {p0.dtype} like p0, got {list(t.shape)} of {t.dtype}")


def _check_backward(grad, p0, p1, w, b, tau, wanted):  # type: ignore[no-untyped-def]
    _check(p0, p1, w, b, tau)
    if grad.shape != (len(tau), len(p0)) or grad.dtype != p0.dtype:
        raise ValueError(f"grad: expected [{len(tau)}, {len(p0)}] of {p0.dtype}, got {list(grad.shape)} of {grad.dtype}")
    if not 0 <= wanted < 32:
        raise ValueError(f"wanted: expected 0 to 31, a bit each for p0, p1, w, b, tau; got {wanted}")


def _allocate(p0, p1, w, b, tau):  # type: ignore[no-untyped-def]
    return p0.new_empty(tau.shape[0], p0.shape[0])


def _allocate_backward(grad, p0, p1, w, b, tau, wanted):  # type: ignore[no-untyped-def]
    return [empty_like(t) for i, t in enumerate((p0, p1, w, b, tau)) if wanted >> i & 1]


def _drawn(draw, count, times, wide_tau=True):  # type: ignore[no-untyped-def]
    tau = draw.f32(times) if wide_tau else draw(times)
    return {"p0": draw(count), "p1": draw(count), "w": draw(count), "b": draw(count), "tau": tau}


def _with_grad(draw, count, times, wanted=31, wide_tau=True):  # type: ignore[no-untyped-def]
    return {"grad": draw(times, count), **_drawn(draw, count, times, wide_tau), "wanted": wanted}


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    return _drawn(draw, pick.size(9000, 0), pick.size(8, 0), pick.choice((False, True)))


def _fuzz_backward(draw, pick):  # type: ignore[no-untyped-def]
    return _with_grad(draw, pick.size(9000, 0), pick.size(8, 0), pick.randrange(32), pick.choice((False, True)))


PAIRS = [960] * 78 + [480] * 21 + [960, 480] * 2 + [38400] * 2 + [480] * 2  # DiMR-XL/2R's modules


def _eager(p0, p1, w, b, tau):  # type: ignore[no-untyped-def]
    """A module at a time, as the official code does it."""
    out, at = [], 0
    for size in PAIRS:
        own = slice(at, at + size)
        s = torch.sigmoid(tau[:, None] * (1 + w[own]) + b[own])
        out.append(s * p0[own] + (1 - s) * p1[own])
        at += size
    return out


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("one-time", _drawn, (37, 1)),
        Case("batch", _drawn, (1000, 5)),
        Case("schedule", _drawn, (61, 50)),
        Case("half-tau", _drawn, (33, 3, False)),
        Case("one-parameter", _drawn, (1, 4)),
        Case("no-times", _drawn, (16, 0)),
        Case("no-parameters", _drawn, (0, 3)),
        Case("many", _drawn, (9001, 2)),
        Case("dimr-xl", _drawn, (sum(PAIRS), 1), "DiMR-XL/2R's 107 modules, one time", _eager, lambda p, t: 20 * p * t),
    ],
)
def td_params(p0: Tensor, p1: Tensor, w: Tensor, b: Tensor, tau: Tensor) -> Tensor:
    """s · p0 + (1 - s) · p1 with s = sigmoid(tau · (1 + w) + b), for every parameter and every tau.

    Args:
        p0, p1, w, b: [P] each, of one dtype: float32, float16, bfloat16 (or float64, on the reference). A whole network's
            lie one after the other (`nn.TimeTable`).
        tau: [T], one time, a batch of them or a schedule; any float dtype.

    Returns:
        [T, P], contiguous, of p0's dtype; arithmetic is float32.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape outside of the above, or dtypes that differ.

    Source: DiMR (arXiv 2406.09416) §3.2; the per-channel form, with w stored less 1, is the released code's.
    """
    q0, q1, v, c = (_norm.widen(t) for t in (p0, p1, w, b))
    s = torch.sigmoid(tau.to(q0.dtype)[:, None] * (1 + v) + c)
    return (q1 + s * (q0 - q1)).to(p0.dtype)


@op(
    allocate=_allocate_backward,
    check=_check_backward,
    fuzz=_fuzz_backward,
    c=3.0,
    cases=[
        Case("one-time", _with_grad, (257, 1)),
        Case("batch", _with_grad, (1000, 5)),
        Case("schedule", _with_grad, (61, 50)),
        Case("parameters", _with_grad, (130, 3, 0b01111)),
        Case("tau", _with_grad, (130, 3, 0b10000, False)),
        Case("no-times", _with_grad, (16, 0)),
        Case("no-parameters", _with_grad, (0, 3)),
        Case("many", _with_grad, (4099, 24)),
    ],
)
def td_params_backward(grad: Tensor, p0: Tensor, p1: Tensor, w: Tensor, b: Tensor, tau: Tensor, wanted: int) -> list[Tensor]:
    """The gradients of `td_params`.

    With z = tau (1 + w) + b, s = sigmoid(z) and dz = grad (p0 - p1) s (1 - s): d p0 = sum grad s, d p1 = sum grad (1 - s),
    d w = sum dz tau, d b = sum dz over the times, d tau = sum dz (1 + w) over the parameters. Deterministic.

    Args:
        grad: [T, P], of p0's dtype. p0, p1, w, b, tau: as they were given to `td_params`.
        wanted: the sum of the bits of the gradients to compute: 1 p0, 2 p1, 4 w, 8 b, 16 tau.

    Returns:
        The wanted gradients in that order, each with the shape and dtype of its input.

    Raises:
        TypeError, ValueError: dtype, shape or value outside of the above.

    Source: the chain rule on `td_params`.
    """
    q0, q1, v, c, g = (_norm.widen(t) for t in (p0, p1, w, b, grad))
    times = tau.to(g.dtype)[:, None]
    s = torch.sigmoid(times * (1 + v) + c)
    dz = g * (q0 - q1) * s * (1 - s)
    all_of_them = (
        lambda: (g * s).sum(0),
        lambda: (g * (1 - s)).sum(0),
        lambda: (dz * times).sum(0),
        lambda: dz.sum(0),
        lambda: (dz * (1 + v)).sum(1),
    )
    return [f().to(t.dtype) for i, (t, f) in enumerate(zip((p0, p1, w, b, tau), all_of_them, strict=True)) if wanted >> i & 1]


@td_params.op.backward()  # type: ignore[attr-defined]
def _backward(inputs, outputs, grads, wanted):  # type: ignore[no-untyped-def]
    found = td_params_backward(grads[0], *inputs, bits(wanted))
    return tuple(unpack(found, wanted))
