"""Samplers: what schedules give, what plans become as rows, and the rules of the loop. The solvers' maths: test_solvers.py."""

import math
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffkernels as dk
from diffkernels import _ladder
from diffkernels.ops._philox import normal
from diffkernels.sampling import (
    EDM,
    SOLVERS,
    DiscreteVP,
    Grid,
    Prepared,
    RectifiedFlow,
    Sampler,
    VPCosine,
    VPLinear,
    cfg_weights,
    dpm_adaptive,
    loop,
    prepared,
    randn,
    seeds,
)
from diffkernels.sampling.guidance import UNGUIDED, rescale_gain
from diffkernels.sampling.lower import lower, to_x0
from diffkernels.sampling.plan import Level, Plan, Sum, Symbol

SCHEDULES = {
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "discrete": DiscreteVP.linear(),
    "edm": EDM(),
    "flow": RectifiedFlow(shift=3.0),
}
DRAWING = [
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("sde_dpmpp_2m", {}),
    ("flow_stochastic", {}),
    ("heun", {"s_churn": 3.0, "s_tmax": 50.0}),
]
# One solver of every shape of plan: history, kept sums, held states, noise
SHAPES = [("ddim", {"eta": 0.5}), ("heun", {}), ("dpmpp_2m", {}), ("dpmpp_3m", {}), ("dpmpp_3s", {}), ("unipc", {"order": 3})]
SHAPES += DRAWING[2:]


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Toy(torch.nn.Module):
    """A smooth conditional model of [B, C, H, W] that notes its calls; `twice` gives learned-sigma channels."""

    def __init__(self, twice=False):
        super().__init__()
        self.twice, self.calls = twice, []

    def forward(self, x, t, y=None):
        self.calls.append((x.dtype, t.dtype, tuple(x.shape), t.clone()))
        out = toy(x, t, y)
        return torch.cat([out, torch.full_like(out, 1e4)], 1) if self.twice else out


def toy(x, t, y=None):
    shift = 0.0 if y is None else y.to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(0.7 * x + 0.1 * x.roll(1, 1) + shift) + 1e-4 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def noise(batch=3, seed=5, dtype=torch.float32):
    return randn((batch, 4, 6, 5), [generator(seed + i) for i in range(batch)]).to(dtype)


def ddim(eta=0.0, **kw):
    return Sampler("ddim", schedule=DiscreteVP.linear(), eta=eta, **kw)


def any_schedule(solver):
    return EDM() if solver == "consistency" else DiscreteVP.linear()


def x0_model(schedule, f, alpha_sigma=None):
    """The eps model whose data prediction is f(x, t), in float64."""

    def model(x, t, **cond):
        alpha, sigma = (torch.from_numpy(s(t.numpy())).reshape(-1, 1, 1, 1) for s in (schedule.alpha, schedule.sigma))
        return ((x - alpha * f(x, t, **cond)) / sigma).to(x.dtype)

    return model


Y, NULL = torch.tensor([0.1, -0.4, 0.8]), torch.zeros(3)
GUIDED = {"guidance": 3.0, "cond": {"y": Y}, "uncond": {"y": NULL}}


class Spy:
    """Notes what `ops.solver_step` is called with, by name."""

    def __init__(self, monkeypatch):
        self.calls, ops = [], prepared.ops
        names = ops.solver_step.op.names

        class Ops:
            row_abs_quantile, row_covariance = ops.row_abs_quantile, ops.row_covariance

            @staticmethod
            def solver_step(*args, **kwargs):
                self.calls.append(dict(zip(names, args, strict=False)) | kwargs)
                return ops.solver_step(*args, **kwargs)

        monkeypatch.setattr(prepared, "ops", Ops)


