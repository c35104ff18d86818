"""An activation, gated or not, with 8-bit codes for what it writes: the input of an MLP's second Linear."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _norm, _quantize


def _tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda h: h, "gelu": F.gelu, "gelu_tanh": _tanh, "silu": F.silu}
GATED: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "geglu_tanh": _tanh, "swiglu": F.silu}


def _columns(x: Tensor, activation: str) -> int:
    return x.shape[-1] // 2 if activation in GATED else x.shape[-1]


def _check(x, activation, smooth, rotate):  # type: ignore[no-untyped-def]
    if x.ndim < 1:
        raise ValueError(f"x: expected at least one dimension, [..., D]; got shape {list(x.shape)}")
    if x.dtype not in _norm.FLOATS:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if activation not in PLAIN and activation not in GATED:
        raise ValueError(f"activation: expected one of {', '.join([*PLAIN, *GATED])}; got {activation!r}")
    if activation in GATED and x.shape[-1] % 2:
        raise ValueError(f"x: expected an even number of columns for {activation!r}, got shape {list(x.shape)}")
    _quantize.check(x, _columns(x, activation), smooth, rotate)


def _allocate(x, activation, smooth, rotate):  # type: ignore[no-untyped-def]
    return _quantize.empty(x, _columns(x, activation))


def _drawn(activation, smooth=False, rotate=0):  # type: ignore[no-untyped-def]
    def make(draw, *shape):  # type: ignore[no-untyped-def]
        d = shape[-1] // 2 if activation in GATED else shape[-1]
        return {"x": draw(*shape), "activation": activation, "smooth": draw(d) if smooth else None, "rotate": rotate}

    return make


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    activation, rotate = pick.choice((*PLAIN, *GATED)), pick.choice((0, 0, 0, *_quantize.ROTATIONS))
    d = rotate * pick.size(12) if rotate else pick.size(3000)
    shape = [pick.size(3, 0), pick.size(9, 0), 2 * d if activation in GATED else d][pick.randrange(3) :]
    smooth = pick.maybe(lambda: pick.choice((draw, draw.f32))(d))
    return {"x": draw(*shape), "activation": activation, "smooth": smooth, "rotate": rotate}


def _eager(x, activation, smooth, rotate):  # type: ignore[no-untyped-def]
    return _quantize.eager(_tanh(x))


def _eager_gated(x, activation, smooth, rotate):  # type: ignore[no-untyped-def]
    a, b = x.chunk(2, -1)
    return _quantize.eager(F.silu(a) * b)


def _eager_rotated(x, activation, smooth, rotate):  # type: ignore[no-untyped-def]
    return _quantize.eager(_tanh(x), rotate)


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("none", _drawn("none", smooth=True), (2, 9, 72)),
        Case("gelu", _drawn("gelu"), (3, 5, 65)),
        Case("gelu-tanh", _drawn("gelu_tanh"), (2, 4, 33)),
        Case("silu", _drawn("silu", smooth=True), (7, 130)),
        Case("geglu", _drawn("geglu", smooth=True), (2, 5, 2 * 65)),
        Case("geglu-tanh", _drawn("geglu_tanh"), (3, 2 * 48)),
        Case("swiglu", _drawn("swiglu"), (2, 3, 2, 2 * 31)),
        Case("half", lambda draw: {"x": draw(2, 6, 140).chunk(2, dim=-1)[1], "activation": "gelu_tanh"}),
        Case("skip-token", lambda draw: {"x": draw(2, 6, 48)[:, 1:], "activation": "swiglu", "smooth": draw.f32(24)}),
        Case("tails", lambda draw: {"x": 4 * draw(7, 33), "activation": "gelu"}),
        Case("one-row", _drawn("none"), (257,)),
        Case("one-column", _drawn("silu"), (5, 1)),
        Case("one-column-gated", _drawn("geglu"), (5, 2)),
        Case("no-samples", _drawn("gelu", smooth=True), (0, 4, 16)),
        Case("no-tokens", _drawn("swiglu"), (2, 0, 16)),
        Case("width", _drawn("gelu_tanh"), (2, 1152)),
        Case("rotated-64", _drawn("none", rotate=64), (2, 3, 192)),
        Case("rotated-128", _drawn("gelu_tanh", True, 128), (5, 128)),
        Case("rotated-256", _drawn("swiglu", True, 256), (2, 3, 2 * 512)),
        Case("rotated-columns", lambda draw: {"x": draw(256, 5).t(), "activation": "silu", "rotate": 128}),
        Case("rotated-widest", _drawn("geglu", rotate=256), (1, 2 * 20224)),
        Case("wide", _drawn("silu", smooth=True), (2, 8191)),
        Case("widest", _drawn("swiglu"), (1, 2 * 20001)),
        Case(
            "dit-xl-512",
            _drawn("gelu_tanh"),
            (1, 1024, 4608),
            "DiT-XL/2's MLP at 512²",
            _eager,
            lambda b, n, d: 20 * b * n * d,  # one exponential and one division; the codes 3
        ),
        Case(
            "dit-xl-512-rotated",
            _drawn("gelu_tanh", rotate=256),
            (1, 1024, 4608),
            "DiT-XL/2's MLP at 512², rotated",
            _eager_rotated,
            lambda b, n, d: 28 * b * n * d,  # and a sum a column and step
        ),
        Case(
            "swiglu-1024",
            _drawn("swiglu"),
            (1, 1024, 2 * 3072),
            "a SwiGLU of 3072 columns, 1024 tokens",
            _eager_gated,
            lambda b, n, d: 9 * b * n * d,  # of each of D/2 columns: one exponential, one division, the codes 3
        ),
    ],
)
def act_quantize(x: Tensor, activation: str = "none", smooth: Tensor | None = None, rotate: int = 0) -> list[Tensor]:
    """8-bit codes, and one scale a row, of activation(x) · smooth, in one pass.

    h is float32 and is not rounded to x's dtype. Of each row (the last dimension), with amax = max |h|:
    codes = round(h · (127 / amax)), half to even; code_scale = amax / 127; h ≈ codes · code_scale.
    With `rotate` h is H h, H orthonormal: blocks of a Hadamard matrix of ±1 over √rotate, the root going to code_scale alone.

    Args:
        x: [..., D], or [..., 2 D] for a gated activation; float32, float16, bfloat16 (or float64, on the reference), D >= 1,
            any strides.
        activation: "none"; "gelu" (by erf), "gelu_tanh", "silu"; or gated, with a, b = x.chunk(2, -1): "geglu", gelu(a) · b,
            "geglu_tanh" or "swiglu", silu(a) · b.
        smooth: [D], a factor a column, of any of these dtypes: the inverse of what the Linear's weight was multiplied by.
        rotate: 0, or 64, 128 or 256, a divisor of D: columns that are mixed, by groups of so many, so that no outlier sets a
            row's scale alone. The weight was rotated alike: W h = (W H)(H h), H being its own inverse.

    Returns:
        [codes, code_scale], contiguous: int8 [..., D], in -127..127; float32 of shape x.shape[:-1]. A row of nothing larger
        than 2^-100 (rotated: before the root) counts as zeros: codes 0, scale 1. Where h is not finite, the row's codes are 0
        and its scale says so: NaN where a NaN is (rotated: or two infinities meet), else infinity.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape outside of the above, or an unknown `activation` or `rotate`.
        RuntimeError: a gradient is wanted; there is none.

    Source: Dettmers et al. 2022 (absmax, by row); Xiao et al. 2023, SmoothQuant, eq. 3; Ashkboos et al. 2024, QuaRot
    (rotations); Shazeer 2020 (gated activations).
    """
    if activation in GATED:
        a, b = _norm.widen(x).chunk(2, -1)
        return _quantize.rows(GATED[activation](a) * b, smooth, rotate)
    return _quantize.rows(PLAIN[activation](_norm.widen(x)), smooth, rotate)
