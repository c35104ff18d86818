"""What holds for every op over many calls, in threads and forks, and at the edges of memory; from the declarations alone.

Rungs here are the CPU's: Triton's interpreter is too slow to repeat.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import logging
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels import _C, _ladder, _op
from diffkernels._case import Case, Draw
from diffkernels._op import OPS, Op
from diffkernels.bench import layouts, oracle

ROOMY = 20_000  # elements above which a case is not repeated
HALF = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
RUNGS = [rung for rung in _ladder.LADDER["cpu"] if any(not _ladder.missing(rung, op, "cpu") for op in OPS)]
NATIVE = {(rung, op): kernel for rung, op, _, kernel in _C.kernels if not _ladder.missing(rung, op, "cpu")}
leaves = pytree.tree_leaves
every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


def tensors(args: Any) -> list[Tensor]:
    return [t for t in leaves(args) if isinstance(t, Tensor)]


def args_of(op: Op, case: Case, draw: Draw) -> tuple[Any, ...]:
    return op.bind((), case.args(draw))


@functools.cache
def cases(op: Op, most: int = ROOMY) -> list[Case]:
    """The cases that tests run, of up to `most` elements."""
    some = [case for case in op.cases if case.model is None]
    return [c for c in some if sum(t.numel() for t in tensors(args_of(op, c, Draw(torch.float32)))) <= most]


@functools.cache
def least(op: Op) -> Case:
    """The smallest case that has elements at all."""
    sizes = {case: [t.numel() for t in tensors(args_of(op, case, Draw(torch.float32)))] for case in cases(op)}
    return min((case for case, n in sizes.items() if all(n)), key=lambda case: sum(sizes[case]))


def on(rung: str, op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    with dk.rung(rung), torch.no_grad():
        return oracle.results(op, op.call, args)


def in_place(rung: str, op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The same, writing to the arguments themselves: they are too large to be copied."""
    with dk.rung(rung), torch.no_grad():
        return [*leaves(op.call(*args)), *(args[i] for i in op.writes)]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8) if t.numel() else t


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(bits(s), bits(t)) for s, t in zip(a, b, strict=True))


def rungs(op: Op) -> list[str]:
    return [rung for rung in RUNGS if not _ladder.missing(rung, op.name, "cpu")]


def python(code: str, **env: str) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    run = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


# Again and again


@every_op
def test_a_hundred_runs_are_bit_equal(op) -> None:
    """With two threads and with one; the last results are kept, so that the next lie elsewhere."""
    threads = torch.get_num_threads()
    try:
        for case in cases(op, 2000):
            args = args_of(op, case, Draw(torch.bfloat16))
            for rung in rungs(op):
                first, kept = on(rung, op, args), []
                for i in range(99):
                    if i % 50 == 0 and rung != "reference":
                        torch.set_num_threads(1 if i else 2)
                    kept = [*kept[-7:], on(rung, op, args)]
                    assert same(first, kept[-1]), (case.name, rung)
    finally:
        torch.set_num_threads(threads)


def requiring_grad(args: Any) -> Any:
    return pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t, args
    )


def gradients(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    if not op.differentiable:
        return []
    wide = requiring_grad(args)
    outs = [o for o in leaves(op.call(*wide)) if o.requires_grad]
    wanted = [t for t in tensors(wide) if t.requires_grad]
    return list(torch.autograd.grad(outs, wanted, [o.detach() for o in outs], allow_unused=True, materialize_grads=True))


@every_op
def test_gradients_are_bit_equal(op) -> None:
    args = args_of(op, cases(op)[0], Draw(torch.bfloat16))
    first = gradients(op, args)
    assert all(same(first, gradients(op, args)) for _ in range(20))


@every_op
def test_inputs_are_only_read(op, request) -> None:
    """Nor what lies around them."""

    class Banded(Draw):
        def lay(self, t: Tensor) -> Tensor:
            pad = 64
            buffer = torch.full([t.numel() + 2 * pad], 7, dtype=t.dtype)
            self.buffers.append(buffer)
            return buffer[pad : pad + t.numel()].view(t.shape).copy_(t)

    for case in cases(op, 200_000):
        draw = Banded(torch.float16)
        draw.buffers = []
        args = args_of(op, case, draw)
        watched = [*draw.buffers, *tensors(args)]
        before = [bits(t).clone() for t in watched]
        for rung in rungs(op):
            on(rung, op, args)
            assert all(torch.equal(bits(t), b) for t, b in zip(watched, before, strict=True)), (case.name, rung)
        if op.gradient.own is not None or request.config.getoption("--full"):  # the body's is PyTorch's: it only reads
            gradients(op, args)
            assert all(torch.equal(bits(t), b) for t, b in zip(watched, before, strict=True)), (case.name, "gradient")


class Scratch:
    """Stands for `torch` where the border asks it for scratch memory: 0xFF, between guard bands."""

    BAND = 4096

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, **how: Any) -> Tensor:
        self.buffers.append(torch.full([size + 2 * self.BAND], 0xFF, **how))
        self.buffers[-1][: self.BAND] = self.buffers[-1][self.BAND + size :] = 7
        return self.buffers[-1][self.BAND : self.BAND + size]

    def intact(self) -> bool:
        return all(bool((b[: self.BAND] == 7).all() and (b[-self.BAND :] == 7).all()) for b in self.buffers)