class Once(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"), func
        return func(*args, **(kwargs or {}))


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


def test_sums():
    x, y = Sum({Symbol("x", 0): 1.0}), Sum({Symbol("y", 0): 1.0})
    assert (2 * x + y / 2 - x)[Symbol("x", 0)] == 1 and (2 * x + y / 2 - x)[Symbol("y", 0)] == 0.5
    assert (x - x).terms == {} and repr(x - x) == "0" and (x + y).only("y") == y


def test_what_nobody_reads_is_not_written():
    plan, level = Plan(), Level(1.0, 0.5, 0.0)
    m = plan.evaluate(0, level)
    plan.keep("forgotten", plan.x + m)
    start, sum_ = plan.x, plan.keep("sum", 2 * plan.x + m)
    plan.set(m)
    plan.evaluate(0, level)
    plan.keep("late", sum_)  # nobody reads it: nor what it reads, for its sake
    plan.set(plan.x + m)
    last = plan.evaluate(1, level)
    plan.set(last - sum_ + start)
    rows = lower([plan], "x0", UNGUIDED)
    assert [row.writes for row in rows] == [[Symbol("sum", 0), Symbol("x0", 0)], [], []]
    assert [row.reads for row in rows] == [[], [Symbol("x0", 0)], [Symbol("sum", 0), Symbol("x", 0)]]
    assert [row.alive for row in rows] == [
        {Symbol("x", 0), Symbol("sum", 0), Symbol("x0", 0)},
        {Symbol("x", 0), Symbol("sum", 0)},
        set(),
    ]
    assert [row.ends for row in rows] == [False, True, True] and [row.noise for row in rows] == [False] * 3
    # A, a, lo, hi; of the state: c, d; of the sum; of x0, which is the output itself
    assert rows[0].coef.tolist() == [[[1, 0, -math.inf, math.inf, 1, 0, 1, 2, 1, 0]]]
    assert rows[2].coef.tolist() == [[[1, 0, -math.inf, math.inf, 1, 0, -1, 1]]]
    shown = lower([plan], "x0", UNGUIDED, show_x0=True)
    assert [row.x0 for row in shown] == [2, 1, 1]


def test_more_than_the_op_can_is_refused():
    plan = Plan()
    ms = []
    for i in range(7):
        ms.append(plan.evaluate(i, Level(1.0, 1.0 / (1 + i), 0.0)))
        plan.set(sum(ms[1:], ms[0]))
    with pytest.raises(ValueError, match="solver: evaluation 6 reads 6 kept tensors and writes 1"):
        lower([plan], "x0", UNGUIDED)


def played(sampler, steps, model, noise, drawn=None):
    """A plan carried out as it reads, in float64, with the noise that the op is documented to draw."""
    grid = sampler.grid(steps)
    plan = sampler.plan(grid)
    x = noise.double() * math.hypot(grid.init_scale * plan.start_scale, plan.start_noise)
    tensors = {}
    for n, e in enumerate(plan.evaluations):
        out = model(x, torch.full((len(x),), e.at.time, dtype=torch.float64))
        big, small = to_x0(sampler.prediction, e.at)
        tensors[Symbol("x0", n)], tensors[Symbol("x", n)] = big * out + small * x, x
        if drawn is not None:
            step = torch.tensor(n, dtype=torch.int32)
            tensors[Symbol("z", n)] = normal(drawn, step, 1, x[0].numel()).reshape(x.shape)
        for name, value in e.kept.items():
            tensors[Symbol(name, n)] = sum(c * tensors[s] for s, c in value.terms.items())
        x = sum(c * tensors[s] for s, c in e.state.terms.items())
    return x


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_the_plan(solver):
    """Every solver through the loop, in float64 and float32, and its plan carried out directly; noise included."""
    for schedule, prediction in ((EDM(), "x0"), (VPLinear(), "v"), (DiscreteVP.linear(), "eps"), (RectifiedFlow(), "flow")):
        if solver == "consistency" and prediction != "x0":
            continue
        sampler = Sampler(solver, schedule=schedule, prediction=prediction)
        drawn = torch.tensor([3, -7, 2**60])
        expected = played(sampler, 7, toy, noise(), drawn)
        wide = sampler(toy, noise().double(), steps=7, generator=drawn)
        assert wide.dtype == torch.float64 and (wide - expected).norm() <= 1e-12 * expected.norm()
        narrow = sampler(toy, noise(), steps=7, generator=drawn)
        assert (narrow - expected).norm() <= 3e-6 * expected.norm(), (solver, prediction)


def test_churn_is_in_the_rows():
    for options in ({"s_churn": 4.0}, {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.003}):
        sampler = Sampler("heun", schedule=EDM(), prediction="x0", **options)
        drawn = torch.tensor([1, 2, 3])
        expected = played(sampler, 6, toy, noise(), drawn)
        assert torch.allclose(sampler(toy, noise().double(), steps=6, generator=drawn), expected, rtol=1e-12, atol=1e-12)


def test_flow_euler_is_x_plus_dt_v():
    flow = RectifiedFlow().grid(10)
    rows = lower([SOLVERS["flow_euler"](flow)], "flow", UNGUIDED)
    for i, row in enumerate(rows):
        assert row.coef[0, 0, -2:] == pytest.approx([flow.sigma[i + 1] - flow.sigma[i], 1.0], abs=1e-15)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_guidance_rows(prediction):
    """The outputs' weights sum to the same for every scale; the other channels take cond's alone."""
    for schedule in (DiscreteVP.linear(), RectifiedFlow()) if prediction != "eps" else (DiscreteVP.linear(), EDM()):
        plan = SOLVERS["dpmpp_2m"](schedule.grid(5))
        for clip in (None, (-1.0, 1.0)):
            plain = lower([plan], prediction, cfg_weights(1.0), map_x0=clip)
            scale = torch.tensor([0.0, 1.0, 7.5, -2.0])
            scaled = lower([plan], prediction, cfg_weights(scale, 3), map_x0=clip)
            for p, s in zip((r.coef[0] for r in plain), (r.coef[0] for r in scaled), strict=True):
                assert s.shape == (4, p.shape[1] + 2)
                assert np.allclose(s[:, :2].sum(1), p[0, :2].sum(), rtol=1e-12)
                assert np.array_equal(s[:, 2:4], [p[0, :2]] * 4)
                assert np.array_equal(s[1, :2], p[0, :2])
                assert np.array_equal(s[:, 4:], [p[0, 2:]] * 4)


@pytest.mark.parametrize("clip", [None, 50.0])
def test_prediction_types_agree(clip):
    """One and the same denoiser in five parameterisations, with m as the output and with m as x0."""
    x = torch.randn(3, 5, generator=generator(0), dtype=torch.float64)
    for schedule in (VPLinear(), EDM(sigma_data=0.7), RectifiedFlow()):
        found = []
        for prediction in ("x0", "v", "flow", "eps", "edm"):

            def model(x, t, schedule=schedule, prediction=prediction):
                if prediction == "edm":  # Karras et al., arXiv 2206.00364, table 1: F from c_in x and ln(sigma) / 4
                    sigma, data = torch.exp(4 * t)[:, None], schedule.sigma_data
                    norm = torch.sqrt(sigma**2 + data**2)
                    x = x * norm
                    return (torch.tanh(x) - data**2 / norm**2 * x) * norm / (sigma * data)
                alpha, sigma = (torch.from_numpy(f(t))[:, None] for f in (schedule.alpha, schedule.sigma))
                x0 = torch.tanh(x)
                eps = (x - alpha * x0) / sigma
                return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

            if (prediction == "eps" and isinstance(schedule, RectifiedFlow)) or (
                prediction == "edm" and not isinstance(schedule, EDM)
            ):
                continue
            for solver in ("dpmpp_2m", "heun", "ddim"):
                found.append((solver, Sampler(solver, schedule=schedule, prediction=prediction, clip=clip)(model, x, steps=8)))
        for solver, value in found:
            expected = next(v for s, v in found if s == solver)
            assert torch.allclose(value, expected, rtol=1e-9, atol=1e-10), solver
    assert len(found) > 0


def test_edm_wants_alpha_one():
    with pytest.raises(ValueError, match="prediction: edm needs a schedule with alpha = 1, such as EDM"):
        Sampler("ddim", schedule=VPLinear(), prediction="edm")(toy, noise(), steps=2)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("solver", SOLVERS)
def test_nfe(solver):
    for schedule in SCHEDULES.values():
        if solver == "consistency" and not isinstance(schedule, EDM):
            continue
        sampler, model = Sampler(solver, schedule=schedule, prediction="x0"), Toy()
        sampler(model, noise(), steps=6)
        assert sampler.nfe(6) == len(model.calls) == len(sampler.plan(6).evaluations) == (11 if "heun" in solver else 6)


def test_times_and_dtypes():
    model = Toy()
    ddim()(model, noise(), steps=4)
    assert [int(t[0]) for *_, t in model.calls] == [999, 749, 499, 249]
    assert all(call[1] == torch.int64 and call[3].shape == (3,) for call in model.calls)
    Sampler("heun", schedule=EDM(), prediction="x0")(model := Toy(), noise(), steps=2)
    assert model.calls[0][1] == torch.float32 and [float(t[0]) for *_, t in model.calls] == pytest.approx([80, 0.002, 0.002])


def test_a_plain_step_copies_nothing(monkeypatch):
    """A float32 model that is not guided sees the state itself; each row writes the next state and what is read later."""
    spy, states, seen = Spy(monkeypatch), [], []

    def model(x, t):
        seen.append(x)
        return toy(x, t)

    keep = lambda s, i, t, given: states.append(given["latents"])  # noqa: E731
    Sampler("dpmpp_2m", schedule=DiscreteVP.linear())(model, noise(), steps=5, callback_on_step_end=keep)
    assert all(a is b for a, b in zip(states, seen[1:], strict=False))
    assert [call["copies"] for call in spy.calls] == [0] * 5 and all(call["seed"] is None for call in spy.calls)
    assert [call["results"] for call in spy.calls] == [2, 2, 2, 1, 1]  # 5 steps: the last is of order 1


def test_the_row_writes_the_next_input(monkeypatch):
    """Doubled, in the model's dtype, scaled by edm's c_in: by the row; only the first input has an op of its own."""
    spy = Spy(monkeypatch)
    sampler = Sampler("dpmpp_2m", schedule=EDM(), prediction="edm")
    inputs, states = [], []

    def model(x, t, y):
        inputs.append(x)
        return toy(x, t, y)

    def after(sampler, i, t, given):
        states.append(given["latents"])

    sampler(model, noise(dtype=torch.bfloat16), steps=4, callback_on_step_end=after, **GUIDED)
    assert [(call["copies"], call["copy_dtype"]) for call in spy.calls] == [(2, "bfloat16")] * 3 + [(0, "bfloat16")]
    for sigma, state, seen in zip(sampler.grid(4).sigma[1:], states, inputs[1:], strict=False):
        expected = (state / math.sqrt(sigma**2 + 0.25)).bfloat16()
        assert seen.shape[0] == 6 and torch.equal(seen[:3], seen[3:])
        assert (seen[:3].float() - expected.float()).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("solver, options", [*DRAWING, ("dpmpp_2m", {})])
def test_same_seed_same_picture(solver, options):
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="x0", **options)
    a, b, c = (sampler(toy, noise(), steps=8, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert torch.equal(a, c) == (solver == "dpmpp_2m")


def test_seeds():
    g = [generator(i) for i in range(3)]
    one_each = seeds(3, g)
    assert one_each.dtype == torch.int64 and torch.equal(one_each[1:2], seeds(1, [generator(1)]))
    assert torch.equal(seeds(3, generator(4)), seeds(3, generator(4))) and len(set(seeds(50, generator(4)).tolist())) == 50
    assert torch.equal(seeds(3, one_each), one_each) and (seeds(100) >= 0).all()
    torch.manual_seed(0)
    a = seeds(3)
    torch.manual_seed(0)
    assert torch.equal(a, seeds(3)) and not torch.equal(a, seeds(3))
    x = ddim(1.0)(toy, noise(), steps=5, generator=[generator(i) for i in range(3)])
    assert torch.equal(x, ddim(1.0)(toy, noise(), steps=5, generator=one_each))


def test_deterministic_solvers_draw_nothing():
    g = generator(0)
    before = g.get_state()
    ddim()(toy, noise(), steps=5, generator=g)
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("solver, options", SHAPES)
def test_a_sample_does_not_depend_on_its_neighbours(solver, options):
    """Nor on its place among them: a batch split in two is the same to the bit, noise and guidance included."""
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", **options)
    scale, drawn = torch.tensor([1.0, 3.0, 4.5]), torch.tensor([11, 12, 13])

    def run(at):
        given = {"guidance": scale[at], "cond": {"y": Y[at]}, "uncond": {"y": NULL[at]}}
        return sampler(toy, noise()[at], steps=8, generator=drawn[at], **given)

    whole = run(slice(None))
    assert torch.equal(whole, torch.cat([run(slice(0, 1)), run(slice(1, 3))]))
    assert torch.equal(whole.flip(0), run([2, 1, 0]))
    plain = sampler(toy, noise()[:1], steps=8, cond={"y": Y[:1]}, generator=drawn[:1])
    assert torch.allclose(plain, whole[:1], atol=2e-6)  # scale 1 is the conditional model


@pytest.mark.parametrize("solver, options", SHAPES)
def test_steps_of_ones_own(solver, options):
    """Each sample follows its own grid, however many evaluations the others still have: alone it is the same to the bit."""
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", **options)
    steps, drawn = [3, 7, sampler.grid(4)], torch.tensor([11, 12, 13])
    model = Toy()
    together = sampler(model, noise(), steps=steps, generator=drawn)
    assert len(model.calls) == sampler.nfe(7)
    last = [sampler.plan(n).evaluations[-1].at.time for n in steps]  # who is done stays where it was
    assert model.calls[-1][3].tolist() == pytest.approx(last)
    for b, n in enumerate(steps):
        assert torch.equal(sampler(toy, noise()[b : b + 1], steps=n, generator=drawn[b : b + 1]), together[b : b + 1])


def test_steps_of_ones_own_with_everything():
    sampler = Sampler("sde_dpmpp_2m", schedule=DiscreteVP.linear(), prediction="v", threshold=0.9)
    drawn, known = torch.tensor([11, 12, 13]), noise(seed=40)
    mask = (noise(seed=50) > 0).float()

    def run(at, steps):
        given = {"guidance": 2.0, "guidance_interval": (0.2, 3.0), "guidance_rescale": 0.5, "generator": drawn[at]}
        return sampler(
            toy, noise()[at], steps=steps, cond={"y": Y[at]}, uncond={"y": NULL[at]}, mask=mask[at], known=known[at], **given
        )

    together, seen = run(slice(None), [4, 9, 6]), []
    for b, n in enumerate((4, 9, 6)):
        seen.append(run(slice(b, b + 1), n))
    assert torch.equal(torch.cat(seen), together)


def test_callback_of_samples_with_steps_of_their_own(capsys):
    """Steps are those of the sample that has most."""
    for solver in ("heun", "ddim"):
        told = []
        Sampler(solver, schedule=DiscreteVP.linear())(
            toy, noise(2), steps=[2, 5], callback_on_step_end=lambda s, i, t, given, told=told: told.append(i), progress=True
        )
        assert told == [0, 1, 2, 3, 4] and "5/5" in capsys.readouterr().err


def test_doubled_batch():
    """One call an evaluation, [cond; uncond]; the result is u + s (c - u) in every step."""
    seen = []

    def model(x, t, y):
        assert torch.equal(x[:3], x[3:]) and len(t) == 6
        seen.append(y)
        return toy(x, t, y)

    got = ddim()(model, noise(), steps=5, **GUIDED)
    assert len(seen) == 5 and all(torch.equal(v, torch.cat([Y, NULL])) for v in seen)

    def combined(x, t):
        c, u = toy(x, t, Y), toy(x, t, NULL)
        return u + 3 * (c - u)

    assert torch.allclose(got, ddim()(combined, noise(), steps=5), atol=2e-5)


def test_guided_channels():
    def combined(x, t):
        c, u = toy(x, t, Y), toy(x, t, NULL)
        return torch.cat([u[:, :3] + 3 * (c[:, :3] - u[:, :3]), c[:, 3:]], 1)

    got = ddim()(toy, noise(), steps=5, guided_channels=3, **GUIDED)
    assert torch.allclose(got, ddim()(combined, noise(), steps=5), atol=2e-5)
    alone = {"steps": 5, "cond": {"y": Y}}
    assert torch.equal(ddim()(toy, noise(), guided_channels=3, **alone), ddim()(toy, noise(), **alone))


def test_guidance_one_needs_no_uncond():
    for one in (1, 1.0, np.float32(1)):
        model = Toy()
        ddim()(model, noise(), steps=2, guidance=one, cond={"y": Y})
        assert model.calls[0][2][0] == 3


@pytest.mark.parametrize("scales", [[2.0], [2.0, -1.5], [1.0, 0.5, 3.0]])
def test_several_conditions(scales):
    """u + sum_i s_i (c_i - u), Liu et al., arXiv 2206.01714, eq. 11, in one batch of all."""
    ys = [Y, Y.flip(0), 0.3 * Y][: len(scales)]

    def combined(x, t):
        u = toy(x, t, NULL)
        return u + sum(s * (toy(x, t, y) - u) for s, y in zip(scales, ys, strict=True))

    model = Toy()
    cond = [{"y": y} for y in ys]
    got = ddim()(model, noise(dtype=torch.float64), steps=5, guidance=scales, cond=cond, uncond={"y": NULL})
    assert {call[2][0] for call in model.calls} == {3 * (1 + len(scales))}
    assert torch.allclose(got, ddim()(combined, noise(dtype=torch.float64), steps=5), atol=1e-10)
    half = ddim()(Toy(), noise(dtype=torch.bfloat16), steps=5, guidance=scales, cond=cond, uncond={"y": NULL})
    assert half.dtype == torch.bfloat16 and (half.double() - got).norm() <= 0.02 * got.norm()


def test_guidance_interval():
    """Inside of (lo, hi] of sigma / alpha guided, outside of it the conditional model in a batch of its own size."""
    lo, hi = 0.3, 5.0
    for solver in ("ddim", "heun", "unipc"):
        sampler = Sampler(solver, schedule=VPLinear(), prediction="v")
        inside = [lo < e.at.sigma / e.at.alpha <= hi for e in sampler.plan(9).evaluations]
        assert True in inside and False in inside

        def combined(x, t):
            c, u = toy(x, t, Y), toy(x, t, NULL)
            ratio = float(np.exp(-VPLinear().lam(float(t[0]))))
            return u + 3 * (c - u) if lo < ratio <= hi else c

        model = Toy()
        got = sampler(model, noise(dtype=torch.float64), steps=9, guidance_interval=(lo, hi), **GUIDED)
        assert [call[2][0] for call in model.calls] == [6 if here else 3 for here in inside]
        assert [len(call[3]) for call in model.calls] == [6 if here else 3 for here in inside]
        assert torch.allclose(got, sampler(combined, noise(dtype=torch.float64), steps=9), atol=1e-10)
    sigma, model = EDM().grid(6).sigma, Toy()  # lo is outside, hi is inside
    Sampler("ddim", schedule=EDM(), prediction="x0")(model, noise(), steps=6, guidance_interval=(sigma[4], sigma[2]), **GUIDED)
    assert [call[2][0] for call in model.calls] == [3, 3, 6, 6, 3, 3]
    everywhere = sampler(toy, noise(), steps=9, guidance_interval=(0.0, math.inf), **GUIDED)
    assert torch.equal(everywhere, sampler(toy, noise(), steps=9, **GUIDED))


def rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale):
    """diffusers' function of that name, diffusers.pipelines.stable_diffusion (which needs transformers to import)."""
    std_text = noise_pred_text.std(dim=list(range(1, noise_pred_text.ndim)), keepdim=True)
    std_cfg = noise_cfg.std(dim=list(range(1, noise_cfg.ndim)), keepdim=True)
    noise_pred_rescaled = noise_cfg * (std_text / std_cfg)
    noise_cfg = guidance_rescale * noise_pred_rescaled + (1 - guidance_rescale) * noise_cfg
    return noise_cfg


def test_rescale_is_diffusers_function():
    pytest.importorskip("diffusers")
    import inspect
    from importlib.util import find_spec
    from pathlib import Path

    root = Path(find_spec("diffusers").origin).parent
    text = (root / "pipelines/stable_diffusion/pipeline_stable_diffusion.py").read_text()
    for line in inspect.getsource(rescale_noise_cfg).splitlines()[2:]:
        assert line in text


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_guidance_rescale(phi):
    def combined(x, t):
        c, u = toy(x, t, Y), toy(x, t, NULL)
        return rescale_noise_cfg(u + 3 * (c - u), c, phi)

    got = ddim()(toy, noise(dtype=torch.float64), steps=6, guidance_rescale=phi, **GUIDED)
    assert torch.allclose(got, ddim()(combined, noise(dtype=torch.float64), steps=6), atol=1e-10)
    narrow = ddim()(toy, noise(), steps=6, guidance_rescale=phi, **GUIDED)
    assert (narrow - got).norm() <= 1e-5 * got.norm()
    flat = rescale_gain([torch.ones(2, 5), torch.ones(2, 5)], torch.tensor([[3.0, -2.0]]), 0.7)
    assert flat == pytest.approx(1.0)  # a constant output is left as it is, not divided by 0


def test_learned_sigma_is_a_view(monkeypatch):
    spy = Spy(monkeypatch)
    assert torch.equal(ddim()(Toy(True), noise(), steps=4, **GUIDED), ddim()(Toy(), noise(), steps=4, **GUIDED))
    shapes = [[(tuple(o.shape), o.stride(0)) for o in call["outputs"]] for call in spy.calls]
    assert len(shapes) == 8 and shapes[0] == [((3, 4, 6, 5), 240)] * 2  # one call an evaluation; 240: a row of 2 C channels


def test_bfloat16_model_float32_state():
    states, model = [], Toy()

    def after(sampler, i, t, given):
        states.append([given[name].dtype for name in ("latents", "pred_original_sample")])

    given = {"callback_on_step_end": after, "callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"]}
    out = ddim()(model, noise(dtype=torch.bfloat16), steps=6, **given)
    assert out.dtype == torch.bfloat16 and states == [[torch.float32] * 2] * 6
    assert {call[0] for call in model.calls} == {torch.bfloat16}


