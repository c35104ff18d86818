"""Every op × case × dtype × rung, each case and dtype in every layout, from the declarations alone: nothing here names an op.

The oracle is the op's own body in float64 on the inputs as they are (already rounded). A kernel may be as wrong as the
body is in its own dtype, plus 2 ulp of the largest result.
"""

from __future__ import annotations

import importlib.util
import mmap
from functools import cache, lru_cache
from typing import NamedTuple

import pytest
import torch
from conftest import NOT_RUN
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels._case import Draw
from diffkernels._ladder import RUNGS, interpreting, missing
from diffkernels._op import OPS
from diffkernels.bench import fuzz, layouts, oracle

DTYPES = fuzz.DTYPES
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
leaves = pytree.tree_leaves
ROOMY = 200_000  # elements above which a case runs as drawn only


class Strided(Draw):
    lay = staticmethod(layouts.strided)


class Transposed(Draw):
    lay = staticmethod(layouts.transposed)


class Misaligned(Draw):
    lay = staticmethod(layouts.misaligned)


class Far(Draw):
    """Samples so far apart that the last begins beyond 2^31 elements, in memory of which next to nothing is touched.

    As much lies before the first: an offset that wraps reads something wrong there, and the process lives to say so.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        size, self.used = 2**34 + 2**24, 2**33
        try:
            if self.device == "cpu":
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
                self.memory = torch.frombuffer(memory, dtype=torch.uint8)
            else:
                self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except (OSError, RuntimeError) as e:
            pytest.skip(f"no room for 16 GiB of addresses: {e}")

    def lay(self, t: Tensor) -> Tensor:
        if t.ndim < 2 or t.shape[0] < 2 or t.numel() == 0:
            return t
        step = 2**31 // (t.shape[0] - 1) + 1
        room = self.memory[self.used : self.used + 2**33 + 2**20].view(t.dtype)
        self.used += (t.numel() * t.element_size() // 4096 + 2) * 4096
        return room.as_strided(t.shape, (step, *t[0].contiguous().stride()), room.storage_offset()).copy_(t)


class Zeros(Draw):
    def values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


class LargeMean(Draw):
    def values(self, shape: tuple[int, ...]) -> Tensor:
        return (100 if self.dtype is torch.float16 else 1e4) + super().values(shape)  # float16 ends at 65504


class Integers(Draw):
    """-1, 0 and 1."""

    def values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-1, 2, shape, generator=self.generator).float()


LAYOUTS = {
    "drawn": Draw,
    "strided": Strided,
    "transposed": Transposed,
    "misaligned": Misaligned,
    "zeros": Zeros,
    "large-mean": LargeMean,
}


def cases(op) -> list:
    """The cases that tests run."""
    return [case for case in op.cases if case.model is None]


@cache
def richest(op):
    """Of them, the one with the most tensors."""
    return max(cases(op), key=lambda c: sum(isinstance(t, Tensor) for t in leaves(op.bind((), c.args(Draw(torch.float32))))))


def interpreted(rung: str) -> bool:
    return rung == "triton" and interpreting()


def rungs(op: str, device: str) -> list[str]:
    """The rungs that can run here; what can't is noted with its reason."""
    here = []
    for rung in RUNGS:
        why = missing(rung, op, device)
        if why is None:
            here.append(rung)
        elif "does not run on" not in why:
            NOT_RUN[f"{device}/{rung}"] = why
    if device == "cpu" and "cuda" not in DEVICES:
        NOT_RUN.update({f"cuda/{rung}": missing(rung, op, "cuda") or "" for rung in ("sm90", "cuda", "triton")})
    return here


def chosen(config) -> list:
    """The ops, by name, whose kernels are called."""
    return [(name, OPS[name]) for name in config.getoption("--op") or OPS]


def every_kernel(config) -> list:
    """What the other tests of a rung call: every case; the interpreter, a millisecond a program, the first and the richest."""
    full = config.getoption("--full")
    return [
        pytest.param(op, case, device, rung, id=f"{name}-{case.name}-{device}-{rung}")
        for name, op in chosen(config)
        for case in cases(op)
        for device in DEVICES
        for rung in rungs(name, device)
        if full or not interpreted(rung) or case in (cases(op)[0], richest(op))
    ]


