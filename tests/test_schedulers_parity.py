"""Step parity with diffusers, and with its formulas in float64.

Our loop runs on the other's own noise levels with random raw model outputs. Every state that it reaches is fed to the other's
`step` with the same output and the same noise, so that errors don't accumulate; then both are held against the textbook formula
in float64 on the same float32 inputs, written here a second time (of UniPC and the singlestep solvers: theirs, in float64).
"""

import importlib
import math

import numpy as np
import pytest
import torch

from diffkernels.ops._philox import normal
from diffkernels.sampling import DiscreteVP, Grid, RectifiedFlow, Sampler

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 16, 16)
SEEDS = torch.tensor([7, 2**40 + 1])
STEPS = (1, 4, 20, 50)
NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORST: dict[str, tuple[float, ...]] = {}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    print("\nlargest error of a step over max|out|: ours - theirs, ours - float64, theirs - float64")
    for what, worst in sorted(WORST.items()):
        print(f"{what:<18}", *(f"{w:.1e}" for w in worst))


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Tape(torch.nn.Module):
    """Raw outputs that do not depend on the input; notes what it was called with and gave."""

    def __init__(self):
        super().__init__()
        self.random, self.states, self.times, self.outs = generator(11), [], [], []

    def forward(self, x, t):
        self.states.append(x.clone())
        self.times.append(float(t[0]))
        self.outs.append(torch.randn(x.shape, generator=self.random))
        return self.outs[-1]


def record(sampler, grid, tape=None):
    """(states [n + 1], outputs [n], times [n]), an entry an evaluation, of our loop in float32."""
    tape = Tape() if tape is None else tape
    end = sampler(tape, torch.randn(SHAPE, generator=generator(3)), steps=grid, generator=SEEDS)
    return [*tape.states, end], tape.outs, tape.times


def drawn(n):
    """The noise of evaluation n's state, float64."""
    return normal(SEEDS, torch.tensor(n), 1, math.prod(SHAPE[1:])).reshape(SHAPE)


@pytest.fixture
def their_noise(monkeypatch):
    """their_noise(module, n): what a scheduler that takes no noise draws next."""

    def set_next(module, n):
        where = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
        monkeypatch.setattr(where, "randn_tensor", lambda *args, **more: drawn(n).float())

    return set_next


