"""The gradient of `norm_modulate` and `gate_residual_norm`: every input's, in one pass and one sum over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from . import _broadcast, _norm

WANTED = ("x", "scale", "shift", "weight", "bias", "delta", "gate")  # the bits of `wanted`, lowest first


def _targets(x, scale, shift, weight, bias, delta, gate, wanted):  # type: ignore[no-untyped-def]
    """The inputs whose gradients are wanted."""
    return [t for i, t in enumerate((x, scale, shift, weight, bias, delta, gate)) if wanted >> i & 1]


def _check(grad, x, scale, shift, weight, bias, norm, eps, eps_mode, residual, delta, gate, wanted):  # type: ignore[no-untyped-def]
    _norm.check(x, norm, eps, eps_mode, scale=scale, shift=shift, weight=weight, bias=bias, gate=gate)
    for name, t in (("grad", grad), ("residual", residual), ("delta", delta)):
        if t is not None:
            _norm.like(name, t, x)
    if not 0 <= wanted < 1 << len(WANTED):
        raise ValueError(f"wanted: expected 0 to {(1 << len(WANTED)) - 1}, a bit each for {', '.join(WANTED)}; got {wanted}")
    targets = _targets(x, scale, shift, weight, bias, delta, gate, wanted)
    if any(t is None for t in targets):
        raise ValueError(f"wanted: {wanted:#b} asks for the gradient of an input that is None")
    if gate is not None and delta is None:
        raise ValueError("gate: expected None without delta")


def _allocate(grad, x, scale, shift, weight, bias, norm, eps, eps_mode, residual, delta, gate, wanted):  # type: ignore[no-untyped-def]
    return [empty_like(t) for t in _targets(x, scale, shift, weight, bias, delta, gate, wanted)]


def unpack(found: Sequence[Tensor], wanted: Sequence[bool]) -> Iterator[Tensor | None]:
    """The gradients that were found, None for those that were not wanted."""
    gradients = iter(found)
    return (next(gradients) if w else None for w in wanted)


def bits(wanted: Iterable[bool]) -> int:
    """The argument `wanted`."""
    return sum(int(w) << i for i, w in enumerate(wanted))


def _case(name: str, *shape: int, wanted: int = 0b11111, **rest):  # type: ignore[no-untyped-def]
    """`rest` maps an argument to the shape of its tensor ("f32" first for one that is always float32), or to its value."""

    def args(draw):  # type: ignore[no-untyped-def]
        drawn = {k: draw(*v) if isinstance(v, tuple) else v for k, v in rest.items()}
        given = dict.fromkeys(("scale", "shift", "weight", "bias", "residual", "delta", "gate"))
        how = dict(zip(("norm", "eps", "eps_mode"), _norm.DEFAULTS, strict=True))
        return {"grad": draw(*shape), "x": draw(*shape), **given, **how, **drawn, "wanted": wanted}

    return Case(name, args)


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    shape, operand = _broadcast.drawn(draw, pick, 2)  # of one column, LayerNorm's gradient is all cancelled
    given = {name: pick.maybe(operand) for name in ("scale", "shift", "weight", "bias")}
    given |= {name: pick.maybe(lambda: draw(*shape)) for name in ("residual", "delta")}
    given["gate"] = pick.maybe(operand) if given["delta"] is not None else None
    order = [given.get(name, True) is not None for name in WANTED]
    wanted = bits(has and pick.random() < 0.7 for has in order)
    return {"grad": draw(*shape), "x": draw(*shape), **given, **_norm.how(pick), "wanted": wanted}


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    c=3.0,
    cases=[
        _case("adaln", 2, 35, 72, scale=(2, 72), shift=(2, 72), wanted=0b111),
        _case("plain", 3, 5, 64, wanted=0b1),
        _case("affine", 2, 37, 48, weight=(48,), bias=(48,), eps=1e-5, wanted=0b11001),
        _case("all", 2, 9, 33, scale=(2, 33), shift=(2, 33), weight=(33,), bias=(33,)),
        _case("no-x", 2, 9, 33, scale=(2, 33), shift=(2, 33), weight=(33,), bias=(33,), wanted=0b11110),
        _case("per-token", 2, 6, 33, scale=(2, 6, 33), shift=(2, 6, 33), weight=(33,), wanted=0b1111),
        _case("per-frame", 2, 12, 40, scale=(2, 3, 1, 40), shift=(2, 4, 1, 40), wanted=0b111),
        _case("per-frame-4d", 2, 3, 4, 40, scale=(2, 3, 1, 40), shift=(2, 40), bias=(40,), wanted=0b10111),
        _case("rms-outside", 41, 60, weight=(60,), norm="rms", eps=1e-8, eps_mode="outside", wanted=0b1001),
        _case("layer-outside", 3, 130, eps=1e-3, eps_mode="outside", wanted=0b1),
        _case("rms-per-sample", 2, 3, 2, 31, weight=(2, 31), norm="rms", wanted=0b1001),
        _case("one-row", 257, scale=(257,), wanted=0b11),
        _case("one-column", 5, 1, shift=(5, 1), wanted=0b101),
        _case("no-samples", 0, 4, 16, scale=(0, 16), weight=(16,), wanted=0b1011),
        _case("no-tokens", 2, 0, 16, scale=(2, 16), shift=(2, 16), wanted=0b111),
        _case(
            "gated", 2, 35, 72, residual=(2, 35, 72), delta=(2, 35, 72), gate=(2, 72), scale=(2, 72), shift=(2, 72),
            wanted=0b1100111,
        ),
        _case("gated-shared", 3, 40, 24, delta=(3, 40, 24), gate=(24,), weight=(24,), wanted=0b1101001),
        _case("residual", 2, 9, 48, residual=(2, 9, 48), delta=(2, 9, 48), norm="rms", wanted=0b0100001),
        _case("wide", 5, 8191, weight=(8191,), scale=(5, 8191), norm="rms", wanted=0b1011),
        _case("widest", 1, 66816, weight=(66816,), bias=(66816,), wanted=0b11001),
    ],
)  # fmt: skip
def norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    residual: Tensor | None,
    delta: Tensor | None,
    gate: Tensor | None,
    wanted: int,
) -> list[Tensor]:
    """The gradients of x_new = x_old + gate · delta, y = norm_modulate(x_new, …) or, without delta, of the norm alone.

    With h = (x - mean) / d, dh = grad · (1 + scale) · weight, and k = 1, or d / sqrt(ms) where eps is outside of the root
    (0 where ms is 0: the norm has a kink there, and a padded token no gradient):

        G       = (dh - mean(dh) - k h mean(dh h)) / d + residual          RMSNorm without mean(dh)
        d shift = sum grad,  d scale = sum grad (h weight + bias),  d bias = sum grad (1 + scale),
        d weight = sum grad (1 + scale) h,  d delta = G gate,  d gate = sum G delta

    where each sum runs over the rows that share a row of the operand. Deterministic.

    Args:
        grad: [..., D], the gradient of y. x: x_new, like grad.
        scale, shift, weight, bias, norm, eps, eps_mode: as they were given to the norm.
        residual: the gradient of x_new from elsewhere, like x, or None.
        delta, gate: of `gate_residual_norm`, or None. delta is shaped like x; gate broadcasts as scale does.
        wanted: the sum of the bits of the gradients to compute: 1 x (or x_old, the same), 2 scale, 4 shift, 8 weight,
            16 bias, 32 delta, 64 gate.

    Returns:
        The wanted gradients in that order, each contiguous, with the shape and dtype of its input.

    Raises:
        TypeError, ValueError: dtype, shape or value outside of the above.

    Source: the chain rule on `norm_modulate`'s and `gate_residual_norm`'s definitions.
    """
    g, one = _norm.widen(grad), torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    e, ms = _norm.centred(_norm.widen(x), norm)
    root = ms.sqrt()
    divisor = (ms + eps).sqrt() if eps_mode == "inside" else root + eps
    k = one if eps_mode == "inside" else torch.where(ms == 0, 0, divisor / torch.where(ms == 0, 1, root))
    w, b, s, a = (one * 0 if t is None else _broadcast.align(t, x).to(g.dtype) for t in (weight, bias, scale, gate))
    w, a = one if weight is None else w, one if gate is None else a
    h = e / divisor
    dh = g * (1 + s) * w
    total = dh - k * h * (dh * h).mean(-1, keepdim=True)
    if norm == "layer":
        total = total - dh.mean(-1, keepdim=True)
    total = total / divisor
    if residual is not None:
        total = total + residual.to(g.dtype)
    change = None if delta is None else delta.to(g.dtype)
    rows = (total, g * (h * w + b), g, g * (1 + s) * h, g * (1 + s), total * a, None if change is None else total * change)
    found = []
    for i, (t, values) in enumerate(zip((x, scale, shift, weight, bias, delta, gate), rows, strict=True)):
        if wanted >> i & 1:
            assert t is not None and values is not None
            summed = values if t.shape == x.shape else _broadcast.gather(values, t)
            found.append(summed.to(t.dtype, copy=True))  # never grad itself
    return found