def paired(op, case, rung: str, dtype: str, layout: str) -> bool:
    """Whether a call is made without --full. As drawn, every case is, in every dtype.

    What a layout breaks is loads and addresses, which follow from the case's operands or the dtype: pairs show it, so a case
    meets each layout in one dtype, and the next case in the next. The interpreter, a millisecond a program, loads all of them
    alike: the richest case is enough, and of a case as drawn one dtype.
    """
    if interpreted(rung) and case is richest(op):
        return layout == "drawn" or dtype == "f32"
    if layout == "drawn" and not interpreted(rung):
        return True
    if interpreted(rung) and layout != "drawn":
        return False
    turn = cases(op).index(case) + list(LAYOUTS).index(layout)
    return turn % len(DTYPES) == list(DTYPES).index(dtype)


def every_call(config) -> list:
    """What test_kernel calls, the rungs of a call one after another: they share what `expected` keeps."""
    full = config.getoption("--full")
    return [
        pytest.param(op, case, device, rung, dtype, layout, id=f"{name}-{case.name}-{device}-{rung}-{dtype}-{layout}")
        for name, op in chosen(config)
        for case in cases(op)
        for dtype in DTYPES
        for layout in LAYOUTS
        for device in DEVICES
        for rung in rungs(name, device)
        if full or paired(op, case, rung, dtype, layout)
    ]


def pytest_generate_tests(metafunc) -> None:
    """What isn't called without --full isn't collected either."""
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize(("op", "case", "device", "rung", "dtype", "layout"), every_call(metafunc.config))
    elif "rung" in metafunc.fixturenames:
        metafunc.parametrize(("op", "case", "device", "rung"), every_kernel(metafunc.config))
    elif "dtype" in metafunc.fixturenames:
        metafunc.parametrize(("op", "case", "dtype"), every_gradient(metafunc.config.getoption("--full")))


EXPECTED = {(op, device, rung) for op in OPS for device in DEVICES for rung in rungs(op, device)}
RAN: set[tuple[str, str, str]] = set()


def size(args) -> int:
    return sum(t.numel() for t in leaves(args) if isinstance(t, Tensor))


@cache
def big(op, case, roomy: int = ROOMY) -> bool:
    return size(op.bind((), case.args(Draw(torch.float32)))) > roomy


class Expected(NamedTuple):
    args: tuple
    exact: list[Tensor]
    reference: list[Tensor]


@lru_cache(maxsize=1)  # the rungs of a case come one after another
def expected(op, case, dtype: torch.dtype, layout: type[Draw], device: str) -> Expected:
    args = op.bind((), case.args(layout(dtype, device)))
    return Expected(args, oracle.exact(op, args), oracle.results(op, op.reference, args))


class Guarded:
    """An allocator whose outputs are NaN, between guard bands that must survive."""

    def __init__(self, op, monkeypatch) -> None:
        self.allocate, self.buffers = op.allocate, []
        monkeypatch.setattr(op, "allocate", self)

    def __call__(self, *args):
        return pytree.tree_map(self.guard, self.allocate(*args))

    def guard(self, t: Tensor) -> Tensor:
        assert t.is_contiguous(), "what the allocator gives, kernels refuse"
        inner, buffer = fuzz.guarded(t)
        self.buffers.append(buffer)
        return inner

    def intact(self) -> bool:
        return all(map(fuzz.intact, self.buffers))


def test_kernel(op, case, device, rung, dtype, layout, monkeypatch) -> None:
    if big(op, case) and layout not in ("drawn", "large-mean"):
        pytest.skip("a big case runs as drawn")
    args, exact, reference = expected(op, case, DTYPES[dtype], LAYOUTS[layout], device)
    guarded, given = Guarded(op, monkeypatch), fuzz.bits([t for t in leaves(args) if isinstance(t, Tensor)])
    with dk.rung(rung), torch.no_grad():
        got = oracle.results(op, op.call, args)
    assert guarded.intact(), "wrote outside of its outputs"
    after = fuzz.bits([t for t in leaves(args) if isinstance(t, Tensor)])
    assert all(map(torch.equal, given, after)), "wrote to an input"
    assert len(got) == len(exact) and all(g.is_contiguous() for g in got[: len(got) - len(op.writes)])
    own = oracle.own_error(exact, reference) if op.c > 1 and layout == "drawn" else 0.0  # a gradient's
    truncates = interpreted(rung) and DTYPES[dtype] is torch.bfloat16  # the interpreter; a GPU rounds
    for g, e, r in zip(got, exact, reference, strict=True):
        lost = e.numel() and not (r.double() - e).abs().max() <= 0.1 * e.abs().nan_to_num(0, 0).max()
        if layout == "large-mean" and lost:
            continue  # all cancelled: the definition itself has no digit left to compare with
        enough = op.c == 1 or e.numel() >= 64  # of few sums the definition's own error may be small by luck
        oracle.compare(g, e, r, c=op.c, own=own, rms=layout not in ("zeros", "large-mean") and not truncates and enough)
    RAN.add((op.name, device, rung))