def judge(what, ours, theirs, exact, slack=1):
    """Ours is within 2e-6 of max|out| of float64, and no farther from it than theirs, `slack` ulp of max|out| aside.

    Theirs may then be 2e-6 from ours, or as far as it is itself from float64: its float32 coefficients cost it up to 4e-6.
    With noise the slack is 4 ulp: theirs is then the float64 normal rounded once, ours a kernel's.
    """
    ours, theirs = ours.double(), theirs.double()
    top = float(exact.abs().max())
    gap, mine, yours = (float((a - b).abs().max()) / top for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
    WORST[what] = tuple(map(max, WORST.get(what, (0.0, 0.0, 0.0)), (gap, mine, yours)))
    ulp = slack * 2.0 ** (math.floor(math.log2(top)) - 23) / top
    assert mine <= min(2e-6, yours + ulp), (what, mine, yours)
    assert gap <= max(2e-6, yours + ulp), (what, gap, yours)


def vp_grid(bar, times):
    """Our levels from alphas_cumprod at whole timesteps, then 0."""
    table = DiscreteVP(bar.double())
    t = np.asarray(times, np.int64)
    alpha, sigma = np.append(table.alpha(t), 1.0), np.append(table.sigma(t), 0.0)
    return Grid(alpha, sigma, np.append(t, 0), alpha)


def sigma_grid(sigmas, times, vp):
    """Our levels from a scheduler's `sigmas`: VP by sigma / sqrt(1 + sigma^2), else EDM's."""
    s = sigmas.double().numpy()
    alpha = 1 / np.sqrt(1 + s**2) if vp else np.ones_like(s)
    time = np.append(times, times[-1] * 0)
    return Grid(alpha, s * alpha, time, alpha, 1.0 if vp else float(s[0]))


def evaluations(sampler, grid):
    """Every evaluation but the first, with the one before it."""
    each = sampler.plan(grid).evaluations
    return zip(each[1:], each[:-1], strict=True)


def x0_of(prediction, out, x, alpha, sigma):
    out, x = out.double(), x.double()
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    return out if prediction == "sample" else alpha * x - sigma * out


# ---------------------------------------------------------------- DDIM and DDPM


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim(steps, eta, prediction, clip):
    theirs = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=clip is not None)
    theirs.set_timesteps(steps)
    grid = vp_grid(theirs.alphas_cumprod, theirs.timesteps)
    assert list(grid.time) == list(DiscreteVP.linear().grid(steps, "leading").time)
    sampler = Sampler("ddim", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], eta=eta, clip=clip)
    states, outs, _ = record(sampler, grid)
    bar = np.append(grid.alpha**2, 1.0)
    for i, t in enumerate(theirs.timesteps):
        last = i == steps - 1
        noise = torch.zeros(SHAPE) if last else drawn(i)
        found = theirs.step(
            outs[i],
            int(t),
            states[i],
            eta=eta,
            variance_noise=noise.float() if eta else None,
            use_clipped_model_output=clip is not None,
        ).prev_sample
        # arXiv 2010.02502, eq. 12 and 16
        a, b = bar[i], bar[i + 1]
        x0 = x0_of(prediction, outs[i], states[i], math.sqrt(a), math.sqrt(1 - a))
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        eps = (states[i].double() - math.sqrt(a) * x0) / math.sqrt(1 - a)
        std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        exact = math.sqrt(b) * x0 + math.sqrt(max(1 - b - std**2, 0)) * eps + std * noise
        judge(f"ddim eta={eta:g}", states[i + 1], found, exact, 4 if eta else 1)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(steps, prediction, variance, their_noise):
    theirs = diffusers.DDPMScheduler(
        prediction_type=prediction, clip_sample=False, variance_type=variance, timestep_spacing="trailing"
    )
    theirs.set_timesteps(steps)
    grid = vp_grid(theirs.alphas_cumprod, theirs.timesteps)
    assert list(grid.time) == list(DiscreteVP.linear().grid(steps, "trailing").time)
    sampler = Sampler("ddpm", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], variance=variance)
    states, outs, _ = record(sampler, grid)
    bar = grid.alpha**2
    for i, t in enumerate(theirs.timesteps):
        their_noise("ddpm", i)  # theirs draws last, too, as t > 0 with this spacing, of a variance clamped up from 0 to 1e-20
        found = theirs.step(outs[i], int(t), states[i]).prev_sample
        # arXiv 2006.11239, eq. 7
        a, b = bar[i], bar[i + 1]
        beta = 1 - a / b
        x0 = x0_of(prediction, outs[i], states[i], math.sqrt(a), math.sqrt(1 - a))
        exact = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * states[i].double()
        if i < steps - 1:
            std = math.sqrt(beta * ((1 - b) / (1 - a) if variance == "fixed_small" else 1.0))
            exact = exact + std * drawn(i)
        elif variance == "fixed_large":
            continue  # theirs adds noise of the whole beta to the final sample; ours does not
        judge(f"ddpm {variance}", states[i + 1], found, exact, 4)


