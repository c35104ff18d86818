"""Passes over the activation: what each op of a module reads and writes, counted while it runs.

A unit is one read or one write of the module's activation. Views, matrix products, convolutions by torch, attention and
lookups are left out: they are what remains when everything else is fused. What a product's epilogue reads besides is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "convolution",
    "conv2d_w8a8",
    "attention",
    "embedding",
    "empty",
)
EPILOGUE = ("gate", "residual")


@dataclass
class Passes(TorchDispatchMode):
    """A mode: `with Passes(unit) as passes: block(x)`. `unit` is the number of elements of the activation.

    `reads` and `writes` are in units, `calls` counts the ops, `by_op` has (calls, units) a name.
    """

    unit: int
    reads: float = 0.0
    writes: float = 0.0
    calls: int = 0
    by_op: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].rstrip("_")
        product = any(p in name for p in PRODUCTS)
        beside = [a for a, p in zip(args, func._schema.arguments, strict=False) if product and p.name in EPILOGUE]
        if func.is_view or (product and not _elements(beside)) or name in ("detach", "alias", "_unsafe_view"):
            return out
        read = _elements(beside if product else (args, kwargs)) / self.unit
        write = 0.0 if product else _elements(out) / self.unit
        self.reads, self.writes, self.calls = self.reads + read, self.writes + write, self.calls + 1
        entry = self.by_op.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += read + write
        return out


def _elements(tree: Any) -> int:
    return sum(_distinct(t) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


def _distinct(t: Tensor) -> int:
    """Elements in memory: an expanded dimension is read once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count


def count(call: Callable[[], Any], unit: int) -> Passes:
    """The passes of one call, without gradients; a call before it has laid what is laid once."""
    with torch.no_grad():
        call()
        with Passes(unit) as passes:
            call()
    return passes
