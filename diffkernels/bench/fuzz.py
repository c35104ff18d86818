"""Seeded fuzz: an op called with random shapes, dtypes, layouts, broadcasts and values, on one rung, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _ladder
from .._case import Pick
from .._op import Op
from . import oracle
from .layouts import FuzzDraw

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BAND = 4096  # bytes of guard band on either side of an output


@dataclass
class Outcome:
    """What one call showed. `share`: its error over the allowed one; `problem`, in words, where something is wrong."""

    op: str
    rung: str
    seed: int
    dtype: str
    what: str  # shapes, layouts, values
    share: float = 0.0
    refused: str | None = None
    problem: str | None = None


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A NaN-filled tensor like `t` inside of a buffer of 7s, and the buffer."""
    pad = BAND // t.element_size()
    buffer = torch.full([t.numel() + 2 * pad], 7, dtype=t.dtype, device=t.device)
    inner = buffer[pad : pad + t.numel()]
    inner.fill_(torch.nan if t.dtype.is_floating_point else torch.iinfo(t.dtype).min)
    return inner.view(t.shape), buffer


def intact(buffer: Tensor) -> bool:
    pad = BAND // buffer.element_size()
    return bool((buffer[:pad] == 7).all() and (buffer[buffer.numel() - pad :] == 7).all())


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, to be compared as they are, NaN and all."""
    flat = [torch.empty(t.numel(), dtype=t.dtype, device=t.device).copy_(t.reshape(-1)) for t in tensors]
    return [t.view(torch.uint8) if t.numel() else t for t in flat]


def drawn(op: Op, seed: int, device: str = "cpu", again: int = 0) -> tuple[tuple[Any, ...], FuzzDraw]:
    """The arguments of call number `seed`, and how they were drawn; with `again`, the same call with other values."""
    pick = Pick(f"{op.name} {seed}")
    draw = FuzzDraw(DTYPES[pick.choice(tuple(DTYPES))], device, seed + again * 1_000_003, pick, op.c > 1)
    return op.bind((), op.fuzz(draw, pick)), draw


def check(op: Op, rung: str, seed: int, device: str = "cpu") -> Outcome:
    """Calls `op` on `rung` with what `seed` draws: right, complete, inside of its outputs, inputs untouched, twice the same."""
    args, draw = drawn(op, seed, device)
    dtype = next(name for name, t in DTYPES.items() if t is draw.dtype)
    shapes = " ".join(f"{name}={_told(a)}" for name, a in zip(op.names, args, strict=True) if a is not None)
    outcome = Outcome(op.name, rung, seed, dtype, f"{draw.kind}; {', '.join(draw.laid)}; {shapes}")
    try:
        with torch.no_grad():
            op.check(*args)
            exact, reference = oracle.exact(op, args), oracle.results(op, op.reference, args)
            got = reference if rung == "reference" else run(op, rung, args)
            if isinstance(got, str):
                outcome.refused = got
            elif rung != "reference" or draw.nan is None:  # the definition may carry a NaN further than it says, as 0 * NaN
                outcome.share = compare(op, rung, draw.kind, got, exact, reference, seed)
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        outcome.problem = str(error)
    return outcome


def run(op: Op, rung: str, args: tuple[Any, ...]) -> list[Tensor] | str:
    """The outputs of the kernel itself, or the words of its refusal. Raises AssertionError for what no kernel may do."""
    kernel = _ladder.kernel(rung, op.name)
    assert kernel is not None
    inputs = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
    before, runs = bits(inputs), []
    for _ in range(2):
        given = op.apart(args)
        empty, tree = pytree.tree_flatten(op.allocate(*args))
        outs, buffers = zip(*(guarded(t) for t in empty), strict=True) if empty else ((), ())
        refused = kernel(pytree.tree_unflatten(outs, tree), *given)
        if not all(intact(b) for b in buffers):
            raise AssertionError("wrote outside of its outputs")
        if any(not torch.equal(a, b) for a, b in zip(before, bits(inputs), strict=True)):
            raise AssertionError("changed an input")
        if refused is not None:
            return refused
        runs.append([*outs, *(given[i] for i in op.writes)])
    if any(not torch.equal(a, b) for a, b in zip(*map(bits, runs), strict=True)):
        raise AssertionError("two runs differ")
    return runs[0]


def compare(op: Op, rung: str, kind: str, got: list[Tensor], exact: list[Tensor], reference: list[Tensor], seed: int) -> float:
    """Raises AssertionError where the results are too far from float64; returns the largest error over the allowed one."""
    truncates = rung == "triton" and _ladder.interpreting() and any(g.dtype is torch.bfloat16 for g in got)  # a GPU rounds
    own, worst = oracle.own_error(exact, reference) if op.c > 1 else 0.0, 0.0
    for i, (g, e, r) in enumerate(zip(got, exact, reference, strict=True)):
        inside = e.isfinite()
        if inside.any() and (r.double() - e)[inside].abs().max() > 0.1 * e[inside].abs().max():
            continue  # all cancelled: the definition itself has no digit left to compare with
        rms = kind == "normal" and not truncates and e.numel() >= 64
        try:
            worst = max(worst, oracle.compare(g, e, r, c=op.c, own=own, rms=rms))
        except AssertionError:  # few numbers, or a sum that cancels: the definition's error may be small by luck
            drawn_again = [_definition(op, seed, again, i, g.device.type) for again in range(1, 17)]
            error, largest = (max(numbers) for numbers in zip(*drawn_again, strict=True))
            least = 4 * error + 2 * oracle.ULP[g.dtype] * largest
            worst = max(worst, oracle.compare(g, e, r, c=op.c, own=own, least=least, rms=False))
    return worst


def _definition(op: Op, seed: int, again: int, i: int, device: str) -> tuple[float, float]:
    """Of output i of the same call with other values: the definition's largest error, and the largest result."""
    args, _ = drawn(op, seed, device, again)
    exact = oracle.exact(op, args)[i]
    error = (oracle.results(op, op.reference, args)[i].double() - exact).abs()
    inside = error.isfinite()
    return (error[inside].max().item(), exact[inside].abs().max().item()) if inside.any() else (0.0, 0.0)


def _told(a: Any) -> str:
    if isinstance(a, Tensor):
        return "×".join(map(str, a.shape)) or "0-d"
    return f"[{', '.join(map(_told, a))}]" if isinstance(a, list) else str(a)
