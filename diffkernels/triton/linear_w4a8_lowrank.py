"""linear_w4a8_lowrank: see `_linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._linear import linear


def linear_w4a8_lowrank(y: Tensor, x: Tensor, x_scale: Tensor, weight: Tensor, group_scale: Tensor, *rest: Any) -> str | None:
    """The op of that name on the Triton rung."""
    return linear(y, x, x_scale, weight, group_scale, *rest)
