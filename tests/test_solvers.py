"""Solvers on the host: what a plan's sums must satisfy exactly, and the orders of convergence on a mixture of Gaussians."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffkernels.sampling import (
    EDM,
    SOLVERS,
    DiscreteVP,
    Grid,
    RectifiedFlow,
    Sampler,
    VPCosine,
    VPLinear,
    cfg_weights,
)
from diffkernels.sampling.guidance import UNGUIDED
from diffkernels.sampling.lower import lower
from diffkernels.sampling.plan import Symbol
from diffkernels.sampling.solvers import adaptive_step

SCHEDULES = {
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "discrete": DiscreteVP.linear(),
    "edm": EDM(),
    "flow": RectifiedFlow(shift=3.0),
}
DETERMINISTIC = [
    ("ddim", {}),
    ("heun", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"kind": "taylor", "lower_order_final": False}),
    ("dpmpp_3m", {}),
    ("dpmpp_3m", {"kind": "taylor"}),
    ("dpmpp_2s", {}),
    ("dpmpp_2s", {"kind": "taylor"}),
    ("dpmpp_3s", {}),
    ("dpmpp_3s", {"kind": "taylor"}),
    *(("unipc", {"order": order, "kind": kind}) for order in (1, 2, 3) for kind in ("bh1", "bh2")),
    ("unipc", {"order": 3, "corrector": False, "lower_order_final": False}),
]
STOCHASTIC = [
    ("ddim", {"eta": 0.3}),
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5}),
    ("sde_dpmpp_2m", {}),
    ("sde_dpmpp_2m", {"kind": "taylor"}),
    ("flow_stochastic", {}),
]
CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}


def named(cases):
    return [pytest.param(*case, id="-".join(map(str, (case[0], *case[1].values())))) for case in cases]


def grids(start=False):
    for schedule in SCHEDULES.values():
        for final in ("zero", "sigma_min"):
            middle = float(schedule._times(17, schedule.spacings[0], final)[6])
            yield schedule.grid(17, final=final, start=middle if start else None)


def zero_snr(steps=12):
    bar = np.array(DiscreteVP.linear().alphas_cumprod)
    bar[-1] = 0
    return DiscreteVP(bar).grid(steps)


def states(plan, x, denoise, noise=lambda n: 0.0, given=None):
    """A plan carried out: the states before every evaluation and after the last. `given` replaces some of the first."""
    values, seen = {}, []

    def value(total):
        return sum(c * values[s] for s, c in total.terms.items())

    x = plan.start_scale * x + (plan.start_noise * noise(-1) if plan.start_noise else 0.0)
    for n, e in enumerate(plan.evaluations):
        x = given.get(n, x) if given else x
        seen.append(x)
        values[Symbol("x", n)], values[Symbol("x0", n)], values[Symbol("z", n)] = x, denoise(x, e.at), noise(n)
        for name, kept in e.kept.items():
            values[Symbol(name, n)] = value(kept)
        x = value(e.state)
        assert all(s.n == n for total in (e.state, *e.kept.values()) for s in total.terms if s.name == "z")
    return [*seen, x]


def from_exact_data(plan, first):
    """The states if x0 = y whatever they are: their coefficients of y, of the first noise, and of the noise of the rest."""
    basis = np.eye(3 + len(plan.evaluations))
    return states(plan, first.alpha * basis[0] + first.sigma * basis[1], lambda x, at: basis[0], lambda n: basis[3 + n])


# ---------------------------------------------------------------- levels


def test_spacings():
    """The ends of every one, and what each is even in."""
    for schedule in (VPLinear(), VPCosine(), DiscreteVP.scaled_linear()):
        for spacing in ("logsnr", "exponential", "karras", "quadratic"):
            grid = schedule.grid(9, spacing, "sigma_min")
            first, last = schedule._range()
            assert grid.lam[[0, -1]] == pytest.approx([float(schedule.lam(first)), float(schedule.lam(last))], rel=1e-12)
        assert np.diff(schedule.grid(9, "exponential", "sigma_min").lam, 2) == pytest.approx(0, abs=1e-9)
        rooted = np.exp(-schedule.grid(9, "karras", "sigma_min").lam / 7)
        assert np.diff(rooted, 2) == pytest.approx(0, abs=1e-9)
        assert np.diff(np.sqrt(schedule.grid(9, "quadratic", "sigma_min").time), 2) == pytest.approx(0, abs=1e-9)
    assert np.diff(np.log(EDM().grid(9, "exponential", "sigma_min").sigma), 2) == pytest.approx(0, abs=1e-12)


def test_lcm_timesteps():
    table = DiscreteVP.scaled_linear()
    assert list(table.grid(4, "lcm").time) == [999, 759, 499, 259, 0]
    assert list(table.grid(1, "lcm").time) == [999, 0] and table.grid(50, "lcm").time[49] == 19
    with pytest.raises(ValueError, match="steps: lcm has 50 timesteps"):
        table.grid(51, "lcm")


@pytest.mark.parametrize("name", SCHEDULES)
def test_start_in_the_middle(name):
    schedule = SCHEDULES[name]
    for final in ("zero", "sigma_min"):
        whole = schedule.grid(10, final=final)
        start = float(schedule._times(10, schedule.spacings[0], final)[4])
        part = schedule.grid(10, final=final, start=start)
        assert part.steps == 6
        for field in ("alpha", "sigma", "time", "scale"):
            assert np.array_equal(getattr(part, field), getattr(whole, field)[4:])
        with pytest.raises(ValueError, match="start: no level"):
            schedule.grid(10, final=final, start=-1.0)


def test_between():
    for schedule in SCHEDULES.values():
        grid = schedule.grid(10, final="sigma_min")
        for lam in (grid.lam[3], 0.3 * grid.lam[3] + 0.7 * grid.lam[4]):
            level = grid.between(lam)
            assert math.log(level.alpha / level.sigma) == pytest.approx(lam, rel=1e-9)
            assert level.alpha == pytest.approx(float(schedule.alpha(schedule.time_at(lam))))
    own = Grid(grid.alpha, grid.sigma, grid.time, grid.scale)
    with pytest.raises(ValueError, match="expected a grid of a schedule"):
        own.between(0.0)
    with pytest.raises(ValueError, match="lam"):
        DiscreteVP.linear().grid(10).between(-20.0)


# ---------------------------------------------------------------- exact data


@pytest.mark.parametrize("solver, options", named(DETERMINISTIC + STOCHASTIC))
def test_a_constant_denoiser_is_solved_exactly(solver, options):
    """With x0 = y whatever the state, evaluation n sees alpha y + sigma noise of its level: signal alpha, variance sigma^2.

    Without noise of its own a solver then makes x_t = alpha_t y + (sigma_t / sigma_s)(x_s - alpha_s y).
    """
    stochastic = (solver, options) in STOCHASTIC
    for grid in [*grids(), *grids(start=True), *([] if solver == "heun" else [zero_snr()])]:
        plan = SOLVERS[solver](grid, **options)
        found = from_exact_data(plan, grid.level(0))
        for x, at in zip(found, [*(e.at for e in plan.evaluations), grid.level(grid.steps)], strict=True):
            assert x[0] == pytest.approx(at.alpha, rel=1e-10, abs=1e-10)
            assert (x[1:] ** 2).sum() == pytest.approx(at.sigma**2, rel=1e-10, abs=1e-20)
            assert stochastic or x[1] == pytest.approx(at.sigma, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("schedule", [EDM(), VPLinear(), DiscreteVP.linear()])
def test_churn_ends_up_on_its_level(schedule):
    plan = SOLVERS["heun"](schedule.grid(18, final="sigma_min", spacing="karras"), **CHURN)
    assert plan.start_noise == 0 or schedule is not SCHEDULES["edm"]
    found = from_exact_data(plan, schedule.grid(18, spacing="karras").level(0))
    for x, e in zip(found, plan.evaluations, strict=False):
        assert x[0] == pytest.approx(e.at.alpha, rel=1e-10)
        assert (x[1:] ** 2).sum() == pytest.approx(e.at.sigma**2, rel=1e-10)


def test_churn_is_algorithm_2():
    """arXiv 2206.00364, Algorithm 2, written a second time."""
    grid, random = EDM().grid(12), np.random.default_rng(0)
    options = CHURN | {"s_tmax": 90.0, "s_noise": 1.007}
    plan = SOLVERS["heun"](grid, **options)
    assert len(plan.evaluations) == 23 and plan.start_noise > 0
    noises = {n: random.standard_normal(5) for n in range(-1, 23)}
    x = start = 80 * random.standard_normal(5)

    def denoise(x, at):
        return np.tanh(x / (1 + at.sigma))

    class At:
        def __init__(self, sigma):
            self.sigma = sigma

    for i in range(12):
        s, t = grid.sigma[i], grid.sigma[i + 1]
        gamma = min(40.0 / 12, math.sqrt(2) - 1) if 0.05 <= s <= 90.0 else 0.0
        hat = s * (1 + gamma)
        x = x + math.sqrt(hat**2 - s**2) * 1.007 * noises[2 * i - 1]
        d = (x - denoise(x, At(hat))) / hat
        y = x + (t - hat) * d
        if t > 0:
            y = x + (t - hat) * (d + (y - denoise(y, At(t))) / t) / 2
        x = y
    assert states(plan, start, denoise, noises.__getitem__)[-1] == pytest.approx(x, rel=1e-10, abs=1e-12)


def test_ddpm_is_the_posterior():
    """arXiv 2006.11239, eq. 7, written with betas."""
    table = DiscreteVP.linear()
    grid = table.grid(1000)
    beta, bar = np.linspace(1e-4, 0.02, 1000), table.alphas_cumprod
    small, large = SOLVERS["ddpm"](grid).evaluations, SOLVERS["ddpm"](grid, variance="fixed_large").evaluations
    for i, t in enumerate(range(999, 0, -1)):
        x0, x, z = (Symbol(name, i) for name in ("x0", "x", "z"))
        state, other = small[i].state, large[i].state
        assert state[x0] == pytest.approx(np.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t]), rel=1e-9)
        assert state[x] == pytest.approx(np.sqrt(1 - beta[t]) * (1 - bar[t - 1]) / (1 - bar[t]), rel=1e-9)
        assert state[z] ** 2 == pytest.approx((1 - bar[t - 1]) / (1 - bar[t]) * beta[t], rel=1e-9)
        assert other[z] ** 2 == pytest.approx(beta[t], rel=1e-9)
        assert (other[x0], other[x]) == (state[x0], state[x])


def test_fresh_noise():
    """lcm and consistency: what f leaves, and noise to the next level."""
    grid = DiscreteVP.scaled_linear().grid(4, "lcm")
    for n, e in enumerate(SOLVERS["lcm"](grid).evaluations):
        k = 10 * grid.time[n]
        skip, out = 0.25 / (k**2 + 0.25), k / math.sqrt(k**2 + 0.25)
        assert e.state[Symbol("x", n)] == pytest.approx(skip * grid.alpha[n + 1], rel=1e-12)
        assert e.state[Symbol("x0", n)] == pytest.approx(out * grid.alpha[n + 1], rel=1e-12)
        assert e.state[Symbol("z", n)] == grid.sigma[n + 1]
    grid = EDM().grid(5, final="sigma_min")
    for n, e in enumerate(SOLVERS["consistency"](grid).evaluations):  # f leaves sigma_min
        assert e.state[Symbol("x0", n)] == 1 and e.state[Symbol("x", n)] == 0
        assert e.state[Symbol("z", n)] ** 2 + 0.002**2 == pytest.approx(grid.sigma[n + 1] ** 2, rel=1e-12)


@pytest.mark.parametrize(
    "solver, options", named([*DETERMINISTIC, *STOCHASTIC, ("heun", CHURN), ("ddpm", {"variance": "fixed_large"})])
)
def test_the_row_to_zero_is_symbolic(solver, options):
    for schedule in SCHEDULES.values():
        if options == CHURN and (schedule is SCHEDULES["flow"] or schedule is SCHEDULES["cosine"]):
            continue  # a flow has no churn; at this cosine's first level there is no room for more noise
        for steps in (1, 2, 20):
            plan = SOLVERS[solver](schedule.grid(steps), **options)
            assert plan.evaluations[-1].state.terms == {Symbol("x0", plan.n): 1.0}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_coefficient_is_finite(solver):
    for grid in [EDM().grid(n, final=f) for n in (1, 2, 3, 1000) for f in ("zero", "sigma_min")]:
        for e in SOLVERS[solver](grid).evaluations:
            assert all(np.isfinite(list(total.terms.values())).all() for total in (e.state, *e.kept.values()))


def test_first_order_solvers_are_one():
    for grid in grids():
        plans = [SOLVERS[name](grid).evaluations for name in ("ddim", "euler", "dpmpp_1", "flow_euler")]
        assert all(plan == plans[0] for plan in plans)
        assert SOLVERS["euler_ancestral"](grid).evaluations == SOLVERS["ddim"](grid, eta=1.0).evaluations
    flow = RectifiedFlow().grid(10)
    rows = lower([SOLVERS["flow_euler"](flow)], "flow", cfg_weights(2.0))
    for i, row in enumerate(rows):  # x + (t' - t) v
        assert row.coef[0, 0, -2:] == pytest.approx([flow.sigma[i + 1] - flow.sigma[i], 1.0], abs=1e-15)


# ---------------------------------------------------------------- which order where


def used(plan):
    """How many data predictions each state is made of."""
    return [len(e.state.only("x0").terms) for e in plan.evaluations]


def test_lower_order_final():
    def orders(steps, solver="dpmpp_2m", final="sigma_min", **options):
        return used(SOLVERS[solver](EDM().grid(steps, final=final), **options))

    assert orders(14) == [1] + [2] * 12 + [1]
    assert orders(15) == [1] + [2] * 14
    assert orders(10, lower_order_final="official") == [1] + [2] * 9
    assert orders(9, lower_order_final="official") == [1] + [2] * 7 + [1]
    assert orders(20, lower_order_final=True) == [1] + [2] * 18 + [1]
    assert orders(4, lower_order_final=False) == [1, 2, 2, 2]
    assert orders(4, lower_order_final=False, euler_at_final=True) == [1, 2, 2, 1]
    assert orders(6, "dpmpp_3m") == [1, 2, 3, 3, 2, 1]
    assert orders(6, "dpmpp_3m", lower_order_final=False) == [1, 2, 3, 3, 3, 3]
    assert orders(16, "dpmpp_3m", "zero") == [1, 2] + [3] * 13 + [1]
    assert orders(6, "sde_dpmpp_2m") == [1, 2, 2, 2, 2, 1]
    plain = {"order": 3, "corrector": False}
    assert orders(20, "unipc", **plain) == [1, 2] + [3] * 16 + [2, 1]
    assert orders(6, "unipc", lower_order_final=False, **plain) == [1, 2, 3, 3, 3, 3]


def test_singlestep_blocks():
    """As diffusers' order_list: [1, 2, 3] blocks, what is left over, and a last step of order 1."""

    def orders(steps, order, final="zero"):  # the evaluations since the state that a block begins with
        plan = SOLVERS[f"dpmpp_{order}s"](EDM().grid(steps, "logsnr", final), kind="taylor")
        return [n + 1 - max((s.n for s in e.state.terms if s.name == "x"), default=n) for n, e in enumerate(plan.evaluations)]

    assert orders(7, 3) == [1, 2, 3, 1, 2, 3, 1]
    assert orders(6, 3) == [1, 2, 3, 1, 2, 1]
    assert orders(5, 3) == [1, 2, 3, 1, 1] and orders(5, 3, "sigma_min") == [1, 2, 3, 1, 2]
    assert orders(6, 2) == [1, 2, 1, 2, 1, 1] and orders(5, 2) == [1, 2, 1, 2, 1]
    assert orders(1, 3) == [1] and orders(2, 3) == [1, 1]