def test_small_integers_are_exact_where_the_definition_is(op, case, device, rung) -> None:
    args, exact, _ = expected(op, case, torch.float32, Integers, device)
    # A solver step's results; none of a norm's but its zeros; 63.5 is a code's tie.
    whole = [e.numel() > 0 and e.dtype.is_floating_point and bool((e == e.round()).all()) for e in exact]
    if not any(whole):
        pytest.skip("no result is whole")
    with dk.rung(rung), torch.no_grad():
        got = oracle.results(op, op.call, args)
    assert all(torch.equal(g.double(), e) for g, e, w in zip(got, exact, whole, strict=True) if w)


def test_nan_and_infinity_stay_in_their_sample(op, case, device, rung) -> None:
    clean = op.bind((), case.args(Draw(torch.float32, device)))
    names = [name for name, _ in op.params]
    if "x" not in names or not clean[names.index("x")].is_floating_point():
        pytest.skip("no sample")
    x = clean[names.index("x")]
    if x.ndim < 2 or x.shape[0] < 2 or x.numel() == 0:
        pytest.skip("one sample")
    dirty = list(clean)
    dirty[names.index("x")] = x = x.clone()
    x[(0,) * x.ndim] = torch.nan
    with dk.rung(rung), torch.no_grad():
        before, after = oracle.results(op, op.call, clean), oracle.results(op, op.call, dirty)
    for b, a, r in zip(before, after, oracle.results(op, op.reference, dirty), strict=True):
        if a.shape[: x.ndim - 1] == x.shape[:-1]:  # the gradient of a shared operand is everybody's
            assert torch.equal(b[1:], a[1:]) and torch.equal(a[0].isnan(), r[0].isnan())
    x[(0,) * x.ndim] = torch.inf
    exact = oracle.results(op, op.reference, dirty)
    with dk.rung(rung), torch.no_grad():
        for g, e in zip(oracle.results(op, op.call, dirty), exact, strict=True):
            assert torch.equal(g.isfinite(), e.isfinite())


def test_two_runs_are_bit_equal(op, case, device, rung) -> None:
    if interpreted(rung):
        pytest.skip("interpreted, a millisecond a program: test_verify.py runs each of its calls twice")
    args = op.bind((), case.args(Draw(torch.bfloat16, device)))
    with dk.rung(rung), torch.no_grad():
        first, second = oracle.results(op, op.call, args), oracle.results(op, op.call, args)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(*fuzz.bits([a, b]))


def test_offsets_are_of_64_bits(op, case, device, rung) -> None:
    if big(op, case, 20_000):
        pytest.skip("a small case has offsets as large")
    args, exact, reference = expected(op, case, torch.float32, Far, device)
    if not any(isinstance(t, Tensor) and t.ndim > 1 and t.shape[0] > 1 and t.stride(0) > 2**24 for t in leaves(args)):
        pytest.skip("one sample")
    with dk.rung(rung), torch.no_grad():
        for g, e, r in zip(oracle.results(op, op.call, args), exact, reference, strict=True):
            oracle.compare(g, e, r, c=op.c, rms=False, own=oracle.own_error(exact, reference) if op.c > 1 else 0.0)


