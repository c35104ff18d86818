"""Whole scheduler steps beside diffusers' own, over a null model: what is timed is everything but the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _ladder
from .._case import Draw
from .._op import OPS
from ..sampling import DiscreteVP, Sampler
from .timing import measure

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


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    """A row a case: microseconds a step, of a whole loop's. Raises ValueError where diffusers is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"schedulers: the peer is diffusers, which can't be imported here ({error})") from error
    for name, shape, steps in RUNS:
        kind, settings, solver, options = CASES[name]
        peer = getattr(diffusers, kind)(**BETAS, **settings)
        peer.set_timesteps(steps)
        yield _row(
            name,
            shape,
            steps,
            peer,
            Sampler(solver, schedule=DiscreteVP.scaled_linear(), spacing="dpm_linspace", **options),
            seconds,
        )
    yield noise_row(seconds)


def _row(name: str, shape: tuple[int, ...], steps: int, peer: Any, sampler: Sampler, seconds: float) -> dict[str, Any]:
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

    timing = measure(
        {"ours": ours, "diffusers": theirs, "checked": lambda: sampler(lambda x, t: out, x, steps=steps)}, seconds, 9
    )
    truth = exact(lambda x, t: out.double(), x.double())
    found: dict[str, dict[str, Any]] = {name: {"us": timing.median(name) * 1e6 / steps} for name in ("diffusers", "checked")}
    for contender in found:
        ratio, low, high = timing.ratio(contender, "ours")
        found[contender] |= {"ratio": ratio, "ratio_95": [low, high]}
    return {
        "op": "scheduler step",
        "case": f"{name}, mean of {steps} steps",
        "model": "latents " + "×".join(map(str, shape)),
        "dtype": "f32",
        "rung": _ladder.running("solver_step"),
        "shape": list(shape),
        "us": timing.median("ours") * 1e6 / steps,
        "us_p10_p90": [t * 1e6 / steps for t in timing.spread("ours")],
        "error": _error(ours(), truth),
        "peers": {
            "diffusers": found["diffusers"] | {"error": _error(theirs(), truth)},
            "ours, checking for NaN": found["checked"],
        },
    }


def noise_row(seconds: float) -> dict[str, Any]:
    """The same step with noise made in it and without, and what torch takes to make as much."""
    op = OPS["solver_step"]
    cases = {case.name: case for case in op.cases}
    args = {name: op.bind((), cases[name].args(Draw(torch.float32))) for name in ("sde-dpmpp-2m-cfg-1024", "dpmpp-2m-cfg-1024")}
    x = args["dpmpp-2m-cfg-1024"][1]

    def call(name: str) -> Callable[[], Any]:
        return lambda: op.call(*args[name])

    contenders = {
        "ours": call("sde-dpmpp-2m-cfg-1024"),
        "without noise": call("dpmpp-2m-cfg-1024"),
        "randn": lambda: torch.randn_like(x),
    }
    timing = measure(contenders, seconds)
    peers = {}
    for name in ("without noise", "randn"):
        ratio, low, high = timing.ratio(name, "ours")
        peers[name] = {"us": timing.median(name) * 1e6, "ratio": ratio, "ratio_95": [low, high]}
    return {
        "op": "noise in the step",
        "case": "sde-dpmpp-2m-cfg-1024",
        "model": "latents " + "×".join(map(str, x.shape)),
        "dtype": "f32",
        "rung": _ladder.running("solver_step"),
        "shape": list(x.shape),
        "us": timing.median("ours") * 1e6,
        "us_p10_p90": [t * 1e6 for t in timing.spread("ours")],
        "peers": peers,
    }


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()
