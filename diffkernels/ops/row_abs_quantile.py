"""How far a sample's data prediction reaches: a quantile of |m|, m recomputed from the model's outputs and never written."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._case import Case
from .._op import op
from ._solver import MAX_OUTPUTS, Columns, check_per_sample, check_state, combined


def _check(outputs, x, coef, step, gain, q, guided_channels):  # type: ignore[no-untyped-def]
    check_state(outputs, x, step, coef, len(outputs) * (1 + (guided_channels != -1)) + 1, guided_channels)
    check_per_sample(x, gain=gain)
    if not 0 <= q <= 1:
        raise ValueError(f"q: expected 0 to 1, got {q}")
    if x.shape[1:].numel() == 0:
        raise ValueError(f"x: expected at least one element a sample, got {list(x.shape)}")


def _allocate(outputs, x, coef, step, gain, q, guided_channels):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0])


def _args(draw: Any, shape: tuple[int, ...], outputs: int = 1, gain: bool = False, **more: Any) -> dict[str, Any]:
    columns = outputs * (1 + ("guided_channels" in more)) + 1
    return {
        "outputs": [draw(*shape) for _ in range(outputs)],
        "x": draw.f32(*shape),
        "coef": draw.f32(3, shape[0] if outputs > 1 else 1, columns + 2),
        "step": draw.index(3),
        "gain": draw.f32(shape[0]) if gain else None,
        **more,
    }


def _fuzz(draw: Any, pick: Any) -> dict[str, Any]:
    shape = (pick.size(4, 0), pick.size(3), pick.size(30000))
    guided = {"guided_channels": pick.randint(0, shape[1])} if pick.random() < 0.3 else {}
    q = pick.choice((0.25, 0.5, 0.995, 1.0, pick.uniform(0.1, 1)))  # the least of many differences has no digit left
    return _args(draw, shape, pick.randint(1, MAX_OUTPUTS), pick.random() < 0.5, q=q, **guided)


def _flops(*shape: int) -> float:
    return 6 * math.prod(shape)  # m, three times over


def _x0(draw: Any, *shape: int) -> dict[str, Any]:
    """x0 = (x - sigma (u + w (c - u))) / alpha."""
    w, sigma, alpha = 4.0, 0.6, 0.8
    row = [-sigma / alpha * (1 - w), -sigma / alpha * w, 1 / alpha]
    coef = draw.index(1).new_tensor([[row]], dtype=torch.float32)
    return {"outputs": [draw(*shape), draw(*shape)], "x": draw.f32(*shape), "coef": coef, "step": draw.index(1)}


def _eager(outputs, x):  # type: ignore[no-untyped-def]
    u, c = outputs
    m = (x - 0.6 * (u + 4.0 * (c - u)).float()) / 0.8
    return torch.quantile(m.abs().flatten(1), 0.995, dim=1)


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("one-output", lambda d: _args(d, (2, 3, 5))),
        Case("cfg", lambda d: _args(d, (3, 4, 30, 9), 2)),
        Case("median", lambda d: _args(d, (2, 1001), q=0.5)),
        Case("lower-quarter", lambda d: _args(d, (2, 77), q=0.25)),
        Case("most", lambda d: _args(d, (2, 77), q=1.0)),
        Case("rescale", lambda d: _args(d, (2, 3, 600), 2, gain=True, guided_channels=2)),
        Case("one-element", lambda d: _args(d, (5,))),
        Case("no-samples", lambda d: _args(d, (0, 6))),
        Case("sd15-512", _x0, (8, 4, 64, 64), "SD1.5 latents at 512², batch 8", _eager, _flops),
        Case("sdxl-1024", _x0, (16, 4, 128, 128), "SDXL latents at 1024², batch 16", _eager, _flops),
    ],
)
def row_abs_quantile(
    outputs: list[Tensor],
    x: Tensor,
    coef: Tensor,
    step: Tensor,
    gain: Tensor | None = None,
    q: float = 0.995,
    guided_channels: int = -1,
) -> Tensor:
    """The q-quantile of |m| in every sample, m = gain sum_g A_g outputs_g + a x as in `solver_step`: dynamic thresholding's.

    With a the sorted |m| and p = q (E - 1): between a[floor p] and a[floor p + 1], linearly; `torch.quantile`'s default.

    Args:
        outputs, x, coef, step, gain, guided_channels: as in `solver_step`; of coef's row the first columns are read.
        q: 0 to 1; 0.995 in Imagen (Saharia et al., arXiv 2205.11487, app. E) and DPM-Solver.

    Returns:
        [B], like x; NaN for a sample that holds one.

    Raises:
        TypeError, ValueError: dtype, shape or count outside of the above; samples without elements. IndexError: step, on a CPU.
    """
    m = combined(Columns(coef, step, x), outputs, x, gain, guided_channels)
    a = m.abs().reshape(x.shape[0], x.shape[1:].numel()).sort(1).values
    place = q * (a.shape[1] - 1)
    below, above = a[:, int(place)], a[:, min(int(place) + 1, a.shape[1] - 1)]
    value = torch.where(below == above, below, below + (place - int(place)) * (above - below))
    return torch.where(a.isnan().any(1), torch.nan, value)
