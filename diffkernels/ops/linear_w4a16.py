"""A Linear of 4-bit weights and inputs that are not coded: weight-only quantization (AWQ, QServe)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _linear, _norm
from .linear_w4a8_lowrank import GROUPS, check_packed_w4, drawn_w4, whole_w4


def _check(x, weight, group_scale, weight_scale, bias, low, up, gate, residual, activation):  # type: ignore[no-untyped-def]
    if x.dtype not in _norm.FLOATS:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"x: expected [..., K], got shape {list(x.shape)}")
    _linear.check_scales(weight_scale)
    _linear.check_rows(x, weight_scale.shape[0], bias, low, up, gate, residual, activation)
    check_packed_w4(weight, group_scale, weight_scale.shape[0], x.shape[-1])


def _allocate(x, weight, group_scale, weight_scale, bias, low, up, gate, residual, activation):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _drawn(draw, *shape, n=0, group=64, **more):  # type: ignore[no-untyped-def]
    return {"x": draw(*shape), **drawn_w4(draw, n, shape[-1], group), **more}


def _mlp(draw, m, k, n):  # type: ignore[no-untyped-def]
    return _drawn(draw, m, k, n=n, bias=draw(n), activation="gelu_tanh")


def _eager(x, weight, group_scale, weight_scale, bias, activation):  # type: ignore[no-untyped-def]
    """What an eager user of 4-bit weights does: the weight widened, then a Linear, then the activation."""
    wide = whole_w4(weight, group_scale, weight_scale.shape[0], x.shape[-1]).to(x.dtype) * weight_scale[:, None].to(x.dtype)
    return F.gelu(F.linear(x, wide, bias), approximate="tanh")


def _flops(m, k, n):  # type: ignore[no-untyped-def]
    return 2 * m * k * n


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    return _linear.fuzzed(draw, pick, _drawn, group=pick.choice(GROUPS))


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("plain", lambda d: _drawn(d, 5, 64, n=64)),
        Case("tails", lambda d: _drawn(d, 3, 13, 83, n=67, bias=d(67), **_linear.low_rank(d, 3, 13, r=7, n=67))),
        Case(
            "groups-128",
            lambda d: _drawn(d, 37, 260, n=130, group=128, activation="gelu", **_linear.low_rank(d, 37, r=33, n=130)),
        ),
        Case(
            "chunks",
            lambda d: _drawn(
                d, 75, 2305, n=130, bias=d.f32(130), activation="gelu_tanh", **_linear.low_rank(d, 75, r=5, n=130)
            ),
        ),
        Case("few", lambda d: _drawn(d, 23, 777, n=70, group=128, bias=d(70))),
        Case("gated", lambda d: _drawn(d, 2, 9, 40, n=65, bias=d(65), gate=d(2, 65), residual=d(2, 9, 65))),
        Case("silu", lambda d: _drawn(d, 2, 9, 128, n=33, activation="silu", **_linear.low_rank(d, 2, 9, r=16, n=33))),
        Case("vector", lambda d: _drawn(d, 31, n=131)),
        Case("one", lambda d: _drawn(d, 1, 1, n=1, **_linear.low_rank(d, 1, r=1, n=1))),
        Case("deep", lambda d: _drawn(d, 2, 4611, n=71, group=128)),
        Case("no-rows", lambda d: _drawn(d, 0, 16, n=8)),
        Case("no-inputs", lambda d: _drawn(d, 3, 0, n=8, bias=d(8), **_linear.low_rank(d, 3, r=2, n=8))),
        Case("no-outputs", lambda d: _drawn(d, 3, 8, n=0)),
        Case("dit-xl-512", _mlp, (1024, 1152, 4608), "DiT-XL/2 at 512²: the MLP's first Linear", _eager, _flops),
        Case("few-rows", _mlp, (32, 4096, 4096), "32 tokens", _eager, _flops),
    ],
)
def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x Wᵀ · weight_scale + bias + low up) · gate + residual with a weight of 4 bits, and x as it is.

    Of W's whole numbers, in -128..112, each is a code of 4 bits times a scale of its group of 64 or 128 inputs. They are exact
    in bfloat16: their products with x, and the sums of these, lose no more than a Linear's in x's dtype do. The order of the
    sums, and with it a last bit, may depend on how many rows a call has.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        weight: uint8 [⌈N/64⌉, ⌈K/8⌉, 64, 4], what `pack_w4` makes of codes [N, K] in -8..7.
        group_scale: uint8 [⌈N/64⌉, ⌈K/group⌉, 64], what `pack_w4` makes of scales in 1..16. The low four bits count.
        weight_scale: float32 [N].
        bias: [N].
        low, up: [..., R] and [R, N], together or not at all: a branch of R ranks, such as a LoRA.
        gate: [N] shared, [B, N] per sample, [B, S, N] per token, or [B, F, 1, N] per frame, as `norm_modulate`'s operands.
        residual: [..., N]; bias, low, up, gate and residual are float32, float16 or bfloat16.
        activation: "none", "gelu", "gelu_tanh" or "silu".

    Returns:
        A contiguous tensor [..., N] of x's dtype. Sums and epilogue are float32, rounded once.

    Raises:
        TypeError, ValueError: an argument outside of the above. RuntimeError: a gradient is wanted; there is none.

    Source: Lin et al. 2023, AWQ (arXiv 2306.00978), weight-only; Lin et al. 2024, QServe (arXiv 2405.04532), its scales.
    """
    wide = torch.promote_types(x.dtype, weight_scale.dtype)
    codes = whole_w4(weight, group_scale, weight_scale.shape[0], x.shape[-1])
    h = (x.to(wide) @ codes.to(wide).T) * weight_scale
    return _linear.epilogue(h, bias, low, up, gate, residual, activation).to(x.dtype)
