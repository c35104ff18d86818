"""Samplers against what is known exactly: orders on a Gaussian mixture, invariants of the rows, the rules of the loop."""

import math

import numpy as np
import pytest
import torch

import diffkernels as dk
from diffkernels import _ladder
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
    randn,
)
from diffkernels.sampling.solvers import lower

SCHEDULES = {
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "discrete": DiscreteVP.linear(),
    "edm": EDM(),
    "flow": RectifiedFlow(shift=3.0),
}
DETERMINISTIC = ["ddim", "euler", "heun", "dpmpp_1", "dpmpp_2m", "flow_euler"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are tiny: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_and_its_inverse(name):
    schedule = SCHEDULES[name]
    for spacing in schedule.spacings:
        grid = schedule.grid(17, spacing)
        assert grid.sigma[-1] == 0 and grid.alpha[-1] == 1 and grid.steps == 17
        assert np.all(np.diff(grid.sigma) < 0)
    t = np.array([0.05, 0.2, 0.7]) * (999 if name == "discrete" else 1)
    assert np.allclose(schedule.time_at(schedule.lam(t)), t, rtol=1e-12)
    vp = name in ("linear", "cosine", "discrete")
    if vp:
        assert np.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)
    assert schedule.grid(5).init_scale == {"edm": 80.0}.get(name, 1.0)
    assert schedule.grid(5).time.dtype == (np.int64 if name == "discrete" else np.float64)


def test_known_values():
    assert DiscreteVP.linear().sigma(999) == pytest.approx(0.99998, abs=1e-5)
    assert DiscreteVP.linear().alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    scaled = DiscreteVP.scaled_linear()
    assert scaled.sigma(999) / scaled.alpha(999) == pytest.approx(14.6146, rel=1e-5)
    assert scaled.sigma(0) / scaled.alpha(0) == pytest.approx(0.02917, rel=1e-3)
    edm = EDM().grid(18)
    assert edm.sigma[0] == 80 and edm.sigma[17] == 0.002 and edm.sigma[1] == pytest.approx(57.586, rel=1e-4)
    cosine = VPCosine().grid(4)
    assert cosine.time[0] == pytest.approx(0.9961, abs=1e-4) and cosine.lam[0] == pytest.approx(-5.1)
    assert np.allclose(RectifiedFlow(shift=3.0).grid(4).sigma, [1, 0.9, 0.75, 0.5, 0])
    assert RectifiedFlow(time_scale=1000.0).grid(2).time[1] == 500


def test_spacings_of_whole_timesteps():
    table = DiscreteVP.linear()
    times = {s: list(table.grid(4, s).time[:-1]) for s in table.spacings[:6]}
    assert times["trailing"] == [999, 749, 499, 249]
    assert times["leading"] == [750, 500, 250, 0]
    assert times["linspace"] == times["spaced"] == [999, 666, 333, 0]
    assert times["dpm_linspace"] == [999, 749, 500, 250]
    assert times["dpm_leading"] == [800, 600, 400, 200]
    assert list(DiscreteVP.scaled_linear().grid(2, "leading").time) == [501, 1, 0]
    assert list(table.grid(250, "spaced").time[:3]) == [999, 995, 991]
    assert table.grid(1000).time[-2] == 0 and len(set(table.grid(1000).time)) == 1000


def test_final_sigma_min():
    assert EDM().grid(10, final="sigma_min").sigma[-1] == 0.002
    assert DiscreteVP.linear().grid(10, final="sigma_min").sigma[-1] == DiscreteVP.linear().sigma(0)
    with pytest.raises(ValueError, match="ends at timestep 0 already"):
        DiscreteVP.linear().grid(10, "leading", "sigma_min")  # timestep 0 twice


