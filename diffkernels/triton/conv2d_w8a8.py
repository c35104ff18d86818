"""conv2d_w8a8: see `_linear`; a row of x is a window."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._linear import product


def conv2d_w8a8(
    y: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    *rest: Any,
) -> str | None:
    """The op of that name on the Triton rung."""
    if x.ndim != 4 or y.ndim != 4 or x_scale.shape != x.shape[:1] or y.shape[0] != x.shape[0]:
        return "x, x_scale: not [B, H, W, C] and [B]"
    if min(kernel, stride, dilation) < 1 or padding < 0 or max(kernel, stride, dilation, padding) >= 2**31:
        return "kernel, stride, padding or dilation: below its least, or above 2^31"
    _, high, wide, channels = x.shape
    span = dilation * (kernel - 1) + 1
    if min(high, wide) + 2 * padding < span:
        return "x: smaller than the kernel"
    lines, columns = ((size + 2 * padding - span) // stride + 1 for size in (high, wide))
    if tuple(y.shape[1:3]) != (lines, columns):
        return "y: not of x's windows"
    window = (high, wide, channels, lines, columns, kernel, stride, padding, dilation)
    codes = (x, *x.stride())
    return product(
        y, codes, window, x_scale, kernel**2 * channels, weight, None, weight_scale, bias, None, None, gate, residual, *rest
    )
