"""Step parity with diffusers, and with its formulas in float64.

Our loop runs on the other's own noise levels with random raw model outputs. Every state that it reaches is fed to the other's
`step` with the same output, so that errors don't accumulate; then both are held against the textbook formula in float64 on
the same float32 inputs, written here a second time.
"""

import math

import numpy as np
import pytest
import torch

from diffkernels.sampling import DiscreteVP, Grid, RectifiedFlow, Sampler

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 16, 16)
STEPS = (1, 4, 20, 50)
NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORST: dict[str, tuple[float, ...]] = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are tiny: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
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


def record(sampler, grid, seed=None):
    """(states [n + 1], outputs [n], times [n]), an entry an evaluation, of our loop in float32."""
    tape = Tape()
    end = sampler(tape, torch.randn(SHAPE, generator=generator(3)), steps=grid, generator=generator(seed) if seed else None)
    return [*tape.states, end], tape.outs, tape.times


def judge(what, ours, theirs, exact):
    """Ours is within 2e-6 of max|out| of float64, and no farther from it than theirs, an ulp of max|out| aside.

    Theirs may then be 2e-6 from ours, or as far as it is itself from float64: its float32 coefficients cost it up to 4e-6.
    """
    ours, theirs = ours.double(), theirs.double()
    top = float(exact.abs().max())
    gap, mine, yours = (float((a - b).abs().max()) / top for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
    WORST[what] = tuple(map(max, WORST.get(what, (0.0, 0.0, 0.0)), (gap, mine, yours)))
    ulp = 2.0 ** (math.floor(math.log2(top)) - 23) / top
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
    states, outs, _ = record(sampler, grid, seed=7)
    random = generator(7)
    bar = np.append(grid.alpha**2, 1.0)
    for i, t in enumerate(theirs.timesteps):
        last = i == steps - 1
        noise = torch.zeros(SHAPE) if last else torch.randn(SHAPE, generator=random) if eta else None
        found = theirs.step(
            outs[i],
            int(t),
            states[i],
            eta=eta,
            variance_noise=noise if eta else None,
            use_clipped_model_output=clip is not None,
        ).prev_sample
        # arXiv 2010.02502, eq. 12 and 16
        a, b = bar[i], bar[i + 1]
        x0 = x0_of(prediction, outs[i], states[i], math.sqrt(a), math.sqrt(1 - a))
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        eps = (states[i].double() - math.sqrt(a) * x0) / math.sqrt(1 - a)
        std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        exact = math.sqrt(b) * x0 + math.sqrt(max(1 - b - std**2, 0)) * eps + (std * noise.double() if eta else 0)
        judge(f"ddim eta={eta:g}", states[i + 1], found, exact)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(steps, prediction, variance):
    theirs = diffusers.DDPMScheduler(
        prediction_type=prediction, clip_sample=False, variance_type=variance, timestep_spacing="trailing"
    )
    theirs.set_timesteps(steps)
    grid = vp_grid(theirs.alphas_cumprod, theirs.timesteps)
    assert list(grid.time) == list(DiscreteVP.linear().grid(steps, "trailing").time)
    sampler = Sampler("ddpm", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], variance=variance)
    states, outs, _ = record(sampler, grid, seed=7)
    random, again = generator(7), generator(7)
    bar = grid.alpha**2
    for i, t in enumerate(theirs.timesteps):
        if i == steps - 1:
            # theirs still draws here, as t > 0 with this spacing, of a variance clamped up from 0 to 1e-20
            random = torch.Generator().manual_seed(7)
        found = theirs.step(outs[i], int(t), states[i], generator=random).prev_sample
        # arXiv 2006.11239, eq. 7
        a, b = bar[i], bar[i + 1]
        beta = 1 - a / b
        x0 = x0_of(prediction, outs[i], states[i], math.sqrt(a), math.sqrt(1 - a))
        exact = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * states[i].double()
        if i < steps - 1:
            std = math.sqrt(beta * ((1 - b) / (1 - a) if variance == "fixed_small" else 1.0))
            exact = exact + std * torch.randn(SHAPE, generator=again).double()
        elif variance == "fixed_large":
            continue  # theirs adds noise of the whole beta to the final sample; ours does not
        judge(f"ddpm {variance}", states[i + 1], found, exact)


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
    s, plan = grid.sigma, sampler.evaluations(grid)
    start, slope = states[0].double(), None
    for i, e in enumerate(plan):
        theirs.scale_model_input(states[i], theirs.timesteps[i])
        found = theirs.step(outs[i], theirs.timesteps[i], states[i]).prev_sample
        # arXiv 2206.00364, Algorithm 1
        d = (states[i].double() - x0_of(prediction, outs[i], states[i], 1.0, s[e.level])) / s[e.level]
        dt = s[e.step + 1] - s[e.step]
        if e.level == e.step:
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
    for e, (a, b) in zip(
        Sampler(name, schedule=DiscreteVP.linear()).evaluations(grid), zip(*[t.states for t in tape], strict=True), strict=True
    ):
        assert torch.allclose(a, b / math.sqrt(1 + float(sigmas[e.level]) ** 2), rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- DPM-Solver++


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order, kind", [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp(steps, order, kind, prediction, karras):
    theirs = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction,
        solver_order=order,
        solver_type=kind,
        final_sigmas_type="zero",
        use_karras_sigmas=karras,
        **SCALED,
    )
    theirs.set_timesteps(steps)
    grid = sigma_grid(theirs.sigmas, theirs.timesteps.numpy(), vp=True)
    if not karras:
        assert list(grid.time) == list(DiscreteVP.scaled_linear().grid(steps, "dpm_linspace").time)
    options = {"kind": kind} if order == 2 else {}
    sampler = Sampler(
        f"dpmpp_{order}{'m' if order == 2 else ''}", schedule=DiscreteVP.linear(), prediction=NAMES[prediction], **options
    )
    states, outs, _ = record(sampler, grid)
    m = []
    for i, e in enumerate(sampler.evaluations(grid)):
        found = theirs.step(outs[i], theirs.timesteps[i], states[i]).prev_sample
        # arXiv 2211.01095, eq. 9 and Algorithm 2
        m.append(x0_of(prediction, outs[i], states[i], grid.alpha[i], grid.sigma[i]))
        if grid.sigma[i + 1] == 0:
            exact = m[i]
        else:
            lam = grid.lam
            h = lam[i + 1] - lam[i]
            alpha, phi = grid.alpha[i + 1], math.expm1(-h)
            exact = grid.sigma[i + 1] / grid.sigma[i] * states[i].double() - alpha * phi * m[i]
            if e.state.history:
                d1 = (m[i] - m[i - 1]) * h / (lam[i] - lam[i - 1])
                exact = exact + (-alpha * phi / 2 * d1 if kind == "midpoint" else alpha * (phi / h + 1) * d1)
        assert bool(e.state.history) == (order == 2 and 0 < i < steps - 1)
        judge(f"dpmpp_{order} {kind}", states[i + 1], found, exact)


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
