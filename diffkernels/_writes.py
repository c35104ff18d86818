"""What an op that writes to its arguments needs: autograd has to know, and a call must be possible that leaves no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._op import Op


def without_gradient(op: Op, *args: Any) -> Any:
    """The op below autograd. Raises a RuntimeError where a gradient is wanted: torch.library takes no formula for such an op,
    and would forget silently."""
    for name, value in zip(op.names, args, strict=True):
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(f"{name}: {op.name} has no gradient: expected no tensor that requires one, or torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        return noted(op._overload(*args), *[args[i] for i in op.writes])


def noted(out: Any, *written: Tensor) -> Any:
    """`out`; and autograd raises where it has saved what has been written to since."""
    torch.autograd.graph.increment_version(written)
    return out


def copy(t: Tensor) -> Tensor:
    """With the same strides."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
