"""DPM-Solver's adaptive step size: two answers of neighbouring order a step, and a step as long as they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .guidance import Scale
from .loop import Sampler
from .plan import Level, Plan
from .prepared import Conditions
from .schedules import FINALS, Grid, Schedule
from .solvers import adaptive_step


class Adaptive(NamedTuple):
    """What `dpm_adaptive` returns: samples like noise, model evaluations, steps that were taken and that were refused."""

    samples: Tensor
    nfe: int
    accepted: int
    rejected: int


def embedded(grid: Grid, *, order: int = 3, kind: str = "midpoint", predict: str = "data") -> Plan:
    """A solver of one step, to the grid's second level: see `solvers.adaptive_step`; order 2 (1 and 2) or 3 (2 and 3)."""
    if order not in (2, 3):
        raise ValueError(f"order: expected 2 or 3, got {order!r}")
    first, last = float(grid.lam[0]), float(grid.lam[1])
    inner = [grid.between(first + k / order * (last - first)) for k in range(1, order)]
    return adaptive_step(grid.level(0), grid.level(1), inner, kind=kind, predict=predict)


@torch.no_grad()
def dpm_adaptive(
    model: Callable[..., Tensor],
    noise: Tensor,
    *,
    schedule: Schedule,
    prediction: str = "eps",
    order: int = 3,
    predict: str = "data",
    kind: str = "midpoint",
    atol: float = 0.0078,
    rtol: float = 0.05,
    theta: float = 0.9,
    h_init: float = 0.05,
    final: str = "zero",
    clip: float | tuple[float, float] | None = None,
    threshold: float | tuple[float, float] | None = None,
    guidance: Scale = 1.0,
    guided_channels: int = -1,
    guidance_rescale: float = 0.0,
    cond: Conditions | None = None,
    uncond: Mapping[str, Tensor] | None = None,
) -> Adaptive:
    """Samples by DPM-Solver-12 or -23 (arXiv 2206.00927, app. C), or their ++ forms, with steps as long as the error allows.

    A step of length h in lam = log(alpha / sigma) is taken where E <= 1, and h becomes theta h E^(-1 / order) in any case. E is
    the largest over the samples of RMS((high - low) / max(atol, rtol max(|low|, |low before|))): all of them take one step,
    and a sample depends on its neighbours. The host reads E in every step: this loop waits for the device.

    Args:
        model, noise, guidance, guided_channels, guidance_rescale, cond, uncond: as in a call of `Sampler`.
        schedule, prediction, clip, threshold: as in `Sampler`. The schedule begins at alpha > 0: no flow, no zero terminal SNR.
        order: 2 or 3. predict: "data" (DPM-Solver++) or "noise" (DPM-Solver). kind: "midpoint" or "taylor".
        atol, rtol, theta, h_init: of the step's length, above 0; theta below 1. Defaults: the authors', for pixels in [-1, 1].
        final: "sigma_min" ends at the schedule's smallest noise, "zero" takes the data prediction there, one evaluation more.

    Raises:
        TypeError, ValueError: an argument outside of the above. FloatingPointError: a model output was not finite.
    """
    for name, value, most in (
        ("atol", atol, math.inf),
        ("rtol", rtol, math.inf),
        ("theta", theta, 1),
        ("h_init", h_init, math.inf),
    ):
        if not 0 < value < most:
            raise ValueError(f"{name}: expected a number above 0{'' if most > 1 else ' and below 1'}, got {value}")
    if final not in FINALS:
        raise ValueError(f"final: expected one of {', '.join(FINALS)}; got {final!r}")
    bounds = {"schedule": schedule, "prediction": prediction, "clip": clip, "threshold": threshold}
    sampler = Sampler(embedded, **bounds, order=order, kind=kind, predict=predict)  # type: ignore[arg-type]
    settings = {"guidance": guidance, "guided_channels": guided_channels, "guidance_rescale": guidance_rescale}
    whole = schedule.grid(1, final="sigma_min")
    if whole.alpha[0] == 0:
        raise ValueError("schedule: expected alpha > 0 at its noisiest level, where log(alpha / sigma) is infinite otherwise")
    state = sampler.prepare(noise, steps=whole, **settings).begin(noise, cond, uncond)  # type: ignore[arg-type]
    x, before, s, end = state.x, state.x, whole.level(0), whole.level(1)
    lam, last, h = float(whole.lam[0]), float(whole.lam[1]), h_init
    nfe = accepted = rejected = 0
    first: Tensor | None = None

    def once(*args: Tensor, **kwargs: Tensor) -> Tensor:
        """The model where the step begins: a refused step comes back to it."""
        nonlocal first, nfe
        if first is None:
            first, nfe = model(*args, **kwargs), nfe + 1
        return first

    while lam < last:
        to_end = h >= last - lam
        h, t = (last - lam, end) if to_end else (h, whole.between(lam + h))
        step = sampler.prepare(noise, steps=_step(s, t, schedule), keep=("low",), **settings)  # type: ignore[arg-type]
        step.replace(-1, state, x)
        for n in range(len(step.rows)):
            step.advance(n, model if n else once, state)
        nfe += len(step.rows) - 1
        low = step.kept(state, "low")
        scale = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
        errors = ((state.x - low) / scale).flatten(1).square().mean(1).sqrt() if x.numel() else x.new_zeros(1)
        if not errors.isfinite().all():
            samples = ", ".join(str(b) for b in (~errors.isfinite()).nonzero().flatten().tolist())
            raise FloatingPointError(f"step {accepted}, sample {samples}: the model's output is not finite")
        error = float(errors.max())
        if error <= 1:
            x, before, s, first = state.x, low, t, None
            lam, accepted = (last if to_end else lam + h), accepted + 1
        else:
            rejected += 1
        h = theta * h * error ** (-1 / order) if error > 0 else math.inf
    if final == "zero":
        grid = _step(end, Level(1.0, 0.0, 0.0), schedule)
        step = Sampler("ddim", **bounds).prepare(noise, steps=grid, **settings)  # type: ignore[arg-type]
        step.replace(-1, state, x)
        step.advance(0, model, state)
        x, nfe = state.x, nfe + 1
    return Adaptive(x.to(noise.dtype), nfe, accepted, rejected)


def _step(s: Level, t: Level, schedule: Schedule) -> Grid:
    alpha, sigma, time = (np.array(pair, np.float64) for pair in zip(s, t, strict=True))
    return Grid(alpha, sigma, time, alpha, schedule=schedule)
