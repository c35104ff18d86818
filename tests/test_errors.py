"""What every op refuses, from its declaration alone: each parameter in turn is given what it can't be.

A refusal is a TypeError, ValueError or IndexError that begins with the parameter's name, the same whatever way the call takes.
What is not refused is the definition's.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels import _C
from diffkernels._case import Draw
from diffkernels._ladder import LADDER, missing
from diffkernels._op import OPS, Op
from diffkernels.bench import layouts, oracle

ERRORS = (TypeError, ValueError, IndexError)
NATIVE = {(rung, op): kernel for rung, op, _, kernel in _C.kernels if not missing(rung, op, "cpu")}
MODE = FakeTensorMode()
leaves = pytree.tree_leaves
pytestmark = pytest.mark.usefixtures("one_thread")
warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")


def other_dtype(t: Tensor) -> Tensor:
    return t.to(torch.int32) if t.is_floating_point() else t.float()


def least(t: Tensor) -> int:
    return 0 if t.dtype is torch.bool else torch.iinfo(t.dtype).min


def like(t: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=t.dtype)


# What a parameter of each kind can't be, whatever the op.
NEVER: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Tensor": {
        "array": lambda t: t.numpy(),
        "reversed-array": lambda t: t.reshape(-1).numpy()[::-1],
        "list": lambda t: [t],
        "text": lambda t: "x",
        "number": lambda t: 1.0,
        "sparse": lambda t: t.to_sparse(),
        "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:1]]),
        "other-dtype": other_dtype,
        "bool": lambda t: t.bool(),
        "complex": lambda t: t.to(torch.complex64),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
    },
    "int": {
        "none": lambda v: None,
        "text": lambda v: "1",
        "fraction": lambda v: 1.5,
        "list": lambda v: [1],
        "tensor": lambda v: torch.tensor(1),
        "beyond-64-bits": lambda v: 2**70,
    },
    "float": {
        "none": lambda v: None,
        "text": lambda v: "1",
        "list": lambda v: [1.0],
        "complex": lambda v: 1j,
        "tensor": lambda v: torch.tensor(1.0),
        "nan": lambda v: math.nan,
        "beyond-a-float": lambda v: 10**400,
    },
    "str": {
        "none": lambda v: None,
        "number": lambda v: 3,
        "bytes": lambda v: v.encode(),
        "empty": lambda v: "",
        "unknown": lambda v: v + "s",
        "prefix": lambda v: v[:-1],
        "nul": lambda v: v + "\0",
        "surrogate": lambda v: "\ud800",
    },
    "bool": {"none": lambda v: None, "text": lambda v: "yes", "number": lambda v: 1, "tensor": lambda v: torch.tensor(True)},
}
NEVER["float?"] = {how: f for how, f in NEVER["float"].items() if how != "none"}
NEVER["Tensor?"] = NEVER["Tensor"]
NEVER["Tensor"] = NEVER["Tensor"] | {"none": lambda t: None}
NEVER["Tensor[]"] = {
    "tensor": lambda ts: ts[0],
    "none": lambda ts: None,
    "text": lambda ts: "x",
    "generator": iter,
    "of-none": lambda ts: [*ts[:-1], None],
    "of-lists": lambda ts: [*ts[:-1], ts],
    **{f"of-{how}": lambda ts, f=f: [*ts[:-1], f(ts[-1])] for how, f in NEVER["Tensor?"].items() if how != "list"},
}

# What it may be or not, as the op says; where it may, the result is the definition's.
PERHAPS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Tensor": {
        "longer": lambda t: like(t, *t.shape[:-1], t.shape[-1] + 1),
        "shorter": lambda t: like(t, *t.shape[:-1], t.shape[-1] - 1),
        "narrow": lambda t: like(t, *t.shape[:-1], 1),
        "no-columns": lambda t: t[..., :0],
        "more-samples": lambda t: like(t, t.shape[0] + 1, *t.shape[1:]),
        "fewer-samples": lambda t: t[:-1],
        "no-samples": lambda t: t[:0],
        "middle": lambda t: like(t, t.shape[0], t.shape[1] + 1, *t.shape[2:]),
        "one-less": lambda t: t[0],
        "one-more": lambda t: t[None],
        "one-more-behind": lambda t: t[..., None],
        "nine": lambda t: t.reshape(*[1] * (9 - t.ndim), *t.shape),
        "no-dimension": lambda t: like(t),
        "turned": lambda t: t.mT if t.ndim > 1 else t[None, None],
        "half": lambda t: t.half(),
        "double": lambda t: t.double(),
        "long": lambda t: t.long(),
        "negative": lambda t: torch.full_like(t, -1),
        "lowest": lambda t: torch.full_like(t, -65504 if t.is_floating_point() else least(t)),
        "highest": lambda t: torch.full_like(t, 65504 if t.is_floating_point() else -1 - least(t)),
        "nan": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    },
    "int": {str(n): lambda v, n=n: n for n in (-(2**63), -(2**31), -2, -1, 0, 1, 3, 5, 64, 2**31, 2**32 + 1, 2**63 - 1)},
    "float": {str(f): lambda v, f=f: f for f in (-math.inf, -1.0, -1e-9, 0, 0.0, 1, 1.5, math.inf)},
    "str": {},
    "bool": {"other": lambda v: not v},
}
PERHAPS["float?"] = PERHAPS["float"] | {"none": lambda v: None}
PERHAPS["Tensor?"] = PERHAPS["Tensor"] | {"none": lambda t: None}
PERHAPS["Tensor[]"] = {
    "empty": lambda ts: [],
    "tuple": tuple,
    "many": lambda ts: ts * 70,
    "one-too-many": lambda ts: [*ts, ts[0]],
    **{f"of-{how}": lambda ts, f=f: [*ts[:-1], f(ts[-1])] for how, f in PERHAPS["Tensor"].items()},
}


@functools.cache
def given(op: Op, name: str, fullest: bool = False) -> dict[str, Any] | None:
    """The arguments of a case that gives `name` a value: the first one, or the one that gives most; None where none does."""
    found = []
    for case in op.cases:
        if case.model is None:
            args = dict(zip(op.names, op.bind((), case.args(Draw(torch.float32))), strict=True))
            some = args[name] is not None and (not isinstance(args[name], list) or args[name])
            if some and all(t.numel() for t in leaves(args) if isinstance(t, Tensor)):
                found.append(args)
    return max(found, key=lambda args: fullest and len(leaves(args)) - leaves(args).count(None), default=None)


def calls(table: dict[str, dict[str, Callable[[Any], Any]]], fullest: bool = False) -> Iterator[Any]:
    """Every op with one argument changed: the op, the argument's name, the arguments before and after."""
    for op in OPS.values():
        for name, kind in op.params:
            args = given(op, name, fullest)
            for how, f in table[kind].items() if args else ():
                with contextlib.suppress(IndexError, RuntimeError):  # no such dimension
                    bad = args | {name: f(args[name])}
                    if bad[name] is args[name] is not None:
                        continue  # a bool mask as bool
                    if not fullest or typed(bad, op):  # else it never reaches a kernel
                        yield pytest.param(op, name, args, bad, id=f"{op.name}-{name}-{how}")


