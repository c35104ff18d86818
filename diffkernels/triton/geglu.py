"""gelu(a) * b: one program a block of a row; contiguous tensors are one long row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm


@triton.jit
def _kernel(
    y,  # [R, D] contiguous
    a, b,  # (data, row stride, column stride)
    D,
    TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    h = tl.load(a[0] + row * a[1] + column * a[2], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(b[0] + row * b[1] + column * b[2], mask=mask, other=0.0).to(tl.float32)
    if TANH:  # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)), by an exponential that can't overflow
        z = 1.5957691216057308 * (h + 0.044715 * h * h * h)  # 2 sqrt(2 / pi)
        t = tl.exp(-tl.abs(z))
        phi = tl.where(z < 0, t, 1.0) / (1.0 + t)
    else:
        phi = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    tl.store(y + row * D + column, (h * phi * u).to(y.dtype.element_ty), mask=mask)


def geglu(y: Tensor, a: Tensor, b: Tensor, approximate: str) -> str | None:
    """The op of that name on the Triton rung."""
    if a.dtype not in _norm.FLOATS or b.dtype != a.dtype:
        return "a, b: not alike, or not float32, float16 or bfloat16"
    if a.ndim < 1 or b.shape != a.shape or approximate not in ("none", "tanh"):
        return "shapes that differ, or an unknown `approximate`"
    if a.numel() == 0:
        return None
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
    block = min(1024, triton.next_power_of_2(a.shape[-1]))
    with torch.cuda.device_of(a):
        _kernel[(a.numel() // a.shape[-1] * triton.cdiv(a.shape[-1], block),)](
            y, _norm.matrix(a), _norm.matrix(b), a.shape[-1], TANH=approximate == "tanh", BLOCK=block
        )
    return None