# ---------------------------------------------------------------- Euler and Heun, in sigma


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_euler_and_heun(steps, prediction, karras, name):
    kind = diffusers.EulerDiscreteScheduler if name == "euler" else diffusers.HeunDiscreteScheduler
    theirs = kind(prediction_type=prediction, use_karras_sigmas=karras, **SCALED)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas if name == "euler" else torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]])
    times = theirs.timesteps if name == "euler" else torch.cat([theirs.timesteps[:1], theirs.timesteps[1::2]])
    grid = sigma_grid(sigmas, times.numpy().astype(np.float64), vp=False)
    sampler = Sampler(name, schedule=DiscreteVP.scaled_linear(), prediction=NAMES[prediction])
    states, outs, seen = record(sampler, grid)
    assert seen == pytest.approx(list(map(float, theirs.timesteps)), rel=1e-6)  # the same model times, Heun's too
    s, first = grid.sigma, [True, *[e.step != f.step for e, f in evaluations(sampler, grid)]]
    start, slope = states[0].double(), None
    for i, e in enumerate(sampler.plan(grid).evaluations):
        theirs.scale_model_input(states[i], theirs.timesteps[i])
        found = theirs.step(outs[i], theirs.timesteps[i], states[i]).prev_sample
        # arXiv 2206.00364, Algorithm 1
        d = (states[i].double() - x0_of(prediction, outs[i], states[i], 1.0, e.at.sigma)) / e.at.sigma
        dt = s[e.step + 1] - s[e.step]
        if first[i]:
            start, slope = states[i].double(), d
            exact = start + dt * d
        else:
            exact = start + dt * (slope + d) / 2
        judge(name, states[i + 1], found, exact)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_vp_state_is_their_state_over_alpha(name):
    """k-diffusion scales the model's input by alpha; our state is that input, so nothing is scaled and all else is the same."""
    sigmas = torch.tensor([14.6, 5.0, 1.2, 0.3, 0.0])
    time = np.arange(4.0)
    tape = [Tape(), Tape()]
    x, ends = torch.randn(SHAPE, generator=generator(3), dtype=torch.float64), []
    for vp, t in zip((True, False), tape, strict=True):
        grid = sigma_grid(sigmas, time, vp)
        start = x * grid.sigma[0] / grid.init_scale  # the VP state has sigma_max alpha, VE has sigma_max
        sampler = Sampler(name, schedule=DiscreteVP.linear(), prediction="eps")
        ends.append(sampler(lambda x, _, t=t: t(x, _).double(), start, steps=grid))
    assert torch.allclose(*ends, rtol=1e-10, atol=1e-12)
    for e, a, b in zip(sampler.plan(grid).evaluations, tape[0].states, tape[1].states, strict=True):
        assert torch.allclose(a, b / math.sqrt(1 + e.at.sigma**2), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
def test_euler_ancestral(steps, karras, their_noise):
    theirs = diffusers.EulerAncestralDiscreteScheduler(**SCALED)
    theirs.set_timesteps(steps)
    if karras:  # this class has no option for it
        levels = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SCALED)
        levels.set_timesteps(steps)
        theirs.sigmas, theirs.timesteps = levels.sigmas, levels.timesteps
    grid = sigma_grid(theirs.sigmas, theirs.timesteps.numpy().astype(np.float64), vp=False)
    states, outs, _ = record(Sampler("euler_ancestral", schedule=DiscreteVP.scaled_linear(), prediction="eps"), grid)
    for i, t in enumerate(theirs.timesteps):
        their_noise("euler_ancestral_discrete", i)
        theirs.scale_model_input(states[i], t)
        found = theirs.step(outs[i], t, states[i]).prev_sample
        # k-diffusion, get_ancestral_step
        a, b = grid.sigma[i], grid.sigma[i + 1]
        up = math.sqrt(b**2 * (a**2 - b**2) / a**2)
        exact = states[i].double() + (math.sqrt(b**2 - up**2) - a) * outs[i].double() + up * drawn(i)
        judge("euler_ancestral", states[i + 1], found, exact, 4)


# ---------------------------------------------------------------- DPM-Solver++