def test_a_bfloat16_state_would_drift():
    """The same bfloat16 model under a float64 state, ours, and one that is rounded to bfloat16 every step."""
    grid = DiscreteVP.linear().grid(50)

    def half(x, t):
        return toy(x.bfloat16(), t).to(x.dtype)

    start = noise(dtype=torch.bfloat16)
    exact = ddim()(half, start.double(), steps=50)
    ours = []
    ddim()(toy, start, steps=50, callback_on_step_end=lambda s, i, t, given: ours.append(given["latents"]))
    drifting = start
    for i in range(50):
        (a, s), (b, r) = ((float(grid.alpha[k]), float(grid.sigma[k])) for k in (i, i + 1))
        eps = toy(drifting, torch.full((3,), int(grid.time[i])))
        drifting = b * (drifting - s * eps) / a + r * eps
    error, drift = ((t.double() - exact).norm() / exact.norm() for t in (ours[-1], drifting))
    print(f"float32 state {error:.1e}, bfloat16 state {drift:.1e}")
    assert error <= 2e-3 and drift >= 10 * error


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in ("ddpm", "consistency")])
@pytest.mark.parametrize("schedule, prediction", [("discrete", "eps"), ("linear", "v"), ("edm", "x0"), ("flow", "flow")])
def test_float32_loop_follows_float64(solver, schedule, prediction):
    """Relative RMS <= 1e-5 after 50 steps."""
    sampler = Sampler(solver, schedule=SCHEDULES[schedule], prediction=prediction)
    drawn = torch.tensor([1, 2, 3])
    wide = sampler(toy, noise().double(), steps=50, generator=drawn)
    assert wide.dtype == torch.float64
    narrow = sampler(toy, noise(), steps=50, generator=drawn)
    print(solver, schedule, float((narrow - wide).norm() / wide.norm()))
    assert (narrow - wide).norm() <= 1e-5 * wide.norm()


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "lcm"])  # which has 50 timesteps to choose from
def test_a_thousand_steps(solver):
    sampler = Sampler(solver, schedule=any_schedule(solver), prediction="x0")
    assert sampler(lambda x, t: x.tanh(), torch.randn(2, 3), steps=1000).isfinite().all()