def test_scratch_memory_holds_nothing_known(monkeypatch) -> None:
    used = set()
    for op in OPS.values():
        for case in cases(op, 200_000):
            for dtype in HALF.values():
                args = args_of(op, case, Draw(dtype))
                for rung in rungs(op):
                    with monkeypatch.context() as patch:
                        patch.setattr(_op, "torch", scratch := Scratch())
                        got = on(rung, op, args)
                    if scratch.buffers:
                        used.add(op.name)
                        assert same(got, on(rung, op, args)) and scratch.intact(), (op.name, case.name, rung)
    assert used, "no kernel asked for any: the border's callback is elsewhere"


# Threads, forks, imports


def test_eight_threads_of_every_op_agree() -> None:
    """200 calls each, some on a rung of the thread's own, on inputs that all of them share."""
    work = [
        (op, args, {rung: on(rung, op, args) for rung in rungs(op)})
        for op in OPS.values()
        for case in cases(op, 5000)
        for args in [args_of(op, case, Draw(torch.float32))]
    ]
    wrong: list[Any] = []

    def calls(seed: int) -> None:
        try:
            pick = random.Random(seed)
            for _ in range(200):
                op, args, expected = pick.choice(work)
                rung = pick.choice(list(expected))
                if pick.random() < 0.5:
                    got = on(rung, op, args)
                else:
                    with torch.no_grad():
                        rung, got = next(iter(expected)), oracle.results(op, op.call, args)
                if not same(got, expected[rung]):
                    wrong.append((seed, op.name, rung))
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


class Ticker:
    """Another thread, which counts how often it ran. The interpreter makes nobody share: only who lets go is interrupted."""

    def __enter__(self) -> Ticker:
        self.ticks, self.done, self.before = 0, False, sys.getswitchinterval()
        self.thread = threading.Thread(target=self.tick)
        self.thread.start()
        sys.setswitchinterval(1000.0)
        time.sleep(0.01)  # until the thread waits that long too
        return self

    def tick(self) -> None:
        while not self.done:
            self.ticks += 1
            time.sleep(1e-4)

    def __exit__(self, *_: Any) -> None:
        sys.setswitchinterval(self.before)
        self.done = True
        self.thread.join()


