"""Noise schedules x_t = alpha_t x_0 + sigma_t eps, and the grids of noise levels that a sampler walks. All in float64.

`lam` is the half log-SNR log(alpha / sigma) of DPM-Solver (arXiv 2206.00927, §3), the variable in which its solvers step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from .plan import Level

Array = npt.NDArray[np.float64]
FINALS = ("zero", "sigma_min")


@dataclass(frozen=True, eq=False)
class Grid:
    """N + 1 noise levels, from the noisiest down, for N solver steps: level i to level i + 1.

    Attributes:
        alpha, sigma: [N + 1] float64, signal and noise scale. The last sigma may be exactly 0, the others are positive.
        time: [N + 1], the model's time input at each level: int64 for integer timesteps, else float64. Unused at sigma = 0.
        scale: [N + 1] float64, k such that x / k follows EDM's ODE d(x/k)/ds = (x/k - x0)/s in s = sigma / k. It is alpha
            for VP (s is then k-diffusion's sigma), and 1 for EDM (s = sigma) and for flows (s = t).
        init_scale: what standard normal noise is multiplied with to start at level 0.
        schedule: what the levels were taken from, for solvers that evaluate between them; None for a grid of one's own.

    Raises ValueError if the arrays are not of one length of at least 2, or log(alpha / sigma) does not strictly increase.
    """

    alpha: Array
    sigma: Array
    time: npt.NDArray[Any]
    scale: Array
    init_scale: float = 1.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        n = len(self.sigma)
        if n < 2 or not len(self.alpha) == len(self.time) == len(self.scale) == n:
            raise ValueError(
                "grid: expected alpha, sigma, time and scale of one length of at least 2, got "
                f"{len(self.alpha)}, {n}, {len(self.time)} and {len(self.scale)}"
            )
        if self.sigma[:-1].min() <= 0 or self.sigma[-1] < 0 or self.alpha.min() < 0 or not np.all(np.diff(self.lam) > 0):
            raise ValueError("grid: expected sigma > 0 but at the end, and log(alpha / sigma) to strictly increase")

    @property
    def steps(self) -> int:
        """N, the number of solver steps."""
        return len(self.sigma) - 1

    @cached_property
    def lam(self) -> Array:
        """[N + 1], log(alpha / sigma): -inf at alpha = 0, inf at sigma = 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def level(self, i: int) -> Level:
        """Level i as numbers."""
        return Level(float(self.alpha[i]), float(self.sigma[i]), float(self.time[i]))

    def between(self, lam: float) -> Level:
        """The level at which log(alpha / sigma) = lam. Raises ValueError for a grid of no schedule, and beyond its noisiest."""
        if self.schedule is None:
            raise ValueError(
                "steps: this solver evaluates between the grid's levels; expected a grid of a schedule, got a Grid"
            )
        t = self.schedule.time_at(lam)
        if abs(float(self.schedule.lam(t)) - lam) > 1e-6 * max(1.0, abs(lam)):
            raise ValueError(f"lam: expected the log(alpha / sigma) of a level that the schedule has, got {lam:g}")
        return Level(float(self.schedule.alpha(t)), float(self.schedule.sigma(t)), float(self.schedule.model_time(t)))


@dataclass(frozen=True, eq=False)
class Schedule:
    """What all schedules share: alpha(t), sigma(t), lam(t), its inverse, and `grid(steps)`. Times fall while sampling."""

    spacings: ClassVar[tuple[str, ...]] = ("uniform", "logsnr", "exponential", "karras", "quadratic")  # the first: default

    def alpha(self, t: npt.ArrayLike) -> Array:
        """Signal scale at times t, like t, float64."""
        raise NotImplementedError

    def sigma(self, t: npt.ArrayLike) -> Array:
        """Noise scale at times t, like t, float64."""
        raise NotImplementedError

    def lam(self, t: npt.ArrayLike) -> Array:
        """Half log-SNR log(alpha / sigma) at times t, like t, float64."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def time_at(self, lam: npt.ArrayLike) -> Array:
        """The inverse of `lam`: times at which log(alpha / sigma) = lam."""
        raise NotImplementedError

    def model_time(self, t: npt.ArrayLike) -> npt.NDArray[Any]:
        """What the network takes for time t."""
        return np.asarray(t, np.float64)

    def _range(self) -> tuple[float, float]:
        """The noisiest and the cleanest time that a grid holds, the exact end aside."""
        raise NotImplementedError

    def _points(self, n: int, spacing: str) -> Array:
        """n falling times that include both ends of `_range` (the noisier one if n = 1)."""
        first, last = self._range()
        if spacing == "uniform":
            return np.linspace(first, last, n)
        if spacing == "quadratic":  # DPM-Solver's time_quadratic
            return np.linspace(np.sqrt(first), np.sqrt(last), n) ** 2
        lam_first, lam_last = float(self.lam(first)), float(self.lam(last))
        if spacing in ("logsnr", "exponential"):  # even in log(sigma / alpha): one thing under two names
            t = self.time_at(np.linspace(lam_first, lam_last, n))
        else:  # Karras et al., arXiv 2206.00364, eq. 5, in sigma / alpha
            rho = getattr(self, "rho", 7.0)
            s = np.linspace(np.exp(-lam_first / rho), np.exp(-lam_last / rho), n) ** rho
            t = self.time_at(-np.log(s))
        t[0] = first  # exact, whatever the round trip gave
        if n > 1:
            t[-1] = last
        return t

    def _times(self, steps: int, spacing: str, final: str) -> Array:
        """[steps] times before an exact zero, or [steps + 1] for final = "sigma_min"."""
        return self._points(steps if final == "zero" else steps + 1, spacing)

    def _scale(self, alpha: Array) -> Array:
        return alpha

    def _init_scale(self, sigma: float) -> float:
        return 1.0  # VP: alpha^2 + sigma^2 = 1, and data of unit variance

    def grid(self, steps: int, spacing: str | None = None, final: str = "zero", start: float | None = None) -> Grid:
        """The noise levels of `steps` solver steps.

        Args:
            steps: >= 1.
            spacing: one of `self.spacings`; None: the first of them.
            final: "zero" ends at exactly sigma = 0; "sigma_min" at the schedule's smallest noise.
            start: begin in the middle, at the first of these levels whose time is at most this: there are then fewer steps.
                For a start from data (SDEdit, arXiv 2108.01073).

        Raises:
            TypeError, ValueError: an argument outside of the above.
        """
        if isinstance(steps, bool) or not isinstance(steps, Integral):
            raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
        steps = int(steps)
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        spacing = self.spacings[0] if spacing is None else spacing
        if spacing not in self.spacings:
            raise ValueError(f"spacing: {type(self).__name__} has {', '.join(self.spacings)}; got {spacing!r}")
        if final not in FINALS:
            raise ValueError(f"final: expected one of {', '.join(FINALS)}; got {final!r}")
        t = self._times(steps, spacing, final)
        if start is not None:
            t = t[t <= start]
            if len(t) < (1 if final == "zero" else 2):
                raise ValueError(f"start: no level of {steps} {spacing} steps is at or below time {start}")
        alpha, sigma, time = self.alpha(t), self.sigma(t), self.model_time(t)
        if final == "zero":
            alpha, sigma, time = np.append(alpha, 1.0), np.append(sigma, 0.0), np.append(time, time.dtype.type(0))
        return Grid(alpha, sigma, time, self._scale(alpha), self._init_scale(float(sigma[0])), self)


class _VP(Schedule):
    """alpha^2 + sigma^2 = 1, given log alpha."""

    def log_alpha(self, t: npt.ArrayLike) -> Array:
        """log alpha at times t, like t, float64."""
        raise NotImplementedError

    def alpha(self, t: npt.ArrayLike) -> Array:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: npt.ArrayLike) -> Array:
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))


def _log_alpha_at(lam: npt.ArrayLike) -> Array:
    """VP's log alpha from lam: alpha^2 = sigmoid(2 lam)."""
    return -0.5 * np.logaddexp(0.0, -2 * np.asarray(lam, np.float64))


@dataclass(frozen=True, eq=False)
class VPLinear(_VP):
    """Continuous VP, beta(t) linear on [0, 1]: log alpha = -t^2 (b1 - b0)/4 - t b0/2 (Song et al., arXiv 2011.13456, eq. 33).

    Args: beta_min, beta_max: b0 and b1. t_min: the cleanest time of a grid. time_scale: the network's time is time_scale t.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    time_scale: float = 1.0

    def log_alpha(self, t: npt.ArrayLike) -> Array:
        t = np.asarray(t, np.float64)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def time_at(self, lam: npt.ArrayLike) -> Array:
        # (b1 - b0) t^2 + 2 b0 t = c with c = -4 log alpha, solved for the positive root without cancellation
        c = -4 * _log_alpha_at(lam)
        return c / (self.beta_min + np.sqrt(self.beta_min**2 + (self.beta_max - self.beta_min) * c))

    def model_time(self, t: npt.ArrayLike) -> npt.NDArray[Any]:
        return self.time_scale * np.asarray(t, np.float64)

    def _range(self) -> tuple[float, float]:
        return 1.0, self.t_min


@dataclass(frozen=True, eq=False)
class VPCosine(_VP):
    """Continuous VP with alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)) (Nichol & Dhariwal, arXiv 2102.09672, eq. 17).

    alpha reaches 0 at t = 1: t stops where lam = lam_min, at 0.9961. (DPM-Solver's code clips its discrete tables at -5.1, and
    stops this one at t = 0.9946, lam = -4.8.)
    Args: s: offset. lam_min: the smallest half log-SNR. t_min, time_scale: see `VPLinear`.
    """

    s: float = 0.008
    lam_min: float = -5.1
    t_min: float = 1e-3
    time_scale: float = 1.0

    def _angle(self, t: npt.ArrayLike) -> Array:
        return np.pi / 2 * (np.asarray(t, np.float64) + self.s) / (1 + self.s)

    def log_alpha(self, t: npt.ArrayLike) -> Array:
        t = np.minimum(t, self.time_at(self.lam_min))
        return np.log(np.cos(self._angle(t))) - np.log(np.cos(self._angle(0.0)))

    def time_at(self, lam: npt.ArrayLike) -> Array:
        lam = np.maximum(lam, self.lam_min)
        angle = np.arccos(np.exp(_log_alpha_at(lam)) * np.cos(self._angle(0.0)))
        return angle * 2 * (1 + self.s) / np.pi - self.s

    def model_time(self, t: npt.ArrayLike) -> npt.NDArray[Any]:
        return self.time_scale * np.asarray(t, np.float64)

    def _range(self) -> tuple[float, float]:
        return float(self.time_at(self.lam_min)), self.t_min


@dataclass(frozen=True, eq=False)
class DiscreteVP(_VP):
    """VP over T trained timesteps 0 ... T - 1, given the cumulative products of 1 - beta. The model's time is the timestep.

    Between timesteps log alpha is interpolated linearly (DPM-Solver, arXiv 2206.00927, app. D.4); the spacings of whole
    timesteps never need it. Spacings:
        trailing, leading, linspace: as in diffusers' DDIMScheduler (Lin et al., arXiv 2305.08891, table 2);
        dpm_linspace, dpm_leading: what its DPMSolverMultistepScheduler means by these names: one more, without timestep 0;
        spaced: the integer grid of the spaced sampler of guided-diffusion and DiT, rounded as it rounds;
        lcm: latent consistency models' (arXiv 2310.04378): of 50 even timesteps, every so many;
        logsnr (= exponential), karras, quadratic: even in lam, rho = 7, or even in sqrt t, between both ends: fractional.

    Args:
        alphas_cumprod: [T], falling, in (0, 1); the last may be 0 (zero terminal SNR; the fractional spacings then refuse).
        steps_offset: added to the timesteps of the leading spacings (1 for Stable Diffusion).

    Raises ValueError if alphas_cumprod is anything else.
    """

    spacings: ClassVar[tuple[str, ...]] = (
        "trailing",
        "leading",
        "linspace",
        "dpm_linspace",
        "dpm_leading",
        "spaced",
        "lcm",
        "logsnr",
        "exponential",
        "karras",
        "quadratic",
    )
    alphas_cumprod: Sequence[float] | Array | torch.Tensor
    steps_offset: int = 0

    def __post_init__(self) -> None:
        table = np.array(self.alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or len(table) < 2 or not (table[0] < 1 and table[-1] >= 0 and np.all(np.diff(table) < 0)):
            raise ValueError(
                "alphas_cumprod: expected 2 or more strictly falling numbers below 1, only the last of which may be 0"
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike, steps_offset: int = 0) -> DiscreteVP:
        """From the T per-step variances beta."""
        return cls(np.cumprod(1 - np.asarray(betas, np.float64), dtype=np.float64), steps_offset)

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
        """beta from 1e-4 to 0.02: DDPM (arXiv 2006.11239, §4), ADM and DiT."""
        return cls.from_betas(np.linspace(beta_start, beta_end, timesteps))

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, steps_offset: int = 1
    ) -> DiscreteVP:
        """sqrt(beta) linear: latent diffusion, Stable Diffusion 1 and 2 and SDXL (whose steps_offset is 1)."""
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2, steps_offset)

    @classmethod
    def cosine(cls, timesteps: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """alphas_cumprod ~ cos^2, beta at most 0.999 (arXiv 2102.09672, eq. 17): diffusers' squaredcos_cap_v2."""
        bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - bar[1:] / bar[:-1], max_beta))

    @property
    def _table(self) -> Array:
        return np.asarray(self.alphas_cumprod, np.float64)

    def _whole(self, t: npt.ArrayLike) -> bool:
        t = np.asarray(t, np.float64)
        return bool(np.all(t == np.round(t)))

    def log_alpha(self, t: npt.ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            table = 0.5 * np.log(self._table)
        if self._whole(t):  # also where the table ends in alpha = 0
            return table[np.asarray(t, np.int64)]
        return np.interp(np.asarray(t, np.float64), np.arange(len(table)), table)

    def alpha(self, t: npt.ArrayLike) -> Array:
        return np.sqrt(self._table[np.asarray(t, np.int64)]) if self._whole(t) else super().alpha(t)

    def sigma(self, t: npt.ArrayLike) -> Array:
        return np.sqrt(1 - self._table[np.asarray(t, np.int64)]) if self._whole(t) else super().sigma(t)

    def time_at(self, lam: npt.ArrayLike) -> Array:
        if self._table[-1] == 0:
            raise ValueError("alphas_cumprod: ends in 0, which has no finite log-SNR; use a spacing of whole timesteps")
        table = 0.5 * np.log(self._table)
        return np.interp(_log_alpha_at(lam), table[::-1], np.arange(len(table), dtype=np.float64)[::-1])

    def model_time(self, t: npt.ArrayLike) -> npt.NDArray[Any]:
        return np.asarray(t, np.int64) if self._whole(t) else np.asarray(t, np.float64)

    def _range(self) -> tuple[float, float]:
        return len(self._table) - 1.0, 0.0

    def _times(self, steps: int, spacing: str, final: str) -> Array:
        total = len(self._table)
        if steps > total:
            raise ValueError(f"steps: expected at most the {total} trained timesteps, got {steps}")
        if spacing in ("logsnr", "exponential", "karras", "quadratic"):
            return super()._times(steps, spacing, final)
        if spacing == "trailing":
            # a float step may overshoot by one element, which would round to timestep -1
            t = np.round(np.arange(total, 0, -total / steps)[:steps]) - 1
        elif spacing == "leading":
            t = np.arange(steps)[::-1] * (total // steps) + float(self.steps_offset)
        elif spacing == "dpm_leading":
            t = np.arange(steps + 1)[:0:-1] * (total // (steps + 1)) + float(self.steps_offset)
        elif spacing == "linspace":
            t = np.round(np.linspace(0, total - 1, steps))[::-1]
        elif spacing == "lcm":
            origin = np.arange(1, 51)[::-1] * (total // 50) - 1
            if steps > len(origin):
                raise ValueError(f"steps: lcm has 50 timesteps to choose from, got {steps}")
            t = origin[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(np.int64)].astype(np.float64)
        elif spacing == "dpm_linspace":
            t = np.round(np.linspace(0, total - 1, steps + 1))[:0:-1]
        else:  # spaced: the stride is accumulated in floating point, then rounded half to even
            stride = (total - 1) / max(steps - 1, 1)
            t = np.round(np.cumsum([0.0] + [stride] * (steps - 1)))[::-1]
        if t[0] > total - 1:
            raise ValueError(f"steps_offset: {self.steps_offset} takes {steps} {spacing} steps past timestep {total - 1}")
        if final == "sigma_min" and t[-1] == 0:
            raise ValueError(f"final: {spacing!r} ends at timestep 0 already: expected 'zero' with it, got 'sigma_min'")
        return t if final == "zero" else np.append(t, 0.0)


@dataclass(frozen=True, eq=False)
class EDM(Schedule):
    """alpha = 1, sigma = t, rho-spaced (Karras et al., arXiv 2206.00364, eq. 5). The model's time is sigma.

    A model is EDM's denoiser D(x, sigma), preconditioning included (prediction "x0"), or the network F in it ("edm").
    Args: sigma_min, sigma_max, rho: the grid; its end after sigma_min is exactly 0. sigma_data: F's preconditioning.
    """

    spacings: ClassVar[tuple[str, ...]] = ("karras", "logsnr", "exponential", "uniform")
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def alpha(self, t: npt.ArrayLike) -> Array:
        return np.ones_like(t, dtype=np.float64)

    def sigma(self, t: npt.ArrayLike) -> Array:
        return np.array(t, np.float64)

    def time_at(self, lam: npt.ArrayLike) -> Array:
        return np.exp(-np.asarray(lam, np.float64))

    def _range(self) -> tuple[float, float]:
        return self.sigma_max, self.sigma_min

    def _init_scale(self, sigma: float) -> float:
        return sigma


@dataclass(frozen=True, eq=False)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t: rectified flow (Liu et al., arXiv 2209.03003), flow matching (Lipman et al., 2210.02747).

    `shift` k moves a grid's times to k t / (1 + (k - 1) t) (Esser et al., arXiv 2403.03206, eq. 23). Spacings:
        uniform: t from 1 to 0 in equal steps before the shift: what the SD3 and FLUX pipelines ask for;
        linspace: diffusers' FlowMatchEulerDiscreteScheduler left alone: `steps` times from 1 to shift(1/1000), then 0.
            It shifts that end twice.

    Args: shift: k > 0. time_scale: the network's time is time_scale t (1; diffusers' SD3: 1000). t_min: the end of "sigma_min".
    """

    spacings: ClassVar[tuple[str, ...]] = ("uniform", "linspace")
    shift: float = 1.0
    time_scale: float = 1.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift: expected a number above 0, got {self.shift}")

    def alpha(self, t: npt.ArrayLike) -> Array:
        return 1 - np.asarray(t, np.float64)

    def sigma(self, t: npt.ArrayLike) -> Array:
        return np.array(t, np.float64)

    def time_at(self, lam: npt.ArrayLike) -> Array:
        return 1 / (1 + np.exp(np.asarray(lam, np.float64)))

    def model_time(self, t: npt.ArrayLike) -> npt.NDArray[Any]:
        return self.time_scale * np.asarray(t, np.float64)

    def _shifted(self, t: npt.ArrayLike) -> Array:
        t = np.asarray(t, np.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _times(self, steps: int, spacing: str, final: str) -> Array:
        if final == "sigma_min":
            return self._shifted(np.linspace(1.0, self.t_min, steps + 1))
        if spacing == "uniform":
            return self._shifted(np.linspace(1.0, 0.0, steps + 1)[:-1])
        return self._shifted(np.linspace(1.0, float(self._shifted(1e-3)), steps))

    def _scale(self, alpha: Array) -> Array:
        return np.ones_like(alpha)

    def _init_scale(self, sigma: float) -> float:
        return sigma
