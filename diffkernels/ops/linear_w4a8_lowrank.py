"""A Linear of 4-bit weights and 8-bit inputs with a low-rank branch beside it (SVDQuant, QServe)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Case
from .._op import op
from . import _linear
from ._linear import COLUMNS, DEPTH, DTYPES

GROUPS = (64, 128)  # consecutive inputs of an output that share a scale
LARGEST = 16  # of these scales


def code_w4(weight: Tensor, group: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, K] rounded to 4 bits: int8 codes [N, K] in -8..7, uint8 group_scale [N, ⌈K/group⌉] in 1..16, float32
    weight_scale [N]; weight ≈ codes · group_scale · weight_scale.

    Of the 16 scales each group takes the one of the smallest squared error. A row that is not finite has such a weight_scale.
    Raises ValueError for another group.
    """
    if group not in GROUPS:
        raise ValueError(f"group: expected 64 or 128, got {group!r}")
    n, k = weight.shape
    w = F.pad(weight.detach().float(), (0, -k % group)).reshape(n, -(-k // group), group)
    largest = w.abs().amax((1, 2)) if w.numel() else w.new_zeros(n)
    weight_scale = torch.where(largest == 0, 1.0, largest / (7.5 * LARGEST))  # a NaN stays one
    w = w / weight_scale[:, None, None]
    least = torch.full_like(w[..., :1], torch.inf)
    codes, scale = torch.zeros_like(w), torch.ones_like(least)
    for s in range(1, LARGEST + 1):
        q = (w / s).round().clamp(-8, 7)
        error = (q * s - w).square().sum(-1, keepdim=True)
        better = error < least
        codes, scale, least = torch.where(better, q, codes), scale.where(~better, float(s)), least.minimum(error)
    return codes.flatten(1)[:, :k].to(torch.int8), scale[..., 0].to(torch.uint8), weight_scale


def pack_w4(codes: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and group scales of a weight [N, K] as every rung reads them, both uint8.

    Codes, int8 [N, K] in -8..7: [⌈N/64⌉, ⌈K/8⌉, 64, 4], code + 8 of inputs 8i + j in a byte's low half and of 8i + 4 + j in its
    high half, padded by code 0. Scales, uint8 [N, groups] in 1..16: scale - 1, [⌈N/64⌉, groups, 64].
    Raises TypeError for other dtypes, ValueError for other shapes or numbers.
    """
    check_w4(codes, group_scale)
    n, k = codes.shape
    q = F.pad((codes + 8).to(torch.uint8), (0, -k % (2 * DEPTH), 0, -n % COLUMNS), value=8)
    q = q.reshape(-(-n // COLUMNS), COLUMNS, -(-k // (2 * DEPTH)), 2, DEPTH)
    packed = (q[:, :, :, 0] | q[:, :, :, 1] << 4).transpose(1, 2).contiguous()
    scale = F.pad(group_scale - 1, (0, 0, 0, -n % COLUMNS)).reshape(-(-n // COLUMNS), COLUMNS, group_scale.shape[1])
    return packed, scale.transpose(1, 2).contiguous()


def check_w4(codes: Tensor, group_scale: Tensor) -> None:
    """Raises what `pack_w4` does."""
    if codes.dtype != torch.int8 or group_scale.dtype != torch.uint8:
        raise TypeError(f"codes, group_scale: expected int8 and uint8, got {codes.dtype} and {group_scale.dtype}")
    if codes.ndim != 2 or group_scale.ndim != 2 or group_scale.shape[0] != codes.shape[0]:
        raise ValueError(
            f"codes, group_scale: expected [N, K] and [N, groups], got {list(codes.shape)}, {list(group_scale.shape)}"
        )
    k = codes.shape[1]
    if all(-(-k // group) != group_scale.shape[1] for group in GROUPS):
        raise ValueError(f"group_scale: expected groups of 64 or 128 of {k} inputs, got {group_scale.shape[1]} groups")
    there = not codes.is_meta and codes.numel() > 0
    if there and not (codes.amin() >= -8 and codes.amax() <= 7):
        raise ValueError("codes: expected -8 to 7")
    if there and not (group_scale.amin() >= 1 and group_scale.amax() <= LARGEST):
        raise ValueError(f"group_scale: expected 1 to {LARGEST}")


def unpack_w4(packed: Tensor, group_scale: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_w4`: int8 [n, k] and uint8 [n, groups]."""
    both = torch.stack((packed & 15, packed >> 4), 3)  # [panels, eights, 64, 2, 4]
    rows = packed.shape[0] * COLUMNS
    codes = both.transpose(1, 2).reshape(rows, 2 * DEPTH * packed.shape[1])[:n, :k].to(torch.int8) - 8
    scale = group_scale.transpose(1, 2).reshape(rows, group_scale.shape[1])[:n]
    return codes.contiguous(), (scale & 15).contiguous() + 1


def whole_w4(packed: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """What `pack_w4` packed, codes times their groups' scales: int16 [n, k], in -128..112."""
    codes, scale = unpack_w4(packed, group_scale, n, k)
    group = group_of(group_scale, n, k) or GROUPS[0]
    return codes.to(torch.int16) * scale.to(torch.int16).repeat_interleave(group, 1)[:, :k]


def group_of(group_scale: Tensor, n: int, k: int) -> int | None:
    """The size of the groups of a packed scale, or None where it is not pack_w4's of a weight [n, k]."""
    if group_scale.dtype != torch.uint8 or group_scale.ndim != 3:
        return None
    fits = (g for g in GROUPS if tuple(group_scale.shape) == (-(-n // COLUMNS), -(-k // g), COLUMNS))
    return next(fits, None)


def check_packed_w4(weight, group_scale, n, k):  # type: ignore[no-untyped-def]
    """Raises where they are not what `pack_w4` makes of [n, k]."""
    _linear.check_packed(weight, n, k, 2 * DEPTH, "pack_w4")
    if group_scale.dtype != torch.uint8:
        raise TypeError(f"group_scale: expected uint8, as pack_w4 returns it, got {group_scale.dtype}")
    if group_of(group_scale, n, k) is None:
        shapes = " or ".join(str([-(-n // COLUMNS), -(-k // g), COLUMNS]) for g in GROUPS)
        raise ValueError(f"group_scale: expected {shapes}, got shape {list(group_scale.shape)}")


def _check(x, x_scale, weight, group_scale, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    _linear.check(x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype)
    check_packed_w4(weight, group_scale, weight_scale.shape[0], x.shape[-1])


def _allocate(x, x_scale, weight, group_scale, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    return _linear.allocate(x, x_scale, weight_scale, dtype)


def drawn_w4(draw, n, k, group):  # type: ignore[no-untyped-def]
    """A weight that keeps its input's size."""
    codes = torch.randint(-8, 8, (n, k), generator=draw.generator, dtype=torch.int8)
    scale = torch.randint(1, LARGEST + 1, (n, -(-k // group)), generator=draw.generator, dtype=torch.uint8)
    packed, group_scale = (t.to(draw.device) for t in pack_w4(codes, scale))
    return {"weight": packed, "group_scale": group_scale, "weight_scale": draw.f32(n).abs() / (45 * max(1, k) ** 0.5)}


def _drawn(draw, *shape, n=0, group=64, **more):  # type: ignore[no-untyped-def]
    """The scales make results of the size of 1."""
    return {
        "x": draw.codes(*shape),
        "x_scale": draw.f32(*shape[:-1]).abs() / 73,
        **drawn_w4(draw, n, shape[-1], group),
        "dtype": _linear.named(draw),
        **more,
    }


def _mlp(draw, m, k, n):  # type: ignore[no-untyped-def]
    return _drawn(draw, m, k, n=n, bias=draw(n), activation="gelu_tanh", **_linear.low_rank(draw, m, r=32, n=n))


def _eager(x, x_scale, weight, group_scale, weight_scale, bias, low, up, activation, dtype):  # type: ignore[no-untyped-def]
    """What an eager user of 4-bit weights does: the weight widened, then a product of floats, then a pass a line."""
    n, k = weight_scale.shape[0], x.shape[-1]
    wide = whole_w4(weight, group_scale, n, k).to(low.dtype) * weight_scale[:, None].to(low.dtype)
    y = F.linear(x.to(low.dtype), wide) * x_scale[:, None].to(low.dtype) + bias + low @ up
    return F.gelu(y, approximate="tanh").to(DTYPES[dtype])


def _flops(m, k, n):  # type: ignore[no-untyped-def]
    return 2 * m * (k + 32) * n


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
        Case("group-64", lambda d: _drawn(d, 113, 201, n=65, bias=d.f32(65), activation="gelu_tanh")),
        Case("gated", lambda d: _drawn(d, 2, 9, 40, n=65, bias=d(65), gate=d(2, 65), residual=d(2, 9, 65))),
        Case("silu", lambda d: _drawn(d, 2, 9, 128, n=33, activation="silu", **_linear.low_rank(d, 2, 9, r=16, n=33))),
        Case("vector", lambda d: _drawn(d, 31, n=3)),
        Case("one", lambda d: _drawn(d, 1, 1, n=1, **_linear.low_rank(d, 1, r=1, n=1))),
        Case("deep", lambda d: _drawn(d, 2, 4611, n=7, group=128)),
        Case("no-rows", lambda d: _drawn(d, 0, 16, n=8)),
        Case("no-inputs", lambda d: _drawn(d, 3, 0, n=8, bias=d(8), **_linear.low_rank(d, 3, r=2, n=8))),
        Case("no-outputs", lambda d: _drawn(d, 3, 8, n=0)),
        Case(
            "dit-xl-512",
            _mlp,
            (1024, 1152, 4608),
            "DiT-XL/2 at 512²: the MLP's first Linear, rank 32",
            _eager,
            _flops,
            arithmetic="int8",
        ),
        Case("few-rows", _mlp, (32, 4096, 4096), "32 tokens, rank 32", _eager, _flops, arithmetic="int8"),
    ],
)
def linear_w4a8_lowrank(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: str = "bfloat16",
) -> Tensor:
    """`linear_w8a8` with a weight of 4 bits: activation(x Wᵀ · x_scale · weight_scale + bias + low up) · gate + residual.

    Of W's int8 codes each is a code of 4 bits times a whole scale of its group of 64 or 128 inputs: their products with x are
    whole numbers, and their sums exact, on every rung.

    Args:
        x, x_scale, weight_scale, bias, gate, residual, activation, dtype: as in `linear_w8a8`.
        weight: uint8 [⌈N/64⌉, ⌈K/8⌉, 64, 4], what `pack_w4` makes of codes [N, K] in -8..7.
        group_scale: uint8 [⌈N/64⌉, ⌈K/group⌉, 64], what `pack_w4` makes of scales in 1..16. The low four bits count.
        low, up: [..., R] and [R, N], together or not at all: what the 4 bits lose most of, in R ranks.

    Returns:
        A contiguous tensor [..., N]. The epilogue is float32, rounded once.

    Raises:
        TypeError, ValueError: an argument outside of the above. RuntimeError: a gradient is wanted; there is none.

    Source: Li et al. 2024, SVDQuant (arXiv 2411.05007); Lin et al. 2024, QServe (arXiv 2405.04532), progressive scales.
    """
    wide = whole_w4(weight, group_scale, weight_scale.shape[0], x.shape[-1])
    return _linear.define(wide, x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype)