def test_unipc_without_corrector_is_dpmpp():
    """UniP-2 with B(h) = e^h - 1 is DPM-Solver++(2M) (arXiv 2302.04867, §3.3)."""
    grid = EDM().grid(20)
    unip = SOLVERS["unipc"](grid, corrector=False, lower_order_final=False)
    multistep = SOLVERS["dpmpp_2m"](grid)
    for a, b in zip(unip.evaluations, multistep.evaluations, strict=True):
        assert {s: pytest.approx(c, rel=1e-12) for s, c in a.state.terms.items()} == b.state.terms


# (solver, options, tensors read and written by all rows of one step of the solver, in the middle of a run)
PASSES = [
    ("ddim", {}, 3),
    ("ddim", {"eta": 1.0}, 3),
    ("ddpm", {}, 3),
    ("euler_ancestral", {}, 3),
    ("heun", {}, 8),
    ("heun", {"s_churn": 10.0, "s_tmax": 50.0}, 8),
    ("dpmpp_2m", {}, 5),
    ("dpmpp_3m", {}, 6),
    ("sde_dpmpp_2m", {}, 5),
    ("unipc", {"order": 1}, 7),
    ("unipc", {"order": 2}, 8),
    ("unipc", {"order": 3}, 9),
    ("lcm", {}, 3),
    ("consistency", {}, 3),
    ("flow_stochastic", {}, 3),
]


