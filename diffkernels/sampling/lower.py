"""From plans to rows of `ops.solver_step`: what each evaluation reads and writes, and one coefficient table for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..ops._solver import MAX_HISTORY, MAX_RESULTS
from .guidance import UNGUIDED, Weights
from .plan import Evaluation, Level, Plan, Sum, Symbol
from .schedules import Array

PREDICTIONS = ("eps", "x0", "v", "flow", "edm")


def to_x0(prediction: str, at: Level, sigma_data: float = 0.5) -> tuple[float, float]:
    """(A, a) with x0 = A (model output) + a x.

    eps; x0; v = alpha eps - sigma x0 (arXiv 2202.00512, app. D); flow = eps - x0; edm, the network F in EDM's D(x, sigma) =
    c_skip x + c_out F(c_in x) (arXiv 2206.00364, table 1).

    Raises ValueError for eps at alpha = 0, and for edm where alpha is not 1.
    """
    alpha, sigma = at.alpha, at.sigma
    if prediction == "eps":
        if alpha == 0:
            raise ValueError("prediction: eps says nothing about x0 at alpha = 0 (t = 1 of a flow, zero terminal SNR)")
        return -sigma / alpha, 1 / alpha
    if prediction == "x0":
        return 1.0, 0.0
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return -sigma / norm, alpha / norm
    if prediction == "flow":
        return -sigma / (alpha + sigma), 1 / (alpha + sigma)
    if alpha != 1:
        raise ValueError(f"prediction: edm needs a schedule with alpha = 1, such as EDM; got {alpha}")
    norm = sigma**2 + sigma_data**2
    return sigma * sigma_data / math.sqrt(norm), sigma_data**2 / norm


def model_input(prediction: str, at: Level, sigma_data: float = 0.5) -> tuple[float, float]:
    """What the state is multiplied with before the model sees it, and the time that goes with it."""
    if prediction != "edm":
        return 1.0, at.time
    return 1 / math.hypot(at.sigma, sigma_data), math.log(at.sigma) / 4


@dataclass
class Row:
    """One call of `ops.solver_step`, which follows one model evaluation.

    Attributes:
        step: the solver step that it belongs to. ends: whether it completes it.
        reads: the history tensors, in order.
        writes: the results after the next state, in order; "x0" of this evaluation among them is the data prediction.
        alive: of all tensors kept so far, what later rows read.
        noise: whether it draws.
        guided: whether the model sees every condition (CFG), or the first alone.
        weights: [P, B or 1, G] of the G model outputs that this makes, in the guided channels.
        scales: [P] what the next model input is of the next state, a plan each; None where there is no next one.
        coef: [P, B or 1, K] float64.
    """

    step: int
    ends: bool
    reads: list[Symbol]
    writes: list[Symbol]
    alive: set[Symbol]
    noise: bool
    guided: bool
    weights: Array
    scales: Array | None = None
    coef: Array = field(default_factory=lambda: np.zeros((0, 0, 0)))

    @property
    def outputs(self) -> int:
        """G."""
        return self.weights.shape[2]

    @property
    def x0(self) -> int | None:
        """Which result is the data prediction."""
        return next((1 + i for i, symbol in enumerate(self.writes) if symbol.name == "x0"), None)


def _read(sums: Sequence[Sum]) -> set[Symbol]:
    return {symbol for each in sums for symbol in each.terms}


def _needed(plans: Sequence[Plan], length: int, keep: Sequence[str]) -> list[set[Symbol]]:
    """For every evaluation, the symbols that later ones read, or whoever runs them all."""
    needed: list[set[Symbol]] = [set() for _ in range(length)] + [{Symbol(name, length - 1) for name in keep}]
    for n in reversed(range(length)):
        needed[n] = set(needed[n + 1])
        for plan in plans:
            if n + 1 < len(plan.evaluations):
                e = plan.evaluations[n + 1]
                wanted = [e.state, *(value for name, value in e.kept.items() if Symbol(name, n + 1) in needed[n + 1])]
                needed[n] |= {s for s in _read(wanted) if s.n <= n}
        needed[n] = {s for s in needed[n] if s.n <= n}
    return needed[:length]


def lower(
    plans: Sequence[Plan],
    prediction: str,
    guided: Weights,
    interval: tuple[float, float] | None = None,
    *,
    map_x0: tuple[float, float] | None = None,
    mask_strength: float | None = None,
    show_x0: bool = False,
    keep: Sequence[str] = (),
    sigma_data: float = 0.5,
) -> list[Row]:
    """The rows for a batch whose samples follow one of `plans` each, aligned at the first evaluation.

    A plan that is over repeats its last model evaluation and keeps its state. Without `map_x0` and `mask_strength` the row's m
    is the guided model output itself and all else is multiplied out here in float64; x0, whose coefficients grow like
    1 / alpha, is then never an intermediate. With one of them m is x0.

    Args:
        prediction: one of PREDICTIONS.
        guided: how outputs combine, see `guidance`. interval: the range of sigma / alpha where they do; elsewhere the first
            alone counts, and where no sample is inside, the model sees that one alone.
        map_x0: (lo, hi) of the row: the clamp, or with a bound the range of it.
        mask_strength: the column of masks, where there is one.
        show_x0: whether the last evaluation of every step also writes x0.
        keep: names of sums that the very last evaluation writes, though none reads them.

    Raises ValueError: what `to_x0` refuses; a plan that reads or writes more than the op can.
    """
    lead = max(plans, key=lambda plan: len(plan.evaluations))  # the others are over when it is
    length = len(lead.evaluations)
    needed = _needed(plans, length, keep)
    rows = []
    for n in range(length):
        each = [plan.evaluations[min(n, len(plan.evaluations) - 1)] for plan in plans]
        over = [n >= len(plan.evaluations) for plan in plans]
        step = lead.evaluations[n].step
        ends = n + 1 == length or lead.evaluations[n + 1].step != step
        writes = sorted(s for s in needed[n] if s.n == n and s.name != "x")
        if show_x0 and ends and Symbol("x0", n) not in writes:
            writes.insert(0, Symbol("x0", n))
        sums = [_results(e, n, writes, done) for e, done in zip(each, over, strict=True)]
        own = {Symbol("x0", n), Symbol("x", n), Symbol("z", n)}
        reads = sorted(_read([u for s in sums for u in s]) - own, key=lambda s: (-s.n, s.name))
        noise = any(u[Symbol("z", n)] != 0 for s in sums for u in s)
        if len(reads) > MAX_HISTORY or 1 + len(writes) > MAX_RESULTS:
            raise ValueError(f"solver: evaluation {n} reads {len(reads)} kept tensors and writes {1 + len(writes)}")
        inside = [not done and _inside(e.at, interval) for e, done in zip(each, over, strict=True)]
        weights = guided if any(inside) else UNGUIDED
        first = np.broadcast_to(np.eye(1, weights.guided.shape[1]), weights.guided.shape)
        each_weights = np.stack([weights.guided if here else first for here in inside])
        row = Row(step, ends, reads, writes, needed[n], noise, any(inside), each_weights)
        coefs = []
        for e, u, w in zip(each, sums, each_weights, strict=True):
            big, small = to_x0(prediction, e.at, sigma_data)
            mapped = map_x0 is not None or mask_strength is not None
            a, head = (big, small) if mapped else (1.0, 0.0)
            tail = [head, *([0.0] if noise else []), *(map_x0 or (-math.inf, math.inf))]
            tail += [] if mask_strength is None else [mask_strength]
            for y in u:
                c, d = y[Symbol("x0", n)], y[Symbol("x", n)]
                tail += [c, d] if mapped else [c * big, c * small + d]
                tail += [y[s] for s in reads] + ([y[Symbol("z", n)]] if noise else [])
            columns = [a * w] if weights.rest is None else [a * w, a * weights.rest]
            fixed = np.broadcast_to(np.array(tail), (len(w), len(tail)))
            coefs.append(np.concatenate([*columns, fixed], axis=1))
        row.coef = np.stack(coefs)
        if n + 1 < length:
            later = [plan.evaluations[min(n + 1, len(plan.evaluations) - 1)] for plan in plans]
            row.scales = np.array([model_input(prediction, e.at, sigma_data)[0] for e in later])
        rows.append(row)
    return rows


def _inside(at: Level, interval: tuple[float, float] | None) -> bool:
    noise = at.sigma / at.alpha if at.alpha > 0 else math.inf
    return interval is None or interval[0] < noise <= interval[1]


def _results(e: Evaluation, n: int, writes: Sequence[Symbol], over: bool) -> list[Sum]:
    """The next state, then what is written besides; of a plan that is over the state alone goes on."""
    x0 = Sum({Symbol("x0", n): 1.0})
    if over:
        return [Sum({Symbol("x", n): 1.0}), *(x0 if s.name == "x0" else Sum() for s in writes)]
    return [e.state, *(x0 if s.name == "x0" else e.kept.get(s.name, Sum()) for s in writes)]
