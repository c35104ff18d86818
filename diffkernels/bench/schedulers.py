"""Whole scheduler steps beside diffusers' own, over a null model: what is timed is everything but the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ladder
from .._case import Draw
from .._op import OPS
from ..sampling import DiscreteVP, Sampler
from . import oracle

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES: dict[
    str, tuple[str, dict[str, Any], str, dict[str, Any]]
] = {  # diffusers' class and options, our solver and the sampler's options
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m", {}),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m", {}),
    "dpmpp-2m-threshold": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "thresholding": True, "sample_max_value": 10.0},
        "dpmpp_2m",
        {"threshold": (0.995, 10.0)},
    ),
    "unipc-2": ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc", {"order": 2}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
}
SHAPES = ((8, 4, 64, 64), (16, 4, 128, 128))
RUNS = [(name, shape, 20) for name in CASES for shape in SHAPES] + [("dpmpp-2m", (1, 4, 64, 64), 50)]


NAMES = {f"{name}, mean of {steps} steps, {'×'.join(map(str, shape))}": (name, shape, steps) for name, shape, steps in RUNS}
NOISE = "sde-dpmpp-2m-cfg-1024"


def subject(case: str) -> tuple[dict[str, Any], dict[str, Callable[[], Tensor]], dict[str, float | None], int]:
    """Row, contenders, errors and steps of one of NAMES. Raises ValueError where diffusers is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"the peer is diffusers, which can't be imported here ({error})") from error
    name, shape, steps = NAMES[case]
    kind, settings, solver, options = CASES[name]
    peer = getattr(diffusers, kind)(**BETAS, **settings)
    peer.set_timesteps(steps)
    sampler = Sampler(solver, schedule=DiscreteVP.scaled_linear(), spacing="dpm_linspace", **options)
    draw = Draw(torch.float32)
    x, out = draw(*shape), draw(*shape)
    prepared, exact = sampler.prepare(x, steps=steps), sampler.prepare(x.double(), steps=steps)

    def theirs() -> Tensor:
        scheduler, state = copy.copy(peer), x
        scheduler.model_outputs = [None] * len(peer.model_outputs)
        scheduler.timestep_list = [None] * len(peer.model_outputs)
        for t in peer.timesteps:
            state = scheduler.step(out, t, state, return_dict=False)[0]
        return state

    def ours() -> Tensor:
        return prepared(lambda x, t: out, x)

    truth = exact(lambda x, t: out.double(), x.double())
    row = {
        "model": "latents " + "×".join(map(str, shape)),
        "rung": _ladder.running("solver_step"),
        "shape": list(shape),
        "error": _error(ours(), truth),
    }
    checked = "ours, checking for NaN"
    contenders = {"ours": ours, "diffusers": theirs, checked: lambda: sampler(lambda x, t: out, x, steps=steps)}
    return row, contenders, {"diffusers": _error(theirs(), truth), checked: None}, steps


def noise(case: str) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """The same step with noise made in it and without, and what torch takes to make as much."""
    op = OPS["solver_step"]
    cases = {c.name: c for c in op.cases}
    with_noise, without = (op.bind((), cases[name].args(Draw(torch.float32))) for name in (case, "dpmpp-2m-cfg-1024"))
    x = without[1]
    got, exact = op.call(*with_noise), oracle.exact(op, with_noise)
    row = {
        "model": "latents " + "×".join(map(str, x.shape)),
        "rung": _ladder.running("solver_step"),
        "shape": list(x.shape),
        "error": max(_error(g, e) for g, e in zip(got, exact, strict=True)),
    }
    contenders = {
        "ours": lambda: op.call(*with_noise),
        "without noise": lambda: op.call(*without),
        "randn": lambda: torch.randn_like(x),
    }
    return row, contenders


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()