LEVELS = {"linspace": {}, "karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
# every prediction on one grid, and every grid with one prediction
VARIED = [
    *(("linspace", prediction) for prediction in NAMES),
    *((levels, "epsilon") for levels in LEVELS if levels != "linspace"),
]
ENDS = [*((*case, "zero") for case in VARIED), ("linspace", "epsilon", "sigma_min")]  # on the others theirs has sigma_min twice


def dpm_grid(theirs, steps, levels):
    theirs.set_timesteps(steps)
    return sigma_grid(theirs.sigmas, theirs.timesteps.numpy(), vp=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order, kind", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "published")])
@pytest.mark.parametrize("levels, prediction", [*VARIED, ("lu", "epsilon")])
def test_dpmpp(steps, order, kind, prediction, levels):
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction,
        solver_order=order,
        solver_type="midpoint" if order == 3 else kind,
        final_sigmas_type="zero",
        **LEVELS.get(levels, {"use_lu_lambdas": True}),
        **SCALED,
    )
    grid = dpm_grid(theirs, steps, levels)
    if levels == "linspace":
        assert list(grid.time) == list(DiscreteVP.scaled_linear().grid(steps, "dpm_linspace").time)
    else:  # even in lam, which is what "lu" comes down to
        own = DiscreteVP.scaled_linear().grid(steps, "karras" if levels == "karras" else "exponential")
        assert np.allclose(own.lam[:-1], grid.lam[:-1], rtol=0, atol=1e-4)  # their table is a product in float32
    options = {"kind": kind} if order > 1 else {}
    sampler = Sampler(
        f"dpmpp_{order}{'m' if order > 1 else ''}", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], **options
    )
    states, outs, _ = record(sampler, grid)
    m = []
    for i in range(steps):
        found = theirs.step(outs[i], theirs.timesteps[i], states[i]).prev_sample
        # arXiv 2211.01095, eq. 9 and Algorithm 2; the third order is the authors' code's
        m.append(x0_of(prediction, outs[i], states[i], grid.alpha[i], grid.sigma[i]))
        p = min(order, i + 1, steps - i if steps < 15 or i == steps - 1 else order)
        if grid.sigma[i + 1] == 0:
            exact = m[i]
        else:
            lam = grid.lam
            h = lam[i + 1] - lam[i]
            alpha, phi = grid.alpha[i + 1], math.expm1(-h)
            exact = grid.sigma[i + 1] / grid.sigma[i] * states[i].double() - alpha * phi * m[i]
            if p > 1:
                d1 = (m[i] - m[i - 1]) * h / (lam[i] - lam[i - 1])
            if p == 2:
                exact = exact + (alpha * (phi / h + 1) * d1 if kind == "heun" else -alpha * phi / 2 * d1)
            if p == 3:
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                older = (m[i - 1] - m[i - 2]) / r1
                first, second = d1 + r0 / (r0 + r1) * (d1 - older), (d1 - older) / (r0 + r1)
                exact = exact + alpha * (phi / h + 1) * first - alpha * ((phi + h) / h**2 - 0.5) * second
        judge(f"dpmpp_{order} {kind}", states[i + 1], found, exact)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("levels, prediction", VARIED)
def test_sde_dpmpp_2m(steps, kind, prediction, levels):
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction, algorithm_type="sde-dpmsolver++", solver_type=kind, **LEVELS[levels], **SCALED
    )
    grid = dpm_grid(theirs, steps, levels)
    sampler = Sampler("sde_dpmpp_2m", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], kind=kind)
    states, outs, _ = record(sampler, grid)
    m, lam = [], grid.lam
    for i in range(steps):
        found = theirs.step(outs[i], theirs.timesteps[i], states[i], variance_noise=drawn(i).float()).prev_sample
        m.append(x0_of(prediction, outs[i], states[i], grid.alpha[i], grid.sigma[i]))
        if i == steps - 1:
            exact = m[i]
        else:  # arXiv 2211.01095, app. C
            h, alpha, sigma = lam[i + 1] - lam[i], grid.alpha[i + 1], grid.sigma[i + 1]
            v = 1 - math.exp(-2 * h)
            exact = (
                sigma / grid.sigma[i] * math.exp(-h) * states[i].double() + alpha * v * m[i] + sigma * math.sqrt(v) * drawn(i)
            )
            if i > 0:
                d1 = (m[i] - m[i - 1]) * h / (lam[i] - lam[i - 1])
                exact = exact + alpha * (v / 2 if kind == "midpoint" else 1 - v / (2 * h)) * d1
        judge(f"sde_dpmpp_2m {kind}", states[i + 1], found, exact, 4)


def in_float64(scheduler, steps):
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


