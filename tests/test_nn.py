"""The modules between the ops and the models: time-dependent and adaptive norms, stacked parameters, split concatenations."""

import copy
import gc
import os
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffkernels as dk
from diffkernels import _ladder
from diffkernels.nn import (
    AdaLayerNorm,
    AdaLayerNormContinuous,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    RMSNorm,
    ScheduledTimes,
    Stack,
    StackedLinear,
    TimeDependentLayerNorm,
    TimeDependentParameter,
    TimeDependentRMSNorm,
    TimeTable,
    concat_linear,
    concat_norm_linear,
)

GOLDEN = Path(os.environ.get("DIFFKERNELS_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
NORMS = {"td_layer_norm": TimeDependentLayerNorm, "td_rms_norm": TimeDependentRMSNorm}
RUNGS = [None, "reference", "cpu", "avx2", "avx512"]  # None: whatever the ladder chooses


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def forced(rung: str | None, *ops: str):
    """The rung in force, or a skip that says which op it can't run here."""
    if rung is None:
        return nullcontext()
    for op in ops:
        if why := _ladder.missing(rung, op, "cpu"):
            pytest.skip(f"{op}: {why}")
    return dk.rung(rung)


def randomised(module: nn.Module, seed: int = 0, std: float = 0.5) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=draw)
    return module


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Time-dependent norms


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", NORMS)
def test_official_norms(name: str, rung: str | None) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is not there and DIFFKERNELS_GOLDEN names no other place")
    golden = load_file(path)
    norm = NORMS[name](60).double()
    norm.load_state_dict({k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}, strict=True)
    x, tau, y = golden["in.x"], golden["in.tau"], golden["out.y"]
    with torch.no_grad(), forced(rung, "norm_modulate", "td_params"):
        if rung in (None, "reference"):
            assert error(norm(x, tau), y) <= 1e-12
        assert error(norm.float()(x.float(), tau.float()), y) <= 1e-5


def moving(p: TimeDependentParameter, tau: Tensor) -> Tensor:
    """The paper's formula in float64, one row a time."""
    s = 1 / (1 + torch.exp(-(tau.double()[:, None] * (1 + p.nodecay_weight.double()) + p.nodecay_bias.double())))
    return s * p.param0.double() + (1 - s) * p.param1.double()


def plain_norm(norm: nn.Module, x: Tensor, tau: Tensor) -> Tensor:
    """The whole norm in float64; one row of parameters for all, or one a sample."""
    h = x.double()

    def rows(p: TimeDependentParameter) -> Tensor:
        v = moving(p, tau)
        return v.view(len(v), *(1,) * (x.ndim - 2), -1)

    if isinstance(norm, TimeDependentRMSNorm):
        return rows(norm.scale) * h / (h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5 + 1e-8)
    h = h - h.mean(-1, keepdim=True)
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * rows(norm.weight) + rows(norm.bias)


@pytest.mark.parametrize("dim", [48, 60, 480, 960, 38400, 66816])
@pytest.mark.parametrize("kind", [TimeDependentLayerNorm, TimeDependentRMSNorm])
def test_closed_form(kind: type, dim: int) -> None:
    norm = randomised(kind(dim))
    x = drawn(4, 3, dim)
    taus = torch.tensor([-1.0, -0.37, 0.0, 1.0])
    with torch.no_grad():
        for tau in (taus, *taus.split(1)):
            expected = plain_norm(norm, x, tau)
            assert error(norm(x, tau), expected) <= 1e-6
        assert not norm(torch.zeros_like(x[:1]), taus[:1]).isnan().any()
        whole = norm(x, taus)
        for i in range(4):  # shared and per sample agree
            assert error(norm(x[i : i + 1], taus[i : i + 1]), whole[i : i + 1]) <= 1e-7


def test_time_moves_the_norm() -> None:
    """As built, time changes nothing: param0 is param1. One drawn parameter, and it does."""
    norm, x, tau = TimeDependentRMSNorm(8), drawn(1, 8), torch.tensor([-1.0])
    torch.testing.assert_close(norm(x, tau), F.rms_norm(x, (8,), eps=0))
    assert torch.equal(norm(x, tau), norm(x, -tau))
    with torch.no_grad():
        norm.scale.param0.fill_(3.0)
    assert norm(x, tau).abs().sum() < norm(x, -tau).abs().sum()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = TimeDependentLayerNorm(5), TimeDependentRMSNorm(7)
        self.linear = nn.Linear(5, 7)
        self.times = TimeTable(self)

    def forward(self, x: Tensor, t: Tensor, time: Tensor | None = None) -> Tensor:
        table = self.time_table(t) if time is None else time
        return self.b(self.linear(self.a(x, table=table)), table=table)

    def time_table(self, t: Tensor) -> Tensor:
        return self.times(t.float() / 10)


def test_time_table_is_each_modules_own() -> None:
    model = randomised(Two())
    names, x, t = list(model.state_dict()), drawn(3, 2, 5), torch.tensor([1.0, -4.0, 7.0])
    assert model.times.width == 5 + 5 + 7
    own = model.b(model.linear(model.a(x, t / 10)), t / 10)
    torch.testing.assert_close(model(x, t), own)  # in grad mode: a concatenation
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), own)  # a buffer
        assert model.a.weight.param0.untyped_storage().nbytes() == 4 * model.times.width
        assert torch.equal(model.b.scale.of(model.times(t / 10)), model.b.scale(t / 10))
    assert list(model.state_dict()) == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_time_table_gradients() -> None:
    model, x, t = randomised(Two()).double(), drawn(3, 2, 5, dtype=torch.float64), torch.tensor([1.0, -4.0, 7.0])
    tau = t.double() / 10

    def gradients(out: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        out.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.time_table = lambda t: model.times(t.double() / 10)
    own = gradients(model.b(model.linear(model.a(x, tau)), tau))
    with torch.no_grad():
        model(x, t)  # parameters are views now
    table = gradients(model(x, t))
    for name, g in own.items():
        assert g.any() and error(table[name], g) <= 1e-12, name


def test_time_dependent_norms_refuse() -> None:
    model, x = Two(), drawn(2, 3, 5)
    with pytest.raises(ValueError, match="tau, table: expected one of them, got none"):
        model.a(x)
    with pytest.raises(ValueError, match="tau, table: expected one of them, got both"):
        model.a(x, torch.zeros(1), table=torch.zeros(1, 17))
    with pytest.raises(ValueError, match=r"table: expected shape \[T, 17\], got \[1, 16\]"):
        model.a(x, table=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="belongs to no TimeTable"):
        TimeDependentRMSNorm(5)(x, table=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="weight: expected shape"):
        model.a(x, torch.zeros(3))  # three times for two samples
    with pytest.raises(ValueError, match="module: expected time-dependent parameters in it, Linear has none"):
        TimeTable(nn.Linear(2, 2))


# A table for a schedule


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"):
            raise AssertionError(f"a host sync: {func}")
        return func(*args, **(kwargs or {}))


def test_scheduled_times() -> None:
    model = randomised(Two())
    x = drawn(3, 2, 5)
    schedule = [9, 4, 0, 7, 4]  # in any order, twice if need be
    with torch.no_grad():
        for times in (schedule, torch.tensor(schedule), torch.tensor(schedule).double()):
            scheduled = ScheduledTimes(model, times)
            for t in (torch.tensor([7, 0, 9]), torch.tensor([4.0, 9.0, 4.0]), torch.tensor([4]), torch.tensor(7)):
                assert torch.equal(scheduled(x, t), model(x, t.reshape(-1))), t
            rows = scheduled.rows(torch.tensor([4.0, 5.0, -1.0, 10.0, torch.nan, 4.0001, 9.0]))
            assert rows.isnan().all(1).tolist() == [False, True, True, True, True, True, False]
            assert not rows[0].isnan().any()
        close = torch.linspace(0, 1, 4096, dtype=torch.float64) ** 2  # a schedule in float64, called in float32
        rows = ScheduledTimes(model, close).rows(close.float())
        torch.testing.assert_close(rows, model.time_table(close))

        one = ScheduledTimes(model, schedule, shared=True)
        assert torch.equal(one.rows(torch.tensor([7, 7, 7])), model.time_table(torch.tensor([7])))
        assert one.rows(torch.tensor([7, 7, 9])).isnan().all()
        assert one.rows(torch.tensor([5, 5])).isnan().all()
    for times in ([], [[1.0]]):
        with pytest.raises(ValueError, match="times: expected "):
            ScheduledTimes(model, times)


def test_scheduled_times_do_not_wait_for_the_device() -> None:
    model = randomised(Two())
    with NoSync(), pytest.raises(AssertionError, match="a host sync"):
        bool(torch.ones(2).all())
    scheduled, shared = ScheduledTimes(model, [1, 2, 3]), ScheduledTimes(model, [1, 2, 3], shared=True)
    with torch.no_grad(), NoSync():
        for made in (scheduled, shared):
            assert made(drawn(2, 2, 5), torch.tensor([2, 2])).shape == (2, 2, 7)


# The Linear of a concatenation


def split_case(seed: int, per_sample: bool, dtype: torch.dtype = torch.float64, offset: float = 0.0):
    """Slices of several widths, the first of them strided; gamma, beta, weight, bias; all leaves."""
    sizes, out, rows = (6, 17, 9), 11, (3,) if per_sample else ()
    xs = [drawn(3, 5, d, seed=seed + i, dtype=dtype) + offset for i, d in enumerate(sizes)]
    xs[0] = drawn(3, 6, sizes[0], seed=seed, dtype=dtype)[:, 1:] + offset
    gamma, beta = 1 + 0.3 * drawn(*rows, 32, seed=11, dtype=dtype), drawn(*rows, 32, seed=12, dtype=dtype)
    return xs, gamma, beta, drawn(out, 32, seed=13, dtype=dtype) / 6, drawn(out, seed=14, dtype=dtype)


def whole(xs, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The same with a concatenation."""
    gamma, beta = (t.unsqueeze(1) if t.ndim == 2 else t for t in (gamma, beta))
    return F.linear(F.layer_norm(torch.cat(xs, -1), (weight.shape[1],), eps=eps) * gamma + beta, weight, bias)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_concat_norm_linear(per_sample: bool, rung: str | None) -> None:
    for offset in (0.0, 3.0):
        case = split_case(0, per_sample, torch.float32, offset)
        exact = whole([x.double() for x in case[0]], *(t.double() for t in case[1:]))
        with forced(rung, "slice_moments"):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    assert error(concat_norm_linear(*case), exact) <= 3e-6
            assert error(concat_norm_linear(*case[:-1], None) + case[-1], exact) <= 3e-6
    xs, gamma, *rest = case
    if not per_sample:
        assert torch.equal(concat_norm_linear(xs, gamma[None], rest[0][None], *rest[1:]), concat_norm_linear(*case))


@pytest.mark.parametrize("per_sample", [False, True])
def test_concat_norm_linear_gradients(per_sample: bool) -> None:
    xs, *rest = split_case(0, per_sample)
    leaves = [t.clone().requires_grad_() for t in (*xs, *rest)]
    grad = drawn(3, 5, 11, seed=20, dtype=torch.float64)
    ours = torch.autograd.grad(concat_norm_linear(leaves[:3], *leaves[3:]), leaves, grad)
    plain = torch.autograd.grad(whole(leaves[:3], *leaves[3:]), leaves, grad)
    for a, b in zip(ours, plain, strict=True):
        assert error(a, b) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_concat_norm_linear_in_half_precision(dtype: torch.dtype) -> None:
    """Forty slices, as DiMR-XL has them: the error stays that of the concatenation in the same dtype."""
    d, n, rms = 48, 40, lambda t: t.double().square().mean().sqrt()
    xs = [(drawn(2, 16, d, seed=i) + 0.5).to(dtype) for i in range(n)]
    gamma, beta = (1 + 0.2 * drawn(n * d, seed=50)).to(dtype), drawn(n * d, seed=51).to(dtype)
    weight, bias = (drawn(96, n * d, seed=52) / (n * d) ** 0.5).to(dtype), drawn(96, seed=53).to(dtype)
    exact = whole([x.double() for x in xs], *(t.double() for t in (gamma, beta, weight, bias)))
    with torch.no_grad():
        ours, plain = concat_norm_linear(xs, gamma, beta, weight, bias), whole(xs, gamma, beta, weight, bias)
    assert ours.dtype == dtype
    assert rms(ours - exact) <= 1.5 * rms(plain - exact)

    one, two = weight[:, : 2 * d].contiguous(), xs[:2]
    exact = F.linear(torch.cat(two, -1).double(), one.double(), bias.double())
    with torch.no_grad():
        assert rms(concat_linear(two, one, bias) - exact) <= 2 * rms(F.linear(torch.cat(two, -1), one, bias) - exact)


def test_concat_linear() -> None:
    xs, _, _, weight, bias = split_case(3, False)
    leaves = [t.clone().requires_grad_() for t in (*xs, weight, bias)]
    ours, plain = concat_linear(leaves[:3], *leaves[3:]), F.linear(torch.cat(leaves[:3], -1), *leaves[3:])
    assert error(ours, plain) <= 1e-14
    grad = drawn(3, 5, 11, seed=20, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(plain, leaves, grad), strict=True)
    assert all(error(a, b) <= 1e-13 for a, b in pairs)
    with torch.no_grad():
        assert error(concat_linear(iter(xs), weight), F.linear(torch.cat(xs, -1), weight)) <= 1e-14


def test_concat_under_autocast() -> None:
    case = split_case(0, True, torch.float32)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            assert error(concat_norm_linear(*case), whole(*case)) <= 0.02
            assert error(concat_linear(case[0], case[3]), F.linear(torch.cat(case[0], -1), case[3])) <= 0.02


def test_concat_refuses() -> None:
    xs, gamma, beta, weight, bias = split_case(0, False)
    for wrong, width in ((xs[:2], 23), (xs + xs[:1], 38)):
        with pytest.raises(ValueError, match=rf"xs: expected 32 channels in all, as weight has, got {width}"):
            concat_norm_linear(wrong, gamma, beta, weight, bias)
    with pytest.raises(ValueError, match="xs: expected 32 channels"):
        concat_linear(xs[:2], weight)
    with pytest.raises(ValueError, match=r"gamma: expected \[32\] or \[B, 32\]"):
        concat_norm_linear(xs, gamma[:-1], beta, weight, bias)
    with pytest.raises(ValueError, match=r"beta: expected \[32\] or \[B, 32\], both alike"):
        concat_norm_linear(xs, gamma, beta[None], weight, bias)


# Stacked parameters


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, n) for n in (3, 5, 2))
        self.stacked = StackedLinear()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.stacked(self.layers, x)


def shares(model: Three) -> bool:
    """Whether the weights lie in one storage that holds nothing else."""
    storages = {layer.weight.untyped_storage().data_ptr() for layer in model.layers}
    return len(storages) == 1 and model.layers[0].weight.untyped_storage().nbytes() == 4 * 10 * model.layers[0].weight.itemsize


def same(model: Three, x: Tensor) -> None:
    for got, layer in zip(model(x), model.layers, strict=True):
        torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias))


def test_stack_is_the_parameters() -> None:
    model, x = Three(), drawn(6, 4)
    before, objects = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    same(model, x)
    assert not shares(model)  # in grad mode nothing is laid
    old = weakref.ref(model.layers[1].weight.untyped_storage())
    with torch.no_grad():
        same(model, x)
        pointers = [p.data_ptr() for p in objects]
        same(model, x)
    assert shares(model) and pointers == [p.data_ptr() for p in objects]
    gc.collect()
    assert old() is None or old().nbytes() == 4 * 40
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert all(type(p) is nn.Parameter and p.is_leaf and p.requires_grad for p in objects)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[k], v) for k, v in before.items())
    assert not any(isinstance(v, Tensor) for stack in vars(model.stacked).values() for v in vars(stack).values())


def test_stack_follows_training() -> None:
    model, plain, x = Three(), Three(), drawn(6, 4)
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(3):
        with torch.inference_mode():  # the buffer must not be an inference tensor, or the next lines would raise
            same(model, x)
        assert shares(model)
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            outs = m(x) if m is model else [layer(x) for layer in m.layers]
            sum(out.square().sum() for out in outs).backward()
            optimizer.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) and torch.equal(p, q)


@torch.no_grad()
def test_stack_is_laid_anew() -> None:
    x = drawn(6, 4)

    def laid() -> Three:
        model = Three()
        model(x)
        assert shares(model)
        return model

    model = laid().double()
    assert not shares(model)
    same(model, x.double())
    assert shares(model)

    model = laid()
    twin = copy.deepcopy(model)
    twin.layers[0].weight.fill_(7.0)
    same(twin, x)
    same(model, x)
    assert shares(twin) and shares(model)
    assert model.layers[0].weight.data_ptr() != twin.layers[0].weight.data_ptr()
    assert not (model.layers[0].weight == 7).any()

    model.load_state_dict(Three().state_dict(), assign=True)
    assert not shares(model)
    same(model, x)
    assert shares(model)

    model.load_state_dict(Three().state_dict())  # in place: the buffer stays
    assert shares(model)
    same(model, x)

    model.layers[1] = nn.Linear(4, 5)
    same(model, x)
    assert shares(model)
    model.layers[1].weight = nn.Parameter(drawn(5, 4))
    same(model, x)
    assert shares(model)
    model.layers[2].weight.data = drawn(2, 4)
    same(model, x)
    assert shares(model)


@torch.no_grad()
def test_stack_gives_way() -> None:
    """Where layers are not plain they are called one by one, and nothing is laid."""
    x = drawn(6, 4)

    def untouched(model: Three, factor: float = 1.0, input: Tensor = x) -> None:
        expected = F.linear(x, *model.layers[1].parameters()) * factor
        assert error(model(input)[1], expected) <= 0.02
        assert not shares(model)

    model = Three()
    model.layers[1].register_forward_hook(lambda module, args, out: 3 * out)
    untouched(model, 3.0)
    model = Three()
    torch.nn.utils.parametrizations.weight_norm(model.layers[1])
    assert torch.equal(model(x)[1], model.layers[1](x)) and not shares(model)
    model = Three()
    with torch.autocast("cpu", torch.bfloat16):
        untouched(model)
        assert model(x)[0].dtype == torch.bfloat16
    model = Three()
    called = torch.func.functional_call(model, {"layers.1.weight": torch.ones(5, 4)}, (x,))
    torch.testing.assert_close(called[1], F.linear(x, torch.ones(5, 4), model.layers[1].bias))
    with torch.inference_mode():
        model = Three()
        untouched(model)

    stack, p, q = Stack(), nn.Parameter(drawn(3)), nn.Parameter(drawn(2))
    assert stack([p, p]) is None and stack([p, drawn(2)]) is None
    assert stack([p, nn.Parameter(drawn(2).double())]) is None
    assert stack([nn.Parameter(torch.empty(3, device="meta")), nn.Parameter(torch.empty(2, device="meta"))]) is None
    assert torch.equal(stack.flat([p, drawn(2)]), torch.cat([p, drawn(2)]))
    with torch.enable_grad():
        assert stack([p, q]) is None
        flat = stack.flat([p, q])
        assert flat.requires_grad
    assert torch.equal(stack([p, q]), flat)
    with torch.enable_grad():
        assert stack([p.requires_grad_(False), q.requires_grad_(False)]) is not None  # frozen


@torch.no_grad()
def test_stack_is_not_fooled_by_neighbours() -> None:
    """Addresses that follow each other are not enough: the storage must hold them all."""
    memory = drawn(5)
    p, q = nn.Parameter(memory[:3]), nn.Parameter(memory[3:])
    stack = Stack()
    assert torch.equal(stack([p, q]), memory) and p.data_ptr() == memory.data_ptr()  # laid by someone else: kept
    own = torch.empty(0).set_(memory.untyped_storage()[:12], 0, (3,))
    p.data = own
    assert torch.equal(stack([p, q]), memory)
    assert p.data_ptr() != memory.data_ptr()


# Adaptive norms


def layer(x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


@torch.no_grad()
def test_adaptive_norms() -> None:
    x, c = drawn(3, 5, 8), drawn(3, 6, seed=1)
    norm = randomised(AdaLayerNorm(8, 6))
    shift, scale = norm[1](F.silu(c)).unsqueeze(1).chunk(2, -1)
    assert error(norm(x, c), layer(x) * (1 + scale) + shift) <= 1e-6
    assert {k: list(v.shape) for k, v in norm.state_dict().items()} == {"1.weight": [16, 6], "1.bias": [16]}

    zero = AdaLayerNormZero(8, 6)
    h, gate, *_ = zero(x, c)
    assert error(h, layer(x)) <= 1e-6 and not gate.any()
    parts = randomised(zero)[1](F.silu(c)).chunk(6, -1)
    h, *rest = zero(x, c)
    assert error(h, layer(x) * (1 + parts[1].unsqueeze(1)) + parts[0].unsqueeze(1)) <= 1e-6
    assert all(torch.equal(a, b) and a._is_view() for a, b in zip(rest, parts[2:], strict=True))
    assert list(zero.state_dict()) == ["1.weight", "1.bias"]

    single, t = randomised(AdaLayerNormSingle(8)), drawn(3, 8, seed=2)
    table, last = drawn(6, 8, seed=3), drawn(2, 8, seed=4)
    t0 = single(t)
    assert error(t0.flatten(1), single[1](F.silu(t))) <= 1e-6 and t0.shape == (3, 6, 8)
    for i, m in enumerate(single.modulation(table, t0)):
        assert torch.equal(m, table[i] + t0[:, i])
    for i, m in enumerate(single.modulation(last, t)):
        assert torch.equal(m, last[i] + t)
    with pytest.raises(ValueError, match=r"t: expected \[B, 2, 8\] or \[B, 8\], got \[3, 6, 8\]"):
        single.modulation(last, t0)


@torch.no_grad()
def test_continuous_and_rms() -> None:
    x, c = drawn(3, 5, 8), drawn(3, 6, seed=1)
    for affine in (True, False):
        norm = randomised(AdaLayerNormContinuous(8, 6, elementwise_affine=affine))
        scale, shift = norm.linear(F.silu(c)).unsqueeze(1).chunk(2, -1)
        assert error(norm(x, c), norm.norm(x) * (1 + scale) + shift) <= 1e-6
        assert ("norm.weight" in norm.state_dict()) == affine
    norm = randomised(AdaLayerNormContinuous(8, 6, norm_type="rms_norm", eps=1e-6))
    scale, shift = norm.linear(F.silu(c)).unsqueeze(1).chunk(2, -1)
    assert error(norm(x, c), F.rms_norm(x, (8,), norm.norm.weight, 1e-6) * (1 + scale) + shift) <= 1e-6
    with pytest.raises(ValueError, match="norm_type: expected 'layer_norm' or 'rms_norm', got 'batch'"):
        AdaLayerNormContinuous(8, 6, norm_type="batch")
    rms = randomised(RMSNorm(8, eps=1e-2))
    assert error(rms(x), F.rms_norm(x, (8,), rms.weight, 1e-2)) <= 1e-6
    assert not RMSNorm(8, elementwise_affine=False).state_dict()
