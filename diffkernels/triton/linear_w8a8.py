"""linear_w8a8: see `_linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._linear import linear


def linear_w8a8(y: Tensor, x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """The op of that name on the Triton rung."""
    return linear(y, x, x_scale, weight, None, *rest)