def test_zero_terminal_snr():
    bar = DiscreteVP.linear().alphas_cumprod.copy()
    bar[-1] = 0
    x = torch.randn(2, 3, generator=generator(0))
    for solver in ("ddim", "ddpm", "dpmpp_2m"):
        sampler = Sampler(solver, schedule=DiscreteVP(bar), prediction="v")
        assert sampler(lambda x, t: 0.1 * x, x, steps=20).isfinite().all()
    with pytest.raises(ValueError, match="alpha = 0"):
        Sampler("ddim", schedule=DiscreteVP(bar))(lambda x, t: x, x, steps=5)
    with pytest.raises(ValueError, match="alpha = 0"):
        Sampler("heun", schedule=DiscreteVP(bar), prediction="v")(lambda x, t: x, x, steps=5)


# ---------------------------------------------------------------- rows


def mixed_grids():
    for schedule in SCHEDULES.values():
        for final in ("zero", "sigma_min"):
            yield schedule.grid(17, final=final)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_dirac_exactness(solver):
    """A constant denoiser y gives x_t = alpha_t y + (sigma_t / sigma_s)(x_s - alpha_s y), exactly."""
    for grid in mixed_grids():
        x, y, kept = 0.7, -1.3, []
        for e in SOLVERS[solver](grid):
            after = sum(h * k for h, k in zip(e.state.history, kept[::-1], strict=False))
            new = e.state.x0 * y + e.state.x * x + after
            if e.keep is not None:
                kept.append(e.keep.x0 * y + e.keep.x * x)
            x = new
            i = e.step + 1
            ratio = grid.sigma[i] / grid.sigma[0]
            assert x == pytest.approx(grid.alpha[i] * y + ratio * (0.7 - grid.alpha[0] * y), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, "ddpm"])
def test_noise_variance_is_preserved(name, eta):
    """With exact x0 a step turns noise of variance sigma_s^2 into sigma_t^2, and the signal from alpha_s into alpha_t."""
    grid = SCHEDULES[name].grid(20)
    plan = SOLVERS["ddpm"](grid) if eta == "ddpm" else SOLVERS["ddim"](grid, eta=eta)
    for e in plan:
        s, t = e.level, e.level + 1
        variance = e.state.x**2 * grid.sigma[s] ** 2 + e.state.noise**2
        assert variance == pytest.approx(grid.sigma[t] ** 2, rel=1e-12, abs=1e-300)
        assert e.state.x0 + e.state.x * grid.alpha[s] == pytest.approx(grid.alpha[t], rel=1e-12)


def test_ddpm_is_the_posterior():
    """arXiv 2006.11239, eq. 7, written with betas."""
    table = DiscreteVP.linear()
    grid = table.grid(1000)
    beta, bar = np.linspace(1e-4, 0.02, 1000), table.alphas_cumprod
    small, large = SOLVERS["ddpm"](grid), SOLVERS["ddpm"](grid, variance="fixed_large")
    for i, t in enumerate(range(999, 0, -1)):
        assert small[i].state.x0 == pytest.approx(np.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t]), rel=1e-9)
        assert small[i].state.x == pytest.approx(np.sqrt(1 - beta[t]) * (1 - bar[t - 1]) / (1 - bar[t]), rel=1e-9)
        assert small[i].state.noise ** 2 == pytest.approx((1 - bar[t - 1]) / (1 - bar[t]) * beta[t], rel=1e-9)
        assert large[i].state.noise ** 2 == pytest.approx(beta[t], rel=1e-9)
        assert large[i].state[:2] == small[i].state[:2]


@pytest.mark.parametrize("solver", [*DETERMINISTIC, "ddpm"])
def test_the_row_to_zero_is_symbolic(solver):
    for schedule in SCHEDULES.values():
        for steps in (1, 2, 20):
            last = SOLVERS[solver](schedule.grid(steps))[-1]
            assert last.state == (1.0, 0.0, (), 0.0)


def test_first_order_solvers_are_one():
    for grid in mixed_grids():
        assert SOLVERS["ddim"](grid) == SOLVERS["euler"](grid) == SOLVERS["dpmpp_1"](grid) == SOLVERS["flow_euler"](grid)
    flow = RectifiedFlow().grid(10)
    rows = lower(SOLVERS["flow_euler"](flow), flow, "flow", cfg_weights(1.0))
    for i, row in enumerate(rows):  # x + (t' - t) v
        assert row.coef[0, -2:] == pytest.approx([flow.sigma[i + 1] - flow.sigma[i], 1.0], abs=1e-15)