def passes(row):
    """The model output, x and the history read; the state and the history written."""
    return row.outputs + 1 + len(row.reads) + 1 + len(row.writes)


@pytest.mark.parametrize("solver, options, expected", PASSES)
def test_passes(solver, options, expected):
    plan = SOLVERS[solver](EDM().grid(20), **options)
    rows = lower([plan], "x0", UNGUIDED)
    assert sum(passes(row) for row in rows if row.step == 9) == expected
    assert max(len(row.reads) for row in rows) <= 5


@pytest.mark.parametrize(
    "order, kind, spacing, expected",
    [
        (2, "midpoint", "logsnr", 7),
        (2, "midpoint", "karras", 9),
        (2, "taylor", "logsnr", 9),
        (3, "midpoint", "logsnr", 13),
        (3, "taylor", "logsnr", 16),
    ],
)
def test_passes_of_a_singlestep_block(order, kind, spacing, expected):
    rows = lower([SOLVERS[f"dpmpp_{order}s"](EDM().grid(19, spacing), kind=kind)], "x0", UNGUIDED)
    assert sum(passes(row) for row in rows[2 * order : 3 * order]) == expected


# ---------------------------------------------------------------- orders of convergence

RANDOM = np.random.default_rng(1)
MEANS = 2 * RANDOM.standard_normal((4, 6))
STDS = np.linspace(0.3, 0.8, 4)
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])
START = RANDOM.standard_normal((32, 6))


