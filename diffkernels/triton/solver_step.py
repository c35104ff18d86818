"""m = map(sum A p + a x + s z_0); y_j = c_j m + d_j x + sum h_jk u_k + s_j z_(1+j): one program a run of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._solver import MAX_HISTORY, MAX_OUTPUTS, MAX_RESULTS, RUN, width
from ._philox import normals

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def combined(
    b, e, inside, outputs, output_samples, x, row, coef_column, gain, guided, OUTPUTS: tl.constexpr, TWO_ROWS: tl.constexpr
):  # fmt: skip
    """gain sum A p + a x at elements e of sample b, where the state is x: how m begins."""
    m = tl.zeros_like(x)
    for g in tl.static_range(OUTPUTS):
        a = tl.load(row + g * coef_column)
        if TWO_ROWS:
            a = tl.where(e < guided, a, tl.load(row + (OUTPUTS + g) * coef_column))
        m += a * tl.load(outputs[g] + b * output_samples[g] + e, mask=inside, other=0.0).to(tl.float32)
    if gain is not None:
        m *= tl.load(gain + b)
    return m + tl.load(row + OUTPUTS * (2 if TWO_ROWS else 1) * coef_column) * x


@triton.jit
def _kernel(
    results,
    copy, flags,  # or None
    outputs,  # tuples of [B, E] tensors, contiguous within a sample
    output_samples,
    terms,  # x, history
    term_samples,
    masks,  # mask, known, or None
    mask_samples,
    coef, coef_step, coef_sample, coef_column, T,
    step, seed, gain, bound,  # the last three: one a sample, or None
    B, E, guided,
    OUTPUTS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr, TWO_ROWS: tl.constexpr, COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(E, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < E
    now = tl.load(step)
    valid = (now >= 0) & (now < T)
    row = coef + tl.where(valid, now, 0).to(tl.int64) * coef_step + b * coef_sample
    x = tl.load(terms[0] + b * term_samples[0] + e, mask=inside, other=0.0)

    m = combined(b, e, inside, outputs, output_samples, x, row, coef_column, gain, guided, OUTPUTS, TWO_ROWS)
    at: tl.constexpr = OUTPUTS * (2 if TWO_ROWS else 1) + 1
    drawn: tl.constexpr = seed is not None
    if drawn:
        key = tl.load(seed + b)
        s = tl.load(row + at * coef_column)
        if s != 0:
            m += s * normals(key, now, 0, first, BLOCK)
    m = tl.where(valid, m, float("nan"))
    if flags is not None:
        bad = inside & ~(tl.abs(m) < float("inf"))
        tl.store(flags + tl.program_id(0), tl.max(bad.to(tl.int32), axis=0).to(tl.float32))

    lo = tl.load(row + (at + drawn) * coef_column)
    hi = tl.load(row + (at + drawn + 1) * coef_column)
    unclear = (lo != lo) | (hi != hi)
    reach = 1.0
    if bound is not None:
        reach = tl.load(bound + b)
        reach = tl.where(reach < lo, lo, reach)  # comparisons as torch.clamp: a NaN stays
        reach = tl.where(reach > hi, hi, reach)
        unclear |= reach != reach
        lo = -reach
        hi = reach
    m = tl.where(m < lo, lo, m)  # a NaN in m stays, a NaN bound spreads
    m = tl.where(m > hi, hi, m)
    m = tl.where(unclear, float("nan"), m)
    if bound is not None:
        m = tl.div_rn(m, reach)
    if masks is not None:
        share = tl.load(row + (at + drawn + 2) * coef_column)
        share *= tl.load(masks[0] + b * mask_samples[0] + e, mask=inside, other=0.0)
        m = (1.0 - share) * m + share * tl.load(masks[1] + b * mask_samples[1] + e, mask=inside, other=0.0)

    head: tl.constexpr = at + drawn + (2 if masks is None else 3)
    each: tl.constexpr = 1 + TERMS + drawn
    for j in tl.static_range(RESULTS):
        c = row + (head + j * each) * coef_column
        y = tl.load(c) * m + tl.load(c + coef_column) * x
        for k in tl.static_range(1, TERMS):
            u = tl.load(terms[k] + b * term_samples[k] + e, mask=inside, other=0.0)
            y += tl.load(c + (1 + k) * coef_column) * u
        if drawn:
            s = tl.load(c + (1 + TERMS) * coef_column)
            if s != 0:
                y += s * normals(key, now, 1 + j, first, BLOCK)
        y = tl.where(valid, y, float("nan"))
        tl.store(results[j] + b * E + e, y, mask=inside)
        if j == 0 and COPIES > 0:
            y *= tl.load(row + (head + RESULTS * each) * coef_column)
            for n in range(COPIES):
                tl.store(copy + (n * tl.cast(B, tl.int64) + b) * E + e, y.to(copy.dtype.element_ty), mask=inside)


def flattened(t: Tensor) -> Tensor:
    """[B, E], contiguous within a sample: a copy only where it is not."""
    flat = t.reshape(t.shape[0], -1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def refusal(
    outputs: list[Tensor], x: Tensor, coef: Tensor, step: Tensor, gain: Tensor | None, guided: int, columns: int
) -> str | None:
    """What the ops over a solver's coefficient table do not take here."""
    if x.ndim < 1 or not 1 <= len(outputs) <= MAX_OUTPUTS or any(t.shape != x.shape for t in outputs):
        return "outputs: not 1 to 4 of x's shape"
    if any(t.dtype not in FLOATS or t.dtype != outputs[0].dtype for t in outputs):
        return "outputs: not float32, float16 or bfloat16, alike"
    if x.dtype != torch.float32 or coef.dtype != torch.float32 or step.dtype != torch.int32 or step.ndim != 0:
        return "x, coef or step: not float32, or step: not a 0-dim int32"
    if guided != -1 and (x.ndim < 2 or not 0 <= guided <= x.shape[1]):
        return "guided_channels: out of range"
    if coef.ndim != 3 or coef.shape[1] not in (1, x.shape[0]) or coef.shape[2] < columns or coef.shape[0] < 1:
        return "coef: not [T, B or 1, K]"
    if gain is not None and (gain.shape != x.shape[:1] or gain.dtype != torch.float32):
        return "gain: not float32 [B]"
    if step.device.type == "cpu" and not 0 <= int(step) < coef.shape[0]:
        return "step: not a row of coef"
    return None


