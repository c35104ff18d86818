"""s * p0 + (1 - s) * p1, s = sigmoid(tau * (1 + w) + b): a program keeps a block of parameters and runs through the times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm

BLOCK = 1024


@triton.jit
def sigmoids(z):
    """sigmoid(z) and sigmoid(-z), by an exponential that can't overflow."""
    t = tl.exp(-tl.abs(z))
    s = 1.0 / (1.0 + t)
    return tl.where(z < 0, t * s, s), tl.where(z < 0, s, t * s)


@triton.jit
def _kernel(y, p0, p1, w, b, tau, P, T, BLOCK: tl.constexpr):  # all contiguous
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    q1 = tl.load(p1 + p, mask=mask, other=0.0).to(tl.float32)
    difference = tl.load(p0 + p, mask=mask, other=0.0).to(tl.float32) - q1
    slope = 1.0 + tl.load(w + p, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(b + p, mask=mask, other=0.0).to(tl.float32)
    for t in range(T):
        s, _ = sigmoids(tl.load(tau + t).to(tl.float32) * slope + c)
        tl.store(y + t * tl.cast(P, tl.int64) + p, (q1 + s * difference).to(y.dtype.element_ty), mask=mask)


def refusal(p0: Tensor, p1: Tensor, w: Tensor, b: Tensor, tau: Tensor) -> str | None:
    if p0.dtype not in _norm.FLOATS or tau.dtype not in _norm.FLOATS:
        return "a tensor is not float32, float16 or bfloat16"
    if p0.ndim != 1 or tau.ndim != 1 or any(t.shape != p0.shape or t.dtype != p0.dtype for t in (p1, w, b)):
        return "parameters: not one dimension, or not alike"
    return None


def td_params(y: Tensor, p0: Tensor, p1: Tensor, w: Tensor, b: Tensor, tau: Tensor) -> str | None:
    """The op of that name on the Triton rung."""
    why = refusal(p0, p1, w, b, tau)
    if why is not None or y.numel() == 0:
        return why
    with torch.cuda.device_of(p0):
        _kernel[(triton.cdiv(len(p0), BLOCK),)](
            y, *(t.contiguous() for t in (p0, p1, w, b, tau)), len(p0), len(tau), BLOCK=BLOCK
        )
    return None