def test_lower_order_final():
    def orders(steps, **kw):
        grid = EDM().grid(steps, final="sigma_min")
        return [1 + len(e.state.history) for e in SOLVERS["dpmpp_2m"](grid, **kw)]

    assert orders(14) == [1] + [2] * 12 + [1]
    assert orders(15) == [1] + [2] * 14
    assert orders(4, lower_order_final=False) == [1, 2, 2, 2]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_guidance_rows(prediction):
    """The outputs' weights sum to the same for every scale; the other channels take cond's alone."""
    for schedule in (DiscreteVP.linear(), RectifiedFlow()) if prediction != "eps" else (DiscreteVP.linear(), EDM()):
        grid = schedule.grid(5)
        plan = SOLVERS["dpmpp_2m"](grid)
        for clip in (None, (-1.0, 1.0)):
            plain = lower(plan, grid, prediction, cfg_weights(1.0), clip)
            scaled = lower(plan, grid, prediction, cfg_weights(torch.tensor([0.0, 1.0, 7.5, -2.0]), 3), clip)
            for p, s in zip(plain, scaled, strict=True):
                assert s.coef.shape == (4, p.coef.shape[1] + 2)
                assert np.allclose(s.coef[:, :2].sum(1), p.coef[0, :2].sum(), rtol=1e-12)
                assert np.array_equal(s.coef[:, 2:4], [p.coef[0, :2]] * 4)
                assert np.array_equal(s.coef[1, :2], p.coef[0, :2])
                assert np.array_equal(s.coef[:, 4:], [p.coef[0, 2:]] * 4)


@pytest.mark.parametrize("clip", [None, 50.0])
def test_prediction_types_agree(clip):
    """One and the same denoiser in four parameterisations, with m as the output and with m as x0."""
    x = torch.randn(3, 5, generator=generator(0), dtype=torch.float64)
    for schedule in (VPLinear(), EDM(), RectifiedFlow()):
        found = []
        for prediction in ("x0", "v", "flow", "eps"):

            def model(x, t, schedule=schedule, prediction=prediction):
                alpha, sigma = (torch.from_numpy(f(t))[:, None] for f in (schedule.alpha, schedule.sigma))
                x0 = torch.tanh(x)
                eps = (x - alpha * x0) / sigma
                return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

            if prediction == "eps" and isinstance(schedule, RectifiedFlow):
                continue
            for solver in ("dpmpp_2m", "heun", "ddim"):
                found.append((solver, Sampler(solver, schedule=schedule, prediction=prediction, clip=clip)(model, x, steps=8)))
        for solver, value in found:
            expected = next(v for s, v in found if s == solver)
            assert torch.allclose(value, expected, rtol=1e-9, atol=1e-10), solver


# ---------------------------------------------------------------- orders of convergence

MEANS = 2 * torch.randn(4, 6, dtype=torch.float64, generator=generator(1))
STDS = torch.linspace(0.3, 0.8, 4, dtype=torch.float64)
LOG_WEIGHTS = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def mixture_x0(x, alpha, sigma):
    """E[x0 | x] for a mixture of 4 Gaussians in 6 dimensions, exactly."""
    variance = alpha**2 * STDS**2 + sigma**2
    away = x[:, None] - alpha * MEANS
    log = LOG_WEIGHTS - 3 * torch.log(variance) - (away**2).sum(-1) / (2 * variance)
    post = MEANS + (alpha * STDS**2 / variance)[:, None] * away
    return (torch.softmax(log, 1)[..., None] * post).sum(1)


# (schedule, spacing, final, (alpha, sigma) at the model's time, prediction)
ODES = {
    "ve": (EDM(sigma_min=0.05, sigma_max=20.0), "logsnr", "sigma_min", lambda t: (1.0, t), "x0"),
    "vp": (VPLinear(t_min=1e-2), "logsnr", "sigma_min", None, "eps"),
    "flow": (RectifiedFlow(), "uniform", "zero", lambda t: (1 - t, t), "flow"),
}