def table(coef: Tensor) -> tuple[Tensor, int, int, int, int]:
    """The table, its strides by step, sample and column, and how many steps it has."""
    return coef, coef.stride(0), 0 if coef.shape[1] == 1 else coef.stride(1), coef.stride(2), coef.shape[0]


def solver_step(
    made: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    history: list[Tensor],
    coef: Tensor,
    step: Tensor,
    seed: Tensor | None,
    gain: Tensor | None,
    bound: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    results: int,
    guided_channels: int,
    copies: int,
    copy_dtype: str,
    watch: bool,
) -> str | None:
    """The op of that name on the Triton rung."""
    if len(history) > MAX_HISTORY or not 1 <= results <= MAX_RESULTS or not 0 <= copies <= MAX_OUTPUTS:
        return "counts out of range"
    two_rows, masks = guided_channels != -1, [t for t in (mask, known) if t is not None]
    flags = {"seed": seed is not None, "guided": two_rows, "mask": mask is not None, "copies": copies > 0}
    columns = width(len(outputs), len(history), results, **flags)
    why = refusal(outputs, x, coef, step, gain, guided_channels, columns)
    if why is not None:
        return why
    if len(masks) == 1 or any(t.shape != x.shape or t.dtype != torch.float32 for t in (*history, *masks)):
        return "history, mask or known: not float32 of x's shape, or one of mask and known"
    if bound is not None and (bound.shape != x.shape[:1] or bound.dtype != torch.float32):
        return "bound: not float32 [B]"
    if seed is not None and (seed.shape != x.shape[:1] or seed.dtype != torch.int64):
        return "seed: not int64 [B]"
    if copies and copy_dtype not in ("float32", "float16", "bfloat16"):
        return "copy_dtype: not float32, float16 or bfloat16"
    if x.numel() == 0:
        return None
    flat, terms, pair = ([flattened(t) for t in given] for given in (outputs, [x, *history], masks))
    elements = terms[0].shape[1]
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(elements, RUN) * x.shape[0],)](
            tuple(made[:results]), made[results] if copies else None, made[-1] if watch else None,
            tuple(flat), tuple(t.stride(0) for t in flat),
            tuple(terms), tuple(t.stride(0) for t in terms),
            tuple(pair) or None, tuple(t.stride(0) for t in pair) or None,
            *table(coef), step, *(t if t is None else t.contiguous() for t in (seed, gain, bound)),
            x.shape[0], elements, elements // x.shape[1] * guided_channels if two_rows else elements,
            OUTPUTS=len(outputs), TERMS=len(terms), RESULTS=results, TWO_ROWS=two_rows, COPIES=copies, BLOCK=RUN,
            enable_fp_fusion=False,  # noise is bit for bit that of the other rungs
        )  # fmt: skip
    return None