# ---------------------------------------------------------------- bounds, masks and starts


def test_clip():
    for solver in ("ddim", "heun", "dpmpp_2m", "unipc"):
        seen = []
        sampler = Sampler(solver, schedule=DiscreteVP.linear(), clip=0.5)
        out = sampler(
            toy,
            noise(),
            steps=6,
            callback_on_step_end=lambda s, i, t, given, seen=seen: seen.append(given["pred_original_sample"]),
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        )
        assert max(x0.abs().max() for x0 in seen) == 0.5 and out.abs().max() <= 0.5


@pytest.mark.parametrize("threshold, q, most", [(0.9, 0.9, math.inf), ((0.995, 1.5), 0.995, 1.5)])
def test_threshold(threshold, q, most):
    """Imagen's dynamic thresholding (arXiv 2205.11487, app. E) as diffusers has it, of the guided data prediction."""
    schedule = VPLinear()

    def bounded(x, t):
        x0 = toy(2 * x, t, NULL) + 3 * (toy(2 * x, t, Y) - toy(2 * x, t, NULL))
        s = torch.quantile(x0.abs().flatten(1), q, dim=1).clamp(1, most).reshape(-1, 1, 1, 1)
        return x0.clamp(-s, s) / s

    raw = lambda x, t, y: x0_model(schedule, lambda x, t: toy(2 * x, t, y))(x, t)  # noqa: E731
    sampler = Sampler("dpmpp_2m", schedule=schedule, threshold=threshold)
    got = sampler(raw, noise(dtype=torch.float64), steps=6, **GUIDED)
    expected = Sampler("dpmpp_2m", schedule=schedule, prediction="x0")(bounded, noise(dtype=torch.float64), steps=6)
    assert torch.allclose(got, expected, rtol=0, atol=1e-9)
    free = Sampler("dpmpp_2m", schedule=schedule)(raw, noise(dtype=torch.float64), steps=6, **GUIDED)
    assert (got - free).abs().max() > 0.01


