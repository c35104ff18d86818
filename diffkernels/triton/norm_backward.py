"""The gradients of norm_modulate and gate_residual_norm, with h = (x - mean) / d and dh = grad * (1 + scale) * weight:

    G = (dh - mean(dh) - k h mean(dh h)) / d + residual,    d delta = G gate,    sums over rows for the operands

A program takes a run of consecutive rows that share a row of each operand (or own one), keeps a row and the operands' sums
in registers, and leaves the sums in scratch; `_sums` adds them up. The run depends on the shapes alone.
Where a row and its sums don't fit, one more kernel walks each row for what its gradient needs of the whole, and then a
program takes a block of columns of a run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._norm import divide_by, operand, statistics, walked_statistics
from ._sums import add_up

REGISTERS = 40960  # floats that a program may hold: its sums, and three more in use at a time
BLOCK = 2048  # columns that it takes of a row that does not fit
SCALARS = tl.constexpr(5)  # of a row: mean in two parts, 1 / d, mean(dh), k mean(dh h)


@triton.jit
def _load(t, row, column, mask):
    """Of t = (data, row stride, column stride)."""
    return tl.load(t[0] + row * t[1] + column * t[2], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _factor(scale, weight, row, column, mask):
    """dh / grad"""
    factor = 1.0
    if weight is not None:
        factor = operand(weight, row, column, mask)
    if scale is not None:
        factor = factor * (1.0 + operand(scale, row, column, mask))
    return factor


@triton.jit
def _slope(ms, divisor, INSIDE: tl.constexpr):
    """k: eps outside of the root has a kink where ms is 0."""
    return 1.0 if INSIDE else tl.where(ms == 0, 0.0, divisor / tl.sqrt(tl.where(ms == 0, 1.0, ms)))


@triton.jit
def _walk(scalars, grad, x, scale, weight, D, eps, LAYER: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The scalars of a wide row: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    mean, rest, ms = walked_statistics(x[0] + row * x[1], x[2], D, LAYER, BLOCK)
    divisor = divide_by(ms, eps, INSIDE)
    first_sum = tl.zeros([BLOCK], tl.float32)
    second_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        column = first + lane
        mask = column < D
        dh = _load(grad, row, column, mask) * _factor(scale, weight, row, column, mask)
        h = tl.where(mask, _load(x, row, column, mask) - mean - rest, 0.0) / divisor
        first_sum += dh
        second_sum += dh * h
    at = scalars + row * SCALARS
    tl.store(at, mean)
    tl.store(at + 1, rest)
    tl.store(at + 2, 1.0 / divisor)
    tl.store(at + 3, tl.sum(first_sum, axis=0) / D if LAYER else 0.0)
    tl.store(at + 4, _slope(ms, divisor, INSIDE) * (tl.sum(second_sum, axis=0) / D))


@triton.jit
def _collect(total, v, own, at, mask):
    """Adds what a row gives to an operand's sum, or stores it where the row owns a row of the operand."""
    if own is None:
        total += v
    else:
        tl.store(own + at, v.to(own.dtype.element_ty), mask=mask)
    return total