def mixture_x0(x, at):
    """E[x0 | x] for a mixture of 4 Gaussians in 6 dimensions, exactly. at: (alpha, sigma, ...)."""
    alpha, sigma = at[0], at[1]
    variance = alpha**2 * STDS**2 + sigma**2
    away = x[:, None] - alpha * MEANS
    log = np.log(WEIGHTS) - 3 * np.log(variance) - (away**2).sum(-1) / (2 * variance)
    p = np.exp(log - log.max(1, keepdims=True))
    post = MEANS + (alpha * STDS**2 / variance)[:, None] * away
    return ((p / p.sum(1, keepdims=True))[..., None] * post).sum(1)


ODES = {
    "ve": (EDM(sigma_min=0.05, sigma_max=20.0), "logsnr", "sigma_min"),
    "vp": (VPLinear(t_min=1e-2), "logsnr", "sigma_min"),
    "flow": (RectifiedFlow(), "uniform", "zero"),
}


def runge_kutta(slope, x, first, last, steps):
    h = (last - first) / steps
    for i in range(steps):
        u = first + i * h
        k1 = slope(u, x)
        k2 = slope(u + h / 2, x + h / 2 * k1)
        k3 = slope(u + h / 2, x + h / 2 * k2)
        k4 = slope(u + h if i < steps - 1 else last, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def follow(ode, x, lams, steps):
    """The exact states at those log(alpha / sigma), the first of which x is at: d(x/alpha)/dlog s = x/alpha - x0."""

    def alpha(lam):
        return 1.0 if ode == "ve" else 1 / math.sqrt(1 + math.exp(-2 * lam))

    def slope(lam, x):
        return mixture_x0(alpha(lam) * x, (alpha(lam), alpha(lam) * math.exp(-lam))) - x

    found = [x]
    for a, b in itertools.pairwise(lams):
        found.append(alpha(b) * runge_kutta(slope, found[-1] / alpha(a), a, b, steps))
    return found


@pytest.fixture(scope="module")
def exact():
    ends = {}
    for ode in ("ve", "vp"):
        grid = ODES[ode][0].grid(2, *ODES[ode][1:])
        ends[ode] = follow(ode, START * grid.init_scale, [grid.lam[0], grid.lam[-1]], 3000)[-1]
    ends["flow"] = runge_kutta(
        lambda t, x: (x - mixture_x0(x, (1 - t, t))) / t if t > 0 else -x,  # as t falls to 0, E[x0] -> x and E[eps] -> 0
        START,
        1.0,
        0.0,
        1000,
    )
    return ends


def measured(ode, solver, exact, steps=(80, 160, 320), history=False, **options):
    errors = []
    for n in steps:
        grid = ODES[ode][0].grid(n, *ODES[ode][1:])
        x, given = START * grid.init_scale, None
        if history:  # the first three states are exact
            given = dict(enumerate(follow(ode, x, grid.lam[:3], 20)))
        end = states(SOLVERS[solver](grid, **options), x, mixture_x0, given=given)[-1]
        # the median: a trajectory beside the border between two modes needs finer steps than these to converge
        errors.append(float(np.median(np.linalg.norm(end - exact[ode], axis=1))))
    order = np.log2(np.array(errors[:-1]) / errors[1:])
    print(ode, solver, options, "orders", *(f"{p:.2f}" for p in order), "errors", *(f"{e:.1e}" for e in errors))
    return order[-1]


WHOLE = {"lower_order_final": False}
ORDERS = [
    ("ddim", {}, 0.9, 1.25),  # and euler and dpmpp_1, whose plans are equal: test_first_order_solvers_are_one
    ("heun", {}, 1.9, 2.1),
    ("dpmpp_2m", {"kind": "midpoint"}, 1.85, 2.1),
    ("dpmpp_2m", {"kind": "taylor"}, 1.85, 2.1),
    ("dpmpp_3m", {}, 1.9, 2.4),
    ("dpmpp_3m", {"kind": "taylor"}, 2.2, 3.15),
    ("unipc", {"order": 1, **WHOLE}, 1.85, 2.2),
    ("unipc", {"order": 2, **WHOLE}, 2.75, 3.3),
    ("unipc", {"order": 3, **WHOLE}, 3.7, 4.6),
    ("unipc", {"order": 2, "kind": "bh1", **WHOLE}, 2.75, 3.3),
    ("unipc", {"order": 2, "corrector": False, **WHOLE}, 1.85, 2.2),
]


@pytest.mark.parametrize("ode", ["ve", "vp"])
@pytest.mark.parametrize("solver, options, low, high", ORDERS)
def test_order(ode, solver, options, low, high, exact):
    assert low <= measured(ode, solver, exact, **options) <= high


@pytest.mark.parametrize("ode", ["ve", "vp"])
def test_order_of_3m_from_exact_history(ode, exact):
    assert 2.85 <= measured(ode, "dpmpp_3m", exact, history=True, kind="taylor", **WHOLE) <= 3.15
    assert 1.9 <= measured(ode, "dpmpp_3m", exact, history=True, **WHOLE) <= 2.4


@pytest.mark.parametrize("ode", ["ve", "vp"])
@pytest.mark.parametrize(
    "order, kind, steps",
    [(2, "midpoint", (81, 161, 321)), (2, "taylor", (81, 161, 321))] + [(3, k, (80, 161, 320)) for k in ("midpoint", "taylor")],
)
def test_order_of_singlestep(ode, order, kind, steps, exact):
    """Numbers of steps after which a whole block is the last, or one of order 2; steps count evaluations."""
    found = measured(ode, f"dpmpp_{order}s", exact, steps, kind=kind)
    assert order - 0.15 <= found <= order + 0.35


@pytest.mark.parametrize("solver, order", [("flow_euler", 1), ("flow_heun", 2)])
def test_order_of_flows(solver, order, exact):
    assert abs(measured("flow", solver, exact) - order) <= 0.1


@pytest.mark.parametrize("predict", ["data", "noise"])
@pytest.mark.parametrize("kind", ["midpoint", "taylor"])
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_step(order, kind, predict):
    """Errors of one step fall like h^(p + 1), p = order for the answer, order - 1 for the one inside of it."""
    schedule, lam, errors = VPLinear(), 0.0, []
    level = schedule.grid(5).between
    x = 1.3 * START
    for h in (0.04, 0.02):
        inner = [level(lam + h * k / order) for k in range(1, order)]
        plan = adaptive_step(level(lam), level(lam + h), inner, kind=kind, predict=predict)
        assert len(plan.evaluations) == order
        high = states(plan, x, mixture_x0)[-1]
        plan.set(plan.evaluations[-1].kept["low"])
        low = states(plan, x, mixture_x0)[-1]
        end = follow("vp", x, [lam, lam + h], 50)[-1]
        errors.append([float(np.median(np.linalg.norm(y - end, axis=1))) for y in (low, high)])
    found = np.log2(np.divide(*errors))
    assert found == pytest.approx([order, order + 1], abs=0.2), errors


# ---------------------------------------------------------------- distributions


def test_consistency_on_an_exact_model():
    """1, 2 and 5 steps with the exact consistency function of a mixture in one dimension, F_min^-1(F_sigma(x)), sample it.

    Kolmogorov's test at p > 0.01 against the mixture with noise of sigma_min.
    """
    weights, means, stds = np.array([0.3, 0.5, 0.2]), np.array([-1.5, 0.2, 2.0]), np.array([0.2, 0.4, 0.1])

    def cdf(x, sigma):
        z = (x[:, None] - means) / np.hypot(stds, sigma)
        return torch.special.ndtr(torch.from_numpy(z)).numpy() @ weights

    table, count, random = np.linspace(-4, 4, 20001), 40_000, np.random.default_rng(5)
    schedule = EDM(sigma_min=0.002, sigma_max=80.0)
    quantiles = cdf(table, schedule.sigma_min)
    rising = np.concatenate([[True], np.diff(quantiles) > 0])

    def f(x, at):
        return np.interp(cdf(x, at.sigma), quantiles[rising], table[rising])

    for steps in (1, 2, 5):
        grid = schedule.grid(steps, final="sigma_min")
        which = random.choice(3, count, p=weights)
        x = means[which] + stds[which] * random.standard_normal(count) + 80 * random.standard_normal(count)
        plan = SOLVERS["consistency"](grid)
        found = np.sort(states(plan, x, f, lambda n: random.standard_normal(count))[-1])
        exact = cdf(found, schedule.sigma_min)
        rank = np.arange(count + 1) / count
        distance = math.sqrt(count) * max(np.max(rank[1:] - exact), np.max(exact - rank[:-1]))
        p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * distance**2) for k in range(1, 20))
        print("consistency", steps, f"p = {p:.2f}")
        assert p > 0.01


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_cfg_is_exact_classifier_guidance(scale):
    """u + s (c - u) is u plus s times the classifier's gradient, with exact models: grad log p(c | x) by autograd."""
    alpha, sigma = 0.6, 0.8
    x = torch.from_numpy(START).requires_grad_()
    means, stds, weights = (torch.from_numpy(a) for a in (MEANS, STDS, WEIGHTS))
    variance = alpha**2 * stds**2 + sigma**2
    log = weights.log() - 3 * variance.log() - ((x[:, None] - alpha * means) ** 2).sum(-1) / (2 * variance)

    def eps(logs):
        (score,) = torch.autograd.grad(torch.logsumexp(logs, 1).sum(), x, retain_graph=True)
        return -sigma * score

    cond, uncond = eps(log[:, :2]), eps(log)  # class: the first two components
    (gradient,) = torch.autograd.grad((torch.logsumexp(log[:, :2], 1) - torch.logsumexp(log, 1)).sum(), x)
    w = cfg_weights(scale).guided[0]
    assert torch.allclose(w[0] * cond + w[1] * uncond, uncond - scale * sigma * gradient, rtol=0, atol=1e-6)
    assert np.allclose((x.detach() - sigma * uncond).numpy() / alpha, mixture_x0(START, (alpha, sigma)), atol=1e-9)


