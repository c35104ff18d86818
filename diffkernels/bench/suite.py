"""What is timed: the cases that ops declare with a model's name, and whole steps and models; a Subject each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _ladder
from .._case import Case, Draw
from .._op import OPS, Op
from . import dimr, dit, machine, oracle, peers, schedulers
from .timing import Busy, Call, measure

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
COPIES = 256  # of a case's tensors at most, for a cold cache


@dataclass(frozen=True)
class Task:
    """One row to be measured, in words that another process understands."""

    op: str
    case: str
    dtype: str = "f32"
    rung: str | None = None
    device: str = "cpu"
    shape: tuple[int, ...] | None = None
    backward: bool = False
    vs: tuple[str, ...] = peers.ALWAYS
    l2: str = "warm"
    seconds: float = 1.0
    limit: float = 0.03

    def row(self) -> dict[str, Any]:
        """What is known of the row before anything is measured."""
        running, model, shape = self.rung, None, self.shape
        if self.op in OPS:
            case = _case(OPS[self.op], self.case)
            model, shape = case.model, self.shape or case.shape
            running = running or _ladder.running(self.op, self.device)
        name = self.op + (" and its gradients" if self.backward else "")
        return {
            "op": name, "case": self.case, "model": model, "dtype": self.dtype, "rung": running, "device": self.device,
            "shape": list(shape or ()), "l2": self.l2,
        }  # fmt: skip


@dataclass
class Subject:
    """Contenders that are timed together, ours first; `row` holds what is known of them, the error above all.

    `per` is how many steps a call makes; `graphs` are the contenders that a GPU replays as graphs.
    """

    row: dict[str, Any]
    contenders: dict[str, Call]
    errors: dict[str, float | None] = field(default_factory=dict)  # of peers, relative to the largest result
    skipped: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    graphs: tuple[str, ...] = ()
    per: int = 1
    rounds: int = 25
    context: AbstractContextManager[Any] = field(default_factory=nullcontext)


def part(task: Task) -> dict[str, Any]:
    """The samples of one process: a Subject, measured. Never raises: a row that can't be had says why."""
    row = task.row()
    try:
        with torch.no_grad() if not task.backward else nullcontext():
            subject = _op_subject(task) if task.op in OPS else MODELS[task.op].subject(task.case)
            with subject.context:
                timing = measure(
                    subject.contenders,
                    task.seconds,
                    subject.rounds,
                    device=task.device,
                    graphs=subject.graphs,
                    limit=task.limit,
                )
    except Busy as busy:
        return {"row": row, "not_measured": f"the machine was busy: {busy}"}
    except Exception as error:  # a case that fails must not end the run, whatever it raises
        return {"row": row, "not_measured": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    found = {name: getattr(subject, name) for name in ("errors", "skipped", "peak_bytes", "per")}
    return {"row": row | subject.row, "samples": timing.samples, "faults": timing.faults, "load": timing.load, **found}


def _case(op: Op, name: str) -> Case:
    return next(c for c in op.cases if c.name == name)


def _op_subject(task: Task) -> Subject:
    op = OPS[task.op]
    case, dtype = _case(op, task.case), DTYPES[task.dtype]

    def drawn(seed: int) -> dict[str, Any]:
        kwargs = case.args(Draw(dtype, task.device, seed), task.shape)
        if task.backward:
            kwargs = {name: a.detach().requires_grad_() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        return kwargs

    kwargs = drawn(0)
    args = op.bind((), kwargs)
    with torch.no_grad():
        outs = pytree.tree_leaves(op.call(*args))
        if task.backward and case.eager is not None:  # of what users get: of attention that is o, without lse
            outs = outs[: len(pytree.tree_leaves(case.eager(**kwargs)))]
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outs]
    moved = _bytes(args) + _bytes(outs)
    moved += 2 * _bytes(args) + _bytes(outs) if task.backward else 0  # grads and inputs read, their gradients written
    sets = [kwargs]
    if task.l2 == "cold":  # as many tensors in turn as the last cache does not hold
        some = -(-2 * machine.cache(task.device) // max(moved, 1)) + 1
        sets += [drawn(seed) for seed in range(1, min(some, COPIES) if some > 2 else 1)]

    def timed(make: Callable[[dict[str, Any]], Call]) -> Call:
        calls = [make(given) for given in sets]
        if task.backward:
            own = [[a for a in op.bind((), given) if isinstance(a, Tensor)] for given in sets]
            calls = [_with_gradients(call, mine, grads) for call, mine in zip(calls, own, strict=True)]
        return _in_turn(calls)

    def ours(given: dict[str, Any]) -> Call:
        return lambda: op.call(**given)

    with _ladder.rung(task.rung) if task.rung else nullcontext():
        rung = _ladder.running(op.name, task.device)
        subject = Subject({"rung": rung, "bytes": moved}, {"ours": timed(ours), "again": timed(ours)})
        exact = _judge(op, task, args, subject, grads)
        if not task.backward:
            subject.row["flops"] = case.flops(*(task.shape or case.shape)) if case.flops else None
            subject.row["arithmetic"] = case.arithmetic
            kernel = _ladder.kernel(rung, op.name) if rung != "reference" else None
            if kernel is not None and task.device == "cpu":
                subject.contenders["kernel"] = _kernel(kernel, args, op.allocate(*args))
        if task.device == "cuda":
            subject.contenders["called"] = timed(ours)
        for name in task.vs:
            try:
                peer = timed(peers.PEERS[name](op, case, kwargs))
                answer = pytree.tree_leaves(peer())
            except peers.Skip as why:
                subject.skipped[name] = str(why)
            except Exception as error:  # a broken peer is a row with its reason
                subject.skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                subject.contenders[name] = peer
                steady = len(sets) == 1 and _same(answer, pytree.tree_leaves(peer()))
                subject.errors[name] = _worst(answer, exact) if steady else None
                subject.peak_bytes[name] = peak_bytes(peer, task.device)
    subject.peak_bytes["ours"] = peak_bytes(subject.contenders["ours"], task.device)
    half = torch.zeros(moved // 2, dtype=torch.uint8, device=task.device)
    other = torch.empty_like(half)
    subject.contenders["copy"] = lambda: other.copy_(half)
    subject.graphs = tuple(name for name in subject.contenders if name != "called")
    subject.context = _ladder.rung(task.rung) if task.rung else nullcontext()
    return subject


def _judge(op: Op, task: Task, args: tuple[Any, ...], subject: Subject, grads: list[Tensor]) -> list[Tensor]:
    """What float64 says, our error beside it noted; raises where that is more than the definition's own allows."""
    got = pytree.tree_leaves(subject.contenders["ours"]())
    if task.backward:
        inputs = [a for a in args if isinstance(a, Tensor)]
        wide = oracle.widened(args)
        leaves = [a for a in wide if isinstance(a, Tensor)]
        exact = list(torch.autograd.grad(pytree.tree_leaves(op.body(*wide))[: len(grads)], leaves, [g.double() for g in grads]))
        own = list(torch.autograd.grad(pytree.tree_leaves(op.body(*args))[: len(grads)], inputs, grads))
    else:
        exact, own = (r[: len(got)] for r in (oracle.exact(op, args), oracle.results(op, op.reference, args)))
    usual = oracle.own_error(exact, own)
    for g, e, o in zip(got, exact, own, strict=True):
        oracle.compare(g, e, o, c=3.0 if task.backward else op.c, own=usual if task.backward else 0.0, rms=False)
    subject.row["error"] = _worst(got, exact)
    return exact


def _with_gradients(call: Call, inputs: list[Tensor], grads: list[Tensor]) -> Call:
    return lambda: torch.autograd.grad(pytree.tree_leaves(call())[: len(grads)], inputs, grads)


def _in_turn(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _kernel(kernel: Any, args: tuple[Any, ...], outs: Any) -> Call:
    def call() -> Any:
        refused = kernel(outs, *args)
        assert refused is None, refused
        return outs

    return call


def peak_bytes(call: Call, device: str) -> int | None:
    """The most memory that PyTorch's allocator held during a call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"] if profile.profiler else []
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return max(0, *held) if held else None


def _bytes(args: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, Tensor))


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """False of a peer that draws noise of its own: its distance from ours says nothing."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _worst(got: list[Tensor], exact: list[Tensor]) -> float | None:
    """The largest error, relative to the largest result, of what a peer answers: the first results, if not all.

    None where its answer is cut in other pieces.
    """
    exact = exact[: len(got)]
    if not got or [g.shape for g in got] != [e.shape for e in exact]:
        return None
    return max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True))


# Rows that belong to no op. A Model's cases are named, and each is a Subject.


@dataclass(frozen=True)
class Model:
    cases: tuple[str, ...]
    subject: Callable[[str], Subject]
    default: bool = False  # run without being named: it needs neither gigabytes nor a package that is no dependency


def _overhead(case: str) -> Subject:
    """What one eager call costs before and after its kernel: three tensors of a few elements."""
    op = OPS["norm_modulate"]
    x, scale, shift = torch.randn(1, 1, 8), torch.randn(1, 8), torch.randn(1, 8)
    exact = oracle.exact(op, op.bind((x, scale, shift), {}))
    row = {"rung": _ladder.running(op.name), "shape": [1, 1, 8], "error": _worst([op.call(x, scale, shift)], exact)}
    add = "torch.add"
    return Subject(row, {"ours": lambda: op.call(x, scale, shift), add: lambda: torch.add(x, x)}, errors={add: None})


def _dimr(case: str) -> Subject:
    """A whole model's forward pass, everything but its GEMMs and its attention, beside the same in plain PyTorch."""
    contenders, shape = dimr.contenders()
    got, exact = (torch.as_tensor(contenders[name]()) for name in ("ours", "eager"))
    error = ((got - exact).abs().max() / exact.abs().max()).item()  # of the whole forward, from eager's
    row = {"model": "DiMR-XL/2R, 257 tokens", "rung": _ladder.running("norm_modulate"), "shape": shape, "error": error}
    return Subject(row, contenders, context=dimr.without_products())


def _dit(case: str) -> Subject:
    """A whole model's forward pass in 8 bits beside the same in plain PyTorch, bfloat16; errors are from float32's answer."""
    contenders, exact, shape = dit.contenders()
    errors = {name: _worst([call()], [exact.double()]) for name, call in contenders.items()}
    row = {"model": "DiT-B/2, 256 tokens, batch 2", "dtype": "bf16", "rung": _ladder.running("linear_w8a8"), "shape": shape}
    return Subject(row | {"error": errors.pop("ours")}, {**contenders}, errors, rounds=9)


def _schedulers(case: str) -> Subject:
    row, contenders, errors, per = schedulers.subject(case)
    return Subject(row, {**contenders}, errors, per=per, rounds=9)


def _noise(case: str) -> Subject:
    row, contenders = schedulers.noise(case)
    return Subject(row, contenders)


MODELS = {
    "call overhead": Model(("three small tensors",), _overhead, default=True),
    "noise in the step": Model((schedulers.NOISE,), _noise, default=True),
    "scheduler step": Model(tuple(schedulers.NAMES), _schedulers),
    "dimr-xl-forward": Model(("all but GEMMs and attention",), _dimr),
    "dit-b-forward": Model(("int8",), _dit),
}


def tasks(
    ops: list[str] | None = None,
    dtypes: list[str] | None = None,
    shapes: list[tuple[int, ...]] | None = None,
    device: str = "cpu",
    **common: Any,
) -> list[Task]:
    """What there is to measure. Raises ValueError, with what there is, for an unknown op, case or dtype.

    An entry of `ops` is an op, an op's case (`norm_modulate/flux-1024`), or one of the MODELS.
    """
    wanted = {name: set[str]() for name in (*OPS, *MODELS)} if not ops else {}
    for entry in ops or []:
        name, _, case = entry.partition("/")
        if name not in OPS and name not in MODELS:
            raise ValueError(f"op: expected one of {', '.join((*OPS, *MODELS))}; got {name!r}")
        known = [c.name for c in OPS[name].cases if c.model] if name in OPS else list(MODELS[name].cases)
        if case and case not in known:
            raise ValueError(f"op: {name} has the cases {', '.join(known)}; got {case!r}")
        wanted.setdefault(name, set()).add(case)
    for dtype in dtypes or []:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    return list(_tasks(wanted, bool(ops), dtypes or ["f32", "bf16"], shapes, Task("", "", device=device, **common)))


def _tasks(
    wanted: dict[str, set[str]], named: bool, dtypes: list[str], shapes: list[tuple[int, ...]] | None, like: Task
) -> Iterator[Task]:
    common = asdict(like)
    for name, cases in wanted.items():
        every = not cases or "" in cases
        if name in MODELS:
            if like.device == "cpu" and (named or MODELS[name].default) and not shapes:
                for case in MODELS[name].cases:
                    if every or case in cases:
                        yield Task(**common | {"op": name, "case": case, "l2": "warm", "rung": None})
            continue
        for c in OPS[name].cases:
            if c.model is None or not (every or c.name in cases):
                continue
            at = [None] if shapes is None else [s for s in shapes if len(s) == len(c.shape)]
            for dtype, shape in itertools.product(dtypes, at):
                one = common | {"op": name, "case": c.name, "dtype": dtype, "shape": shape}
                yield Task(**one)
                if c.backward and common["l2"] == "warm":
                    yield Task(**one | {"backward": True, "vs": tuple(v for v in common["vs"] if v in peers.ALWAYS)})
            if shapes is not None and at:
                break  # a shape is one row: of the first case that takes it