def mixture_model(ode):
    schedule, _, _, levels, prediction = ODES[ode]

    def model(x, t):
        time = float(t[0])
        alpha, sigma = levels(time) if levels else (float(schedule.alpha(time)), float(schedule.sigma(time)))
        x0 = mixture_x0(x, alpha, sigma)
        if prediction == "x0":
            return x0
        eps = (x - alpha * x0) / sigma
        return eps if prediction == "eps" else eps - x0

    return model


def exact_end(ode, x):
    """The ODE d(x/k)/dlog s = x/k - x0 by classical Runge-Kutta in log s, or for the flow, dx/dt = v in t."""
    schedule, spacing, final, _, _ = ODES[ode]
    model, steps = mixture_model(ode), 400
    grid = schedule.grid(2, spacing, final)
    x = x * grid.init_scale
    if ode == "flow":

        def slope(t, x):
            return model(x, [t]) if t > 0 else -x  # v = eps - x0; as t falls to 0, E[x0] -> x and E[eps] -> 0

        first, last = 1.0, 0.0
    else:

        def slope(log_s, x):  # x is the state over alpha
            alpha = 1.0 if ode == "ve" else 1 / math.sqrt(1 + math.exp(2 * log_s))
            return x - mixture_x0(alpha * x, alpha, alpha * math.exp(log_s))

        first, last = -grid.lam[0], -grid.lam[-1]
        x = x / grid.alpha[0]
    h = (last - first) / steps
    for i in range(steps):
        u = first + i * h
        k1 = slope(u, x)
        k2 = slope(u + h / 2, x + h / 2 * k1)
        k3 = slope(u + h / 2, x + h / 2 * k2)
        k4 = slope(u + h if i < steps - 1 else last, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x if ode == "flow" else x * grid.alpha[-1]


@pytest.fixture(scope="module")
def exact():
    x = torch.randn(32, 6, dtype=torch.float64, generator=generator(2))
    return x, {ode: exact_end(ode, x) for ode in ODES}


def measured_order(ode, solver, exact, **options):
    schedule, spacing, final, _, prediction = ODES[ode]
    sampler = Sampler(solver, schedule=schedule, prediction=prediction, spacing=spacing, final=final, **options)
    x, ends = exact
    # the median: a trajectory beside the border between two modes needs finer steps than these to converge
    errors = [float((sampler(mixture_model(ode), x, steps=n) - ends[ode]).norm(dim=1).median()) for n in (80, 160, 320)]
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors


ORDERS = [
    ("ddim", {}, 0.9, 1.25),  # and euler and dpmpp_1, whose plans are equal: test_first_order_solvers_are_one
    ("heun", {}, 1.9, 2.1),
    ("dpmpp_2m", {"kind": "midpoint"}, 1.85, 2.1),
    ("dpmpp_2m", {"kind": "taylor"}, 1.85, 2.1),
]


@pytest.mark.parametrize("ode", ["ve", "vp"])
@pytest.mark.parametrize("solver, options, low, high", ORDERS)
def test_order(ode, solver, options, low, high, exact):
    order, errors = measured_order(ode, solver, exact, **options)
    print(ode, solver, options, order, errors)
    assert low <= order[-1] <= high, (order, errors)


@pytest.mark.parametrize("solver, order", [("flow_euler", 1), ("flow_heun", 2)])
def test_order_of_flows(solver, order, exact):
    found, errors = measured_order("flow", solver, exact)
    print("flow", solver, found, errors)
    assert abs(found[-1] - order) <= 0.1, (found, errors)


# ---------------------------------------------------------------- the loop


class Toy(torch.nn.Module):
    """A smooth conditional model of [B, C, H, W] that notes its calls; `twice` gives learned-sigma channels."""

    def __init__(self, twice=False):
        super().__init__()
        self.twice, self.calls = twice, []

    def forward(self, x, t, y=None):
        self.calls.append((x.dtype, t.dtype, tuple(x.shape), t.clone()))
        shift = 0.0 if y is None else y.to(x.dtype).reshape(-1, 1, 1, 1)
        out = torch.tanh(0.7 * x + 0.1 * x.roll(1, 1) + shift) + 1e-4 * t.to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.cat([out, torch.full_like(out, 1e4)], 1) if self.twice else out


def noise(batch=3, seed=5, dtype=torch.float32):
    return randn((batch, 4, 6, 5), [generator(seed + i) for i in range(batch)], dtype=dtype)


def ddim(eta=0.0, **kw):
    return Sampler("ddim", schedule=DiscreteVP.linear(), eta=eta, **kw)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nfe(solver):
    for schedule in SCHEDULES.values():
        sampler, toy = Sampler(solver, schedule=schedule, prediction="x0"), Toy()
        sampler(toy, noise(), steps=6)
        assert sampler.nfe(6) == len(toy.calls) == (11 if "heun" in solver else 6)


def test_times_and_dtypes():
    toy = Toy()
    ddim()(toy, noise(), steps=4)
    assert [int(t[0]) for *_, t in toy.calls] == [999, 749, 499, 249]
    assert all(call[1] == torch.int64 and call[3].shape == (3,) for call in toy.calls)
    Sampler("heun", schedule=EDM(), prediction="x0")(toy := Toy(), noise(), steps=2)
    assert toy.calls[0][1] == torch.float32 and [float(t[0]) for *_, t in toy.calls] == pytest.approx([80, 0.002, 0.002])


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_same_seed_same_picture(solver):
    sampler = Sampler(solver, schedule=DiscreteVP.linear())
    a, b, c = (sampler(Toy(), noise(), steps=8, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert torch.equal(a, c) == (solver == "dpmpp_2m")


def test_deterministic_solvers_draw_nothing():
    g = generator(0)
    before = g.get_state()
    ddim()(Toy(), noise(), steps=5, generator=g)
    assert torch.equal(g.get_state(), before)


def test_a_sample_does_not_depend_on_its_neighbours():
    sampler, y = ddim(1.0), torch.tensor([0.1, -0.4, 0.8])
    scale = torch.tensor([1.0, 3.0, 4.5])

    def run(at):
        return sampler(
            Toy(),
            noise()[at],
            steps=8,
            guidance=scale[at],
            cond={"y": y[at]},
            uncond={"y": torch.zeros_like(y[at])},
            generator=[generator(100 + i) for i in range(3)][at],
        )

    whole = run(slice(None))
    assert torch.equal(whole, torch.cat([run(slice(0, 1)), run(slice(1, 3))]))
    plain = sampler(Toy(), noise()[:1], steps=8, cond={"y": y[:1]}, generator=[generator(100)])
    assert torch.allclose(plain, whole[:1], atol=1e-6)  # scale 1 is the conditional model


def test_doubled_batch():
    """One call an evaluation, [cond; uncond]; the result is u + s (c - u) in every step."""
    seen = []

    def model(x, t, y):
        assert torch.equal(x[:3], x[3:]) and len(t) == 6
        seen.append(y)
        return Toy()(x, t, y)

    y, null = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    got = ddim()(model, noise(), steps=5, guidance=3.0, cond={"y": y}, uncond={"y": null})
    assert len(seen) == 5 and all(torch.equal(v, torch.cat([y, null])) for v in seen)

    def combined(x, t):
        c, u = Toy()(x, t, y), Toy()(x, t, null)
        return u + 3 * (c - u)

    assert torch.allclose(got, ddim()(combined, noise(), steps=5), atol=2e-5)


def test_guided_channels():
    y, null = torch.ones(3), torch.zeros(3)

    def combined(x, t):
        c, u = Toy()(x, t, y), Toy()(x, t, null)
        return torch.cat([u[:, :3] + 4 * (c[:, :3] - u[:, :3]), c[:, 3:]], 1)

    got = ddim()(Toy(), noise(), steps=5, guidance=4.0, guided_channels=3, cond={"y": y}, uncond={"y": null})
    assert torch.allclose(got, ddim()(combined, noise(), steps=5), atol=2e-5)
    assert torch.equal(
        ddim()(Toy(), noise(), steps=5, guided_channels=3, cond={"y": y}), ddim()(Toy(), noise(), steps=5, cond={"y": y})
    )


def test_guidance_one_needs_no_uncond():
    toy = Toy()
    ddim()(toy, noise(), steps=2, guidance=1, cond={"y": torch.ones(3)}, uncond={"y": torch.zeros(3)})
    assert toy.calls[0][2][0] == 3


def test_learned_sigma_is_a_view(monkeypatch):
    from diffkernels.sampling import loop

    shapes = []
    real = loop.ops.solver_step

    class Spy:
        @staticmethod
        def solver_step(outputs, *rest):
            shapes.append([(tuple(o.shape), o.stride(0)) for o in outputs])
            return real(outputs, *rest)

    monkeypatch.setattr(loop, "ops", Spy)
    y = {"y": torch.ones(3)}
    args = {"steps": 4, "guidance": 2.0, "cond": y, "uncond": {"y": torch.zeros(3)}}
    assert torch.equal(ddim()(Toy(True), noise(), **args), ddim()(Toy(), noise(), **args))
    assert len(shapes) == 8 and shapes[0] == [((3, 4, 6, 5), 240)] * 2  # one call an evaluation; 240: a row of 2 C channels


def test_bfloat16_model_float32_state():
    states, toy = [], Toy()
    out = ddim()(toy, noise(dtype=torch.bfloat16), steps=6, callback=lambda i, t, x, x0: states.append((x.dtype, x0.dtype)))
    assert out.dtype == torch.bfloat16 and states == [(torch.float32,) * 2] * 6
    assert {call[0] for call in toy.calls} == {torch.bfloat16}
    exact = ddim()(lambda x, t: Toy()(x.bfloat16(), t).double(), noise(dtype=torch.bfloat16).double(), steps=6)
    assert (out.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"])
@pytest.mark.parametrize("schedule, prediction", [("discrete", "eps"), ("linear", "v"), ("edm", "x0"), ("flow", "flow")])
def test_float32_loop_follows_float64(solver, schedule, prediction):
    """Relative RMS <= 1e-5 after 50 steps."""
    sampler = Sampler(solver, schedule=SCHEDULES[schedule], prediction=prediction)
    wide = sampler(Toy(), noise().double(), steps=50)
    assert wide.dtype == torch.float64
    narrow = sampler(Toy(), noise(), steps=50)
    print(solver, schedule, float((narrow - wide).norm() / wide.norm()))
    assert (narrow - wide).norm() <= 1e-5 * wide.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_thousand_steps(solver):
    out = Sampler(solver, schedule=DiscreteVP.linear())(lambda x, t: x.tanh(), torch.randn(2, 3), steps=1000)
    assert out.isfinite().all()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_callback(solver):
    sampler = Sampler(solver, schedule=EDM(), prediction="x0")
    seen = []
    whole = sampler(Toy(), noise(), steps=6, callback=lambda *a: seen.append(a))
    assert torch.equal(whole, sampler(Toy(), noise(), steps=6))  # a callback changes nothing
    assert [i for i, *_ in seen] == list(range(6)) and seen[0][1] == 80.0 and isinstance(seen[0][1], float)
    assert torch.equal(seen[-1][2], whole) and torch.equal(seen[-1][3], whole)  # the last step returns x0
    stopped = sampler(Toy(), noise(), steps=6, callback=lambda i, t, x, x0: i < 2)
    assert torch.equal(stopped, seen[2][2])


def test_interrupt_and_progress(capsys):
    def interrupt(i, t, x, x0):
        if i == 2:
            raise KeyboardInterrupt

    sampler = ddim()
    with pytest.raises(KeyboardInterrupt):
        sampler(Toy(), noise(), steps=6, callback=interrupt, progress=True)
    assert "3/6" in capsys.readouterr().err
    assert torch.equal(sampler(Toy(), noise(), steps=6), ddim()(Toy(), noise(), steps=6))
    sampler(Toy(), noise(), steps=2)
    assert capsys.readouterr().err == ""


def test_noise_is_left_alone():
    for schedule in (EDM(), VPLinear()):
        x = noise()
        Sampler("dpmpp_2m", schedule=schedule, prediction="x0")(Toy(), x, steps=3)
        assert torch.equal(x, noise())


def test_vector_and_strided_noise():
    sampler = ddim()
    assert sampler(lambda x, t: 0.1 * x, torch.randn(7), steps=3).shape == (7,)
    x = noise().permute(0, 2, 3, 1)
    assert torch.equal(sampler(lambda x, t: 0.1 * x, x, steps=3), sampler(lambda x, t: 0.1 * x, x.contiguous(), steps=3))


def test_own_grid():
    """Any levels: two stretches of DiscreteVP's timesteps run one after the other are the whole."""
    table, sampler = DiscreteVP.linear(), ddim()
    whole = table.grid(6)

    def part(a, b):
        return Grid(whole.alpha[a:b], whole.sigma[a:b], whole.time[a:b], whole.scale[a:b])

    halfway = sampler(Toy(), noise(), steps=part(0, 4))
    assert torch.equal(sampler(Toy(), halfway, steps=part(3, 7)), sampler(Toy(), noise(), steps=6))


def test_clip():
    for solver in ("ddim", "heun", "dpmpp_2m"):
        seen = []
        sampler = Sampler(solver, schedule=DiscreteVP.linear(), clip=0.5)
        out = sampler(Toy(), noise(), steps=6, callback=lambda i, t, x, x0, seen=seen: seen.append(x0))
        assert max(x0.abs().max() for x0 in seen) == 0.5 and out.abs().max() <= 0.5


RUNGS = [r for r in ("reference", "cpu", "avx2", "avx512") if _ladder.missing(r, "solver_step", "cpu") is None]


@pytest.mark.parametrize("solver, options", [("ddim", {"eta": 1.0}), ("heun", {}), ("dpmpp_2m", {})])
@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_agree(solver, options, rung):
    """20 guided steps: nothing of the loop depends on the kernel."""
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), **options)
    args = {"guidance": 2.5, "guided_channels": 3, "cond": {"y": torch.ones(3)}, "uncond": {"y": torch.zeros(3)}}

    def run(x):
        return sampler(Toy(True), x, steps=20, generator=[generator(i) for i in range(3)], **args)

    with dk.rung("reference"):
        expected = run(noise())
    with dk.rung(rung):
        assert (run(noise()) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver, options", [("ddim", {"eta": 1.0}), ("heun", {}), ("dpmpp_2m", {})])
def test_no_host_sync(solver, options):
    def after(i, t, x, x0):  # what precedes the first step may copy tables to the device
        torch.cuda.set_sync_debug_mode("error")

    args = {"guidance": 2.0, "cond": {"y": torch.ones(3).cuda()}, "uncond": {"y": torch.zeros(3).cuda()}}
    cuda = torch.Generator("cuda").manual_seed(0)
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), **options)
    try:
        out = sampler(Toy(), noise().cuda(), steps=8, generator=cuda, callback=after, **args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


def test_rejects_bad_settings():
    table = DiscreteVP.linear()
    for make, error, text in [
        (lambda: Sampler("nope", schedule=table), ValueError, "solver: expected one of ddim, ddpm, euler.*'nope'"),
        (lambda: Sampler(schedule="linear"), TypeError, "schedule: expected a Schedule, got str"),
        (lambda: Sampler(schedule=table, prediction="epsilon"), ValueError, "prediction: expected one of eps, x0, v, flow"),
        (lambda: Sampler(schedule=table, spacing="uniform"), ValueError, "spacing: DiscreteVP has trailing, leading"),
        (lambda: Sampler(schedule=table, final="one"), ValueError, "final: expected one of zero, sigma_min"),
        (lambda: Sampler(schedule=table, clip=-1.0), ValueError, "clip: expected"),
        (lambda: Sampler(schedule=table, eta=1.0), TypeError, "eta: solver 'dpmpp_2m' has the options kind, lower_order_final"),
        (lambda: Sampler("ddim", schedule=table, eta=1.5), ValueError, "eta: expected 0 to 1, got 1.5"),
        (lambda: Sampler(schedule=table, kind="magic"), ValueError, "kind: expected one of midpoint"),
        (lambda: Sampler("ddpm", schedule=table, variance="learned"), ValueError, "variance: expected one of fixed_small"),
        (lambda: DiscreteVP([0.5, 0.6]), ValueError, "alphas_cumprod: expected"),
        (lambda: RectifiedFlow(shift=0.0), ValueError, "shift: expected"),
        (lambda: table.grid(1001), ValueError, "steps: expected at most the 1000"),
        (lambda: table.grid(2.0), TypeError, "steps: expected an int, got float"),
        (lambda: EDM().grid(0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: randn((2, 3), [generator(0)]), ValueError, "generator: expected one a sample, 2, got 1"),
        (lambda: randn((2, 3), 7), TypeError, "generator: expected None, a torch.Generator"),
    ]:
        with pytest.raises(error, match=text):
            make()


def test_rejects_bad_calls():
    y, x = torch.ones(3), noise()
    for change, error, text in [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"guidance": 2.0}, ValueError, "uncond: guidance 2.0 needs it"),
        ({"guidance": "2"}, TypeError, "guidance: expected a number or a float tensor"),
        ({"guidance": float("nan"), "uncond": {}}, ValueError, "guidance: expected finite"),
        ({"guidance": torch.ones(2), "uncond": {}}, ValueError, r"guidance: expected a number or a tensor \[3\], got 2"),
        ({"guidance": 2.0, "cond": {"y": y}, "uncond": {}}, ValueError, "uncond: expected the names of cond, \\['y'\\]"),
        ({"guidance": 2.0, "cond": {"y": y}, "uncond": {"y": y[:, None]}}, ValueError, "uncond.'y'.: expected the shape"),
        ({"cond": {"y": torch.ones(2)}}, ValueError, "cond.'y'.: expected leading dimension 3"),
        ({"cond": {"y": 1}}, TypeError, "cond.'y'.: expected a tensor, got int"),
        ({"guided_channels": 5}, ValueError, "guided_channels: expected -1 or 0 to"),
        ({"noise": x.long()}, TypeError, "noise: expected float16.*got torch.int64"),
        ({"noise": [1.0]}, TypeError, "noise: expected a tensor, got list"),
        ({"noise": torch.tensor(1.0)}, ValueError, "noise: expected"),
        ({"model": lambda x, t: x[:, :3]}, ValueError, r"model: expected an output of shape \[3, 4, 6, 5\] or twice"),
        ({"model": lambda x, t: (x,)}, TypeError, "model: expected it to return a tensor, got tuple"),
    ]:
        args = {"model": Toy(), "noise": x, "steps": 2, **change}
        with pytest.raises(error, match=text):
            ddim()(args.pop("model"), args.pop("noise"), **args)


def test_example_of_the_docs():
    """The README's habit: what the docs show is run."""
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    exec(text.split("```python")[1].split("```")[0], {})


def test_numbers_of_numpy_and_lists_are_numbers() -> None:
    noise, y = torch.randn(2, 1, 2, 2), torch.ones(2)
    call = dict(cond={"y": y}, uncond={"y": 0 * y})
    got = Sampler("ddim", schedule=DiscreteVP.linear(), clip=[-1, 1])(
        lambda x, t, y: 0.1 * x, noise, steps=np.int64(3), guidance=np.float32(2), **call
    )
    want = Sampler("ddim", schedule=DiscreteVP.linear(), clip=(-1.0, 1.0))(
        lambda x, t, y: 0.1 * x, noise, steps=3, guidance=2.0, **call
    )
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="clip: expected a number above 0"):
        Sampler("ddim", schedule=DiscreteVP.linear(), clip="1")


def test_sigma_min_after_timestep_zero_is_refused_by_name() -> None:
    for spacing in ("leading", "linspace", "spaced"):
        with pytest.raises(ValueError, match=r"final: .* ends at timestep 0 already"):
            DiscreteVP.linear().grid(4, spacing, "sigma_min")
