"""The checks that the models' forward passes share."""

from __future__ import annotations

from torch import Tensor


def check_inputs(x: Tensor, t: Tensor, y: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError where a model of samples [C, H, W] can't take x [B, C, H, W], t [B], [1] or [] and y [B]."""
    c, h, w = shape
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"x: expected shape [B, {c}, {h}, {w}], got {list(x.shape)}")
    b = x.shape[0]
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, b)):
        raise ValueError(f"t: expected shape [{b}], [1] or [], got {list(t.shape)}")
    if y.shape != (b,):
        raise ValueError(f"y: expected shape [{b}], got {list(y.shape)}")
