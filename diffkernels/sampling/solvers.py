"""Solvers as pure functions: a grid of noise levels in, the coefficients of every step out, in float64 on the host.

A solver speaks of x0 only: it says what each update is in terms of the data prediction, the state, kept tensors and noise.
`lower` then folds the model's prediction type, guidance and clipping into one row of `ops.solver_step` per evaluation.
With m_i data predictions, lam = log(alpha / sigma) and h = lam_t - lam_s > 0 for the step s -> t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .guidance import Weights
from .schedules import Array, Grid


class Update(NamedTuple):
    """y = x0 * (data prediction) + x * (state that the model saw) + sum_k history[k] * (k-th last kept) + noise * z."""

    x0: float
    x: float
    history: tuple[float, ...] = ()
    noise: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """One model evaluation and what follows from it.

    Attributes:
        step: the solver step that it belongs to, 0 ... N - 1.
        level: the index of the noise level at which the model is evaluated.
        state: the next state.
        keep: what later evaluations read as history, or None.
    """

    step: int
    level: int
    state: Update
    keep: Update | None = None


Solver = Callable[..., list[Evaluation]]
SOLVERS: dict[str, Solver] = {}
KEEP_X0 = Update(1.0, 0.0)


def _register(*names: str) -> Callable[[Solver], Solver]:
    def add(solver: Solver) -> Solver:
        SOLVERS.update(dict.fromkeys(names, solver))
        return solver

    return add


def solver(name: str) -> Solver:
    """The solver of that name. Raises ValueError, with the names there are."""
    if name not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}; got {name!r}")
    return SOLVERS[name]


def _first_order(grid: Grid, s: int, t: int, eta: float = 0.0) -> Update:
    """Level s to level t with x0 held constant: DDIM(eta), arXiv 2010.02502, eq. 12, in a form that holds for any alpha, sigma.

    Noise: eta sigma_t sqrt(1 - e^{-2h}). The rest of sigma_t keeps the direction of eps: r = sqrt(1 - eta^2 (1 - e^{-2h})).
    """
    alpha_t, sigma_t, sigma_s = float(grid.alpha[t]), float(grid.sigma[t]), float(grid.sigma[s])
    if sigma_t == 0:
        return Update(alpha_t, 0.0)  # said outright: h is infinite here
    h = float(grid.lam[t] - grid.lam[s])
    variance = -math.expm1(-2 * h)
    r = math.sqrt(1 - eta**2 * variance)
    # alpha_t (1 - r e^{-h}), without the cancellation
    x0 = alpha_t * (eta**2 * variance / (1 + r) - r * math.expm1(-h))
    return Update(x0, r * sigma_t / sigma_s, noise=eta * sigma_t * math.sqrt(variance))


@_register("ddim")
def ddim(grid: Grid, *, eta: float = 0.0) -> list[Evaluation]:
    """DDIM, arXiv 2010.02502, eq. 12 and 16. Order 1 for eta = 0; eta = 1 is ancestral sampling.

    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 to 1, got {eta}")
    return [Evaluation(i, i, _first_order(grid, i, i + 1, eta)) for i in range(grid.steps)]