@pytest.mark.parametrize("steps", (*STEPS, 5, 6))
@pytest.mark.parametrize("order, kind", [(2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")])
@pytest.mark.parametrize("levels, prediction, final", ENDS)
def test_dpmpp_singlestep(steps, order, kind, prediction, final, levels):
    def make():
        return diffusers.DPMSolverSinglestepScheduler(
            prediction_type=prediction,
            solver_order=order,
            solver_type=kind,
            lower_order_final=True,
            final_sigmas_type=final,
            **LEVELS[levels],
            **SCALED,
        )

    theirs, wide = make(), in_float64(make(), steps)
    grid = dpm_grid(theirs, steps, levels)
    sampler = Sampler(f"dpmpp_{order}s", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], kind=kind)
    states, outs, _ = record(sampler, grid)
    for i, t in enumerate(theirs.timesteps):
        found = theirs.step(outs[i], t, states[i]).prev_sample
        exact = wide.step(outs[i].double(), t, states[i].double()).prev_sample
        judge(f"dpmpp_{order}s {kind}", states[i + 1], found, exact, order)  # as many terms, which cancel: an ulp of each


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize(
    "kind, levels, prediction, final",
    [*(("bh2", *case) for case in ENDS), *(("bh1", "linspace", p, "sigma_min") for p in NAMES)],
)  # theirs is not finite at 0 with bh1
def test_unipc(steps, order, kind, corrector, prediction, levels, final):
    def make():
        return diffusers.UniPCMultistepScheduler(
            prediction_type=prediction,
            solver_order=order,
            solver_type=kind,
            disable_corrector=[] if corrector else list(range(steps)),
            final_sigmas_type=final,
            **LEVELS[levels],
            **SCALED,
        )

    theirs, wide = make(), in_float64(make(), steps)
    grid = dpm_grid(theirs, steps, levels)
    options = {"order": order, "kind": kind, "corrector": corrector}
    sampler = Sampler("unipc", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], **options)
    states, outs, _ = record(sampler, grid)
    for i, t in enumerate(theirs.timesteps):
        found = theirs.step(outs[i], t, states[i]).prev_sample
        exact = wide.step(outs[i].double(), t, states[i].double()).prev_sample
        judge(f"unipc {order} {kind}", states[i + 1], found, exact, 4)  # the corrected state goes on in either


# ---------------------------------------------------------------- consistency models


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", NAMES)
def test_lcm(steps, prediction, their_noise):
    theirs = diffusers.LCMScheduler(prediction_type=prediction)
    theirs.set_timesteps(steps)
    grid = vp_grid(theirs.alphas_cumprod, theirs.timesteps)
    assert list(grid.time) == list(DiscreteVP.scaled_linear().grid(steps, "lcm").time)
    states, outs, _ = record(Sampler("lcm", schedule=DiscreteVP.linear(), prediction=NAMES[prediction]), grid)
    for i, t in enumerate(theirs.timesteps):
        their_noise("lcm", i)
        found = theirs.step(outs[i], t, states[i]).prev_sample
        # arXiv 2310.04378, eq. 9 and Algorithm 3 of the first
        k = 10 * float(t)
        f = k / math.hypot(k, 0.5) * x0_of(prediction, outs[i], states[i], grid.alpha[i], grid.sigma[i])
        f = f + 0.25 / (k**2 + 0.25) * states[i].double()
        exact = grid.alpha[i + 1] * f + grid.sigma[i + 1] * drawn(i)
        judge("lcm", states[i + 1], found, exact, 4)


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_consistency(steps, their_noise):
    theirs = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    theirs.set_timesteps(steps)
    raw = []

    class Consistency(Tape):
        """f of a raw output, which theirs is given."""

        def forward(self, x, t):
            raw.append(super().forward(x, t))
            skip, out = theirs.get_scalings_for_boundary_condition(theirs.sigmas[len(raw) - 1])
            self.outs[-1] = out * raw[-1] + skip * x
            return self.outs[-1]

    grid = sigma_grid(theirs.sigmas, theirs.timesteps.numpy().astype(np.float64), vp=False)
    sampler = Sampler("consistency", schedule=DiscreteVP.linear(), prediction="x0")
    states, outs, _ = record(sampler, grid, Consistency())
    for i, t in enumerate(theirs.timesteps):
        their_noise("consistency_models", i)
        theirs.scale_model_input(states[i], t)
        found = theirs.step(raw[i], t, states[i]).prev_sample
        # arXiv 2303.01469, Algorithm 1; f leaves sigma_min, which ends the grid
        exact = outs[i].double() + math.sqrt(grid.sigma[i + 1] ** 2 - grid.sigma[-1] ** 2) * drawn(i)
        judge("consistency", states[i + 1], found, exact, 4)


# ---------------------------------------------------------------- flow


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(steps, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = RectifiedFlow(shift=shift, time_scale=1000.0)
    theirs.set_timesteps(steps)
    assert np.allclose(theirs.sigmas, schedule.grid(steps, "linspace").sigma, rtol=1e-6)
    theirs.set_timesteps(sigmas=list(np.linspace(1, 1 / steps, steps)))  # as the SD3 and FLUX pipelines do
    assert np.allclose(theirs.sigmas, schedule.grid(steps).sigma, rtol=1e-6)
    assert np.allclose(theirs.timesteps, schedule.grid(steps).time[:-1], rtol=1e-6)
    s = theirs.sigmas.double().numpy()
    grid = Grid(1 - s, s, 1000 * s, np.ones_like(s))
    states, outs, seen = record(Sampler("flow_euler", schedule=schedule, prediction="flow"), grid)
    assert seen == pytest.approx(list(map(float, theirs.timesteps)), rel=1e-6)
    for i, t in enumerate(theirs.timesteps):
        found = theirs.step(outs[i], t, states[i]).prev_sample
        judge("flow_euler", states[i + 1], found, states[i].double() + (s[i + 1] - s[i]) * outs[i].double())


def flow_grid(sigmas):
    s = sigmas.double().numpy()
    return Grid(1 - s, s, 1000 * s, np.ones_like(s))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_stochastic(steps, shift, their_noise):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    theirs.set_timesteps(steps)
    grid, s = flow_grid(theirs.sigmas), theirs.sigmas.double().numpy()
    states, outs, _ = record(Sampler("flow_stochastic", schedule=RectifiedFlow(), prediction="flow"), grid)
    for i, t in enumerate(theirs.timesteps):
        their_noise("flow_match_euler_discrete", i)
        found = theirs.step(outs[i], t, states[i]).prev_sample
        exact = (1 - s[i + 1]) * (states[i].double() - s[i] * outs[i].double()) + s[i + 1] * drawn(i)
        judge("flow_stochastic", states[i + 1], found, exact, 4)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(steps, shift):
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    s = torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]).double().numpy()
    sampler = Sampler("flow_heun", schedule=RectifiedFlow(), prediction="flow")
    states, outs, seen = record(sampler, flow_grid(torch.from_numpy(s)))
    assert seen == pytest.approx(list(map(float, theirs.timesteps)), rel=1e-6)
    for i, t in enumerate(theirs.timesteps):
        found = theirs.step(outs[i], t, states[i]).prev_sample
        step, second = divmod(i, 2)
        x, v = states[i - second].double(), outs[i - second].double()
        slope = (v + outs[i].double()) / 2 if second else v
        judge("flow_heun", states[i + 1], found, x + (s[step + 1] - s[step]) * slope)


# ---------------------------------------------------------------- tables of betas


def test_beta_tables():
    for ours, theirs in [
        (DiscreteVP.linear(), diffusers.DDPMScheduler()),
        (DiscreteVP.scaled_linear(), diffusers.DDPMScheduler(**SCALED)),
        (DiscreteVP.cosine(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    ]:
        assert np.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4)  # theirs is a product in float32


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 999, 1000])
def test_spacings(spacing, steps):
    for ours, kind in [(spacing, diffusers.DDIMScheduler), (f"dpm_{spacing}", diffusers.DPMSolverMultistepScheduler)]:
        if ours not in DiscreteVP.spacings or (steps == 1000 and ours == "dpm_leading"):
            continue
        theirs = kind(timestep_spacing=spacing)
        if steps > 500 and ours == "dpm_linspace":
            continue  # 1001 rounded points of 1000 timesteps repeat one: theirs drops it, ours refuses
        theirs.set_timesteps(steps)
        assert list(DiscreteVP.linear().grid(steps, ours).time[:-1]) == theirs.timesteps.tolist()
