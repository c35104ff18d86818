"""What the ops over a solver's coefficient table share: where a row's columns are, the checks, and how m begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_OUTPUTS, MAX_HISTORY, MAX_RESULTS = 4, 5, 3
RUN = 1024  # elements of a sample that share one flag of `watch`


def width(
    outputs: int,
    history: int,
    results: int,
    *,
    seed: bool = False,
    guided: bool = False,
    mask: bool = False,
    copies: bool = False,
) -> int:
    """How many columns of a row `solver_step` reads."""
    return outputs * (1 + guided) + 3 + seed + mask + results * (2 + history + seed) + copies


def check_state(outputs: list[Tensor], x: Tensor, step: Tensor, coef: Tensor, columns: int, guided_channels: int) -> None:
    """Raises for what all of these ops refuse."""
    if not 1 <= len(outputs) <= MAX_OUTPUTS:
        raise ValueError(f"outputs: expected 1 to {MAX_OUTPUTS} model outputs, got {len(outputs)}")
    if x.ndim < 1:
        raise ValueError(f"x: expected [B, ...], got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: the sampler's state is float32 (or float64, on the reference); got {x.dtype}")
    for i, t in enumerate(outputs):
        if t.shape != x.shape:
            raise ValueError(f"outputs[{i}]: expected x's shape {list(x.shape)}, got {list(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"outputs[{i}]: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if t.dtype != outputs[0].dtype:
            raise TypeError(f"outputs[{i}]: expected the dtype of outputs[0], {outputs[0].dtype}, got {t.dtype}")
    if guided_channels != -1 and (x.ndim < 2 or not 0 <= guided_channels <= x.shape[1]):
        raise ValueError(f"guided_channels: expected -1 (all) or 0 to x.shape[1], got {guided_channels} for {list(x.shape)}")
    if coef.dtype != x.dtype:
        raise TypeError(f"coef: expected x's dtype {x.dtype}, got {coef.dtype}")
    if coef.ndim != 3 or coef.shape[0] < 1 or coef.shape[1] not in (1, x.shape[0]) or coef.shape[2] < columns:
        raise ValueError(f"coef: expected shape [T, {x.shape[0]} or 1, {columns} or more], got {list(coef.shape)}")
    if step.dtype != torch.int32 or step.ndim != 0:
        raise TypeError(f"step: expected a 0-dim int32 tensor, got {step.dtype} of shape {list(step.shape)}")
    traced = torch.compiler.is_compiling() or type(step) is not Tensor or torch._C._len_torch_dispatch_stack()
    if step.device.type == "cpu" and not traced:
        i = int(step)
        if not 0 <= i < coef.shape[0]:
            raise IndexError(f"step: expected 0 <= step < {coef.shape[0]}, the rows of coef; got {i}")


def check_alike(x: Tensor, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Raises unless every tensor has x's shape and dtype."""
    for name, given in tensors.items():
        each = [(name, given)] if isinstance(given, Tensor) else [(f"{name}[{i}]", t) for i, t in enumerate(given or ())]
        for which, t in each:
            if t.shape != x.shape:
                raise ValueError(f"{which}: expected x's shape {list(x.shape)}, got {list(t.shape)}")
            if t.dtype != x.dtype:
                raise TypeError(f"{which}: expected x's dtype {x.dtype}, got {t.dtype}")


def check_per_sample(x: Tensor, **tensors: Tensor | None) -> None:
    """Raises unless every tensor is [B], of x's dtype."""
    for name, t in tensors.items():
        if t is not None and t.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected [{x.shape[0]}], one a sample, got {list(t.shape)}")
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")


class Columns:
    """The columns of the step's row, one after the other, each [B or 1] with x's dimensions; NaN for a step outside."""

    def __init__(self, coef: Tensor, step: Tensor, x: Tensor) -> None:
        i = step.to(torch.int64).clamp(0, coef.shape[0] - 1)
        row = torch.where(step.eq(i), coef.index_select(0, i.reshape(1))[0], torch.nan)
        self.columns: Iterator[Tensor] = iter(row.unbind(-1))
        self.shape = (-1,) + (1,) * (x.ndim - 1)

    def __call__(self) -> Tensor:
        return next(self.columns).reshape(self.shape)

    def combine(self, tensors: Sequence[Tensor]) -> Tensor:
        """sum_k column_k * tensors[k], in the columns' dtype."""
        total = self() * tensors[0]
        for t in tensors[1:]:
            total = total + self() * t
        return total


def combined(columns: Columns, outputs: list[Tensor], x: Tensor, gain: Tensor | None, guided_channels: int) -> Tensor:
    """gain sum_g A_g outputs_g + a x: how m begins."""
    wide = [t.to(x.dtype) for t in outputs]
    m = columns.combine(wide)
    if guided_channels != -1:
        rest = columns.combine(wide)
        first = torch.arange(x.shape[1], device=x.device) < guided_channels
        m = torch.where(first.reshape((1, -1) + (1,) * (x.ndim - 2)), m, rest)
    if gain is not None:
        m = gain.reshape(columns.shape) * m
    return m + columns() * x
