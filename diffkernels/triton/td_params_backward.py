"""The gradients of td_params: a program keeps a block of parameters and their sums, and runs through the times.

d tau is a sum over the parameters: each program leaves its part, which `_sums` adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sums import add_up
from .td_params import BLOCK, refusal, sigmoids


@triton.jit
def _store(out, p, total, mask):
    if out is not None:
        tl.store(out + p, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    d_p0, d_p1, d_w, d_b,  # [P] or None
    d_tau,  # parts, [blocks, T], or None
    grad, grad_time, grad_column,
    p0, p1, w, b, tau,  # contiguous
    P, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    difference = tl.load(p0 + p, mask=mask, other=0.0).to(tl.float32) - tl.load(p1 + p, mask=mask, other=0.0).to(tl.float32)
    slope = 1.0 + tl.load(w + p, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(b + p, mask=mask, other=0.0).to(tl.float32)
    of_p0 = tl.zeros([BLOCK], tl.float32)
    of_p1 = tl.zeros([BLOCK], tl.float32)
    of_w = tl.zeros([BLOCK], tl.float32)
    of_b = tl.zeros([BLOCK], tl.float32)
    for t in range(T):
        time = tl.load(tau + t).to(tl.float32)
        g = tl.load(grad + t * tl.cast(grad_time, tl.int64) + p * grad_column, mask=mask, other=0.0).to(tl.float32)
        s, r = sigmoids(time * slope + c)
        dz = g * difference * s * r
        of_p0 += g * s
        of_p1 += g * r
        of_w += dz * time
        of_b += dz
        if d_tau is not None:
            tl.store(d_tau + tl.program_id(0).to(tl.int64) * T + t, tl.sum(tl.where(mask, dz * slope, 0.0), axis=0))
    _store(d_p0, p, of_p0, mask)
    _store(d_p1, p, of_p1, mask)
    _store(d_w, p, of_w, mask)
    _store(d_b, p, of_b, mask)


def td_params_backward(
    results: list[Tensor], grad: Tensor, p0: Tensor, p1: Tensor, w: Tensor, b: Tensor, tau: Tensor, wanted: int
) -> str | None:
    """The op of that name on the Triton rung."""
    why = refusal(p0, p1, w, b, tau)
    if why is not None:
        return why
    if grad.shape != (len(tau), len(p0)) or grad.dtype != p0.dtype:
        return "grad: not [T, P] of p0's dtype"
    if not 0 <= wanted < 32 or len(results) != wanted.bit_count():
        return "wanted: not the outputs"
    if grad.numel() == 0:
        for t in results:
            t.zero_()
        return None
    rest = iter(results)
    *found, d_tau = (next(rest) if wanted >> i & 1 else None for i in range(5))
    blocks = triton.cdiv(len(p0), BLOCK)
    with torch.cuda.device_of(p0):
        parts = None if d_tau is None else grad.new_empty(1, blocks, len(tau), dtype=torch.float32)
        _kernel[(blocks,)](
            *found, parts, grad, *grad.stride(), *(t.contiguous() for t in (p0, p1, w, b, tau)), len(p0), len(tau), BLOCK=BLOCK
        )
        if d_tau is not None:
            add_up([d_tau], parts, len(tau))
    return None
