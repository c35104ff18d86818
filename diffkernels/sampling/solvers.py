"""Solvers as pure functions: a grid of noise levels in, a plan out, its coefficients in float64 on the host.

A solver speaks of x0 only: what each update is in terms of data predictions m_i, states and noise. Notation: m_0 is the newest
prediction, lam = log(alpha / sigma), h = lam_t - lam_s > 0 for the step s -> t, phi_1 = expm1(-h), and the exact solution of
the ODE is x_t = (sigma_t / sigma_s) x_s - alpha_t phi_1 m for a constant m (DPM-Solver++, arXiv 2211.01095, eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .plan import Level, Plan, Sum
from .schedules import Grid

Solver = Callable[..., Plan]
SOLVERS: dict[str, Solver] = {}
KINDS = ("midpoint", "taylor", "heun")
FINAL_RULES = ("diffusers", "official", True, False)


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


def _one_of(name: str, value: object, among: Sequence[object]) -> None:
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in among):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, among))}; got {value!r}")


class Point(NamedTuple):
    """A data prediction and where it was made."""

    m: Sum
    lam: float


def _lam(level: Level) -> float:
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha) - math.log(level.sigma) if level.alpha > 0 else -math.inf


def _h(s: Level, t: Level) -> float:
    return _lam(t) - _lam(s)


def first_order(x: Sum, m: Sum, s: Level, t: Level) -> Sum:
    """s to t with the data prediction held constant."""
    if t.sigma == 0:
        return t.alpha * m  # said outright: h is infinite here
    return (t.sigma / s.sigma) * x - t.alpha * math.expm1(-_h(s, t)) * m


def _ddim(plan: Plan, m: Sum, s: Level, t: Level, eta: float) -> Sum:
    """DDIM(eta), arXiv 2010.02502, eq. 12, in a form that holds for any alpha and sigma.

    Noise: eta sigma_t sqrt(1 - e^{-2h}). The rest of sigma_t keeps the direction of eps: r = sqrt(1 - eta^2 (1 - e^{-2h})).
    """
    if t.sigma == 0 or eta == 0:
        return first_order(plan.x, m, s, t)
    h = _h(s, t)
    variance = -math.expm1(-2 * h)
    r = math.sqrt(1 - eta**2 * variance)
    c = t.alpha * (eta**2 * variance / (1 + r) - r * math.expm1(-h))  # alpha_t (1 - r e^{-h}), without the cancellation
    return c * m + (r * t.sigma / s.sigma) * plan.x + (eta * t.sigma * math.sqrt(variance)) * plan.z


def _each(grid: Grid, update: Callable[[Plan, int, Sum, Level, Level], Sum]) -> Plan:
    """The plan of a solver that evaluates once a step: `update(plan, i, m, s, t)` is the next state."""
    plan = Plan()
    for i in range(grid.steps):
        s, t = grid.level(i), grid.level(i + 1)
        plan.set(update(plan, i, plan.evaluate(i, s), s, t))
    return plan


@_register("ddim")
def ddim(grid: Grid, *, eta: float = 0.0) -> Plan:
    """DDIM, arXiv 2010.02502, eq. 12 and 16. Order 1 for eta = 0; eta = 1 is ancestral sampling.

    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 to 1, got {eta}")
    return _each(grid, lambda plan, i, m, s, t: _ddim(plan, m, s, t, eta))


@_register("ddpm")
def ddpm(grid: Grid, *, variance: str = "fixed_small") -> Plan:
    """Ancestral sampling, arXiv 2006.11239, eq. 7 and Algorithm 2: the posterior given x0 at its predicted value.

    variance: "fixed_small" is the posterior's (beta tilde, DDIM's eta = 1); "fixed_large" the forward step's (beta).
    Raises ValueError for another variance.
    """
    _one_of("variance", variance, ("fixed_small", "fixed_large"))

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        small = _ddim(plan, m, s, t, 1.0)
        if variance == "fixed_small" or t.sigma == 0:  # the last step draws nothing
            return small
        added = small.only("z")
        return small - added + (s.sigma / t.sigma) * added  # beta tilde = (sigma_t / sigma_s)^2 beta

    return _each(grid, update)