def requiring_grad(args: dict[str, Any], but: str) -> dict[str, Any]:
    """Clones that require grad, but for one argument's."""

    def leaf(t: Any) -> Any:
        plain = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().clone().requires_grad_() if plain else t

    return {k: v if k == but else pytree.tree_map(leaf, v) for k, v in args.items()}


def outcome(call: Callable[[], Any]) -> tuple[type[Exception] | None, str]:
    try:
        call()
    except Exception as e:
        return type(e), str(e)
    return None, ""


def typed(args: dict[str, Any], op: Op) -> bool:
    """Whether torch's own schema has nothing to say."""
    known = {"Tensor": Tensor, "Tensor?": Tensor | None, "Tensor[]": list, "int": int, "float": float, "str": str, "bool": bool}
    known["float?"] = float | None
    for name, kind in op.params:
        value = args[name]
        if not isinstance(value, known[kind]) or (kind == "Tensor[]" and not all(isinstance(t, Tensor) for t in value)):
            return False
        if (kind == "int" and not -(2**63) <= value < 2**63) or (kind == "str" and not value.isascii()):
            return False
    return not any(isinstance(t, Tensor) and (t.is_nested or t.layout is not torch.strided) for t in leaves(args))


def ways(op: Op, args: dict[str, Any], name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every way that a call may take, but for Triton's interpreter."""
    yield "plain", lambda: op.call(**args)
    yield "in order", lambda: op.call(*args.values())
    if op.differentiable:
        yield "gradient", lambda: op.call(**requiring_grad(args, name))
    for rung in LADDER["cpu"]:
        if missing(rung, op.name, "cpu") is None:

            def forced(rung: str = rung) -> Any:
                with dk.rung(rung):
                    return op.call(**args)

            yield rung, forced
    if typed(args, op):
        yield "torch.ops", lambda: op._overload(*args.values())

        def fake() -> Any:
            with MODE:
                return op.call(**pytree.tree_map(lambda t: MODE.from_tensor(t) if isinstance(t, Tensor) else t, args))

        yield "fake", fake


def begins(text: str, name: str) -> bool:
    return text.startswith(name) and text[len(name) : len(name) + 1] in (":", "[")


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_cases_give_every_parameter(op) -> None:
    assert not [name for name in op.names if given(op, name) is None]


@pytest.mark.parametrize(("op", "name", "good", "args"), calls(NEVER))
def test_never(op, name, good, args) -> None:
    expected = outcome(lambda: op.call(**args))
    assert expected[0] in ERRORS and begins(expected[1], name), expected
    for way, call in ways(op, args, name):
        assert outcome(call) == expected, way


def kind(t: Tensor) -> Tensor:
    """0 where finite, else which of NaN and the infinities."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def flushed(t: Tensor) -> Tensor:
    return t.where(t.abs() > 1e-30, 0)


@pytest.mark.parametrize(("op", "name", "good", "args"), calls(PERHAPS))
def test_refused_or_as_defined(op, name, good, args) -> None:
    error, text = expected = outcome(lambda: op.call(**args))
    if error is None:
        values = tuple(args.values())
        exact, own = oracle.exact(op, values), oracle.results(op, op.reference, values)
        for got, e, r in zip(oracle.results(op, op.call, values), exact, own, strict=True):
            # near the dtype's end the definition in its own dtype may overflow where float64 does not
            assert ((kind(got) == kind(r)) | (kind(got) == kind(e.to(r.dtype)))).all()
            if r.isfinite().all():  # test_ops.py counts the digits
                oracle.compare(flushed(got), flushed(e), flushed(r), c=max(op.c, 4.0), rms=False)
    else:  # another argument may be the one that does not fit
        assert error in ERRORS and any(begins(text, n) for n in op.names), expected
    for way, call in ways(op, args, name):
        found = outcome(call)
        if way == "fake" and error is IndexError:
            assert found[0] is None  # values are not known yet
        elif error is None and found[0] is dk.RungError:
            assert way in LADDER["cpu"]
        else:
            assert found == expected, way


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_another_device_is_named(op) -> None:
    """Every tensor but the first: they follow it."""
    first = next(name for name, kind in op.params if "Tensor" in kind)
    for name, kind in op.params:
        if "Tensor" in kind and (name != first or (kind == "Tensor[]" and len(given(op, name)[name]) > 1)):
            args = given(op, name)
            value = args[name]
            moved = [*value[:-1], value[-1].to("meta")] if isinstance(value, list) else value.to("meta")
            for way, call in ways(op, args | {name: moved}, name):
                error, text = outcome(call)
                assert error is ValueError and begins(text, name) and "on cpu like the others, got meta" in text, (way, text)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_the_wrong_arguments(op) -> None:
    args = given(op, op.names[0])
    for name in op.names:
        if name not in op.optional:
            with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{name}'"):
                op.call(**{k: v for k, v in args.items() if k != name})
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma_'"):
        op.call(**args, gamma_=1)
    with pytest.raises(TypeError, match=f"multiple values for argument '{op.names[0]}'"):
        op.call(args[op.names[0]], **args)
    with pytest.raises(TypeError, match=f"positional arguments? but {len(op.names) + 1} were given"):
        op.call(*args.values(), 1)
    with pytest.raises(TypeError, match=r"missing [0-9]+ required positional argument"):
        op.call()


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_memory_that_was_freed(op) -> None:
    args = given(op, op.names[0])
    freed = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args)
    next(t for t in leaves(freed) if isinstance(t, Tensor)).untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="expected tensors with memory of their own"):
        op.call(**freed)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_compiled(op) -> None:
    """While Dynamo traces, the fake kernel says it."""
    torch._dynamo.reset()
    name, kind = next((name, kind) for name, kind in op.params if kind in ("Tensor", "Tensor[]"))
    value = given(op, name)[name]
    args = given(op, name) | {name: [*value[:-1], other_dtype(value[-1])] if kind == "Tensor[]" else other_dtype(value)}
    _, text = outcome(lambda: op.call(**args))
    error, found = outcome(lambda: torch.compile(lambda: op.call(**args), fullgraph=True, backend="eager")())
    assert error is not None and text in found


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_six_errors_an_op(op) -> None:
    refused = {outcome(lambda p=p: op.call(**p.values[3])) for p in calls(NEVER) if p.values[0] is op}
    assert len(refused) >= 6 and all(error in ERRORS for error, _ in refused)


# Kernels defend themselves: they are called past the op's check here


def band(t: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous output like t of NaN (or -128), and the buffer around it, whose ends are 7."""
    pad = 4096 // t.element_size()
    buffer = torch.full([t.numel() + 2 * pad], layouts.poison(t.dtype), dtype=t.dtype)
    buffer[:pad] = buffer[pad + t.numel() :] = 7
    return buffer[pad : pad + t.numel()].view(t.shape), buffer


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8) if t.numel() else t


