"""The cases that ops declare with a model's name, timed against PyTorch eager and `torch.compile`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _C, _ladder
from .._case import Case, Draw
from .._op import OPS, Op
from . import dimr, oracle, schedulers
from .timing import measure

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMAT = 1


def cases(ops: list[str] | None = None, dtypes: list[str] | None = None) -> list[tuple[Op, Case, str]]:
    """What there is to time. Raises ValueError, with what there is, for an unknown op or dtype."""
    for name in ops or []:
        if name not in OPS and name not in MODELS:
            raise ValueError(f"op: expected one of {', '.join((*OPS, *MODELS))}; got {name!r}")
    for name in dtypes or []:
        if name not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    return [
        (op, case, dtype)
        for name, op in OPS.items()
        if not ops or name in ops
        for case in op.cases
        if case.model is not None
        for dtype in dtypes or ("f32", "bf16")
    ]


def run(
    op: Op, case: Case, dtype: str, rung: str | None = None, seconds: float = 2.0, backward: bool = False
) -> dict[str, Any]:
    """One row: microseconds and GB/s of ours, the ratio to each peer with its interval, and the error against float64.

    With `backward`: of the op and the gradients of all its inputs, as a training step calls them.
    """
    kwargs = case.args(Draw(DTYPES[dtype]))
    if backward:
        kwargs = {name: a.detach().requires_grad_() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    args = op.bind((), kwargs)
    inputs = [a for a in args if isinstance(a, Tensor)]
    with torch.no_grad():
        outs = pytree.tree_leaves(op.call(*args))
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype) for o in outs]

    def timed(call: Callable[[], Any]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(pytree.tree_leaves(call()), inputs, grads)) if backward else call

    moved = _bytes(args) + _bytes(outs)
    moved += 2 * _bytes(args) + _bytes(outs) if backward else 0  # grads and inputs read, their gradients written
    half = torch.zeros(moved // 2, dtype=torch.uint8)
    other = torch.empty_like(half)

    with _ladder.rung(rung) if rung else contextlib.nullcontext(), torch.set_grad_enabled(backward):
        peers = {name: timed(peer) for name, peer in _peers(case, kwargs).items()}
        ours = timed(lambda: op.call(**kwargs))
        timing = measure({"ours": ours, **peers, "copy": lambda: other.copy_(half)}, seconds)
        got = pytree.tree_leaves(ours())
        here = _ladder.running(op.name)
        exact = oracle.exact(op, args)
        if backward:
            exact = list(torch.autograd.grad(exact, inputs, [g.double() for g in grads]))
    row: dict[str, Any] = {
        "op": op.name + (" and its gradients" if backward else ""),
        "case": case.name,
        "model": case.model,
        "dtype": dtype,
        "rung": here,
        "shape": list(next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)).shape),
        "us": timing.median("ours") * 1e6,
        "us_p10_p90": [t * 1e6 for t in timing.spread("ours")],
        "bytes": moved,
        "gb_per_s": moved / timing.median("ours") / 1e9,
        "percent_of_copy": 100 * timing.ratio("copy", "ours")[0],
        "page_faults": timing.faults["ours"],
        "error": _worst(got, exact),
        "peers": {},
    }
    for name, peer in peers.items():
        ratio, low, high = timing.ratio(name, "ours")
        answer = pytree.tree_leaves(peer())
        row["peers"][name] = {
            "us": timing.median(name) * 1e6,
            "ratio": ratio,
            "ratio_95": [low, high],
            "error": _worst(answer, exact) if _same(answer, pytree.tree_leaves(peer())) else None,
        }
    return row


def dimr_forward(seconds: float = 5.0) -> Iterator[dict[str, Any]]:
    """A whole model's forward pass, everything but its GEMMs and its attention, beside the same in plain PyTorch."""
    name, (contenders, shape) = "dimr-xl-forward", dimr.contenders()
    with torch.no_grad():
        got, exact = (torch.as_tensor(contenders[name]()) for name in ("ours", "eager"))
        with dimr.without_products():
            timing = measure(contenders, seconds)
    ratio, low, high = timing.ratio("eager", "ours")
    yield {
        "op": name,
        "case": "all but GEMMs and attention",
        "model": name,
        "dtype": "f32",
        "rung": _ladder.running("norm_modulate"),
        "shape": shape,
        "us": timing.median("ours") * 1e6,
        "us_p10_p90": [t * 1e6 for t in timing.spread("ours")],
        "difference": ((got - exact).abs().max() / exact.abs().max()).item(),  # of the whole forward, from eager's
        "peers": {"eager": {"us": timing.median("eager") * 1e6, "ratio": ratio, "ratio_95": [low, high]}},
    }