@_register("ddpm")
def ddpm(grid: Grid, *, variance: str = "fixed_small") -> list[Evaluation]:
    """Ancestral sampling, arXiv 2006.11239, eq. 7 and Algorithm 2: the posterior given x0 at its predicted value.

    variance: "fixed_small" is the posterior's (beta tilde, DDIM's eta = 1); "fixed_large" the forward step's (beta).
    Raises ValueError for another variance.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance: expected one of fixed_small, fixed_large; got {variance!r}")
    evaluations = ddim(grid, eta=1.0)
    if variance == "fixed_small":
        return evaluations
    # beta tilde = (sigma_t / sigma_s)^2 beta; the last step to sigma = 0 draws nothing
    ratio = grid.sigma[:-1] / np.where(grid.sigma[1:] > 0, grid.sigma[1:], np.inf)
    return [
        Evaluation(e.step, e.level, e.state._replace(noise=e.state.noise * float(ratio[i]))) for i, e in enumerate(evaluations)
    ]


@_register("euler", "flow_euler", "dpmpp_1")
def euler(grid: Grid) -> list[Evaluation]:
    """Euler's method in sigma / alpha (EDM, k-diffusion) or in a flow's t. Order 1.

    Both, DPM-Solver++(1) (arXiv 2211.01095, eq. 9) and DDIM with eta = 0 are one and the same row: x0 held constant.
    """
    return ddim(grid)


@_register("heun", "flow_heun")
def heun(grid: Grid) -> list[Evaluation]:
    """EDM's Heun, arXiv 2206.00364, Algorithm 1, without churn, in s = sigma / scale. Order 2; 2 N - 1 evaluations.

    d = (x - x0)/s: the predictor is x' = x + (s' - s) d; what is kept is x + (s' - s) d / 2, to which the second evaluation
    adds (s' - s) d' / 2. A step to sigma = 0 is Euler's, as d' is undefined there.
    """
    s, k = grid.sigma / grid.scale if np.all(grid.scale > 0) else None, grid.scale
    if s is None:
        raise ValueError("heun: the schedule starts at alpha = 0 (zero terminal SNR), where sigma / alpha is infinite")
    evaluations = []
    for i in range(grid.steps):
        predictor = _first_order(grid, i, i + 1)
        if grid.sigma[i + 1] == 0:
            evaluations.append(Evaluation(i, i, predictor))
            continue
        q, k_t = float((s[i + 1] - s[i]) / (2 * s[i])), float(k[i + 1])
        half = Update(-k_t * q, k_t / float(k[i]) * (1 + q))
        evaluations.append(Evaluation(i, i, predictor, keep=half))
        q = float((s[i + 1] - s[i]) / (2 * s[i + 1]))
        evaluations.append(Evaluation(i, i + 1, Update(-k_t * q, q, (1.0,))))
    return evaluations


@_register("dpmpp_2m")
def dpmpp_2m(grid: Grid, *, kind: str = "midpoint", lower_order_final: bool = True) -> list[Evaluation]:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2. Order 2, one evaluation a step.

    x_t = (sigma_t / sigma_s) x - alpha_t expm1(-h) m_0 + alpha_t w D1 with D1 = (m_0 - m_1) h / h_previous and
    w = -expm1(-h)/2 (kind "midpoint") or expm1(-h)/h + 1 (kind "taylor"; "heun" is diffusers' name for it).
    Warm-up: the first step has no m_1 and is of order 1. So is a step to sigma = 0, which returns m_0; and, as in diffusers,
    with `lower_order_final` the last step whenever there are fewer than 15 (the authors' code: fewer than 10).

    Raises ValueError for another kind.
    """
    if kind not in ("midpoint", "taylor", "heun"):
        raise ValueError(f"kind: expected one of midpoint, taylor, heun; got {kind!r}")
    lam = grid.lam
    evaluations = []
    for i in range(grid.steps):
        state = _first_order(grid, i, i + 1)
        last = i == grid.steps - 1
        if i > 0 and grid.sigma[i + 1] > 0 and not (last and lower_order_final and grid.steps < 15):
            h = float(lam[i + 1] - lam[i])
            phi = math.expm1(-h)
            weight = -phi / 2 if kind == "midpoint" else phi / h + 1
            # 0 after a start at alpha = 0, whose h is infinite
            d = float(grid.alpha[i + 1]) * weight * h / float(lam[i] - lam[i - 1])
            state = Update(state.x0 + d, state.x, (-d,))
        evaluations.append(Evaluation(i, i, state, keep=None if last else KEEP_X0))
    return evaluations


def _to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(A, a) with x0 = A (model output) + a x."""
    if prediction == "eps":
        if alpha == 0:
            raise ValueError("prediction: eps says nothing about x0 at alpha = 0 (t = 1 of a flow, zero terminal SNR)")
        return -sigma / alpha, 1 / alpha
    if prediction == "x0":
        return 1.0, 0.0
    if prediction == "v":  # v = alpha eps - sigma x0, arXiv 2202.00512, app. D
        norm = alpha**2 + sigma**2
        return -sigma / norm, alpha / norm
    norm = alpha + sigma  # flow: v = eps - x0
    return -sigma / norm, 1 / norm


PREDICTIONS = ("eps", "x0", "v", "flow")


@dataclass(frozen=True, eq=False)
class Row:
    """One call of `ops.solver_step`.

    Attributes:
        step, level: as in `Evaluation`. ends: whether it completes the step.
        history: how many history tensors it reads. noise: whether it takes noise.
        results: how many tensors it writes: the next state, then, if `keeps`, the next history tensor, then maybe x0.
        x0: the index of the result that is the data prediction, or None.
        coef: [B or 1, K] float64.
    """

    step: int
    level: int
    ends: bool
    history: int
    noise: bool
    results: int
    keeps: bool
    x0: int | None
    coef: Array


def lower(
    evaluations: Sequence[Evaluation],
    grid: Grid,
    prediction: str,
    weights: Weights,
    clip: tuple[float, float] | None = None,
    show_x0: bool = False,
) -> list[Row]:
    """The rows of `ops.solver_step`, one an evaluation.

    Without `clip` the row's m is the guided model output itself and all else is multiplied out here in float64; x0, whose
    coefficients grow like 1 / alpha, is then never an intermediate. With `clip`, m is x0, clamped to [lo, hi].

    Args:
        evaluations: what a solver returned for `grid`.
        prediction: one of eps, x0, v (alpha eps - sigma x0), flow (eps - x0).
        weights: how outputs combine, see `guidance.cfg_weights`.
        show_x0: whether the last evaluation of every step also writes x0.

    Raises:
        ValueError: unknown prediction, or eps at alpha = 0.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    rows = []
    for n, e in enumerate(evaluations):
        big, small = _to_x0(prediction, float(grid.alpha[e.level]), float(grid.sigma[e.level]))
        ends = n + 1 == len(evaluations) or evaluations[n + 1].step != e.step
        updates = [e.state] if e.keep is None else [e.state, e.keep]
        if show_x0 and ends and KEEP_X0 not in updates[1:]:
            updates.append(KEEP_X0)
        shown = len(updates) - 1 if updates[-1] == KEEP_X0 and len(updates) > 1 else None
        noise = any(u.noise != 0 for u in updates)
        depth = len(e.state.history)

        head = [big, small, *clip] if clip else [1.0, 0.0, -math.inf, math.inf]
        tail: list[float] = []
        for u in updates:
            c, d = (u.x0, u.x) if clip else (u.x0 * big, u.x0 * small + u.x)
            tail += [c, d, *u.history, *[0.0] * (depth - len(u.history))]
            if noise:
                tail.append(u.noise)
        scales = [weights.guided] if weights.rest is None else [weights.guided, weights.rest]
        columns = [head[0] * w for w in scales]
        batch = len(weights.guided)
        fixed = np.broadcast_to(np.array(head[1:] + tail), (batch, 3 + len(tail)))
        coef = np.concatenate([*columns, fixed], axis=1)
        rows.append(Row(e.step, e.level, ends, depth, noise, len(updates), e.keep is not None, shown, coef))
    return rows