@_register("euler", "flow_euler", "dpmpp_1")
def euler(grid: Grid) -> Plan:
    """Euler's method in sigma / alpha (EDM, k-diffusion) or in a flow's t. Order 1.

    Both, DPM-Solver++(1) (arXiv 2211.01095, eq. 9) and DDIM with eta = 0 are one and the same row: x0 held constant.
    """
    return ddim(grid)


@_register("euler_ancestral")
def euler_ancestral(grid: Grid, *, eta: float = 1.0) -> Plan:
    """k-diffusion's ancestral Euler: a step down to sigma_down, then noise up to sigma_t. It is DDIM(eta) in other words.

    Raises ValueError unless 0 <= eta <= 1.
    """
    return ddim(grid, eta=eta)


@_register("heun", "flow_heun")
def heun(grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Plan:
    """EDM's Heun, arXiv 2206.00364, Algorithms 1 and 2, in s = sigma / scale. Order 2; 2 N - 1 evaluations.

    d = (x - x0)/s: the predictor is x' = x + (s' - s) d; what is kept is x + (s' - s) d / 2, to which the second evaluation
    adds (s' - s) d' / 2. A step to sigma = 0 is Euler's, as d' is undefined there. With s_churn, s is raised to
    s (1 + min(s_churn / N, sqrt 2 - 1)) first where s_tmin <= s <= s_tmax, with noise of scale s_noise, which the update before
    adds: a pass less, and nothing is drawn where nothing is stirred (EDM's code draws always).

    Raises ValueError for a schedule that starts at alpha = 0, for negative options, for churn in a flow.
    """
    if not np.all(grid.scale > 0):
        raise ValueError("heun: the schedule starts at alpha = 0 (zero terminal SNR), where sigma / alpha is infinite")
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    if s_churn and not np.array_equal(grid.scale, grid.alpha):
        raise ValueError("s_churn: expected 0 for a flow, whose noise is not added to x")
    plan, s = Plan(), grid.sigma / grid.scale

    def stirred(i: int) -> tuple[Level, float, float]:
        """The level that step i begins at, its s, and the noise that takes x / scale there from level i."""
        gamma = min(s_churn / grid.steps, math.sqrt(2) - 1) if s_tmin <= s[i] <= s_tmax else 0.0
        if gamma == 0:
            return grid.level(i), float(s[i]), 0.0
        high = float(s[i]) * (1 + gamma)
        try:
            level = grid.between(-math.log(high))
        except ValueError as error:
            raise ValueError(f"s_churn, s_tmax: cannot raise sigma / alpha from {s[i]:.4g} to {high:.4g}: {error}") from None
        return level, high, s_noise * math.sqrt(high**2 - float(s[i]) ** 2)

    def arrive(y: Sum, i: int) -> Sum:
        """The state at level i, which the next step may want stirred."""
        if grid.sigma[i] == 0 or i == grid.steps:
            return y
        level, _, noise = stirred(i)
        k = scale(level, i)
        return (k / float(grid.scale[i])) * y + (k * noise) * plan.z if noise else y

    def scale(level: Level, i: int) -> float:
        return level.alpha if level != grid.level(i) else float(grid.scale[i])

    first, _, noise = stirred(0)
    plan.start_scale, plan.start_noise = scale(first, 0) / float(grid.scale[0]), scale(first, 0) * noise
    for i in range(grid.steps):
        here, now, _ = stirred(i)
        m = plan.evaluate(i, here)
        k, k_next, t = scale(here, i), float(grid.scale[i + 1]), grid.level(i + 1)
        if t.sigma == 0:
            plan.set(t.alpha * m)
            continue
        x, q = plan.x / k, float(s[i + 1] - now) / now
        plan.set(k_next * (x + q * (x - m)))
        half = plan.keep("half", k_next * (x + (q / 2) * (x - m)))
        m = plan.evaluate(i, t)
        q = float(s[i + 1] - now) / (2 * float(s[i + 1]))
        plan.set(arrive(half + q * (plan.x - k_next * m), i + 1))
    return plan


def _order(i: int, steps: int, order: int, rule: str | bool) -> int:
    """The order that the last steps are lowered to, so that the end is stable."""
    lowered = steps < {"diffusers": 15, "official": 10}[rule] if isinstance(rule, str) else rule
    return min(order, steps - i) if lowered else order


def _phis(h: float) -> tuple[float, float, float]:
    """phi_1 = expm1(-h), phi_2 = phi_1 / h + 1, phi_3 = phi_2 / h - 1/2."""
    one = math.expm1(-h)
    if abs(h) < 1e-2:  # the differences cancel: their series
        three = -h / 6 + h**2 / 24 - h**3 / 120 + h**4 / 720 - h**5 / 5040
        return one, h * (three + 0.5), three
    two = one / h + 1
    return one, two, two / h - 0.5


def multistep(x: Sum, s: Level, t: Level, points: Sequence[Point], order: int, kind: str) -> Sum:
    """One step of DPM-Solver++ 1M, 2M or 3M (arXiv 2211.01095, Algorithm 2, app. B) from the newest point first.

    kind: of 2M "midpoint" or "taylor"; of 3M "midpoint" is what the authors' code and diffusers have, whose second difference
    lacks a factor 2 (order 2), "taylor" has it (order 3).
    """
    state = first_order(x, points[0].m, s, t)
    if t.sigma == 0 or order == 1:
        return state
    h = _h(s, t)
    one, two, three = _phis(h)
    r0 = (points[0].lam - points[1].lam) / h  # infinite after a start at alpha = 0: the difference counts for nothing
    d1 = (points[0].m - points[1].m) / r0
    if order == 2:
        return state + (-t.alpha * one / 2 if kind == "midpoint" else t.alpha * two) * d1
    r1 = (points[1].lam - points[2].lam) / h
    older = (points[1].m - points[2].m) / r1
    second = (d1 - older) / (r0 + r1)
    return state + t.alpha * two * (d1 + r0 * second) - (2 if kind == "taylor" else 1) * t.alpha * three * second


def _multistep(grid: Grid, order: int, kind: str, rule: str | bool, euler_at_final: bool) -> Plan:
    _one_of("lower_order_final", rule, FINAL_RULES)
    _one_of("euler_at_final", euler_at_final, (True, False))
    points: list[Point] = []

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        points.insert(0, Point(m, _lam(s)))
        p = min(_order(i, grid.steps, order, rule), i + 1)
        p = 1 if euler_at_final and i == grid.steps - 1 else p
        return multistep(plan.x, s, t, points, p, kind)

    return _each(grid, update)


@_register("dpmpp_2m")
def dpmpp_2m(
    grid: Grid, *, kind: str = "midpoint", lower_order_final: str | bool = "diffusers", euler_at_final: bool = False
) -> Plan:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2. Order 2, one evaluation a step.

    x_t = (sigma_t / sigma_s) x - alpha_t phi_1 m_0 + alpha_t w D1 with D1 = (m_0 - m_1) h / h_previous and w = -phi_1 / 2 (kind
    "midpoint") or phi_1 / h + 1 ("taylor"; "heun" is diffusers' name for it). The first step has no m_1 and is of order 1, and
    so is one to sigma = 0, which returns m_0. `lower_order_final` also lowers the last step: "diffusers" if there are fewer
    than 15, "official" if fewer than 10, True always, False never; euler_at_final always.

    Raises ValueError for another kind or rule.
    """
    _one_of("kind", kind, KINDS)
    return _multistep(grid, 2, kind, lower_order_final, euler_at_final)


@_register("dpmpp_3m")
def dpmpp_3m(
    grid: Grid, *, kind: str = "published", lower_order_final: str | bool = "diffusers", euler_at_final: bool = False
) -> Plan:
    """DPM-Solver++(3M): as in the authors' code and diffusers (kind "published": order 2), or with the Taylor expansion's own
    second derivative ("taylor": order 3). Warm-up and `lower_order_final` as `dpmpp_2m`; the last but one is then of order 2.

    Raises ValueError for another kind or rule.
    """
    _one_of("kind", kind, ("published", "taylor"))
    return _multistep(grid, 3, "midpoint" if kind == "published" else kind, lower_order_final, euler_at_final)


@_register("sde_dpmpp_2m")
def sde_dpmpp_2m(
    grid: Grid, *, kind: str = "midpoint", lower_order_final: str | bool = "diffusers", euler_at_final: bool = False
) -> Plan:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095, app. C: the reverse SDE, one evaluation a step.

    x_t = (sigma_t / sigma_s) e^{-h} x + alpha_t v (m_0 + D1 / 2) + sigma_t sqrt v z with v = 1 - e^{-2h} (kind "midpoint"; D1's
    weight is alpha_t (1 - v / 2h) for "taylor" and "heun"). The rest as `dpmpp_2m`.

    Raises ValueError for another kind or rule.
    """
    _one_of("kind", kind, KINDS)
    _one_of("lower_order_final", lower_order_final, FINAL_RULES)
    _one_of("euler_at_final", euler_at_final, (True, False))
    points: list[Point] = []

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        points.insert(0, Point(m, _lam(s)))
        if t.sigma == 0:
            return t.alpha * m
        h = _h(s, t)
        variance = -math.expm1(-2 * h)
        decay = t.sigma / s.sigma * math.exp(-h)
        state = decay * plan.x + (t.alpha * variance) * m + (t.sigma * math.sqrt(variance)) * plan.z
        p = min(_order(i, grid.steps, 2, lower_order_final), i + 1)
        if p == 1 or (euler_at_final and i == grid.steps - 1):
            return state
        d1 = (m - points[1].m) / ((points[0].lam - points[1].lam) / h)
        return state + t.alpha * (variance / 2 if kind == "midpoint" else 1 - variance / (2 * h)) * d1

    return _each(grid, update)


def singlestep(x: Sum, s: Level, t: Level, points: Sequence[Point], kind: str, predict: str = "data") -> Sum:
    """One step of DPM-Solver++ 1S, 2S or 3S (arXiv 2211.01095, Algorithm 1) from s, where x and the first of `points` are, over
    the inner points after it, to t. kind: "midpoint" or "taylor".

    predict "noise": DPM-Solver-1, 2 or 3 (arXiv 2206.00927, Algorithms 1 and 2, app. B.3), whose points hold eps: alpha and
    sigma change places, and h its sign.
    """
    h = _h(s, t)
    if predict == "noise":
        k, (one, two, three) = t.sigma, _phis(-h)
        state = (t.alpha / s.alpha) * x - (k * one) * points[0].m
    else:
        state = first_order(x, points[0].m, s, t)
        if t.sigma == 0 or len(points) == 1:
            return state
        k, (one, two, three) = t.alpha, _phis(h)
    if len(points) == 1:
        return state
    # to 12 digits: halfway is then 1/2, where the midpoint form needs no points[0], and that much less is read
    r = [round((p.lam - points[0].lam) / h, 12) for p in points[1:]]
    d = [(p.m - points[0].m) / rk for p, rk in zip(points[1:], r, strict=True)]
    if len(points) == 2:
        return state + (-k * one / 2 if kind == "midpoint" else k * two) * d[0]
    if kind == "midpoint":
        return state + (k * two) * d[1]
    return state + (k * two / (r[1] - r[0])) * (r[1] * d[0] - r[0] * d[1]) - (2 * k * three / (r[1] - r[0])) * (d[1] - d[0])


def adaptive_step(s: Level, t: Level, inner: Sequence[Level], *, kind: str = "midpoint", predict: str = "data") -> Plan:
    """DPM-Solver-12 or -23 (arXiv 2206.00927, app. C) from s to t: two answers of neighbouring order, one inside of the other.

    Args:
        s, t: s.alpha and t.sigma are positive.
        inner: one level, halfway in lam, for orders 1 and 2; two, at 1/3 and 2/3, for orders 2 and 3.
        kind: "midpoint" or "taylor". predict: "data" (DPM-Solver++) or "noise" (DPM-Solver).

    Returns:
        A plan of 1 + len(inner) evaluations. The last one's `state` is the higher order's, its `kept["low"]` the lower's.

    Raises ValueError for another kind or predict, or for no or more than two inner levels.
    """
    _one_of("kind", kind, KINDS)
    _one_of("predict", predict, ("data", "noise"))
    if len(inner) not in (1, 2):
        raise ValueError(f"inner: expected one level or two, got {len(inner)}")
    plan, points, base = Plan(), list[Point](), Sum()
    for n, (here, there) in enumerate(zip((s, *inner), (*inner, t), strict=True)):
        m = plan.evaluate(0, here)
        base = base if n else plan.x
        eps = (plan.x - here.alpha * m) / here.sigma
        points.append(Point(m if predict == "data" else eps, _lam(here)))
        last = n == len(inner)
        # the third evaluation's state is of DPM-Solver-2 in the Taylor form, whatever the kind
        plan.set(singlestep(base, s, there, points, kind if last else "taylor", predict))
        if last:
            plan.keep("low", singlestep(base, s, t, points[:-1], kind, predict))
        elif predict == "noise":
            points[-1] = Point(plan.keep("eps", eps), points[-1].lam)
    return plan


def _singlestep(grid: Grid, order: int, kind: str) -> Plan:
    """Blocks of `order` evaluations, the inner points being the grid's own; what is left over at the end is of lower order, and
    the very last evaluation is a step of its own, of order 1: diffusers' order_list."""
    _one_of("kind", kind, KINDS)
    n = grid.steps
    whole = (n - 1) // order
    orders = [1 + k for _ in range(whole) for k in range(order)] + [1 + k for k in range(n - 1 - whole * order)] + [1]
    if n % 3 == 2 and order == 3 and grid.sigma[-1] > 0:
        orders[-1] = 2
    points: list[Point] = []
    base: list[Sum] = []

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        if orders[i] == 1 or math.isinf(points[0].lam):  # no difference reaches back to alpha = 0
            points.clear()
            base[:] = [plan.x]
        points.append(Point(m, _lam(s)))
        return singlestep(base[0], grid.level(i + 1 - len(points)), t, points, kind)

    return _each(grid, update)


@_register("dpmpp_2s")
def dpmpp_2s(grid: Grid, *, kind: str = "midpoint") -> Plan:
    """DPM-Solver++(2S), arXiv 2211.01095, Algorithm 1: two evaluations for two of the grid's steps. Order 2.

    The inner point is the grid's own, as in diffusers: `steps` counts evaluations. Raises ValueError for another kind.
    """
    return _singlestep(grid, 2, kind)


@_register("dpmpp_3s")
def dpmpp_3s(grid: Grid, *, kind: str = "midpoint") -> Plan:
    """DPM-Solver++(3S): DPM-Solver-3 (arXiv 2206.00927, Algorithm 2) on the data prediction, three evaluations for three steps.

    Order 3 where the inner points are evenly spaced in lam, or with kind "taylor". Raises ValueError for another kind.
    """
    return _singlestep(grid, 3, kind)


def _unipc_weights(rks: list[float], hh: float, b_h: float) -> tuple[np.ndarray, np.ndarray]:
    """R and b of UniPC (arXiv 2302.04867, eq. 5 and app. A): R rho = b."""
    b, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for k in range(1, len(rks) + 1):
        factorial *= k
        b.append(phi * factorial / b_h)
        phi = phi / hh - 1 / (factorial * (k + 1))
    return np.array([[rk**k for rk in rks] for k in range(len(rks))]), np.array(b)


@_register("unipc")
def unipc(grid: Grid, *, order: int = 2, kind: str = "bh2", corrector: bool = True, lower_order_final: bool = True) -> Plan:
    """UniPC, arXiv 2302.04867, Algorithms 5 to 8, on the data prediction: one evaluation a step, order `order` + 1.

    The corrector of a step waits for the evaluation after it, which also gives the next predictor: both are one pass. No
    corrector after the last step. A step to sigma = 0 returns m_0 (diffusers' bh1 is not finite there).

    Args: order: 1 to 3, of the predictor. kind: B(h) = h ("bh1") or e^h - 1 ("bh2"). corrector: False leaves UniP alone.
    lower_order_final: the last steps have order 3, 2, 1, as in the authors' code and diffusers, whatever their number.

    Raises ValueError for any other value.
    """
    _one_of("order", order, (1, 2, 3))
    _one_of("kind", kind, ("bh1", "bh2"))
    _one_of("corrector", corrector, (True, False))
    _one_of("lower_order_final", lower_order_final, (True, False))
    points: list[Point] = []
    bases: list[Sum] = []
    orders: list[int] = []

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        x = plan.x
        last = grid.level(i - 1) if i else s
        h = _h(last, s) if i else math.inf
        if corrector and math.isfinite(h):
            p, hh = min(orders[-1], len(points)), -h
            b_h = hh if kind == "bh1" else math.expm1(hh)
            rks = [(point.lam - points[0].lam) / h for point in points[1:p]]
            rho = np.array([0.5]) if p == 1 else np.linalg.solve(*_unipc_weights([*rks, 1.0], hh, b_h))
            x = first_order(bases[0], points[0].m, last, s) - s.alpha * b_h * float(rho[-1]) * (m - points[0].m)
            for r, rk, point in zip(rho, rks, points[1:p], strict=False):
                x = x - s.alpha * b_h * float(r) / rk * (point.m - points[0].m)
        bases[:] = [plan.keep("corrected", x) if x != plan.x else x]
        points.insert(0, Point(m, _lam(s)))
        if math.isinf(points[-1].lam):  # a start at alpha = 0: no difference to it
            points[:] = [point for point in points if math.isfinite(point.lam)] or points[:1]
        orders.append(min(order, grid.steps - i if lower_order_final else order, len(points)))
        state = first_order(x, m, s, t)
        if t.sigma == 0 or orders[-1] == 1:
            return state
        h = _h(s, t)
        b_h = -h if kind == "bh1" else math.expm1(-h)
        rks = [(point.lam - points[0].lam) / h for point in points[1 : orders[-1]]]
        rho = np.array([0.5]) if orders[-1] == 2 else np.linalg.solve(*_unipc_weights(rks, -h, b_h))
        for r, rk, point in zip(rho, rks, points[1:], strict=False):
            state = state - t.alpha * b_h * float(r) / rk * (point.m - m)
        return state

    return _each(grid, update)


@_register("lcm")
def lcm(grid: Grid, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Plan:
    """Latent consistency models, arXiv 2310.04378: f = c_skip x + c_out m with c_skip = sd^2 / (k^2 + sd^2), c_out = k /
    sqrt(k^2 + sd^2), k = timestep_scaling t; then noise again to the next level. Use the spacing "lcm".

    Raises ValueError unless both options are above 0.
    """
    for name, value in (("timestep_scaling", timestep_scaling), ("sigma_data", sigma_data)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        k = timestep_scaling * s.time
        f = (sigma_data**2 / (k**2 + sigma_data**2)) * plan.x + (k / math.hypot(k, sigma_data)) * m
        return t.alpha * f + t.sigma * plan.z if t.sigma > 0 else f

    return _each(grid, update)


@_register("consistency")
def consistency(grid: Grid, *, sigma_min: float | None = None) -> Plan:
    """Multistep consistency sampling, arXiv 2303.01469, Algorithm 1: x = f(x) + sqrt(sigma_t^2 - sigma_min^2) z, where the
    model returns f(x, sigma) (prediction "x0"). sigma_min: the noise that f leaves; None: the grid's smallest.

    Raises ValueError unless alpha = 1 throughout, or for sigma_min below 0 or above the grid's smallest.
    """
    if not np.all(grid.alpha == 1):
        raise ValueError("consistency: expected a schedule with alpha = 1, such as EDM")
    smallest = float(grid.sigma[grid.sigma > 0].min())
    least = smallest if sigma_min is None else sigma_min
    if not 0 <= least <= smallest:
        raise ValueError(f"sigma_min: expected 0 to the grid's smallest sigma, {smallest:g}, got {sigma_min}")

    def update(plan: Plan, i: int, m: Sum, s: Level, t: Level) -> Sum:
        return m + math.sqrt(max(t.sigma, least) ** 2 - least**2) * plan.z

    return _each(grid, update)


@_register("flow_stochastic")
def flow_stochastic(grid: Grid) -> Plan:
    """x0, then fresh noise to the next level: alpha_t m + sigma_t z; diffusers' FlowMatchEuler with stochastic_sampling."""
    return _each(grid, lambda plan, i, m, s, t: t.alpha * m + t.sigma * plan.z)