# Rows that belong to no op, by name only: they need gigabytes, or a package that is no dependency.
MODELS: dict[str, Callable[[float], Iterator[dict[str, Any]]]] = {
    "dimr-xl-forward": dimr_forward,
    "schedulers": schedulers.rows,
}


def overhead(seconds: float = 2.0) -> dict[str, Any]:
    """What one eager call costs before and after its kernel: three tensors of a few elements."""
    op = OPS["norm_modulate"]
    x, scale, shift = torch.randn(1, 1, 8), torch.randn(1, 8), torch.randn(1, 8)
    with torch.no_grad():
        timing = measure({"ours": lambda: op.call(x, scale, shift), "torch.add": lambda: torch.add(x, x)}, seconds)
    return {
        "op": "call overhead",
        "case": "three small tensors",
        "model": None,
        "dtype": "f32",
        "rung": _ladder.running(op.name),
        "shape": [1, 1, 8],
        "us": timing.median("ours") * 1e6,
        "us_p10_p90": [t * 1e6 for t in timing.spread("ours")],
        "us_least": min(timing.samples["ours"]) * 1e6,
        "peers": {"torch.add": {"us": timing.median("torch.add") * 1e6, "us_least": min(timing.samples["torch.add"]) * 1e6}},
    }


def _peers(case: Case, kwargs: dict[str, Any]) -> dict[str, Any]:
    if case.eager is None:
        return {}
    mine = {name: kwargs[name] for name in inspect.signature(case.eager).parameters}
    torch._dynamo.reset()  # a graph of its own for every shape, as `dynamic=False` alone would not give
    compiled = torch.compile(case.eager, dynamic=False)
    return {"eager": functools.partial(case.eager, **mine), "compile": functools.partial(compiled, **mine)}


def _bytes(args: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, Tensor))


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """False of a peer that draws noise of its own: its distance from ours says nothing."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _worst(got: list[Tensor], exact: list[Tensor]) -> float | None:
    """The largest error, relative to the largest result; None where a peer's answer is cut in other pieces."""
    if [g.shape for g in got] != [e.shape for e in exact]:
        return None
    return max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True))


def machine() -> dict[str, Any]:
    """What the rows were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k.strip()}
        model = found.get("model name", model)
        if "model" in found:
            model += f" family {found['cpu family']} model {found['model']} stepping {found['stepping']}"
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": list(_C.cpu_features()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _C.build["commit"],
        "compiler": _C.build["compiler"],
        "flags": _C.build["flags"],
        "cuda": _C.build["cuda"],
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine's name as a file's: letters, digits and dashes."""
    words = "".join(c if c.isalnum() else " " for c in f"{machine['cpu']} {machine['cores']} cores".lower()).split()
    return "-".join(w for w in words if w not in ("r", "tm", "cpu", "processor", "family"))


BUILD = ("commit", "torch", "threads", "compiler", "flags", "cuda")  # what a row was measured with


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is the newest of."""
    return row["op"], row["case"], row["dtype"], row["rung"], row["threads"]


def merge(path: Path, here: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes the rows into the machine's file, whole or not at all; older rows of other cases stay.

    Raises ValueError for a file that is no result file of ours.
    """
    stamped = [row | {name: here[name] for name in BUILD} for row in rows]
    machine = {name: value for name, value in here.items() if name not in BUILD}
    old: list[dict[str, Any]] = []
    if path.exists():
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            old = [row for row in content["rows"] if key(row) not in {key(new) for new in stamped}]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a result file of format {FORMAT} ({error})") from error
    content = {"format": FORMAT, "machine": machine, "rows": sorted(old + stamped, key=key)}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def all_rows(
    chosen: list[tuple[Op, Case, str]], rung: str | None, seconds: float, models: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows one by one, so that what was measured survives an interruption."""
    yield overhead(seconds)
    for name in models or []:
        yield from MODELS[name](seconds)
    for op, case, dtype in chosen:
        yield run(op, case, dtype, rung, seconds)
        if case.backward:
            yield run(op, case, dtype, rung, seconds, backward=True)