@triton.jit
def _kernel(
    dx, d_delta,  # [R, D] contiguous, or None
    own,  # scale's, shift's, weight's, bias's and gate's gradient, where each row owns a row of it, else None
    parts,  # [programs, D] of those that are summed, else None
    grad, x, residual, delta,  # (data, row stride, column stride); the last two may be None
    scale, weight, bias, gate,  # operands or None
    scalars,  # [R, SCALARS] where the row does not fit, else None
    D, eps,
    unit, runs, rows,  # each `unit` of rows is cut into `runs` of at most `rows`
    LAYER: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    of_scale = tl.zeros([BLOCK], tl.float32)
    of_shift = tl.zeros([BLOCK], tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_gate = tl.zeros([BLOCK], tl.float32)
    start = run // runs * unit + run % runs * rows
    count = tl.minimum(rows, (run // runs + 1) * unit - start)
    for i in range(count):
        row = start + i
        at = row * D + column
        h = _load(x, row, column, mask)
        g = _load(grad, row, column, mask)
        if scalars is None:
            mean, rest, ms = statistics(h, mask, D, LAYER)
            divisor = divide_by(ms, eps, INSIDE)
            inverse = 1.0 / divisor
        else:
            mean = tl.load(scalars + row * SCALARS)
            rest = tl.load(scalars + row * SCALARS + 1)
            inverse = tl.load(scalars + row * SCALARS + 2)
        h = tl.where(mask, (h - mean - rest) * inverse, 0.0)

        if dx is not None or d_delta is not None or own[4] is not None or parts[4] is not None:
            dh = g * _factor(scale, weight, row, column, mask)
            if scalars is None:
                first = tl.sum(dh, axis=0) / D if LAYER else 0.0
                second = _slope(ms, divisor, INSIDE) * (tl.sum(dh * h, axis=0) / D)
            else:
                first = tl.load(scalars + row * SCALARS + 3)
                second = tl.load(scalars + row * SCALARS + 4)
            G = (dh - first - h * second) * inverse
            if residual is not None:
                G += _load(residual, row, column, mask)
            if dx is not None:
                tl.store(dx + at, G.to(dx.dtype.element_ty), mask=mask)
            if own[4] is not None or parts[4] is not None:
                of_gate = _collect(of_gate, G * _load(delta, row, column, mask), own[4], at, mask)
            if d_delta is not None:
                if gate is not None:
                    G *= operand(gate, row, column, mask)
                tl.store(d_delta + at, G.to(d_delta.dtype.element_ty), mask=mask)

        if own[0] is not None or parts[0] is not None:
            v = h
            if weight is not None:
                v *= operand(weight, row, column, mask)
            if bias is not None:
                v += operand(bias, row, column, mask)
            of_scale = _collect(of_scale, g * v, own[0], at, mask)
        if own[1] is not None or parts[1] is not None:
            of_shift = _collect(of_shift, g, own[1], at, mask)
        if scale is not None:
            g *= 1.0 + operand(scale, row, column, mask)
        if own[2] is not None or parts[2] is not None:
            of_weight = _collect(of_weight, g * h, own[2], at, mask)
        if own[3] is not None or parts[3] is not None:
            of_bias = _collect(of_bias, g, own[3], at, mask)

    at = run * D + column
    if parts[0] is not None:
        tl.store(parts[0] + at, of_scale, mask=mask)
    if parts[1] is not None:
        tl.store(parts[1] + at, of_shift, mask=mask)
    if parts[2] is not None:
        tl.store(parts[2] + at, of_weight, mask=mask)
    if parts[3] is not None:
        tl.store(parts[3] + at, of_bias, mask=mask)
    if parts[4] is not None:
        tl.store(parts[4] + at, of_gate, mask=mask)


def norm_backward(
    results: list[Tensor],
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    eps_mode: str,
    residual: Tensor | None,
    delta: Tensor | None,
    gate: Tensor | None,
    wanted: int,
) -> str | None:
    """The op of that name on the Triton rung."""
    operands = [scale, shift, weight, bias, gate]
    why = _norm.refusal(x, operands, norm, eps, eps_mode)
    if why is not None:
        return why
    if any(t is not None and (t.shape != x.shape or t.dtype not in _norm.FLOATS) for t in (grad, residual, delta)):
        return "grad, residual or delta: not of x's shape, or not float32, float16 or bfloat16"
    if not 0 <= wanted < 128 or len(results) != wanted.bit_count():
        return "wanted: not the outputs"
    targets = [t for i, t in enumerate((x, scale, shift, weight, bias, delta, gate)) if wanted >> i & 1]
    if any(t is None for t in targets) or (gate is not None and delta is None):
        return "wanted: asks for the gradient of an input that is None, or gate without delta"
    if x.numel() == 0:
        for t in results:
            t.zero_()
        return None
    columns, height = x.shape[-1], x.numel() // x.shape[-1]
    rest = iter(results)
    dx, *found, d_delta, d_gate = (next(rest) if wanted >> i & 1 else None for i in range(7))
    found.append(d_gate)
    met = [_norm.meet(t, x) for t in operands]
    own = [None if m is None or m[2] > 1 else t for t, m in zip(found, met, strict=True)]
    summed = [t for t, o in zip(found, own, strict=True) if t is not None and o is None]
    unit, runs, rows = _runs(height, [m[2] for m in met if m is not None and m[2] > 1], bool(summed))
    block = triton.next_power_of_2(columns)
    keep = block * (3 + len(summed)) <= REGISTERS
    block = block if keep else BLOCK
    grid = (height // unit * runs, triton.cdiv(columns, block))
    how = {"LAYER": norm == "layer", "INSIDE": eps_mode == "inside"}
    grad_x = (_norm.matrix(grad), _norm.matrix(x))
    with torch.cuda.device_of(x):
        parts = x.new_empty(len(summed), grid[0], columns, dtype=torch.float32)
        part = iter(parts)
        parts_of = tuple(next(part) if t is not None and o is None else None for t, o in zip(found, own, strict=True))
        scalars = None
        if not keep:
            scalars = x.new_empty(height, SCALARS.value, dtype=torch.float32)
            _walk[(height,)](scalars, *grad_x, met[0], met[2], columns, eps, **how, BLOCK=BLOCK, num_warps=8)
        _kernel[grid](
            dx, d_delta, tuple(own), parts_of, *grad_x, *(None if t is None else _norm.matrix(t) for t in (residual, delta)),
            met[0], *met[2:], scalars, columns, eps, unit, runs, rows,
            **how, BLOCK=block, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
        add_up(summed, parts, columns)
    return None


def _runs(height: int, repeats: list[int], summing: bool) -> tuple[int, int, int]:
    """Rows that share a row of every operand, the runs that they are cut into, and the most rows of a run.

    Long runs leave few parts, and many runs fill a GPU.
    """
    unit = math.gcd(height, *repeats)
    rows = min(64, max(8, triton.next_power_of_2(height // 512))) if summing else 1
    runs = triton.cdiv(unit, rows)
    rows = triton.cdiv(unit, runs)
    return unit, triton.cdiv(unit, rows), rows
