"""The ladder: one table, and the only place that chooses which kernel runs.

Rungs are tried from the left. A kernel either does all of the work or refuses in words, and then the next one is asked;
`reference` never refuses. GPU generations and CPU instruction sets are the same idea.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "diffkernels' compiled module _C is missing or does not load here "
        f"({error}). Build it with `pip install .` from a checkout of diffkernels, and run Python outside of the "
        "checkout's root, where the source tree hides the installed package."
    ) from error

if TYPE_CHECKING:
    from ._op import Op

LADDER = {
    "cuda": ("sm90", "cuda", "triton", "reference"),
    "cpu": ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "cpu", "reference"),
}
RUNGS = tuple(dict.fromkeys(LADDER["cuda"][:-1] + LADDER["cpu"]))

Kernel = Callable[..., str | None]

log = logging.getLogger("diffkernels")
_native: dict[tuple[str, str], Kernel] = {(rung, op): kernel for rung, op, _, kernel in _C.kernels}
# The rung that `rung()` or DIFFKERNELS_RUNG has put in force here, or None.
forced_rung: ContextVar[str | None] = ContextVar("diffkernels_rung", default=None)
_said: set[tuple[str, str, str]] = set()


class RungError(RuntimeError):
    """A rung was asked for and can't run the call; the text gives its reason."""


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def unavailable(rung: str, device: str) -> str | None:
    """Why no kernel of `rung` can run on this machine's `device` ("cpu" or "cuda"), or None where it can."""
    if rung == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu" and not interpreting():
            return "runs on CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1"
    elif rung not in LADDER[device]:
        return f"does not run on {device} tensors"
    elif rung in ("cuda", "sm90") and not _C.build["cuda"]:
        return "not built: there was no nvcc"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        if rung == "sm90" and torch.cuda.get_device_capability() != (9, 0):
            return "needs a GPU of compute capability 9.0"
        if rung == "cuda" and not _built_for(torch.cuda.get_device_capability()):
            return f"not built for this GPU's architecture: CUDA {_C.build['cuda']}"
    elif rung not in ("cpu", "triton", "reference", *_C.cpu_features()):
        return f"this processor has no {rung.replace('_', ' with ')}"
    return None


def _built_for(capability: tuple[int, int]) -> bool:
    """Whether this build's CUDA code runs there: machine code within a generation, PTX (no "-real") from its own on."""
    number = 10 * capability[0] + capability[1]
    for arch in _C.build["cuda"].partition(" for ")[2].split():
        digits = int("".join(c for c in arch.partition("-")[0] if c.isdigit()))
        if digits <= number and ("-real" not in arch or digits // 10 == capability[0]):
            return True
    return False


def kernel(rung: str, op: str) -> Kernel | None:
    """The kernel of `op` on `rung`, or None where none was written."""
    if rung != "triton":
        return _native.get((rung, op))
    name = f"{__package__}.triton.{op}"
    if importlib.util.find_spec(name) is None:
        return None
    return getattr(importlib.import_module(name), op)


def missing(rung: str, op: str, device: str) -> str | None:
    """Why `op` has nothing to run on `rung` here, or None where it has."""
    why = unavailable(rung, device)
    if why is None and rung != "reference" and kernel(rung, op) is None:
        why = "no kernel"
    return why


@functools.cache
def _rungs(op: str, device: str, forced: str | None) -> tuple[tuple[str, Kernel | None], ...]:
    if forced is None:
        names = tuple(rung for rung in LADDER[device] if missing(rung, op, device) is None)
    else:
        why = missing(forced, op, device)
        if why is not None:
            raise RungError(f"{op}: rung {forced!r} was forced, but: {why}")
        names = (forced,)
    return tuple((name, None if name == "reference" else kernel(name, op)) for name in names)


def first(op: str, device: str) -> Kernel | None:
    """The kernel that a call of `op` meets first, or None where only the reference is left."""
    return _rungs(op, device, None)[0][1]


def running(op: str, device: str = "cpu") -> str:
    """The name of the rung that a call of `op` on `device` meets first, forced rungs included."""
    return _rungs(op, device, forced_rung.get())[0][0]


def climb(op: Op, device: str, args: tuple[Any, ...]) -> Any:
    """Runs `op` on the first rung that takes it and returns its outputs."""
    forced = forced_rung.get()
    rungs = _rungs(op.name, device, forced) if device in LADDER else (("reference", None),)
    op.check(*args)  # an invalid call is refused everywhere: it gets its own words here
    outs = refused = None
    for rung, run in rungs:
        if run is None:
            break
        if outs is None:
            outs = op.allocate(*args)
        why = run(outs, *args)
        if why is None:
            return outs
        refused = (rung, why)
    else:
        assert refused is not None
        raise RungError(f"{op.name}: rung {refused[0]!r} was forced, but it refuses: {refused[1]}")
    if forced is None:
        _fell(op.name, device, refused)
    return op.reference(*args)


def _fell(op: str, device: str, refused: tuple[str, str] | None) -> None:
    """Says once per reason that a call ended on the reference; an error under DIFFKERNELS_STRICT on an accelerator."""
    rung, why = refused or (
        "every rung",
        "; ".join(sorted({str(missing(r, op, device)) for r in LADDER.get(device, ())[:-1]})),
    )
    if device != "cpu" and os.environ.get("DIFFKERNELS_STRICT", "0") not in ("", "0"):
        raise RungError(f"{op}: fell to the reference on {device} (DIFFKERNELS_STRICT): {rung}: {why}")
    if (op, rung, why) not in _said:
        _said.add((op, rung, why))
        level = logging.INFO if device == "cpu" else logging.WARNING
        log.log(level, "%s runs its PyTorch reference on %s: %s: %s", op, device, rung, why)


@contextmanager
def rung(name: str) -> Iterator[None]:
    """Forces every op in the block onto one rung; a rung that can't run a call raises `RungError` with its reason.

    The environment variable DIFFKERNELS_RUNG does the same for a whole process. Raises ValueError for an unknown name.
    """
    token = forced_rung.set(_known(name))
    try:
        yield
    finally:
        forced_rung.reset(token)


def _known(name: str) -> str:
    if name not in RUNGS:
        raise ValueError(f"rung: expected one of {', '.join(RUNGS)}; got {name!r}")
    return name


def explain(call: Any, *args: Any, **kwargs: Any) -> str:
    """Each rung's answer to `call(*args, **kwargs)`, a line each, the one that runs marked.

    `call` is a function of `diffkernels.ops`. The kernels really run; the first that takes the call is the one that a
    plain call would use.
    """
    op = call.op
    values = op.bind(args, kwargs)
    op.check(*values)
    device = op.device(values)
    lines, taken = [], False
    for name in LADDER.get(device, ("reference",)):
        why = missing(name, op.name, device)
        run = None if name == "reference" or why else kernel(name, op.name)
        if run is not None:
            why = run(op.allocate(*values), *op.apart(values))
        mark, taken = ("->", True) if why is None and not taken else ("  ", taken)
        lines.append(f"{mark} {name:<12} {why or ('runs' if mark == '->' else 'would run')}")
    return "\n".join(lines)


if "DIFFKERNELS_RUNG" in os.environ:
    forced_rung = ContextVar("diffkernels_rung", default=_known(os.environ["DIFFKERNELS_RUNG"]))
