"""A sampling run, prepared: coefficients, step indices and times on the device, and the tensor loop over them.

Nothing in the loop is numpy, waits for the device or depends on a value: `torch.compile(fullgraph=True)` takes all of it over a
model that it can take, and a CUDA graph records it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .guidance import UNGUIDED, Scale, cfg_weights, rescale_gain
from .lower import lower, model_input
from .plan import Plan, Symbol
from .schedules import Grid

Conditions = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


@dataclass
class State:
    """What goes from one evaluation to the next."""

    x: Tensor
    seen: Tensor  # what the model is called with
    guided: dict[str, Tensor]  # its keyword arguments
    plain: dict[str, Tensor]
    seeds: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    x0: Tensor | None = None
    flags: Any = None


class Moves(NamedTuple):
    """What a row does with kept tensors, by number: which it reads, which is the state that it saw (or None), which of its
    results are kept, and which are dropped once it has read them; which result is the data prediction."""

    reads: list[int]
    held: int | None
    stored: list[tuple[int, int]]
    dropped: list[int]
    alive: set[int]
    x0: int | None


class Prepared:
    """What `Sampler.prepare` returns. Call it for samples, as often as you like.

    Attributes:
        rows: one a model evaluation. steps: how many solver steps that are. draws: whether the solver takes noise.

    For a loop of one's own: `begin`, then `advance` for every row. `State.flags` is then, with watch, where an output was not
    finite ([B, ...], 1 where so); `State.x0`, with show_x0, the data prediction after each step; `kept` has the sums named in
    keep, which the plan's last evaluation keeps.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        grids: Sequence[Grid],
        noise: Tensor,
        *,
        prediction: str,
        sigma_data: float,
        clip: tuple[float, float] | None,
        threshold: tuple[float, float] | None,
        guidance: Scale,
        guided_channels: int,
        interval: tuple[float, float] | None,
        rescale: float,
        mask_strength: float | None,
        image: bool,
        watch: bool,
        show_x0: bool,
        keep: Sequence[str],
    ) -> None:
        self.shape, self.dtype, self.device = noise.shape, noise.dtype, noise.device
        self.wide = torch.promote_types(noise.dtype, torch.float32)
        self._copy_dtype = str(noise.dtype)[6:]
        batch = self.shape[0]
        self.is_guided = not isinstance(guidance, Real) or guidance != 1
        weights = cfg_weights(guidance, guided_channels) if self.is_guided else UNGUIDED
        if len(weights.guided) not in (1, batch):
            raise ValueError(f"guidance: expected a number or a tensor [{batch}], got {len(weights.guided)} scales")
        if weights.guided.shape[1] > 4:
            raise ValueError(f"guidance: expected at most 3 conditions, got {weights.guided.shape[1] - 1}")
        self.outputs, self.rescale = weights.guided.shape[1], rescale
        self.quantile = threshold[0] if threshold else None
        self.watch, self.image, self.masked = watch, image, mask_strength is not None
        self.rows = lower(
            plans,
            prediction,
            weights,
            interval,
            map_x0=(1.0, threshold[1]) if threshold else clip,
            mask_strength=mask_strength,
            show_x0=show_x0,
            keep=keep,
            sigma_data=sigma_data,
        )
        self.steps = 1 + max(row.step for row in self.rows)
        self.draws = any(row.noise for row in self.rows)
        self.guided_channels = [guided_channels if row.guided and self.is_guided else -1 for row in self.rows]
        self._copies = [self._copies_after(n) for n in range(len(self.rows))]
        self._moves = self._name()
        self._integral = all(grid.time.dtype == np.int64 for grid in grids)
        self._tables(plans, prediction, sigma_data)
        self._starts(plans, grids, prediction, sigma_data)

    def _name(self) -> list[Moves]:
        """The rows' tensors under the numbers that they have in `State.kept`."""
        self._keys: dict[Symbol, int] = {}

        def key(symbol: Symbol) -> int:
            return self._keys.setdefault(symbol, len(self._keys))

        moves: list[Moves] = []
        for n, row in enumerate(self.rows):
            before = set(moves[-1].alive) if moves else set()
            alive = {key(s) for s in row.alive}
            held = key(Symbol("x", n)) if Symbol("x", n) in row.alive else None
            stored = [(1 + i, key(s)) for i, s in enumerate(row.writes) if key(s) in alive]
            moves.append(Moves([key(s) for s in row.reads], held, stored, sorted(before - alive), alive, row.x0))
        return moves

    def _copies_after(self, n: int) -> int:
        """How often row n writes the next model input besides the state: 0 where the state itself will do."""
        row = self.rows[n]
        if row.scales is None:
            return 0
        copies = self.rows[n + 1].outputs
        return copies if copies > 1 or self.dtype != self.wide or bool(np.any(row.scales != 1)) else 0

    def _per_sample(self, each: np.ndarray) -> np.ndarray:
        """[P, B or 1, ...] of the plans as [B or 1, ...] of the samples, whose plan is their own or the only one."""
        batch = self.shape[0]
        if len(each) == 1:
            return each[0]
        return each[np.arange(batch), np.arange(batch) if each.shape[1] > 1 else 0]

    def _tables(self, plans: Sequence[Plan], prediction: str, sigma_data: float) -> None:
        rows = []
        for row, copies in zip(self.rows, self._copies, strict=True):
            coef = row.coef
            if copies and row.scales is not None:
                scale = np.broadcast_to(row.scales[:, None, None], (*coef.shape[:2], 1))
                coef = np.concatenate([coef, scale], axis=2)
            rows.append(self._per_sample(coef))
        height, width = max(len(r) for r in rows), max(r.shape[1] for r in rows)
        table = np.zeros((len(rows), height, width))
        for n, r in enumerate(rows):
            table[n, :, : r.shape[1]] = r
        self.coef = torch.from_numpy(table).to(self.wide).to(self.device)
        weights = [self._per_sample(row.weights) for row in self.rows] if self.rescale else []
        self.weights = [torch.from_numpy(np.array(w)).to(self.wide).to(self.device) for w in weights]
        self.index = list(torch.arange(len(rows), dtype=torch.int32, device=self.device).unbind(0))

        times = np.array(
            [
                [model_input(prediction, p.evaluations[min(n, len(p.evaluations) - 1)].at, sigma_data)[1] for p in plans]
                for n in range(len(rows))
            ]
        )
        whole = prediction != "edm" and bool(np.all(times == np.round(times))) and self._integral
        begins = [n if n == 0 or self.rows[n - 1].ends else 0 for n in range(len(self.rows))]  # where n's step began
        seen = times[np.maximum.accumulate(begins), 0]
        self._timesteps = seen.astype(np.int64).tolist() if whole else seen.tolist()
        dtype = torch.int64 if whole else self.wide
        spread = torch.from_numpy(times).to(dtype).to(self.device)
        spread = spread.expand(-1, self.shape[0]) if len(plans) == 1 else spread
        self.times = [spread[n].repeat(row.outputs).contiguous() for n, row in enumerate(self.rows)]

    def _starts(self, plans: Sequence[Plan], grids: Sequence[Grid], prediction: str, sigma_data: float) -> None:
        """x = image_scale image + noise_scale noise, and what the first model input is of x."""
        image, noise, first = [], [], []
        for plan, grid in zip(plans, grids, strict=True):
            scale = float(grid.sigma[0]) if self.image else grid.init_scale
            # a start that is stirred first has the law of noise of the higher level
            noise.append(math.hypot(scale * plan.start_scale, plan.start_noise))
            image.append(float(grid.alpha[0]) * plan.start_scale)
            first.append(model_input(prediction, plan.evaluations[0].at, sigma_data)[0])

        def column(values: list[float]) -> float | Tensor:
            if len(set(values)) == 1:
                return values[0]
            t = torch.tensor(values, dtype=self.wide, device=self.device)
            return t.reshape(-1, *[1] * (len(self.shape) - 1))

        self.image_scale, self.noise_scale, self.input_scale = column(image), column(noise), column(first)

    def timestep(self, n: int) -> float | int:
        """The model's time where the step of evaluation n began, of the first sample."""
        return self._timesteps[n]

    def begin(
        self,
        noise: Tensor,
        cond: Conditions | None = None,
        uncond: Mapping[str, Tensor] | None = None,
        seeds: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> State:
        """The first state. Raises TypeError or ValueError for arguments that are not what was prepared for."""
        if noise.shape != self.shape or noise.dtype != self.dtype:
            raise ValueError(
                f"noise: expected {self.dtype} {list(self.shape)}, as was prepared, got {noise.dtype} {list(noise.shape)}"
            )
        if self.draws and seeds is None:
            raise ValueError(f"seeds: expected int64 [{self.shape[0]}] for a solver that takes noise, got None")
        for name, given, wanted in (("image", image, self.image), ("mask", mask, self.masked), ("known", known, self.masked)):
            if (given is not None) != wanted:
                raise ValueError(f"{name}: expected {'a tensor' if wanted else 'None'}, as was prepared")
        conditions = [cond or {}] if cond is None or isinstance(cond, Mapping) else list(cond)
        guided, plain = self._inputs(conditions, uncond)
        x = noise.to(self.wide).contiguous()
        if isinstance(self.noise_scale, Tensor) or self.noise_scale != 1:
            x = x * self.noise_scale
        if image is not None:
            x = x + self.image_scale * self._like(image, "image")
        state = State(x, x, guided, plain, seeds if self.draws else None)
        if mask is not None and known is not None:
            state.mask, state.known = self._like(mask, "mask"), self._like(known, "known")
        self._see(0, state, self.input_scale)
        return state

    def _like(self, t: Tensor, name: str) -> Tensor:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        try:
            return t.to(self.device, self.wide).expand(self.shape)
        except RuntimeError:
            raise ValueError(f"{name}: expected a shape that broadcasts to {list(self.shape)}, got {list(t.shape)}") from None

    def _inputs(
        self, conditions: list[Mapping[str, Tensor]], uncond: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's keyword arguments, [cond; ...; uncond] and the first cond alone."""
        batch, every = self.shape[0], list(conditions)
        if self.is_guided:
            if len(every) != self.outputs - 1:
                raise ValueError(f"cond: expected {self.outputs - 1} conditions, as guidance has scales, got {len(every)}")
            if uncond is None:
                raise ValueError("uncond: guidance needs it; expected a dict with the names of cond, got None")
            every.append(uncond)
        first = every[0]
        for which, given in enumerate(every):
            name = "uncond" if self.is_guided and which == len(every) - 1 else "cond"
            if given.keys() != first.keys():
                raise ValueError(f"{name}: expected the names of cond, {sorted(first)}, got {sorted(given)}")
            for key, value in given.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name}[{key!r}]: expected a tensor, got {type(value).__name__}")
                if value.ndim < 1 or value.shape[0] != batch:
                    raise ValueError(
                        f"{name}[{key!r}]: expected leading dimension {batch} as noise has, got {list(value.shape)}"
                    )
                if value.shape != first[key].shape:
                    raise ValueError(
                        f"{name}[{key!r}]: expected the shape of cond's, {list(first[key].shape)}, got {list(value.shape)}"
                    )
        guided = {key: torch.cat([each[key] for each in every]) for key in first} if len(every) > 1 else dict(first)
        return guided, dict(first)

    def _see(self, n: int, state: State, scale: float | Tensor) -> None:
        """What evaluation n's model input is of the state, by PyTorch: at the start, and where somebody changed the state."""
        x = state.x if not isinstance(scale, Tensor) and scale == 1 else state.x * scale
        copies = self.rows[n].outputs
        if copies > 1:  # one pass
            x = (
                torch.empty((copies, *x.shape), dtype=self.dtype, device=x.device)
                .copy_(x.expand(copies, *x.shape))
                .flatten(0, 1)
            )
        state.seen = x.to(self.dtype)

    def kept(self, state: State, name: str) -> Tensor:
        """After the last evaluation, one of the sums that were to be kept."""
        return state.kept[self._keys[Symbol(name, len(self.rows) - 1)]]

    def replace(self, n: int, state: State, x: Tensor) -> None:
        """After evaluation n, x instead of the state; -1: before the first."""
        if not isinstance(x, Tensor):
            raise TypeError(f"latents: expected a tensor from the callback, got {type(x).__name__}")
        if x.shape != self.shape:
            raise ValueError(f"latents: expected shape {list(self.shape)} from the callback, got {list(x.shape)}")
        state.x = x.to(self.device, self.wide).contiguous()
        if n == -1:
            self._see(0, state, self.input_scale)
        elif n + 1 < len(self.rows):
            scales = torch.from_numpy(self._per_sample(np.asarray(self.rows[n].scales)[:, None]))
            self._see(n + 1, state, scales.to(state.x).reshape(-1, *[1] * (x.ndim - 1)))

    def advance(self, n: int, model: Callable[..., Tensor], state: State) -> None:
        """Evaluation n and the one pass after it."""
        row, moves, copies, channels = self.rows[n], self._moves[n], self._copies[n], self.guided_channels[n]
        kept = state.kept
        if moves.held is not None:
            kept[moves.held] = state.x
        inputs = state.guided if row.guided else state.plain
        outputs = _outputs(model(state.seen, self.times[n], **inputs), state.seen, row.outputs)
        gain = bound = None
        if self.rescale and row.outputs > 1:
            gain = rescale_gain(outputs, self.weights[n], self.rescale)
        if self.quantile is not None:
            bound = ops.row_abs_quantile(outputs, state.x, self.coef, self.index[n], gain, self.quantile, channels)
        made = ops.solver_step(
            outputs,
            state.x,
            [kept[key] for key in moves.reads],
            self.coef,
            self.index[n],
            state.seeds if row.noise else None,
            gain,
            bound,
            state.mask,
            state.known,
            1 + len(row.writes),
            channels,
            copies,
            self._copy_dtype,
            self.watch,
        )
        state.x = made[0]
        state.x0 = None if moves.x0 is None else made[moves.x0]
        for key in moves.dropped:
            del kept[key]
        for i, key in moves.stored:
            kept[key] = made[i]
        state.seen = made[1 + len(row.writes)] if copies else state.x
        state.flags = made[-1] if self.watch else None

    def __call__(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        cond: Conditions | None = None,
        uncond: Mapping[str, Tensor] | None = None,
        seeds: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Samples like noise; the arguments are those of a `Sampler`'s call, seeds as `sampling.seeds` makes them."""
        with torch.no_grad():
            state = self.begin(noise, cond, uncond, seeds, image, mask, known)
            for n in range(len(self.rows)):
                self.advance(n, model, state)
            return state.x.to(self.dtype)


def _outputs(out: Tensor, seen: Tensor, count: int) -> list[Tensor]:
    """The model's output as views: learned-sigma channels dropped, the parts of a doubled batch apart."""
    if not isinstance(out, Tensor):
        raise TypeError(f"model: expected it to return a tensor, got {type(out).__name__}")
    want = list(seen.shape)
    if list(out.shape) != want:
        if seen.ndim < 2 or list(out.shape) != [want[0], 2 * want[1], *want[2:]]:
            twice = f" or twice the channels, {[want[0], 2 * want[1], *want[2:]]}" if seen.ndim > 1 else ""
            raise ValueError(f"model: expected an output of shape {want}{twice}, got {list(out.shape)}")
        out = out[:, : want[1]]
    return list(out.chunk(count)) if count > 1 else [out]
