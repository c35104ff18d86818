"""A solver's plan: what every model evaluation is followed by, as sums over named tensors. No tensor is touched here.

A solver speaks of data predictions, states and noise as of numbers, `a * x - b * (m0 - m1)`; the sums that come out say, by
name, what each evaluation must write and read, and `lower` makes rows of `ops.solver_step` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Symbol(NamedTuple):
    """A tensor: "x0", the data prediction of evaluation n; "x", the state that it saw; "z", its noise; else what it kept."""

    name: str
    n: int


class Sum:
    """A linear combination of symbols. Terms that cancel to an exact 0 are gone."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Symbol, float] | None = None) -> None:
        self.terms = {symbol: float(c) for symbol, c in (terms or {}).items() if c != 0}

    def __add__(self, other: Sum) -> Sum:
        if not isinstance(other, Sum):
            return NotImplemented
        return Sum({s: self[s] + other[s] for s in self.terms | other.terms})

    def __mul__(self, factor: float) -> Sum:
        return Sum({s: c * float(factor) for s, c in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Sum:
        return self * -1.0

    def __sub__(self, other: Sum) -> Sum:
        return self + -other

    def __truediv__(self, divisor: float) -> Sum:
        return Sum({s: c / float(divisor) for s, c in self.terms.items()})

    def __getitem__(self, symbol: Symbol) -> float:
        return self.terms.get(symbol, 0.0)

    def only(self, name: str) -> Sum:
        """The part that holds symbols of that name."""
        return Sum({s: c for s, c in self.terms.items() if s.name == name})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sum) and self.terms == other.terms

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return " + ".join(f"{c:g} {s.name}{s.n}" for s, c in self.terms.items()) or "0"


class Level(NamedTuple):
    """Where a model is evaluated: x_t = alpha x_0 + sigma eps, and the time that the network takes for it."""

    alpha: float
    sigma: float
    time: float


@dataclass
class Evaluation:
    """One model evaluation and what follows from it.

    Attributes:
        step: the solver step that it belongs to, 0 ... N - 1.
        at: the noise level of the state that it sees.
        state: the next state.
        kept: sums that later evaluations read, by name. Data predictions ("x0") and states ("x") need no entry.
    """

    step: int
    at: Level
    state: Sum = field(default_factory=Sum)
    kept: dict[str, Sum] = field(default_factory=dict)


class Plan:
    """Evaluations in the making: `x` is the state, `evaluate` gives a data prediction, `set` the next state.

        plan = Plan()
        for i in range(grid.steps):
            m = plan.evaluate(i, grid.level(i))
            plan.set(a * plan.x + b * m)

    Attributes:
        evaluations: what was planned so far.
        start_scale, start_noise: the very first state times the one, plus noise times the other, for a solver that stirs
            before it evaluates.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.start_scale, self.start_noise = 1.0, 0.0

    @property
    def n(self) -> int:
        """The last evaluation's number."""
        return len(self.evaluations) - 1

    @property
    def x(self) -> Sum:
        """The state that the last evaluation saw."""
        return Sum({Symbol("x", self.n): 1.0})

    @property
    def z(self) -> Sum:
        """Standard normal noise of the last evaluation; only its `state` may hold it."""
        return Sum({Symbol("z", self.n): 1.0})

    def evaluate(self, step: int, at: Level) -> Sum:
        """The model is evaluated at the current state; returns its data prediction."""
        self.evaluations.append(Evaluation(step, at))
        return Sum({Symbol("x0", self.n): 1.0})

    def set(self, state: Sum) -> None:
        """The next state."""
        self.evaluations[-1].state = state

    def keep(self, name: str, value: Sum) -> Sum:
        """Has the last evaluation write `value`, for later ones to read in place of its parts."""
        self.evaluations[-1].kept[name] = value
        return Sum({Symbol(name, self.n): 1.0})