@pytest.mark.parametrize("solver, options", [s for s in SHAPES if s[0] != "flow_stochastic"])
def test_mask(solver, options):
    """Where the mask is 1 the data prediction is what is known, in every evaluation; the end has it to the bit."""
    schedule, known = VPLinear(), noise(seed=20)
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.bool)
    mask[..., :3, :] = True
    sampler, drawn = Sampler(solver, schedule=schedule, prediction="x0", **options), torch.tensor([1, 2, 3])

    def replaced(strength):
        def model(x, t):
            share = strength * mask.to(x.dtype)
            return (1 - share) * toy(x, t) + share * known.to(x.dtype)

        return sampler(model, noise(dtype=torch.float64), steps=7, generator=drawn)

    for strength in (1.0, 0.4):
        given = {"steps": 7, "generator": drawn, "mask": mask, "known": known.double(), "mask_strength": strength}
        got = sampler(toy, noise(dtype=torch.float64), **given)
        assert torch.allclose(got, replaced(strength), rtol=0, atol=1e-10)
    end = sampler(toy, noise(), steps=7, generator=drawn, mask=mask.float(), known=known)
    full = mask.expand(3, 4, 6, 5)
    assert torch.equal(end[full], known[full]) and not torch.isclose(end[~full], known[~full]).any()


def test_image_to_image():
    """The first state is alpha image + sigma noise of the grid's first level, each sample's own."""
    table, image = DiscreteVP.linear(), noise(seed=30)
    grids = [table.grid(10, start=t) for t in (900, 500, 200)]
    assert [g.steps for g in grids] == [9, 5, 2]
    seen = []

    def model(x, t):
        seen.append((x, t))
        return toy(x, t)

    out = ddim(0.7)(model, noise(), steps=grids, image=image, generator=torch.tensor([1, 2, 3]))
    first, time = seen[0]
    assert time.tolist() == [int(g.time[0]) for g in grids] and len(seen) == 9
    for b, grid in enumerate(grids):
        expected = float(grid.alpha[0]) * image[b] + float(grid.sigma[0]) * noise()[b]
        assert torch.allclose(first[b], expected, atol=1e-6)
        given = {"steps": grid, "image": image[b : b + 1], "generator": torch.tensor([b + 1])}
        assert torch.equal(out[b : b + 1], ddim(0.7)(toy, noise()[b : b + 1], **given))
    Sampler("heun", schedule=EDM(), prediction="x0")(model, noise(), steps=EDM().grid(8, start=2.0), image=image)
    sigma = EDM().grid(8, start=2.0).sigma[0]
    assert 0 < sigma <= 2 and torch.allclose(seen[9][0], image + float(sigma) * noise(), atol=1e-6)


# ---------------------------------------------------------------- callbacks, progress, what is not finite


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "unipc"])
def test_callback(solver):
    sampler = Sampler(solver, schedule=EDM(), prediction="x0")
    seen = []

    def after(given_sampler, step, timestep, tensors):
        assert given_sampler is sampler
        seen.append((step, timestep, tensors))

    both = ["latents", "pred_original_sample"]
    whole = sampler(toy, noise(), steps=6, callback_on_step_end=after, callback_on_step_end_tensor_inputs=both)
    assert torch.equal(whole, sampler(toy, noise(), steps=6))  # a callback changes nothing
    assert [i for i, *_ in seen] == list(range(6)) and [t for _, t, _ in seen] == pytest.approx(list(EDM().grid(6).time[:6]))
    end = seen[-1][2]
    assert torch.equal(end["latents"], whole) and torch.equal(end["pred_original_sample"], whole)  # the last step returns x0
    stopped = sampler(toy, noise(), steps=6, callback_on_step_end=lambda s, i, t, given: i < 2)
    assert torch.equal(stopped, seen[2][2]["latents"])
    default = []
    sampler(toy, noise(), steps=2, callback_on_step_end=lambda s, i, t, given: default.append(list(given)))
    assert default == [["latents"]] * 2
    times = []
    ddim()(toy, noise(), steps=3, callback_on_step_end=lambda s, i, t, given: times.append(t))
    assert times == [999, 666, 332] and all(isinstance(t, int) for t in times)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_callback_replaces_the_latents(in_place, guided):
    """Also what the model sees next, whose copy was written already."""
    seen = []

    def model(x, t, y=None):
        seen.append(x.clone())
        return toy(x, t, y)

    def halved(sampler, step, timestep, tensors):
        if step == 1:
            tensors["latents"] = tensors["latents"].mul_(0.5) if in_place else 0.5 * tensors["latents"]
        states.append(tensors["latents"].clone())
        return tensors

    given = GUIDED if guided else {}
    for dtype in (torch.float32, torch.bfloat16):
        seen, states = [], []
        Sampler("dpmpp_2m", schedule=EDM(), prediction="edm")(
            model, noise(dtype=dtype), steps=4, callback_on_step_end=halved, **given
        )
        for i, sigma in enumerate(EDM().grid(4).sigma[1:4]):
            expected = (states[i] / math.hypot(sigma, 0.5)).to(dtype)
            assert all(torch.allclose(part, expected, rtol=2e-2, atol=1e-6) for part in seen[i + 1].split(3))
    for bad, error, text in [
        (torch.zeros(2), ValueError, r"latents: expected shape \[3, 4, 6, 5\] from the callback, got \[2\]"),
        (1.0, TypeError, "latents: expected a tensor from the callback, got float"),
    ]:
        with pytest.raises(error, match=text):
            ddim()(toy, noise(), steps=2, callback_on_step_end=lambda s, i, t, given, bad=bad: {"latents": bad})


def test_interrupt_and_progress(capsys):
    def interrupt(sampler, i, t, given):
        if i == 2:
            raise KeyboardInterrupt

    sampler = ddim()
    with pytest.raises(KeyboardInterrupt):
        sampler(toy, noise(), steps=6, callback_on_step_end=interrupt, progress=True)
    assert "3/6" in capsys.readouterr().err
    assert torch.equal(sampler(toy, noise(), steps=6), ddim()(toy, noise(), steps=6))
    sampler(toy, noise(), steps=2)
    assert capsys.readouterr().err == ""


class Breaks(Toy):
    """Not finite in some samples from some call on."""

    def __init__(self, call, samples, value=math.nan):
        super().__init__()
        self.call, self.samples, self.value = call, samples, value

    def forward(self, x, t, y=None):
        out = super().forward(x, t, y)
        if len(self.calls) > self.call:
            out[self.samples, 1, 2, 3] = self.value
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_loop(value):
    """With the step and the samples, read at the end of the step after: one evaluation more, or at the end."""
    model = Breaks(3, [1], value)
    with pytest.raises(FloatingPointError, match=r"^step 3, sample 1: the model's output is not finite$"):
        Sampler("dpmpp_2m", schedule=DiscreteVP.linear(), clip=1.0)(model, noise(), steps=8)
    assert len(model.calls) == 5
    model = Breaks(7, [0, 2], value)
    with pytest.raises(FloatingPointError, match=r"^step 7, sample 0, 2: "):
        ddim()(model, noise(), steps=8)
    assert len(model.calls) == 8
    model = Breaks(2, [4], value)  # of [cond; uncond]
    with pytest.raises(FloatingPointError, match=r"^step 1, sample 1: "):
        Sampler("heun", schedule=DiscreteVP.linear())(model, noise(), steps=8, **GUIDED)
    model = Breaks(3, [1], value)
    out = ddim()(model, noise(), steps=8, check_finite=False)
    assert len(model.calls) == 8 and out[[0, 2]].isfinite().all() and not out[1].isfinite().all()
    with pytest.raises(FloatingPointError, match=r"^step 1, sample 1: "):  # a callback that stops does not hide it
        ddim()(Breaks(1, [1], value), noise(), steps=8, callback_on_step_end=lambda s, i, t, given: i < 1)