@every_op
def test_the_gil_is_released(op) -> None:
    """While a kernel works another thread runs, and none does while Python is as busy: the ticks are the kernel's."""
    every = [args_of(op, case, Draw(torch.bfloat16)) for case in cases(op, 1_000_000)]
    args = max(every, key=lambda args: sum(t.numel() for t in tensors(args)))
    rung = next((r for r in reversed(RUNGS) if (r, op.name) in NATIVE), None)
    if rung is None:
        pytest.skip("no kernel")
    kernel, out = NATIVE[rung, op.name], op.allocate(*args)
    memory: dict[int, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch, Ticker() as ticker:  # scratch without a call of torch's, which lets go too
        patch.setattr(_op, "torch", type("Kept", (), {"empty": staticmethod(lambda n, **_: memory[n]), "uint8": None}))
        memory.update({n: torch.empty(n, dtype=torch.uint8) for n in scratch_sizes(op, rung, args)})
        start, before = time.perf_counter(), ticker.ticks
        while time.perf_counter() < start + 0.02:
            pass
        assert ticker.ticks == before, "the control: somebody let go"
        start = time.perf_counter()
        while ticker.ticks < before + 5 and time.perf_counter() < start + 10:
            assert kernel(out, *args) is None
        assert ticker.ticks >= before + 5, "no other thread ran while kernels worked"


def scratch_sizes(op: Op, rung: str, args: tuple[Any, ...]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op, "torch", scratch := Scratch())
        on(rung, op, args)
    return [b.numel() - 2 * Scratch.BAND for b in scratch.buffers]


def test_every_op_works_in_a_forked_child() -> None:
    out = python(
        "import os, torch, diffkernels as dk\n"
        "from diffkernels._case import Draw\n"
        "from diffkernels._op import OPS\n"
        "from torch.utils._pytree import tree_leaves\n"
        "calls = [(op, op.bind((), c.args(Draw(torch.float32)))) for op in OPS.values() for c in op.cases if not c.model]\n"
        "work = lambda: [tree_leaves(op.call(*args)) for op, args in calls]\n"
        "expected = work()\n"
        "dk.ops.norm_modulate(torch.randn(512, 4096))\n"  # a parallel region in the parent
        "if (pid := os.fork()) == 0:\n"
        "    got = work()\n"
        "    torch.set_num_threads(1)\n"  # torch's own pool did not survive
        "    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for g, e in zip(got, expected) for a, b in zip(g, e))\n"
        "    os._exit(0 if same else 1)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    assert out.strip() == "0"


def test_importing_takes_no_time() -> None:
    """Beyond torch's own: processor time, the least of a few."""
    took = []
    for _ in range(5):
        took.append(
            float(python("import time, torch; t = time.process_time()\nimport diffkernels; print(time.process_time() - t)"))
        )
        if took[-1] < 0.3:
            break
    assert min(took) < 0.3


# Leaks


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * mmap.PAGESIZE


def grows(call: Callable[[], Any], times: int) -> tuple[int, int]:
    """By how many bytes the process grows over so many calls, and by how many of Python's own blocks."""
    for _ in range(times // 10):
        call()
    gc.collect()
    before, blocks = resident(), sys.getallocatedblocks()
    for _ in range(times):
        call()
    gc.collect()
    return resident() - before, sys.getallocatedblocks() - blocks


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
@pytest.mark.parametrize("way", ["plain", "refused", "forced", "gradient"])
@every_op
def test_nothing_leaks(op, way, one_thread) -> None:
    args = args_of(op, least(op), Draw(torch.float32))
    name, kind = next((name, kind) for name, kind in op.params if kind in ("Tensor", "Tensor[]"))
    wrong = list(args)
    wrong[op.names.index(name)] = [None] if kind == "Tensor[]" else None

    def refused() -> None:
        try:
            op.call(*wrong)
        except TypeError:
            return
        raise AssertionError("was not refused")

    call = {
        "plain": lambda: op.call(*args),
        "refused": refused,
        "forced": lambda: on(rungs(op)[0], op, args),
        "gradient": lambda: gradients(op, args),
    }[way]
    times = {"plain": 2_500, "refused": 2_500, "forced": 500, "gradient": 100}[way]
    held = [sys.getrefcount(a) for a in leaves(args) if isinstance(a, Tensor)]
    for _ in range(3):  # what leaks does so every time; what another thread has just allocated does not
        grown, blocks = grows(call, times)
        if grown < 2**18 and blocks < 250:
            break
    else:
        raise AssertionError(f"{grown} bytes and {blocks} blocks in {times} calls")
    assert held == [sys.getrefcount(a) for a in leaves(args) if isinstance(a, Tensor)]


# Memory's edges


class Offset(Draw):
    """So many elements past an aligned address: 2, 4, 8 bytes, or an odd number of elements."""

    elements = 1

    def lay(self, t: Tensor) -> Tensor:
        buffer = torch.full([t.numel() + self.elements + 64], layouts.poison(t.dtype), dtype=t.dtype)
        align = -buffer.data_ptr() % 64 // t.element_size()
        return buffer[align + self.elements :][: t.numel()].view(t.shape).copy_(t)


class Expanded(Draw):
    """One element's width in a dimension, with stride 0."""

    dims: tuple[int, ...] = (-1,)

    def lay(self, t: Tensor) -> Tensor:
        one = t
        for dim in range(t.ndim) if t.numel() else ():
            if dim in self.dims or dim - t.ndim in self.dims:
                one = one.narrow(dim, 0, 1)
        return one.clone().expand(t.shape)


class Far(Draw):
    """A few elements whose offsets are beyond 2^31, in memory that is reserved and never filled.

    `dim` has the long stride; an element's offset in its tensor is then up to 3·2^31, and its bytes' beyond 2^32.
    """

    dim = 0

    def lay(self, t: Tensor) -> Tensor:
        if t.ndim == 0 or t.numel() == 0 or t.shape[self.dim] < 2:
            return t
        inner = t.numel() // t.shape[self.dim]
        far = max(inner, 3 * 2**31 // (t.shape[self.dim] - 1))
        stride = list(t.select(self.dim, 0).contiguous().stride())  # the others are dense, in order
        stride.insert(self.dim % t.ndim, far)
        return reserved(far * (t.shape[self.dim] - 1) + inner, t.dtype).as_strided(t.shape, stride).copy_(t)


def reserved(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
    except OSError as e:
        pytest.skip(f"this system does not reserve {elements * dtype.itemsize >> 30} GB: {e}")


LAYOUTS: dict[str, Callable[[torch.dtype], Draw]] = {
    **{f"offset-{n}": lambda dtype, n=n: with_(Offset(dtype), elements=n) for n in (1, 2, 3, 4)},
    "expanded-columns": lambda dtype: with_(Expanded(dtype), dims=(-1,)),
    "expanded-samples": lambda dtype: with_(Expanded(dtype), dims=(0,)),
    "expanded-middle": lambda dtype: with_(Expanded(dtype), dims=(1, -2)),
    "one-element": lambda dtype: with_(Expanded(dtype), dims=(0, 1, 2, 3)),
}


def with_(draw: Draw, **how: Any) -> Draw:
    for name, value in how.items():
        setattr(draw, name, value)
    return draw


def dense(args: Any) -> Any:
    return pytree.tree_map(lambda t: t.clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@every_op
def test_any_strides_give_the_same_bits(op, dtype, layout) -> None:
    for case in cases(op):
        args = args_of(op, case, LAYOUTS[layout](HALF[dtype]))
        near = dense(args)
        for rung in rungs(op):
            if rung != "reference":
                assert same(on(rung, op, args), on(rung, op, near)), (case.name, rung)


@pytest.mark.parametrize("dim", [0, -1], ids=["samples", "columns"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@every_op
def test_offsets_beyond_32_bits(op, dtype, dim) -> None:
    for case in cases(op, 3000):
        args = args_of(op, case, with_(Far(HALF[dtype]), dim=dim))
        near = dense(args)
        for rung in rungs(op):
            if rung != "reference":
                assert same(in_place(rung, op, args), on(rung, op, near)), (case.name, rung)


# On which rung


@every_op
def test_rungs_agree(op) -> None:
    """On other numbers than test_ops.py's: each with float64, so each with the others."""
    for case in cases(op, 200_000):
        for dtype, seed in itertools.product(HALF.values(), (1, 2)):
            args = args_of(op, case, Draw(dtype, seed=seed))
            exact, reference = oracle.exact(op, args), oracle.results(op, op.reference, args)
            own = oracle.own_error(exact, reference) if op.c > 1 else 0.0
            found = {rung: on(rung, op, args) for rung in rungs(op) if rung != "reference"}
            for rung, got in found.items():
                try:
                    for g, e, r in zip(got, exact, reference, strict=True):
                        oracle.compare(g, e, r, c=max(op.c, 3.0), own=own, rms=False)
                except AssertionError as e:
                    raise AssertionError(f"{case.name}, {dtype}, seed {seed}, {rung}: {e}") from None


@every_op
def test_no_case_falls_to_the_reference(op, monkeypatch) -> None:
    """Plain, through torch.library, and in the gradient where the op has its own: the first rung takes every case."""

    def fell(*_: Any) -> Any:
        raise AssertionError("the reference ran")

    first = rungs(op)[0]
    if first == "reference":
        pytest.skip("no kernel")
    for o in OPS.values():
        monkeypatch.setattr(o, "reference", fell)
    for case in cases(op, 200_000):
        for dtype in HALF.values():
            args = args_of(op, case, Draw(dtype))
            assert same(oracle.results(op, op.call, args), on(first, op, args)), case.name
            leaves(op.call(*(requiring_grad(args) if op.differentiable else args)))
            if op.gradient.own is not None:
                gradients(op, args)
            answers = [line.split(maxsplit=1) for line in dk.explain(op.call, *args).splitlines()]
            assert ["->", f"{first:<12} runs"] in answers, case.name


@every_op
def test_strict_makes_a_fall_on_an_accelerator_an_error(op, monkeypatch, caplog) -> None:
    monkeypatch.setattr(_ladder, "_said", set())
    caplog.set_level(logging.INFO, logger="diffkernels")
    monkeypatch.setenv("DIFFKERNELS_STRICT", "1")
    for refused, words in ((("triton", "too wide"), "triton: too wide"), (None, "every rung: ")):
        with pytest.raises(dk.RungError, match=f"^{op.name}: fell to the reference on cuda .DIFFKERNELS_STRICT.: {words}"):
            _ladder._fell(op.name, "cuda", refused)
    wide = oracle.widened(args_of(op, cases(op)[0], Draw(torch.float64)))
    op.call(*wide)  # on a CPU the reference is an answer: said, but no error
    assert {r.levelno for r in caplog.records} == {logging.INFO}
    for off in ("", "0"):
        monkeypatch.setenv("DIFFKERNELS_STRICT", off)
        _ladder._fell(op.name, "cuda", ("triton", "too wide"))
    assert [r.levelno for r in caplog.records].count(logging.WARNING) == 1


# Under PyTorch's transformations


@every_op
def test_export(op) -> None:
    """One opaque op in the graph, which survives a file."""
    args = args_of(op, least(op), Draw(torch.float32))
    flat, spec = pytree.tree_flatten(args)
    where = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> list[Tensor]:
            every = list(flat)
            for i, t in zip(where, given, strict=True):
                every[i] = t
            return [t + 0 for t in leaves(op.call(*pytree.tree_unflatten(every, spec)))]

    given = tuple(flat[i] for i in where)
    program = torch.export.export(Module(), given)
    assert [n.target for n in program.graph.nodes].count(op._overload) == 1
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    assert same(leaves(torch.export.load(file).module()(*given)), [t + 0 for t in leaves(op.call(*args))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@every_op
def test_autocast_never_casts_inside(op, dtype) -> None:
    for case in cases(op):
        args = args_of(op, case, Draw(torch.float32))
        ways = [functools.partial(on, rung, op, args) for rung in rungs(op)]
        ways += [lambda args=args: leaves(op.call(*args)), functools.partial(gradients, op, args)]
        expected = [way() for way in ways]
        with torch.autocast("cpu", dtype=dtype):
            assert all(same(way(), e) for way, e in zip(ways, expected, strict=True)), case.name


# Numbers at the dtypes' ends


class Largest(Draw):
    """A 65504 here and there: too few to cancel."""

    def values(self, shape: tuple[int, ...]) -> Tensor:
        t = super().values(shape)
        t.view(-1)[::101] = 65504
        return t


class Tiny(Draw):
    """Below the normal numbers."""

    def values(self, shape: tuple[int, ...]) -> Tensor:
        return super().values(shape) * (2.0**-18 if self.dtype is torch.float16 else 2.0**-134)

    def f32(self, *shape: int) -> Tensor:
        return self.lay(Draw.values(self, shape) * 2.0**-134)


@every_op
def test_the_largest_half_overflows_where_the_definition_does(op) -> None:
    first = 65520.0  # what rounds to inf
    for case in cases(op):
        args = args_of(op, case, Largest(torch.float16))
        exact, reference = oracle.exact(op, args), oracle.results(op, op.reference, args)
        for rung in rungs(op):
            for got, e, r in zip(on(rung, op, args), exact, reference, strict=True):
                ends = [t.isnan() + 2 * t.isposinf() + 3 * t.isneginf() for t in (got, e.to(r.dtype), r)]
                g, e, r = (t.double().nan_to_num(0, first, -first).clamp(-first, first) for t in (got, e, r))
                near = (ends[0] != 1) & ((g - e).abs() <= op.c * (r - e).abs().max()) if op.c > 1 and e.numel() else False
                assert ((ends[0] == ends[1]) | (ends[0] == ends[2]) | near).all(), (case.name, rung)


@pytest.mark.parametrize("dtype", HALF)
@every_op
def test_subnormal_numbers_are_not_flushed(op, dtype) -> None:
    least = 2 * torch.finfo(HALF[dtype]).smallest_normal * oracle.ULP[HALF[dtype]]
    for case in cases(op):
        args = args_of(op, case, Tiny(HALF[dtype]))
        exact, reference = oracle.exact(op, args), oracle.results(op, op.reference, args)
        for rung in rungs(op):
            for got, e, r in zip(on(rung, op, args), exact, reference, strict=True):
                if e.numel() and e.isfinite().all():
                    allowed = op.c * (r - e).abs().max() + 2 * oracle.ULP[r.dtype] * e.abs().max() + least
                    assert ((got - e).abs() <= allowed).all(), (case.name, rung)


# More than 2^31 elements


class Tall(Draw):
    """Dimensions of size `was` are `now`, and zero there but for some slices, so that most of the memory is never touched."""

    was = now = 7

    def tall(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        dims = [d for d, n in enumerate(shape) if n == self.was]
        if not dims:
            return self.values(shape).to(dtype)
        (dim,) = dims  # ValueError: some other case will do
        shape = tuple(self.now if d == dim else n for d, n in enumerate(shape))
        t = reserved(torch.Size(shape).numel(), dtype).view(shape)
        filled = picked(self.now)
        t.index_copy_(dim, filled, self.values((*shape[:dim], len(filled), *shape[dim + 1 :])).to(dtype))
        return t

    def __call__(self, *shape: int) -> Tensor:
        return self.tall(shape, self.dtype)

    def f32(self, *shape: int) -> Tensor:
        return self.tall(shape, torch.float32)

    def seeds(self, n: int) -> Tensor:
        return super().seeds(self.now if n == self.was else n)


def picked(n: int) -> Tensor:
    """The first of n slices, those around the middle, where bytes are 2^31, and the last, where elements are."""
    return torch.tensor(sorted({0, 1, n // 2, n - 2, n - 1}))


def slices(args: Any, now: int) -> Any:
    """Of every tensor the slices that Tall filled."""

    def some(t: Any) -> Any:
        dims = [d for d, n in enumerate(t.shape) if n == now] if isinstance(t, Tensor) else []
        return t.index_select(dims[0], picked(now)) if dims else t

    return pytree.tree_map(some, args)


def tall(op: Op) -> tuple[Case, int, int, int]:
    """A case, a size in it along which slices don't depend on one another, a larger one in its place for more than 2^31
    elements, and the bytes of the outputs: of all the case that needs least memory."""
    found, now = [], 11
    for case in cases(op):
        small = args_of(op, case, Draw(torch.float16))
        some = all(t.numel() for t in tensors(small))
        for was in sorted({n for t in tensors(small) for n in t.shape if n > 1 and n != now}) if some else ():
            with contextlib.suppress(TypeError, ValueError, IndexError, RuntimeError, StopIteration):
                args = args_of(op, case, with_(Tall(torch.float16), was=was, now=now))
                op.check(*args)
                outs, alone = leaves(op.body(*args)), leaves(op.body(*slices(args, now)))
                close = functools.partial(torch.allclose, rtol=1e-2, atol=1e-2, equal_nan=True)
                if all(close(a, b) for a, b in zip(slices(outs, now), alone, strict=True)):
                    unit = tensors(args)[0].numel() / now
                    needs = (
                        sum(t.nbytes for t in [*tensors(args)[1:], *outs, *outs * 9]) / now / unit
                    )  # inputs are mostly absent
                    larger = int((2**31 + 512) / unit) + 1
                    found.append((needs, len(found), (case, was, larger, sum(t.nbytes for t in outs) * larger // now)))
    return min(found)[2]


def proc(path: str, name: str) -> int:
    with open(f"/proc/{path}") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """An allocation beyond so many bytes fails here, before the system runs out of memory."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (proc("self/status", "VmData") + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.big
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no /proc")
@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung != "reference"])
@every_op
def test_more_than_2_to_the_31_elements(op, rung) -> None:
    if (rung, op.name) not in NATIVE:
        pytest.skip("no kernel")
    case, was, now, size = tall(op)
    size, free = size + 2**31, proc("meminfo", "MemAvailable")
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GB, {free >> 30} are available")
    args = args_of(op, case, with_(Tall(torch.float16), was=was, now=now))
    assert max(t.numel() for t in tensors(args)) > 2**31
    few = slices(args, now)
    exact, reference = oracle.exact(op, few), oracle.results(op, op.reference, few)
    with at_most(size):
        found = slices(in_place(rung, op, args), now)
    for got, e, r in zip(found, exact, reference, strict=True):
        oracle.compare(got, e, r, c=max(op.c, 3.0), rms=False)
