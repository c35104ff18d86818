"""One sampling loop for every solver: a model evaluation, then one `ops.solver_step`, and nothing else over the latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from .guidance import UNGUIDED, cfg_weights
from .schedules import EDM, FINALS, Grid, Schedule
from .solvers import PREDICTIONS, Evaluation, Row, lower, solver

Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, float, Tensor, Tensor | None], Any]


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` [B, ...].

    Args:
        generator: None, one torch.Generator, or B of them: then a sample does not depend on its neighbours in the batch.
            A generator on the CPU serves any device: the same picture everywhere, at the price of a copy.

    Raises ValueError for a list of another length, TypeError for anything else.
    """
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"generator: expected None, a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != shape[0]:
        raise ValueError(f"generator: expected one a sample, {shape[0]}, got {len(generator)}")
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in generator])


class Sampler:
    """A solver on a schedule, for a model of a given prediction type.

    Args:
        solver: a name in `SOLVERS`.
        schedule: the noise schedule that the model was trained with.
        prediction: what the model returns: "eps"; "x0" (EDM's D(x, sigma)); "v" = alpha eps - sigma x0; "flow" = eps - x0.
        clip: c clamps the data prediction to [-c, c], (lo, hi) to that; eps is then the clamped prediction's own.
        spacing: how the schedule spaces its noise levels: a name in `schedule.spacings`, None for the first of them.
        final: "zero" ends at sigma = 0, "sigma_min" at the schedule's smallest noise.
        options: the solver's own keywords, such as eta of "ddim" or kind of "dpmpp_2m".

    Raises:
        TypeError, ValueError: an argument outside of the above, named, with what was expected and what came.
    """

    def __init__(
        self,
        solver: str = "dpmpp_2m",
        *,
        schedule: Schedule,
        prediction: str = "eps",
        clip: float | tuple[float, float] | None = None,
        spacing: str | None = None,
        final: str = "zero",
        **options: Any,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {type(schedule).__name__}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}; got {prediction!r}")
        if spacing is not None and spacing not in schedule.spacings:
            raise ValueError(f"spacing: {type(schedule).__name__} has {', '.join(schedule.spacings)}; got {spacing!r}")
        if final not in FINALS:
            raise ValueError(f"final: expected one of {', '.join(FINALS)}; got {final!r}")
        self.solver, self.schedule, self.prediction = solver, schedule, prediction
        self.spacing, self.final, self.options = spacing, final, options
        self.clip = _bounds(clip)
        self._solve = _solver(solver, options)

    def __repr__(self) -> str:
        extra = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"Sampler({self.solver!r}, schedule={type(self.schedule).__name__}, prediction={self.prediction!r}{extra})"

    def grid(self, steps: int | Grid) -> Grid:
        """The noise levels of that many steps; a Grid is returned as it is."""
        return steps if isinstance(steps, Grid) else self.schedule.grid(steps, self.spacing, self.final)

    def evaluations(self, steps: int | Grid) -> list[Evaluation]:
        """The solver's plan: one entry a model evaluation, coefficients in float64."""
        return self._solve(self.grid(steps), **self.options)

    def nfe(self, steps: int | Grid) -> int:
        """How many times that many steps evaluate the model (a doubled batch counts once)."""
        return len(self.evaluations(steps))

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        *,
        steps: int | Grid = 20,
        guidance: float | Tensor = 1.0,
        guided_channels: int = -1,
        cond: Mapping[str, Tensor] | None = None,
        uncond: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples from standard normal `noise`.

        State and history are float32 whatever noise's dtype, which is the dtype that the model is called with and that
        the result has; only float64 noise makes all of it float64. Gradients are off. The loop makes no host sync.

        Args:
            model: model(x, t, **cond) with x [B, C, ...], which it must not write to, and t [B], int64 timesteps or float32.
                Returns [B, C, ...], or [B, 2 C, ...] of which the first C are used (learned sigma), of any float dtype.
            noise: [B, C, ...] (or [B]), float16, bfloat16, float32 or float64, of unit variance: the schedule scales it.
            steps: solver steps, >= 1, or a Grid of noise levels.
            guidance: s of u + s (c - u), or a float tensor [B] with one a sample. Unless it is the number 1, `uncond` is
                needed, and the model sees one doubled batch, [cond; uncond].
            guided_channels: -1 for all; k guides the first k channels and takes the others from cond.
            cond, uncond: the model's keyword arguments, tensors of leading dimension B, with the same names.
            generator: noise of stochastic solvers: see `randn`. A deterministic one draws nothing.
            callback: callback(step, t, x, x0) after every step: the model's time at its start as a float, the state and the
                data prediction in float32. Returning False stops, and the current state is returned.
            progress: a tqdm bar over the steps on stderr.

        Returns:
            Samples like noise.

        Raises:
            TypeError, ValueError: an argument outside of the above, named, with what was expected and what came.
        """
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise: expected a tensor, got {type(noise).__name__}")
        if noise.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"noise: expected float16, bfloat16, float32 or float64, got {noise.dtype}")
        if noise.ndim < 1:
            raise ValueError(f"noise: expected [B, ...], got shape {list(noise.shape)}")
        batch, device = noise.shape[0], noise.device
        wide = torch.promote_types(noise.dtype, torch.float32)
        if guided_channels != -1 and (noise.ndim < 2 or not 0 <= guided_channels <= noise.shape[1]):
            raise ValueError(f"guided_channels: expected -1 or 0 to {noise.shape[1:2] or 0}, got {guided_channels}")

        guided = isinstance(guidance, Tensor) or guidance != 1
        if not guided:
            weights, guided_channels = UNGUIDED, -1
        else:
            weights = cfg_weights(guidance, guided_channels)
            if uncond is None:
                raise ValueError(f"uncond: guidance {guidance} needs it; expected a dict with the names of cond, got None")
            if len(weights.guided) not in (1, batch):
                raise ValueError(f"guidance: expected a number or a tensor [{batch}], got {len(weights.guided)} scales")
        inputs = _conditions(cond or {}, (uncond or {}) if guided else None, batch)

        grid = self.grid(steps)
        rows = lower(self.evaluations(grid), grid, self.prediction, weights, self.clip, show_x0=callback is not None)
        tables, places = _tables(rows, wide, device)
        index = torch.arange(len(rows), dtype=torch.int32, device=device)
        times = torch.from_numpy(np.ascontiguousarray(grid.time[[row.level for row in rows]]))
        times = times if times.dtype == torch.int64 else times.to(wide)
        times = times[:, None].repeat(1, batch * (2 if guided else 1)).to(device)

        x = noise.to(wide).contiguous()
        if grid.init_scale != 1:
            x = x * grid.init_scale
        history: list[Tensor] = []
        with tqdm(total=grid.steps, disable=not progress) as bar:
            for n, row in enumerate(rows):
                seen = _doubled(x, noise.dtype) if guided else x.to(noise.dtype)
                outputs = _outputs(model(seen, times[n], **inputs), seen, guided)
                fresh = randn(x.shape, generator, device, wide) if row.noise else None
                table, place = places[n]
                results = ops.solver_step(
                    outputs, x, history[: row.history], tables[table], index[place], fresh, row.results, guided_channels
                )
                x = results[0]
                deep = rows[n + 1].history if n + 1 < len(rows) else 0
                history = ([results[1], *history] if row.keeps else history)[:deep]
                if row.ends:
                    bar.update()
                    if callback is not None:
                        x0 = None if row.x0 is None else results[row.x0]
                        if callback(row.step, float(grid.time[row.step]), x, x0) is False:
                            break
        return x.to(noise.dtype)


def _bounds(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = (-clip, clip) if isinstance(clip, Real) else clip
    if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"clip: expected a number above 0 or (lo, hi) with lo < hi, got {clip}")
    return float(bounds[0]), float(bounds[1])


def _solver(name: str, options: dict[str, Any]) -> Callable[..., list[Evaluation]]:
    """The solver, its options tried on a small grid: a wrong one is an error now."""
    solve = solver(name)
    known = [p.name for p in inspect.signature(solve).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(f"{option}: solver {name!r} has {'the options ' + ', '.join(known) if known else 'no options'}")
    solve(EDM().grid(2), **options)
    return solve


def _conditions(cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor] | None, batch: int) -> dict[str, Tensor]:
    """The model's keyword arguments, [cond; uncond] where both are wanted."""
    for which, given in (("cond", cond), ("uncond", uncond or {})):
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{which}[{name!r}]: expected a tensor, got {type(value).__name__}")
            if value.ndim < 1 or value.shape[0] != batch:
                raise ValueError(f"{which}[{name!r}]: expected leading dimension {batch} as noise has, got {list(value.shape)}")
    if uncond is None:
        return dict(cond)
    if cond.keys() != uncond.keys():
        raise ValueError(f"uncond: expected the names of cond, {sorted(cond)}, got {sorted(uncond)}")
    for name, value in cond.items():
        if value.shape != uncond[name].shape:
            raise ValueError(
                f"uncond[{name!r}]: expected the shape of cond's, {list(value.shape)}, got {list(uncond[name].shape)}"
            )
    return {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}