# ---------------------------------------------------------------- prepared


@pytest.mark.parametrize("solver, options", SHAPES)
def test_prepared_is_a_call(solver, options):
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", **options)
    settings = {"steps": 5, "guidance": 3.0, "guidance_interval": (0.1, 20.0)}
    ready = sampler.prepare(noise(dtype=torch.bfloat16), **settings)
    noisy = any(e.state.only("z").terms for e in sampler.plan(5).evaluations)
    assert isinstance(ready, Prepared) and ready.steps == 5 and ready.draws == noisy
    for seed in (5, 90):
        x, drawn = noise(seed=seed, dtype=torch.bfloat16), torch.arange(3) + seed
        with Once():
            made = ready(toy, x, {"y": Y}, {"y": NULL}, drawn)
        again = sampler(toy, x, cond={"y": Y}, uncond={"y": NULL}, generator=drawn, **settings)
        assert made.dtype == torch.bfloat16 and torch.equal(made, again)


def test_prepared_with_image_mask_and_threshold():
    sampler = Sampler("sde_dpmpp_2m", schedule=DiscreteVP.linear(), prediction="v", threshold=0.9)
    image, known, drawn = noise(seed=30), noise(seed=31), torch.tensor([1, 2, 3])
    mask = (noise(seed=32) > 0).float()
    settings = {"steps": DiscreteVP.linear().grid(8, start=800), "guidance": 3.0, "guidance_rescale": 0.7}
    ready = sampler.prepare(noise(), **settings, mask_strength=1.0, image=True)
    with Once():
        made = ready(toy, noise(), {"y": Y}, {"y": NULL}, drawn, image, mask, known)
    given = {"generator": drawn, "image": image, "mask": mask, "known": known}
    assert torch.equal(made, sampler(toy, noise(), cond={"y": Y}, uncond={"y": NULL}, **settings, **given))


