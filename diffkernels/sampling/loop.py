"""One sampling loop for every solver: a model evaluation, then one `ops.solver_step`, and nothing else over the latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .guidance import Scale
from .lower import PREDICTIONS
from .noise import Generators, seeds
from .plan import Plan
from .prepared import Conditions, Prepared
from .schedules import EDM, FINALS, Grid, Schedule
from .solvers import solver

Steps = int | Grid | Sequence[int | Grid]
Callback = Callable[["Sampler", int, Any, dict[str, Tensor | None]], Any]
CALLBACK_INPUTS = ("latents", "pred_original_sample")


class Sampler:
    """A solver on a schedule, for a model of a given prediction type.

    Args:
        solver: a name in `SOLVERS`, or a function of your own that makes a `Plan` of a `Grid`, its options keywords.
        schedule: the noise schedule that the model was trained with.
        prediction: what the model returns: "eps"; "x0" (EDM's D(x, sigma)); "v" = alpha eps - sigma x0; "flow" = eps - x0;
            "edm", the network F(c_in x, ln(sigma) / 4) inside of EDM's D.
        clip: c clamps the data prediction to [-c, c], (lo, hi) to that; eps is then the clamped prediction's own.
        threshold: q, or (q, most): dynamic thresholding (Saharia et al., arXiv 2205.11487, app. E): the data prediction is
            clamped to s = the q-quantile of its absolute values in the sample, at least 1 and at most `most`, and divided by s.
        spacing: how the schedule spaces its noise levels: a name in `schedule.spacings`, None for the first of them.
        final: "zero" ends at sigma = 0, "sigma_min" at the schedule's smallest noise.
        options: the solver's own keywords, such as eta of "ddim" or kind of "dpmpp_2m".

    Raises:
        TypeError, ValueError: an argument outside of the above, named, with what was expected and what came.
    """

    def __init__(
        self,
        solver: str | Callable[..., Plan] = "dpmpp_2m",
        *,
        schedule: Schedule,
        prediction: str = "eps",
        clip: float | tuple[float, float] | None = None,
        threshold: float | tuple[float, float] | None = None,
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
        self.clip, self.threshold = _bounds(clip), _threshold(threshold)
        if self.clip and self.threshold:
            raise ValueError("threshold: expected None with clip: one of them bounds the data prediction")
        self._solve = _solver(solver, options)
        self._last: tuple[Any, Prepared] | None = None

    def __repr__(self) -> str:
        extra = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"Sampler({self.solver!r}, schedule={type(self.schedule).__name__}, prediction={self.prediction!r}{extra})"

    def grid(self, steps: int | Grid) -> Grid:
        """The noise levels of that many steps; a Grid is returned as it is."""
        return steps if isinstance(steps, Grid) else self.schedule.grid(steps, self.spacing, self.final)

    def plan(self, steps: int | Grid) -> Plan:
        """The solver's plan: one entry a model evaluation, coefficients in float64."""
        return self._solve(self.grid(steps), **self.options)

    def nfe(self, steps: int | Grid) -> int:
        """How many times that many steps evaluate the model (a doubled batch counts once)."""
        return len(self.plan(steps).evaluations)

    def prepare(
        self,
        noise: Tensor,
        *,
        steps: Steps = 20,
        guidance: Scale = 1.0,
        guided_channels: int = -1,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        mask_strength: float | None = None,
        image: bool = False,
        watch: bool = False,
        show_x0: bool = False,
        keep: Sequence[str] = (),
    ) -> Prepared:
        """All that does not depend on the model's answers, on noise's device: for real-time use, `torch.compile`, CUDA graphs.

        The arguments are those of a call; of `noise` shape, dtype and device count. mask_strength: a number where there will be
        a mask; image: whether there will be one; watch, show_x0, keep: see `Prepared`.
        """
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise: expected a tensor, got {type(noise).__name__}")
        if noise.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"noise: expected float16, bfloat16, float32 or float64, got {noise.dtype}")
        if noise.ndim < 1:
            raise ValueError(f"noise: expected [B, ...], got shape {list(noise.shape)}")
        if guided_channels != -1 and (noise.ndim < 2 or not 0 <= guided_channels <= noise.shape[1]):
            raise ValueError(f"guided_channels: expected -1 or 0 to {noise.shape[1:2] or 0}, got {guided_channels}")
        for name, value in (("guidance_rescale", guidance_rescale), ("mask_strength", mask_strength)):
            if value is not None and not (isinstance(value, Real) and 0 <= value <= 1):
                raise ValueError(f"{name}: expected 0 to 1, got {value}")
        if guidance_rescale and guided_channels != -1:
            raise ValueError(f"guidance_rescale: expected 0 with guided_channels, got {guidance_rescale}")
        if guidance_interval is not None:
            ends = guidance_interval if isinstance(guidance_interval, tuple | list) else ()
            if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
                raise ValueError(f"guidance_interval: expected (lo, hi) with 0 <= lo < hi, got {guidance_interval}")
        batch, several = noise.shape[0], isinstance(steps, list | tuple)
        if several and len(steps) != batch:  # type: ignore[arg-type]
            raise ValueError(f"steps: expected one for all or one a sample, {batch}, got {len(steps)}")  # type: ignore[arg-type]
        grids = [self.grid(s) for s in steps] if several else [self.grid(steps)]  # type: ignore[union-attr, arg-type]
        return Prepared(
            [self._solve(grid, **self.options) for grid in grids],
            grids,
            noise,
            prediction=self.prediction,
            sigma_data=getattr(self.schedule, "sigma_data", 0.5),
            clip=self.clip,
            threshold=self.threshold,
            guidance=guidance,
            guided_channels=guided_channels,
            interval=guidance_interval,
            rescale=guidance_rescale,
            mask_strength=mask_strength,
            image=image,
            watch=watch,
            show_x0=show_x0,
            keep=keep,
        )

    def _prepared(self, noise: Tensor, **settings: Any) -> Prepared:
        """`prepare`, the last answer of which is kept: a call with the same settings begins at once."""
        plain = isinstance(noise, Tensor) and all(isinstance(v, str | int | float | tuple | None) for v in settings.values())
        if not plain:
            return self.prepare(noise, **settings)
        key, last = (noise.shape, noise.dtype, noise.device, *settings.values()), self._last
        if last is None or key != last[0]:
            self._last = last = key, self.prepare(noise, **settings)  # in one go: threads may share a sampler
        return last[1]

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., Tensor],
        noise: Tensor,
        *,
        steps: Steps = 20,
        guidance: Scale = 1.0,
        guided_channels: int = -1,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        cond: Conditions | None = None,
        uncond: Mapping[str, Tensor] | None = None,
        generator: Generators = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        mask_strength: float = 1.0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        check_finite: bool = True,
        progress: bool = False,
    ) -> Tensor:
        """Samples from standard normal `noise`.

        State and history are float32 whatever noise's dtype, which is the dtype that the model is called with and that
        the result has; only float64 noise makes all of it float64. Gradients are off. The loop makes no host sync.

        Args:
            model: model(x, t, **cond) with x [B, C, ...], which it must not write to, and t [B], int64 timesteps or float32.
                Returns [B, C, ...], or [B, 2 C, ...] of which the first C are used (learned sigma), of any float dtype.
            noise: [B, C, ...] (or [B]), float16, bfloat16, float32 or float64, of unit variance: the schedule scales it.
            steps: solver steps, >= 1, or a Grid of noise levels; or a list with one a sample: each follows its own, and
                one that is done waits unchanged. A sample does not depend on the others.
            guidance: s of u + s (c - u), or a float tensor [B] with one a sample. Unless it is the number 1, `uncond` is
                needed, and the model sees one doubled batch, [cond; uncond]. With a list of 2 or 3 conditions, a list of s.
            guided_channels: -1 for all; k guides the first k channels and takes the others from cond.
            guidance_interval: (lo, hi): guide where lo < sigma / alpha <= hi; elsewhere the model sees cond alone, half the
                work (Kynkäänniemi et al., arXiv 2404.07724).
            guidance_rescale: phi, 0 to 1, see `guidance.rescale_gain`.
            cond, uncond: the model's keyword arguments, tensors of leading dimension B, with the same names. cond may be a
                list of them, each a condition.
            generator: noise of stochastic solvers, one seed a sample: see `seeds`. A deterministic one draws nothing.
            image: data to start from, like noise: the first state is alpha image + sigma noise of the grid's first level; use
                `schedule.grid(..., start=t)`.
            mask, known: where mask is 1 the data prediction is `known` (broadcast to noise's shape): inpainting.
            mask_strength: how much of it, 0 to 1.
            callback_on_step_end: f(sampler, step, timestep, tensors) after every step, as diffusers' pipelines have it; a dict
                that it returns may hold new "latents"; False stops, and the current state is returned.
            callback_on_step_end_tensor_inputs: which tensors it gets, of "latents" (the state, float32) and
                "pred_original_sample" (the data prediction).
            check_finite: stop where a model output is not finite. It is read a step later, so that nothing waits for it.
            progress: a tqdm bar over the steps on stderr.

        Returns:
            Samples like noise.

        Raises:
            TypeError, ValueError: an argument outside of the above, named, with what was expected and what came.
            FloatingPointError: a model output was not finite; it names the step and the samples.
        """
        wanted = tuple(callback_on_step_end_tensor_inputs)
        if not set(wanted) <= set(CALLBACK_INPUTS):
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {CALLBACK_INPUTS}, got {wanted}")
        if (mask is None) != (known is None):
            raise ValueError(f"{'mask' if mask is None else 'known'}: expected both of mask and known, or none")
        if isinstance(cond, list | tuple) and not isinstance(guidance, list | tuple):
            raise ValueError(f"guidance: expected a list with one scale a condition, {len(cond)}, got {guidance}")
        prepared = self._prepared(
            noise,
            steps=steps,
            guidance=guidance,
            guided_channels=guided_channels,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            mask_strength=None if mask is None else mask_strength,
            image=image is not None,
            watch=check_finite,
            show_x0=callback_on_step_end is not None and "pred_original_sample" in wanted,
        )
        drawn = seeds(noise.shape[0], generator, noise.device) if prepared.draws else None
        state = prepared.begin(noise, cond, uncond, drawn, image, mask, known)
        watch = _Watch()
        with tqdm(total=prepared.steps, disable=not progress) as bar:
            for n, row in enumerate(prepared.rows):
                prepared.advance(n, model, state)
                if check_finite:
                    watch.note(row.step, state.flags)
                if not row.ends:
                    continue
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": state.x, "pred_original_sample": state.x0}
                    answer = callback_on_step_end(
                        self, row.step, prepared.timestep(n), {name: tensors[name] for name in wanted}
                    )
                    if answer is False:
                        break
                    if isinstance(answer, Mapping) and "latents" in answer:  # maybe the same tensor, changed in place
                        prepared.replace(n, state, answer["latents"])
        watch.read()
        return state.x.to(noise.dtype)