def _tables(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Coefficients on the device, a table [T, B or 1, K] for every kind of row, and where each row is: (table, index)."""
    kinds: dict[tuple[int, int, bool], list[np.ndarray]] = {}
    places = []
    for row in rows:
        kind = (row.history, row.results, row.noise)
        kinds.setdefault(kind, []).append(row.coef)
        places.append((list(kinds).index(kind), len(kinds[kind]) - 1))
    return [torch.from_numpy(np.stack(coefs)).to(dtype).to(device) for coefs in kinds.values()], places


def _doubled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[x; x] in the model's dtype, in one pass."""
    both = torch.empty((2, *x.shape), dtype=dtype, device=x.device).copy_(x.expand(2, *x.shape))
    return both.flatten(0, 1)


def _outputs(out: Tensor, seen: Tensor, guided: bool) -> list[Tensor]:
    """The model's output as views: learned-sigma channels dropped, halves of a doubled batch apart."""
    if not isinstance(out, Tensor):
        raise TypeError(f"model: expected it to return a tensor, got {type(out).__name__}")
    want = list(seen.shape)
    if list(out.shape) != want:
        if seen.ndim < 2 or list(out.shape) != [want[0], 2 * want[1], *want[2:]]:
            twice = f" or twice the channels, {[want[0], 2 * want[1], *want[2:]]}" if seen.ndim > 1 else ""
            raise ValueError(f"model: expected an output of shape {want}{twice}, got {list(out.shape)}")
        out = out[:, : want[1]]
    return list(out.chunk(2)) if guided else [out]