@pytest.mark.parametrize("solver, options", [("dpmpp_2m", {}), ("ddim", {"eta": 1.0}), ("heun", {}), ("unipc", {"order": 3})])
def test_compile_takes_the_whole_loop(solver, options):
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", threshold=0.9, **options)
    ready = sampler.prepare(noise(), steps=3, guidance=3.0, guidance_rescale=0.5)
    run = torch.compile(ready, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        given = noise(seed=seed), {"y": Y}, {"y": NULL}, torch.arange(3) + seed
        assert torch.allclose(run(toy, *given), ready(toy, *given), atol=1e-6)
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver, options", SHAPES)
def test_cuda_graph(solver, options):
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", **options)
    x, drawn = noise().cuda(), torch.tensor([1, 2, 3]).cuda()
    given = {"y": Y.cuda()}, {"y": NULL.cuda()}
    ready = sampler.prepare(x, steps=4, guidance=3.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ready(toy, x, *given, drawn)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = ready(toy, x, *given, drawn)
    for seed in (5, 6):
        x.copy_(noise(seed=seed))
        drawn.copy_(torch.tensor([seed, 2, 3]))
        graph.replay()
        assert torch.equal(made, ready(toy, x, *given, drawn))


def test_prepared_refuses_what_was_not_prepared():
    ready = ddim(1.0).prepare(noise(), steps=2)
    masked = ddim().prepare(noise(), steps=2, mask_strength=1.0)
    for call, text in [
        (lambda: ready(toy, noise(2), seeds=seeds(2)), r"noise: expected torch.float32 \[3, 4, 6, 5\], as was prepared, got"),
        (lambda: ready(toy, noise().double(), seeds=seeds(3)), "noise: expected torch.float32"),
        (lambda: ready(toy, noise()), r"seeds: expected int64 \[3\] for a solver that takes noise, got None"),
        (lambda: ready(toy, noise(), seeds=seeds(3), image=noise()), "image: expected None, as was prepared"),
        (lambda: masked(toy, noise()), "mask: expected a tensor, as was prepared"),
        (lambda: masked(toy, noise(), mask=noise(), known=noise(2)), r"known: expected a shape that broadcasts to \[3, 4"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="mask: expected a tensor, got float"):
        masked(toy, noise(), mask=1.0, known=noise())


def test_a_call_with_the_same_settings_begins_at_once(monkeypatch):
    made = []
    real = loop.Prepared
    monkeypatch.setattr(loop, "Prepared", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    sampler = ddim()
    first = sampler(toy, noise(), steps=3)
    assert torch.equal(sampler(toy, noise(), steps=3), first) and len(made) == 1
    assert not torch.equal(sampler(toy, noise(), steps=4), first) and len(made) == 2
    scale = torch.tensor([1.0, 2.0, 3.0])
    given = {"cond": {"y": Y}, "uncond": {"y": NULL}, "steps": 3}
    a = sampler(toy, noise(), guidance=scale, **given)
    scale += 1  # a tensor may change under its name
    assert not torch.equal(sampler(toy, noise(), guidance=scale, **given), a)
    assert sampler(toy, noise(2), steps=3).shape[0] == 2 and sampler(toy, noise(dtype=torch.half), steps=3).dtype == torch.half


def test_threads_share_a_sampler():
    sampler, wrong = ddim(), []
    expected = {n: ddim()(toy, noise(), steps=n) for n in (2, 3, 4)}

    def run(n):
        for _ in range(20):
            if not torch.equal(sampler(toy, noise(), steps=n), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- adaptive steps


def mixture_x0(x, alpha, sigma):
    """E[x0 | x] for x0 from two Gaussians, of means (+-1, 0, ...) and deviation 0.3, exactly."""
    mean = torch.zeros(x.shape[1], dtype=x.dtype)
    mean[0] = 1.0
    variance = 0.09 * alpha**2 + sigma**2
    sign = torch.tanh(alpha * (x @ mean) / variance)[:, None] * mean
    return sign + 0.09 * alpha / variance * (x - alpha * sign)


def mixture_model(schedule, calls):
    def model(x, t):
        calls.append(float(t[0]))
        alpha, sigma = (float(f(float(t[0]))) for f in (schedule.alpha, schedule.sigma))
        return (x - alpha * mixture_x0(x.double(), alpha, sigma)) / sigma

    return model


@pytest.fixture(scope="module")
def mixture_end():
    """Noise, and the end of its ODE by very many steps."""
    schedule, x = VPLinear(t_min=1e-2), torch.randn(8, 4, dtype=torch.float64, generator=generator(0))
    fine = Sampler("dpmpp_3m", schedule=schedule, spacing="logsnr", final="sigma_min", kind="taylor")
    return schedule, x, fine(mixture_model(schedule, []), x, steps=1000)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predict", ["data", "noise"])
def test_adaptive_steps(order, predict, mixture_end):
    """The error falls with the tolerance, the evaluations grow; both forms of the solver."""
    schedule, x, exact = mixture_end
    found = []
    for tolerance in (0.2, 0.02, 0.002):
        calls = []
        made = dpm_adaptive(
            mixture_model(schedule, calls),
            x,
            schedule=schedule,
            order=order,
            predict=predict,
            atol=tolerance / 5,
            rtol=tolerance,
            final="sigma_min",
        )
        assert made.nfe == len(calls) == (order - 1) * (made.accepted + made.rejected) + made.accepted
        found.append((float((made.samples - exact).norm() / exact.norm()), made.nfe))
    print(order, predict, found)
    (a, n), (b, m), (c, k) = found
    assert a > 2 * b and b > 2 * c and c <= 2e-3 and n < m < k


def test_adaptive_steps_end_at_the_data_prediction():
    schedule, x = DiscreteVP.linear(), noise(2)[:, :, 0, 0]
    calls = []
    made = dpm_adaptive(mixture_model(schedule, calls), x.bfloat16(), schedule=schedule, clip=1.0)
    short = dpm_adaptive(mixture_model(schedule, []), x.bfloat16(), schedule=schedule, clip=1.0, final="sigma_min")
    assert made.samples.dtype == torch.bfloat16 and made.nfe == len(calls) == short.nfe + 1 and calls[-1] == 0
    assert made.samples.abs().max() <= 1 and made.rejected > 0
    assert (made.samples - short.samples).abs().max() <= 0.1


def test_adaptive_steps_are_guided():
    schedule, calls = VPLinear(t_min=0.01), []

    def model(x, t, y):
        calls.append(len(x))
        return 0.5 * x + y[:, None]

    y = torch.tensor([0.3, -0.2])
    given = {"schedule": schedule, "prediction": "v", "final": "sigma_min"}
    x = torch.randn(2, 5, dtype=torch.float64, generator=generator(1))
    made = dpm_adaptive(model, x, **given, guidance=3.0, cond={"y": y}, uncond={"y": 0 * y})
    plain = dpm_adaptive(lambda x, t: 0.5 * x + 3 * y[:, None], x, **given)
    assert set(calls) == {4} and made.nfe == plain.nfe and torch.allclose(made.samples, plain.samples, atol=1e-9)


def test_adaptive_steps_refuse():
    x = torch.randn(2, 5)
    for change, error, text in [
        ({"rtol": 0.0}, ValueError, "rtol: expected a number above 0, got 0.0"),
        ({"theta": 1.0}, ValueError, "theta: expected a number above 0 and below 1, got 1.0"),
        ({"order": 4}, ValueError, "order: expected 2 or 3, got 4"),
        ({"predict": "eps"}, ValueError, "predict: expected one of data, noise"),
        ({"final": "one"}, ValueError, "final: expected one of zero, sigma_min"),
        ({"schedule": RectifiedFlow(), "prediction": "flow"}, ValueError, "schedule: expected alpha > 0"),
        ({"guidance": 2.0}, ValueError, "uncond: guidance needs it"),
        ({"model": lambda x, t: x * math.nan}, FloatingPointError, "step 0, sample 0, 1: the model's output is not finite"),
    ]:
        args = {"model": lambda x, t: 0.1 * x, "noise": x, "schedule": VPLinear(), **change}
        with pytest.raises(error, match=text):
            dpm_adaptive(args.pop("model"), args.pop("noise"), **args)


# ---------------------------------------------------------------- the rest of the rules


def test_a_solver_of_ones_own():
    """A function that makes a plan of a grid, its options by keyword."""

    def damped(grid, *, by=1.0):
        plan = Plan()
        for i in range(grid.steps):
            t = grid.level(i + 1)
            m = plan.evaluate(i, grid.level(i))
            plan.set(t.alpha * m + (by * t.sigma) * plan.z)
        return plan

    given = {"schedule": DiscreteVP.linear(), "prediction": "v"}
    drawn = torch.tensor([1, 2, 3])
    same = Sampler("flow_stochastic", **given)(toy, noise(), steps=4, generator=drawn)
    assert torch.equal(Sampler(damped, **given)(toy, noise(), steps=4, generator=drawn), same)
    assert not torch.equal(Sampler(damped, by=0.5, **given)(toy, noise(), steps=4, generator=drawn), same)
    with pytest.raises(TypeError, match="eta: solver 'damped' has the options by"):
        Sampler(damped, eta=1.0, **given)


def test_noise_is_left_alone():
    for schedule in (EDM(), VPLinear()):
        x = noise()
        Sampler("dpmpp_2m", schedule=schedule, prediction="x0")(toy, x, steps=3)
        assert torch.equal(x, noise())


def test_vector_and_strided_noise():
    sampler = ddim(1.0)
    assert sampler(lambda x, t: 0.1 * x, torch.randn(7), steps=3).shape == (7,)
    x, drawn = noise().permute(0, 2, 3, 1), torch.tensor([1, 2, 3])
    a, b = (sampler(lambda x, t: 0.1 * x, each, steps=3, generator=drawn) for each in (x, x.contiguous()))
    assert torch.equal(a, b)
    assert sampler(lambda x, t: 0.1 * x, torch.randn(0, 4), steps=3).shape == (0, 4)


def test_own_grid():
    """Any levels: two stretches of DiscreteVP's timesteps run one after the other are the whole."""
    table, sampler = DiscreteVP.linear(), ddim()
    whole = table.grid(6)

    def part(a, b):
        return Grid(whole.alpha[a:b], whole.sigma[a:b], whole.time[a:b], whole.scale[a:b])

    halfway = sampler(toy, noise(), steps=part(0, 4))
    assert torch.equal(sampler(toy, halfway, steps=part(3, 7)), sampler(toy, noise(), steps=6))


RUNGS = [r for r in ("reference", "cpu", "avx2", "avx512") if _ladder.missing(r, "solver_step", "cpu") is None]


@pytest.mark.parametrize("solver, options", [("ddim", {"eta": 1.0}), ("heun", {}), ("dpmpp_2m", {}), ("unipc", {})])
@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_agree(solver, options, rung):
    """20 guided steps with all that a row can do: nothing of the loop depends on the kernel."""
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), prediction="v", threshold=0.99, **options)
    more = {"guidance_rescale": 0.4, "mask": noise(seed=9).sigmoid().round(), "known": noise(seed=8)}
    plain = Sampler(solver, schedule=DiscreteVP.linear(), **options)

    def run():
        drawn = {"steps": 20, "generator": [generator(i) for i in range(3)]}
        yield plain(Toy(True), noise(), guided_channels=3, **drawn, **GUIDED)
        yield sampler(Toy(True), noise(), **drawn, **GUIDED, **more)

    with dk.rung("reference"):
        expected = list(run())
    with dk.rung(rung):
        for got, wanted in zip(run(), expected, strict=True):
            assert (got - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver, options", [("ddim", {"eta": 1.0}), ("heun", {}), ("dpmpp_2m", {})])
def test_no_host_sync(solver, options):
    def after(*_):  # what precedes the first step may copy tables to the device
        torch.cuda.set_sync_debug_mode("error")

    given = {name: {"y": y.cuda()} for name, y in (("cond", Y), ("uncond", NULL))}
    cuda = torch.Generator("cuda").manual_seed(0)
    sampler = Sampler(solver, schedule=DiscreteVP.linear(), **options)
    try:
        out = sampler(toy, noise().cuda(), steps=8, guidance=2.0, generator=cuda, callback_on_step_end=after, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    with pytest.raises(FloatingPointError, match=r"^step 3, sample 1: "):
        sampler(Breaks(3 if solver != "heun" else 6, [1]), noise().cuda(), steps=8, generator=cuda)


def test_rejects_bad_settings():
    table = DiscreteVP.linear()
    for make, error, text in [
        (lambda: Sampler("nope", schedule=table), ValueError, "solver: expected one of ddim, ddpm, euler.*'nope'"),
        (lambda: Sampler(schedule="linear"), TypeError, "schedule: expected a Schedule, got str"),
        (lambda: Sampler(schedule=table, prediction="epsilon"), ValueError, "prediction: expected one of eps, x0, v, flow"),
        (lambda: Sampler(schedule=table, spacing="uniform"), ValueError, "spacing: DiscreteVP has trailing, leading"),
        (lambda: Sampler(schedule=table, final="one"), ValueError, "final: expected one of zero, sigma_min"),
        (lambda: Sampler(schedule=table, clip=-1.0), ValueError, "clip: expected a number above 0"),
        (lambda: Sampler(schedule=table, clip="1"), ValueError, "clip: expected a number above 0"),
        (lambda: Sampler(schedule=table, threshold=1.5), ValueError, r"threshold: expected q in \[0, 1\] or .* got 1.5"),
        (lambda: Sampler(schedule=table, threshold=(0.9, 0.5)), ValueError, "threshold: expected q in"),
        (lambda: Sampler(schedule=table, threshold="0.9"), ValueError, "threshold: expected q in"),
        (lambda: Sampler(schedule=table, threshold=0.9, clip=1.0), ValueError, "threshold: expected None with clip"),
        (lambda: Sampler(schedule=table, eta=1.0), TypeError, "eta: solver 'dpmpp_2m' has the options kind, lower_order_final"),
        (
            lambda: Sampler("flow_stochastic", schedule=table, eta=1.0),
            TypeError,
            "eta: solver 'flow_stochastic' has no options",
        ),
        (lambda: Sampler("ddim", schedule=table, eta=1.5), ValueError, "eta: expected 0 to 1, got 1.5"),
        (lambda: Sampler(schedule=table, kind="magic"), ValueError, "kind: expected one of midpoint"),
        (lambda: Sampler("ddpm", schedule=table, variance="learned"), ValueError, "variance: expected one of fixed_small"),
        (lambda: DiscreteVP([0.5, 0.6]), ValueError, "alphas_cumprod: expected"),
        (lambda: RectifiedFlow(shift=0.0), ValueError, "shift: expected"),
        (lambda: table.grid(1001), ValueError, "steps: expected at most the 1000"),
        (lambda: table.grid(2.0), TypeError, "steps: expected an int, got float"),
        (lambda: table.grid(10, start=-1), ValueError, "start: no level of 10 trailing steps is at or below time -1"),
        (lambda: EDM().grid(0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: randn((2, 3), [generator(0)]), ValueError, "generator: expected one a sample, 2, got 1"),
        (lambda: randn((2, 3), 7), TypeError, "generator: expected None, a torch.Generator"),
        (
            lambda: seeds(2, torch.tensor([1, 2, 3])),
            ValueError,
            r"generator: expected int64 seeds \[2\], got torch.int64 \[3\]",
        ),
        (lambda: seeds(2, torch.ones(2)), ValueError, r"generator: expected int64 seeds \[2\], got torch.float32"),
    ]:
        with pytest.raises(error, match=text):
            make()


def test_rejects_bad_calls():
    x, cond = noise(), {"y": Y}
    both = {"guidance": 2.0, "cond": cond, "uncond": {"y": NULL}}
    for change, error, text in [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"steps": [3, 4]}, ValueError, "steps: expected one for all or one a sample, 3, got 2"),
        ({"steps": [3, 4, 0]}, ValueError, "steps: expected at least 1, got 0"),
        ({"guidance": 2.0}, ValueError, "uncond: guidance needs it"),
        ({"guidance": "2"}, TypeError, "guidance: expected a number, a list of them or a float tensor"),
        ({"guidance": float("nan"), "uncond": {}}, ValueError, "guidance: expected finite"),
        ({"guidance": torch.ones(2), "uncond": {}}, ValueError, r"guidance: expected a number or a tensor \[3\], got 2"),
        (
            {"guidance": [1.0] * 4, "cond": [cond] * 4, "uncond": cond},
            ValueError,
            "guidance: expected at most 3 conditions, got 4",
        ),
        ({"guidance": [1.0, 2.0], "cond": [cond], "uncond": cond}, ValueError, "cond: expected 2 conditions, .* got 1"),
        ({"cond": [cond]}, ValueError, "guidance: expected a list with one scale a condition, 1, got 1.0"),
        ({"guidance": 2.0, "cond": cond, "uncond": {}}, ValueError, "uncond: expected the names of cond, \\['y'\\]"),
        ({"guidance": 2.0, "cond": cond, "uncond": {"y": Y[:, None]}}, ValueError, "uncond.'y'.: expected the shape"),
        ({"cond": {"y": torch.ones(2)}}, ValueError, "cond.'y'.: expected leading dimension 3"),
        ({"cond": {"y": 1}}, TypeError, "cond.'y'.: expected a tensor, got int"),
        ({"guided_channels": 5}, ValueError, "guided_channels: expected -1 or 0 to"),
        ({**both, "guidance_rescale": 1.5}, ValueError, "guidance_rescale: expected 0 to 1, got 1.5"),
        ({**both, "guidance_rescale": "x"}, ValueError, "guidance_rescale: expected 0 to 1, got x"),
        (
            {**both, "guidance_rescale": 0.5, "guided_channels": 3},
            ValueError,
            "guidance_rescale: expected 0 with guided_channels",
        ),
        ({**both, "guidance_interval": (2.0, 1.0)}, ValueError, r"guidance_interval: expected \(lo, hi\) .* got \(2.0, 1.0\)"),
        ({**both, "guidance_interval": 2.0}, ValueError, r"guidance_interval: expected \(lo, hi\) .* got 2.0"),
        ({"mask": x}, ValueError, "known: expected both of mask and known, or none"),
        ({"known": x}, ValueError, "mask: expected both of mask and known, or none"),
        ({"mask": x, "known": x, "mask_strength": 2.0}, ValueError, "mask_strength: expected 0 to 1, got 2.0"),
        ({"mask": x[:2], "known": x}, ValueError, r"mask: expected a shape that broadcasts to \[3, 4, 6, 5\], got \[2"),
        ({"image": x[:2]}, ValueError, "image: expected a shape that broadcasts to"),
        ({"image": 1}, TypeError, "image: expected a tensor, got int"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt"]},
            ValueError,
            "callback_on_step_end_tensor_inputs: expected some of",
        ),
        ({"noise": x.long()}, TypeError, "noise: expected float16.*got torch.int64"),
        ({"noise": [1.0]}, TypeError, "noise: expected a tensor, got list"),
        ({"noise": torch.tensor(1.0)}, ValueError, "noise: expected"),
        ({"model": lambda x, t: x[:, :3]}, ValueError, r"model: expected an output of shape \[3, 4, 6, 5\] or twice"),
        ({"model": lambda x, t: (x,)}, TypeError, "model: expected it to return a tensor, got tuple"),
    ]:
        args = {"model": toy, "noise": x, "steps": 2, **change}
        with pytest.raises(error, match=text):
            ddim()(args.pop("model"), args.pop("noise"), **args)


def test_example_of_the_docs():
    """The README's habit: what the docs show is run."""
    from pathlib import Path

    docs = Path(__file__).parents[1] / "docs"
    text = next(p for p in (docs / "samplers.md", docs / "sampling.md") if p.exists()).read_text()
    exec(text.split("```python")[1].split("```")[0], {})


def test_numbers_of_numpy_and_lists_are_numbers():
    x, y = torch.randn(2, 1, 2, 2), torch.ones(2)
    given = {"cond": {"y": y}, "uncond": {"y": 0 * y}}

    def model(x, t, y):
        return 0.1 * x

    got, want = (
        Sampler("ddim", schedule=DiscreteVP.linear(), clip=clip)(model, x, steps=steps, guidance=guidance, **given)
        for clip, steps, guidance in (([-1, 1], np.int64(3), np.float32(2)), ((-1.0, 1.0), 3, 2.0))
    )
    assert torch.equal(got, want)


def test_sigma_min_after_timestep_zero_is_refused_by_name():
    for spacing in ("leading", "linspace", "spaced"):
        with pytest.raises(ValueError, match=r"final: .* ends at timestep 0 already"):
            DiscreteVP.linear().grid(4, spacing, "sigma_min")
