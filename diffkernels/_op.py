"""@op: a Python function whose body is the op's definition becomes an operator.

From the one declaration derive the torch.library schema, the fake kernel (which is the allocator), the gradient (the vjp of
the body, until `op.backward` declares another), the eager fast path, and what tests, benchmarks and `info` enumerate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _C, _grad, _ladder, _writes
from ._case import Case

_KINDS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "int": "int",
    "float": "float",
    "float | None": "float?",
    "str": "str",
    "bool": "bool",
}
_REAL = (float, int, torch.SymFloat)
_PYTHON = {"int": (int, torch.SymInt), "float": _REAL, "float?": (*_REAL, type(None)), "str": (str,), "bool": (bool,)}
_DEVICES = {1: "cpu", 2: "cuda"}  # DLPack's numbers
_CODES = {torch.bfloat16: (4, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.int8: (0, 8), torch.bool: (6, 8)}
_library = torch.library.Library("diffkernels", "DEF")

OPS: dict[str, Op] = {}


class _First(dict[int, Any]):
    """Device type (DLPack's) to the kernel that a call there meets first; looked up once."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __missing__(self, device: int) -> Any:
        self[device] = run = _ladder.first(self.op, _DEVICES[device])
        return run


class Op:
    """A declared op: see the module's text. `call` is the function that users see."""

    def __init__(
        self,
        body: Callable,
        allocate: Callable,
        check: Callable,
        fuzz: Callable,
        cases: Sequence[Case],
        c: float,
        writes: Sequence[str],
        gradient: bool,
    ) -> None:
        self.name = body.__name__
        self.body, self.allocate, self.fuzz, self._check = body, allocate, fuzz, check
        self.cases, self.c = tuple(cases), c
        self.signature = inspect.signature(body)
        parameters = self.signature.parameters.values()
        self.params = tuple((p.name, _KINDS[str(p.annotation)]) for p in parameters)
        self.names = tuple(self.signature.parameters)
        self.writes = tuple(self.names.index(name) for name in writes)
        self.differentiable = gradient and not writes
        self.optional = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.returns = _KINDS[str(self.signature.return_annotation)]
        self.gradient = _grad.Gradient(body, self.names)
        self.backward = self.gradient.declare

        # PyTorch drops arguments that equal their default on the way to a Python kernel: the schema has none.
        marks = {name: f"(a{i}!)" for i, name in enumerate(writes)}
        schema = ", ".join(f"{kind}{marks.get(name, '')} {name}" for name, kind in self.params)
        _library.define(f"{self.name}({schema}) -> {self.returns}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        qualified = f"diffkernels::{self.name}"
        torch.library.register_fake(qualified, self._fake, lib=_library)
        if not self.differentiable:
            _library.impl(self.name, functools.partial(_writes.without_gradient, self), "Autograd")
        else:
            torch.library.register_autograd(qualified, self.gradient.backward, setup_context=self.gradient.save, lib=_library)
        self._overload = getattr(torch.ops.diffkernels, self.name).default
        self._match_native()
        self.call = self._wrap()
        OPS[self.name] = self

    def reference(self, *args: Any) -> Any:
        """The definition, its outputs laid out as the allocator lays them out."""
        with torch._C._DisableAutocast():  # never casts inside an op
            return pytree.tree_map(lambda t: t.contiguous(), self.body(*args))

    def check(self, *args: Any) -> None:
        """Raises a TypeError, ValueError or IndexError that names the argument, what was expected and what came."""
        first: Tensor | None = None
        for (name, kind), value in zip(self.params, args, strict=True):
            tensors = [value] if kind == "Tensor" or (kind == "Tensor?" and value is not None) else []
            if kind == "Tensor[]":
                if not isinstance(value, list | tuple):
                    raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
                tensors = list(value)
            elif kind in _PYTHON and not isinstance(value, _PYTHON[kind]):
                raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name}: expected a number of 64 bits, got {value:#x}")
            for t in tensors:
                if not isinstance(t, Tensor):
                    raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
                if t.layout is not torch.strided or t.is_nested:
                    raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if t.is_nested else t.layout}")
                first = t if first is None else first
                if t.device != first.device:
                    raise ValueError(f"{name}: expected a tensor on {first.device} like the others, got {t.device}")
        self._check(*args)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in order, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def device(self, args: tuple[Any, ...]) -> str:
        """The device type that chooses the ladder: the first tensor's."""
        return next((t.device.type for t in pytree.tree_leaves(args) if isinstance(t, Tensor)), "cpu")

    def _run(self, *args: Any) -> Any:
        return _ladder.climb(self, self.device(args), args)

    def apart(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, those that the op writes to copied (strides and all): a call that leaves no trace."""
        return tuple(_writes.copy(a) if i in self.writes else a for i, a in enumerate(args))

    def _fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.allocate(*args)

    def _wrap(self) -> Callable:
        """A function of the body's own signature: Python binds its arguments faster than any code of ours."""
        names = ", ".join(self.names)
        out = f"_out if type(_out) is not int else _otherwise(_out, {names})"
        if self.writes:
            out = f"_noted({out}, {', '.join(self.names[i] for i in self.writes)})"
        lines = (
            f"def {self.name}({names}):",
            f"    if _compiling(): return _overload({names})",
            f"    try: _out = _attempt(_first, _op.allocate, {names})",
            f"    except Exception: _op.check({names}); raise",  # the allocator met what it can't: the check's words say what
            f"    return {out}",
        )
        # What the text names: underscored, so that no parameter hides it.
        scope = {"_op": self, "_first": _First(self.name), "_otherwise": self._otherwise, "_overload": self._overload}
        scope |= {"_attempt": _C.attempt, "_compiling": torch.compiler.is_dynamo_compiling, "_noted": _writes.noted}
        exec("\n".join(lines), scope)
        call: Any = functools.wraps(self.body)(scope[self.name])
        call.__defaults__, call.op = self.body.__defaults__, self
        return call

    def _otherwise(self, device: int, *args: Any) -> Any:
        """What no kernel took at once: plain, on DLPack's device type, but forced or refused; or, with 0, not plain."""
        if device:
            return _ladder.climb(self, _DEVICES[device], args)
        self.check(*args)
        return self.reference(*args) if self._transformed() else self._overload(*args)

    def _transformed(self) -> bool:
        """Whether torch.func.grad is at work, which wants the body; vmap and forward mode, silently wrong else, raise."""
        kinds = {i.key().name for i in torch._C._functorch.get_interpreter_stack() or ()}
        if torch.autograd.forward_ad._current_level >= 0:
            kinds.add("Jvp")
        for kind, what in (("Vmap", "torch.func.vmap"), ("Jvp", "forward-mode differentiation")):
            if kind in kinds:
                raise NotImplementedError(f"diffkernels.ops.{self.name} does not support {what}")
        return bool(kinds)

    def _match_native(self) -> None:
        """The signature is written twice, in Python and in C++: they are compared here."""
        expected = [("out", self.returns), *self.params]
        for rung, op, params, _ in _C.kernels:
            if op == self.name and [tuple(p) for p in params] != expected:
                raise ImportError(f"{op} on rung {rung}: Python declares {expected}, C++ has {params}")


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, dtype and device: what most allocators return, as fast as PyTorch gives it."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def alike(x: Tensor, *rest: Any) -> Tensor:
    """The allocator of an op whose output is like its first argument: in an eager call the border knows what it would do."""
    return empty_like(x)


def op(
    *,
    allocate: Callable,
    check: Callable,
    fuzz: Callable,
    cases: Sequence[Case],
    c: float = 1.0,
    writes: Sequence[str] = (),
    gradient: bool = True,
) -> Callable[[Callable], Callable]:
    """Declares an op; the decorated function's body is its definition (wide accumulation and all).

    `allocate(*args)` returns the empty outputs and must be cheap: it runs in every call, and as the fake kernel.
    `check(*args)` raises on invalid arguments: it runs before the reference, in the fake kernel, and once a kernel refused.
    `fuzz(draw, pick)` returns random keyword arguments that are valid: what `diffkernels verify` calls the op with.
    A kernel's error may be `c` times the body's own in the same dtype.
    `writes` names the arguments that the op writes to, as its body does; such an op has no gradient, nor has one that says
    `gradient=False`: where one is wanted, the call is refused.
    """
    return lambda body: Op(body, allocate, check, fuzz, cases, c, writes, gradient).call


def _describe(t: Tensor) -> tuple[Any, ...]:
    """What the border wants to know of a tensor where torch has no exchange API: DLPack's numbers for device and type."""
    code, bits = _CODES.get(t.dtype, (2 if t.dtype.is_floating_point else 1, 8 * t.element_size()))
    device = next((n for n, name in _DEVICES.items() if name == t.device.type), -1)
    return t.data_ptr(), device, t.device.index or 0, code, bits, tuple(t.shape), t.stride()


_C.init(
    getattr(Tensor, "__dlpack_c_exchange_api__", None),
    {
        "describe": _describe,
        "stream": lambda device: torch.cuda.current_stream(device).cuda_stream,
        "threads": torch.get_num_threads,
        "scratch": lambda size, device, index: torch.empty(size, dtype=torch.uint8, device=f"{_DEVICES[device]}:{index}"),
        "tensor": Tensor,
        "alike": alike,
        "empty_like": torch.empty_like,
        "empty_strided": getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None),
        "forced": _ladder.forced_rung,
        "parameter": torch.nn.Parameter,
        "grad_enabled": torch.is_grad_enabled,
        "forward_ad": vars(torch.autograd.forward_ad),
        "modes": [
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._is_tracing,
        ],
    },
)