class _Watch:
    """Flags of model outputs, read a step after they were made, so that the host waits for nothing that was just asked for."""

    def __init__(self) -> None:
        self.pending: tuple[int, Tensor, Tensor, Any] | None = None

    def note(self, step: int, flags: Tensor) -> None:
        if flags.numel() == 0:
            return
        worst, done = flags.max(), None
        host = worst.to("cpu", non_blocking=True)
        if host is not worst:  # the copy is on its way
            done = torch.Event(flags.device)
            done.record()
        self.read()
        self.pending = step, flags, host, done

    def read(self) -> None:
        if self.pending is None:
            return
        step, flags, host, done = self.pending
        if done is not None:
            done.synchronize()
        self.pending = None
        if host:
            samples = ", ".join(str(b) for b in flags.any(1).nonzero().flatten().tolist())
            raise FloatingPointError(f"step {step}, sample {samples}: the model's output is not finite")


def _bounds(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    bounds = (-clip, clip) if isinstance(clip, Real) else clip
    if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"clip: expected a number above 0 or (lo, hi) with lo < hi, got {clip}")
    return float(bounds[0]), float(bounds[1])


def _threshold(threshold: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """(q, most)."""
    if threshold is None:
        return None
    pair = (threshold, float("inf")) if isinstance(threshold, Real) else threshold
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not (0 <= pair[0] <= 1 and pair[1] >= 1):
        raise ValueError(f"threshold: expected q in [0, 1] or (q, most) with most >= 1, got {threshold}")
    return float(pair[0]), float(pair[1])


def _solver(name: str | Callable[..., Plan], options: dict[str, Any]) -> Callable[..., Plan]:
    """The solver, its options tried on a small grid: a wrong one is an error now."""
    solve = name if callable(name) else solver(name)
    name = getattr(solve, "__name__", repr(solve)) if callable(name) else name
    known = [p.name for p in inspect.signature(solve).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(f"{option}: solver {name!r} has {'the options ' + ', '.join(known) if known else 'no options'}")
    solve(EDM().grid(2), **options)
    return solve
