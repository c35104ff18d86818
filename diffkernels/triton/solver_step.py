"""m = clamp(sum A p + a x, lo, hi); y_j = c_j m + d_j x + sum h_jk u_k + s_j noise: one program a block of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.solver_step import MAX_HISTORY, MAX_OUTPUTS, MAX_RESULTS, width

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _kernel(
    outputs,  # tuples of [B, E] tensors, contiguous within a sample
    output_samples,
    terms,  # x, history, noise
    term_samples,
    results,
    coef, coef_step, coef_sample, coef_column, T,
    step, E, guided,
    OUTPUTS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, TWO_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(E, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    i = tl.load(step)
    valid = (i >= 0) & (i < T)
    row = coef + tl.where(valid, i, 0).to(tl.int64) * coef_step + b * coef_sample
    x = tl.load(terms[0] + b * term_samples[0] + e, mask=mask, other=0.0)
    at: tl.constexpr = OUTPUTS * (2 if TWO_ROWS else 1)
    m = tl.load(row + at * coef_column) * x
    for g in tl.static_range(OUTPUTS):
        a = tl.load(row + g * coef_column)
        if TWO_ROWS:
            a = tl.where(e < guided, a, tl.load(row + (OUTPUTS + g) * coef_column))
        m += a * tl.load(outputs[g] + b * output_samples[g] + e, mask=mask, other=0.0).to(tl.float32)
    lo = tl.load(row + (at + 1) * coef_column)
    hi = tl.load(row + (at + 2) * coef_column)
    m = tl.where(m < lo, lo, m)  # a NaN in m stays
    m = tl.where(m > hi, hi, m)
    m = tl.where((lo != lo) | (hi != hi) | (not valid), float("nan"), m)
    for j in tl.static_range(RESULTS):
        c = row + (at + 3 + j * (1 + TERMS)) * coef_column
        y = tl.load(c) * m + tl.load(c + coef_column) * x
        for k in tl.static_range(1, TERMS):
            u = tl.load(terms[k] + b * term_samples[k] + e, mask=mask, other=0.0)
            y += tl.load(c + (1 + k) * coef_column) * u
        y = tl.where(valid, y, float("nan"))
        tl.store(results[j] + b * E + e, y, mask=mask)


def _samples(t: Tensor) -> Tensor:
    """[B, E], contiguous within a sample: a copy only where it is not."""
    flat = t.reshape(t.shape[0], -1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def solver_step(
    results: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    history: list[Tensor],
    coef: Tensor,
    step: Tensor,
    noise: Tensor | None,
    count: int,
    guided_channels: int,
) -> str | None:
    """The op of that name on the Triton rung."""
    terms = [x, *history, *([noise] if noise is not None else [])]
    if x.ndim < 1 or not 1 <= len(outputs) <= MAX_OUTPUTS or len(history) > MAX_HISTORY or not 1 <= count <= MAX_RESULTS:
        return "counts or dimensions out of range"
    if any(t.shape != x.shape for t in (*outputs, *terms)):
        return "a tensor does not have x's shape"
    if any(t.dtype != torch.float32 for t in (*terms, coef)) or any(t.dtype not in FLOATS for t in outputs):
        return "state and coefficients: not float32, or outputs: not float32, float16 or bfloat16"
    if any(t.dtype != outputs[0].dtype for t in outputs) or step.dtype != torch.int32 or step.ndim != 0:
        return "outputs: not alike, or step: not a 0-dim int32"
    two_rows = guided_channels != -1
    if two_rows and (x.ndim < 2 or not 0 <= guided_channels <= x.shape[1]):
        return "guided_channels: out of range"
    k = width(len(outputs), len(history), count, noise is not None, two_rows)
    if coef.ndim != 3 or coef.shape[1] not in (1, x.shape[0]) or coef.shape[2] != k or coef.shape[0] < 1:
        return "coef: not [T, B or 1, K]"
    if x.numel() == 0:
        return None
    if step.device.type == "cpu" and not 0 <= int(step) < coef.shape[0]:
        return "step: not a row of coef"
    flat_outputs, flat_terms = [_samples(t) for t in outputs], [_samples(t) for t in terms]
    elements = flat_terms[0].shape[1]
    block = 1024
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(elements, block) * x.shape[0],)](
            tuple(flat_outputs), tuple(t.stride(0) for t in flat_outputs),
            tuple(flat_terms), tuple(t.stride(0) for t in flat_terms),
            tuple(results),
            coef, coef.stride(0), 0 if coef.shape[1] == 1 else coef.stride(1), coef.stride(2), coef.shape[0],
            step, elements, elements // x.shape[1] * guided_channels if two_rows else elements,
            OUTPUTS=len(outputs), TERMS=len(terms), RESULTS=count, TWO_ROWS=two_rows, BLOCK=block,
        )  # fmt: skip
    return None