# ---------------------------------------------------------------- errors


def test_rejects_bad_options():
    edm, flow, cosine = EDM().grid(4), RectifiedFlow().grid(4), VPCosine().grid(4)
    for solver, grid, options, text in [
        ("ddim", edm, {"eta": 1.5}, "eta: expected 0 to 1, got 1.5"),
        ("euler_ancestral", edm, {"eta": -1}, "eta: expected 0 to 1, got -1"),
        ("ddpm", edm, {"variance": "learned"}, "variance: expected one of fixed_small"),
        ("heun", edm, {"s_churn": -1}, "s_churn: expected 0 or more, got -1"),
        ("heun", edm, {"s_noise": float("nan")}, "s_noise: expected 0 or more, got nan"),
        ("heun", flow, {"s_churn": 1}, "s_churn: expected 0 for a flow"),
        ("heun", cosine, {"s_churn": 1}, "s_tmax"),
        ("dpmpp_2m", edm, {"kind": "magic"}, "kind: expected one of midpoint, taylor, heun; got 'magic'"),
        (
            "dpmpp_2m",
            edm,
            {"lower_order_final": "never"},
            "lower_order_final: expected one of diffusers, official, True, False",
        ),
        ("dpmpp_3m", edm, {"kind": "midpoint"}, "kind: expected one of published, taylor"),
        ("dpmpp_3m", edm, {"lower_order_final": 1}, "lower_order_final: expected"),
        ("sde_dpmpp_2m", edm, {"kind": 2}, "kind: expected"),
        ("dpmpp_2s", edm, {"kind": "bh1"}, "kind: expected"),
        ("unipc", edm, {"order": 4}, "order: expected one of 1, 2, 3; got 4"),
        ("unipc", edm, {"kind": "bh3"}, "kind: expected one of bh1, bh2"),
        ("unipc", edm, {"lower_order_final": "diffusers"}, "lower_order_final: expected one of True, False"),
        ("unipc", edm, {"corrector": None}, "corrector: expected one of True, False; got None"),
        ("dpmpp_2m", edm, {"euler_at_final": "yes"}, "euler_at_final: expected one of True, False"),
        ("consistency", flow, {}, "consistency: expected a schedule with alpha = 1"),
        ("consistency", edm, {"sigma_min": -1.0}, "sigma_min: expected"),
        ("lcm", edm, {"sigma_data": 0.0}, "sigma_data: expected"),
    ]:
        with pytest.raises(ValueError, match=text):
            SOLVERS[solver](grid, **options)
    level = edm.level
    for inner, options, text in [
        ([], {}, "inner: expected one level or two, got 0"),
        ([level(1)], {"predict": "score"}, "predict: expected one of data, noise"),
        ([level(1)], {"kind": "bh1"}, "kind: expected"),
    ]:
        with pytest.raises(ValueError, match=text):
            adaptive_step(level(0), level(2), inner, **options)


def test_every_solver_has_a_sampler():
    """Names there are tests for: a new solver must be added above."""
    tested = {name for name, *_ in [*DETERMINISTIC, *STOCHASTIC]} | {"lcm", "consistency"}
    assert set(SOLVERS) == tested | {"euler", "flow_euler", "dpmpp_1", "flow_heun"}
    assert Sampler("flow_heun", schedule=EDM()).plan(3).evaluations == Sampler("heun", schedule=EDM()).plan(3).evaluations