@pytest.mark.parametrize(("op", "name", "good", "bad"), [*calls(NEVER, True), *calls(PERHAPS, True)])
def test_a_kernel_takes_only_what_the_check_takes(op, name, good, bad) -> None:
    args = tuple(bad.values())
    error, _ = outcome(lambda: op.check(*args))
    for rung in LADDER["cpu"]:
        kernel = NATIVE.get((rung, op.name))
        if kernel is None:
            continue
        made = pytree.tree_map(band, op.allocate(*good.values()))
        outs, buffers = leaves(made)[::2], leaves(made)[1::2]
        before = [bits(b).clone() for b in buffers]
        try:
            why = kernel(outs if op.returns == "Tensor[]" else outs[0], *args)
        except TypeError as e:
            why = str(e)
        if why is None:
            assert error is None, f"{rung} took it"
            fit = [(t.shape, t.dtype) for t in leaves(op.allocate(*args))]
            assert fit == [(t.shape, t.dtype) for t in outs], f"{rung} took outputs of other shapes"
        for b, was, out in zip(buffers, before, outs, strict=True):
            pad = (bits(b).numel() - bits(out).numel()) // 2
            assert torch.equal(bits(b)[:pad], was[:pad]) and torch.equal(bits(b)[-pad:], was[-pad:]), f"{rung}: outside"
            assert why is None or torch.equal(bits(b), was), f"{rung} refused, and wrote"


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_a_kernel_refuses_other_outputs(op) -> None:
    good = tuple(given(op, op.names[0]).values())
    for rung in LADDER["cpu"]:
        kernel = NATIVE.get((rung, op.name))
        if kernel is None:
            continue
        fit = op.allocate(*good)
        for i in range(len(leaves(fit))):
            for how in ("longer", "shorter", "more-samples", "fewer-samples", "one-less", "double", "long"):
                outs = [t.fill_(7) for t in leaves(op.allocate(*good))]
                outs[i] = PERHAPS["Tensor"][how](outs[i]).clone()
                why = kernel(outs if op.returns == "Tensor[]" else outs[0], *good)
                assert isinstance(why, str), (rung, i, how)
                assert all((o == (7 if j != i else o)).all() for j, o in enumerate(outs)), (rung, i, how)
        if op.returns == "Tensor[]":
            assert isinstance(kernel(fit[:-1], *good), str) and isinstance(kernel([*fit, fit[0]], *good), str), rung
