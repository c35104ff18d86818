"""A Linear of 8-bit codes: exact integer products, then one epilogue (LLM.int8, SmoothQuant, Q-DiT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _linear
from ._linear import COLUMNS, DEPTH, DTYPES


def pack_w8(codes: Tensor) -> Tensor:
    """Int8 codes [N, K] of a weight as every rung reads them: uint8 [⌈N/64⌉, ⌈K/4⌉, 64, 4], code + 128, padded by code 0.

    Four consecutive inputs of an output share a 32-bit word: what `vpdpbusd` and a tensor core's fragment take.
    Raises TypeError for a dtype other than int8, ValueError for a tensor that is not [N, K].
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"codes: expected [N, K], got shape {list(codes.shape)}")
    n, k = codes.shape
    padded = F.pad(codes.to(torch.int16) + 128, (0, -k % DEPTH, 0, -n % COLUMNS), value=128).to(torch.uint8)
    return padded.reshape(-(-n // COLUMNS), COLUMNS, -(-k // DEPTH), DEPTH).transpose(1, 2).contiguous()


def unpack_w8(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `pack_w8`: int8 [n, k]."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * COLUMNS, packed.shape[1] * DEPTH)[:n, :k]
    return (rows.to(torch.int16) - 128).to(torch.int8)


def _check(x, x_scale, weight, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    _linear.check(x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype)
    _linear.check_packed(weight, weight_scale.shape[0], x.shape[-1], DEPTH, "pack_w8")


def _allocate(x, x_scale, weight, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    return _linear.allocate(x, x_scale, weight_scale, dtype)


def _packed(draw, n, k):  # type: ignore[no-untyped-def]
    codes = torch.randint(-127, 128, (n, k), generator=draw.generator, dtype=torch.int8)
    return pack_w8(codes).to(draw.device)


def _drawn(draw, *shape, n=0, **more):  # type: ignore[no-untyped-def]
    """The scales make results of the size of 1."""
    return {
        "x": draw.codes(*shape),
        "x_scale": draw.f32(*shape[:-1]).abs() / 73,
        "weight": _packed(draw, n, shape[-1]),
        "weight_scale": draw.f32(n).abs() / (73 * max(1, shape[-1]) ** 0.5),
        "dtype": _linear.named(draw),
        **more,
    }


def _mlp(draw, m, k, n):  # type: ignore[no-untyped-def]
    return _drawn(draw, m, k, n=n, bias=draw(n), activation="gelu_tanh")


def _eager(x, x_scale, weight, weight_scale, bias, activation, dtype):  # type: ignore[no-untyped-def]
    """What an eager user of int8 does: the codes' product, then a pass a line."""
    codes = unpack_w8(weight, weight_scale.shape[0], x.shape[-1])
    y = torch._int_mm(x, codes.t()).float() * x_scale[:, None] * weight_scale + bias
    return F.gelu(y, approximate="tanh").to(DTYPES[dtype])


def _flops(m, k, n):  # type: ignore[no-untyped-def]
    return 2 * m * k * n


def _fuzz(draw, pick):  # type: ignore[no-untyped-def]
    return _linear.fuzzed(draw, pick, _drawn)


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    gradient=False,
    cases=[
        Case("plain", lambda d: _drawn(d, 5, 32, n=64)),
        Case("tails", lambda d: _drawn(d, 3, 13, 35, n=67, bias=d(67))),
        Case("many-rows", lambda d: _drawn(d, 113, 72, n=130, bias=d.f32(130), activation="gelu")),
        Case("gelu-tanh", lambda d: _drawn(d, 7, 129, n=48, bias=d(48), activation="gelu_tanh")),
        Case("silu", lambda d: _drawn(d, 2, 9, 64, n=33, activation="silu")),
        Case("gated", lambda d: _drawn(d, 2, 9, 40, n=65, bias=d(65), gate=d(2, 65), residual=d(2, 9, 65))),
        Case("mixed", lambda d: _drawn(d, 2, 6, 17, n=20, gate=d.f32(2, 6, 20), residual=d.f32(2, 6, 20))),
        Case("chunk", lambda d: _drawn(d, 2, 4, 24, n=32, gate=d(2, 6 * 32).chunk(6, dim=-1)[5])),
        Case(
            "low-rank",
            lambda d: _drawn(d, 37, 70, n=70, bias=d(70), activation="gelu_tanh", **_linear.low_rank(d, 37, r=33, n=70)),
        ),
        Case(
            "low-rank-gated",
            lambda d: _drawn(d, 2, 9, 40, n=65, gate=d(2, 65), residual=d(2, 9, 65), **_linear.low_rank(d, 2, 9, r=5, n=65)),
        ),
        Case("rank-0", lambda d: _drawn(d, 3, 16, n=8, **_linear.low_rank(d, 3, r=0, n=8))),
        Case("vector", lambda d: _drawn(d, 31, n=3)),
        Case("one", lambda d: _drawn(d, 1, 1, n=1)),
        Case("deep", lambda d: _drawn(d, 2, 4611, n=7)),
        Case("no-rows", lambda d: _drawn(d, 0, 16, n=8)),
        Case("no-inputs", lambda d: _drawn(d, 3, 0, n=8, bias=d(8))),
        Case("no-outputs", lambda d: _drawn(d, 3, 8, n=0)),
        Case(
            "dit-xl-512",
            _mlp,
            (1024, 1152, 4608),
            "DiT-XL/2 at 512²: the MLP's first Linear",
            _eager,
            _flops,
            arithmetic="int8",
        ),
        Case(
            "dit-xl-256",
            _mlp,
            (512, 1152, 1152),
            "DiT-XL/2 at 256², batch 2: a square Linear",
            _eager,
            _flops,
            arithmetic="int8",
        ),
        Case("few-rows", _mlp, (32, 4096, 4096), "32 tokens", _eager, _flops, arithmetic="int8"),
    ],
)
def linear_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: str = "bfloat16",
) -> Tensor:
    """activation(x Wᵀ · x_scale · weight_scale + bias + low up) · gate + residual, of int8 codes, whose sums are exact.

    Args:
        x: int8 codes [..., K], any strides, K up to 131 071: a row's products fit into 32 bits.
        x_scale: float32 [...], one a row: `norm_quantize` and `act_quantize` return both.
        weight: uint8 [⌈N/64⌉, ⌈K/4⌉, 64, 4], what `pack_w8` makes of int8 codes [N, K].
        weight_scale: float32 [N], one an output.
        bias: [N].
        low, up: [..., R] and [R, N], together or not at all: a low-rank branch, what of x it passed down to R columns, and the
            way up again (LoRA, SVDQuant). Their product is summed in float32.
        gate: [N] shared, [B, N] per sample, [B, S, N] per token, or [B, F, 1, N] per frame, as `norm_modulate`'s operands.
        residual: [..., N]; bias, low, up, gate and residual are float32, float16 or bfloat16.
        activation: "none", "gelu", "gelu_tanh" or "silu".
        dtype: the result's, "float32", "float16" or "bfloat16".

    Returns:
        A contiguous tensor [..., N]. The epilogue is float32, rounded once.

    Raises:
        TypeError, ValueError: an argument outside of the above. RuntimeError: a gradient is wanted; there is none.

    Source: Dettmers et al. 2022 (arXiv 2208.07339), vector-wise quantization.
    """
    n, k = weight_scale.shape[0], x.shape[-1]
    codes = unpack_w8(weight, n, k)
    return _linear.define(codes, x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype)