def test_any_number_of_threads_gives_the_same_bits(op, case, device, rung, monkeypatch) -> None:
    if device != "cpu" or rung in ("triton", "reference"):
        pytest.skip("threads are the CPU rungs'")
    args = op.bind((), case.args(Draw(torch.float32)))
    Guarded(op, monkeypatch)  # what no thread has written is NaN
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with dk.rung(rung), torch.no_grad():
                found.append(oracle.results(op, op.call, args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(*fuzz.bits([a, b]))


def test_every_usable_rung_ran(request) -> None:
    """What `diffkernels info` calls usable was run above, or this fails."""
    collected = {i.callspec.id for i in request.session.items if i.originalname == "test_kernel"}
    if request.config.getoption("--op") or len(collected) < len(every_call(request.config)):
        pytest.skip("only a part of the suite was selected")
    assert EXPECTED <= RAN, f"usable, but never run: {sorted(EXPECTED - RAN)}"


@pytest.mark.skipif(not (importlib.util.find_spec("triton") and interpreting()), reason="Triton is not interpreted")
def test_what_is_interpreted_is_usable() -> None:
    assert all("triton" in rungs(op, "cpu") for op in OPS if dk._ladder.kernel("triton", op))


def every_case() -> list:
    return [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in cases(op)]


def differentiable() -> list:
    return [p for p in every_case() if p.values[0].differentiable]


def every_gradient(full: bool) -> list:
    """What test_gradient takes: every case × dtype of an op with its own gradient; of the body's, which is PyTorch's, a case
    in one dtype and the next case in the next."""
    return [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{dtype}")
        for op, case in (p.values for p in differentiable())
        for i, dtype in enumerate(DTYPES)
        if full or op.gradient.own is not None or cases(op).index(case) % len(DTYPES) == i
    ]


def requiring_grad(args) -> tuple:
    def leaf(t):
        return t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t

    return pytree.tree_map(leaf, args)


def gradients(outputs, inputs, weights) -> list[Tensor]:
    loss = sum((o * w.to(o)).sum() for o, w in zip(leaves(outputs), weights, strict=True))
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def test_gradient(op, case, dtype) -> None:
    """Every input's gradient, through the registered op, against the body's in float64."""
    args = requiring_grad(op.bind((), case.args(Draw(DTYPES[dtype]))))
    if size(args) > ROOMY:
        pytest.skip("a big case runs forward only")
    wide = requiring_grad(oracle.widened(args))
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in oracle.results(op, op.call, args)]

    def inputs(a):
        return [t for t in pytree.tree_leaves(a) if isinstance(t, Tensor) and t.requires_grad]

    got = gradients(op.call(*args), inputs(args), weights)
    exact = gradients(op.body(*wide), inputs(wide), weights)
    own = gradients(op.body(*args), inputs(args), weights)
    for g, e, o in zip(got, exact, own, strict=True):
        oracle.compare(g, e, o, c=3.0, rms=False, own=oracle.own_error(exact, own))


@pytest.mark.parametrize(("op", "case"), differentiable())
def test_gradcheck(op, case) -> None:
    args = op.bind((), case.args(Draw(torch.float64)))
    if size(args) > 2000 or size(args) == 0:
        pytest.skip("finite differences of a small case only")
    args = pytree.tree_map(
        lambda a: a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a, args
    )
    flat, spec = pytree.tree_flatten(args)
    where = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.requires_grad and a.isfinite().all()]

    def call(*tensors):
        full = list(flat)
        for i, t in zip(where, tensors, strict=True):
            full[i] = t
        outs = leaves(op.call(*pytree.tree_unflatten(full, spec)))
        return tuple(torch.where(o.isinf(), 0, o) for o in outs)  # an infinity has no slope

    torch.autograd.gradcheck(call, [flat[i] for i in where], fast_mode=True)
    torch.autograd.gradgradcheck(call, [flat[i] for i in where], fast_mode=True, atol=1e-4)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("op", "case"), every_case())
def test_opcheck(op, case, request) -> None:
    args = op.bind((), case.args(Draw(torch.float32)))
    if size(args) > ROOMY:
        pytest.skip("a small case says the same")
    # Tracing, seconds a case, and the way through autograd see only whether an argument is there: the richest case shows it,
    # and the first one is compiled below.
    traced = request.config.getoption("--full") or case is richest(op)
    both = (*CHECKS, "test_aot_dispatch_dynamic")
    torch.library.opcheck(op._overload, args, test_utils=both if traced and not op.differentiable else CHECKS)
    if op.differentiable and traced:
        torch.library.opcheck(op._overload, requiring_grad(args), test_utils=both)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_compile_fullgraph_with_dynamic_shapes(op) -> None:
    """Forward and backward; more rows don't compile again."""
    torch._dynamo.reset()
    case = next(c for c in op.cases if c.model is None)

    class Longer(Draw):
        def values(self, shape):
            return super().values((*shape[:1], shape[1] + 3, *shape[2:]) if len(shape) == 3 and self.longer else shape)

    def args(longer: bool):
        draw = Longer(torch.float32)
        draw.longer = longer and op.name == "norm_modulate"
        given = op.bind((), case.args(draw))
        return requiring_grad(given) if op.differentiable else given

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: [o * 2 for o in leaves(op.call(*a))], fullgraph=True, dynamic=True, backend=frames)
    compiled_once = 0
    for longer in (False, True):
        a, b = args(longer), args(longer)
        out, expected = compiled(*a), [o * 2 for o in leaves(op.call(*b))]
        for o, e in zip(out, expected, strict=True):
            torch.testing.assert_close(o, e)
        for results in (out, expected) if op.differentiable else ():
            sum(o.sum() for o in results).backward()
        for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
            if isinstance(x, Tensor) and x.requires_grad and x.grad is not None:
                torch.testing.assert_close(x.grad, y.grad, equal_nan=True)
        compiled_once = compiled_once or frames.frame_count
    assert frames.frame_count == compiled_once, "more rows compiled again"
