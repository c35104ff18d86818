"""rotate(norm(x + bias) * weight + shift) of q and k, v + bias: one program some heads of a token, or all of them.

The pairs of "interleaved" are parted in registers; those of "half" are read again, through the first cache. `qkv_quantize`
runs it too: with scales, the rows of q and k, less a center, leave as codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._qkv import NORMS, check
from ._norm import FLOATS, warps
from ._quantize import magnitude, put_codes, scale_of

TILE = 2048  # elements that a program takes where no norm goes across more
WIDEST = 16384  # what one program holds
RMS, LAYER = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _biased(at, x, bias, head, column, mask, D):
    """x [heads, columns] of a token, with its bias."""
    h = tl.load(at + head * x[3] + column * x[4], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + head * D + column, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _affine(h, weight, shift, head, column, mask, D, ACROSS: tl.constexpr):
    i = head * D + column if ACROSS else column
    if weight is not None:
        h *= tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        h += tl.load(shift + i, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _mean(e, H, D, ACROSS: tl.constexpr):
    """Over a head, or over all of them."""
    total = tl.sum(e, axis=1)
    return tl.sum(total, axis=0) / (H * D) if ACROSS else (total / D)[:, None]


@triton.jit
def _less(h, center, sample, head, column, mask):
    """h less (data, strides of samples, heads, columns), which may be absent."""
    if center is not None:
        h = h - tl.load(center[0] + sample * center[1] + head * center[2] + column * center[3], mask=mask, other=0.0)
    return h


@triton.jit
def _kernel(
    y,  # [B, T, H, D] contiguous
    scales,  # of codes: [B, T, H] contiguous, or None
    x,  # (data, strides of samples, tokens, heads, columns)
    center,  # of codes: (data, strides of samples, heads, columns), or None
    bias, weight, shift,  # contiguous, or None
    cos, sin,  # (data, strides of samples and tokens), or None
    T, H, D, half, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, APART: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // T, row % T
    at = x[0] + sample * x[1] + token * x[2]
    y += row * H * D
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < H) & (column < D)
    if APART and NORM == 0:
        mask = mask & (column >= 2 * half)  # the others are read below
    h = _biased(at, x, bias, head, column, mask, D)
    mean = 0.0
    rest = 0.0
    rstd = 1.0
    if NORM != 0:
        if NORM == LAYER:
            mean = _mean(h, H, D, ACROSS)
        e = tl.where(mask, h - mean, 0.0)
        if NORM == LAYER:
            rest = _mean(e, H, D, ACROSS)  # what rounding left
        ms = _mean(e * e, H, D, ACROSS) - rest * rest
        rstd = 1.0 / tl.sqrt(tl.where(ms < 0, 0.0, ms) + eps)  # a NaN stays
        h = _affine((e - rest) * rstd, weight, shift, head, column, mask, D, ACROSS)
    if cos is not None:
        i = tl.arange(0, PAIRS)[None, :]
        c = tl.load(cos[0] + sample * cos[1] + token * cos[2] + i, mask=i < half, other=1.0)
        s = tl.load(sin[0] + sample * sin[1] + token * sin[2] + i, mask=i < half, other=0.0)
        if APART:
            rotated = (head < H) & (i < half)
            a = _biased(at, x, bias, head, i, rotated, D)
            b = _biased(at, x, bias, head, i + half, rotated, D)
            if NORM != 0:
                a = _affine((a - mean - rest) * rstd, weight, shift, head, i, rotated, D, ACROSS)
                b = _affine((b - mean - rest) * rstd, weight, shift, head, i + half, rotated, D, ACROSS)
            a, b = a * c - b * s, b * c + a * s
            mask = mask & (column >= 2 * half)
        else:
            a, b = tl.split(tl.reshape(h, [HEADS, PAIRS, 2]))
            first = tl.where(i < half, a * c - b * s, a)
            second = tl.where(i < half, b * c + a * s, b)
            h = tl.reshape(tl.join(first, second), [HEADS, BLOCK])
    parted: tl.constexpr = APART and cos is not None
    if scales is None:
        tl.store(y + head * D + column, h.to(y.dtype.element_ty), mask=mask)
        if parted:
            tl.store(y + head * D + i, a.to(y.dtype.element_ty), mask=rotated)
            tl.store(y + head * D + i + half, b.to(y.dtype.element_ty), mask=rotated)
    else:
        h = _less(h, center, sample, head, column, mask)
        largest = tl.max(magnitude(h, mask), axis=1)
        if parted:
            a, b = _less(a, center, sample, head, i, rotated), _less(b, center, sample, head, i + half, rotated)
            largest = tl.maximum(largest, tl.max(tl.maximum(magnitude(a, rotated), magnitude(b, rotated)), axis=1))
        code_scale, inverse = scale_of(largest[:, None], 0)
        put_codes(y + head * D + column, h, inverse, mask)
        if parted:
            put_codes(y + head * D + i, a, inverse, rotated)
            put_codes(y + head * D + i + half, b, inverse, rotated)
        tl.store(scales + row * H + head, code_scale, mask=head < H)


def _launch(
    y: Tensor,
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    tables: tuple[Tensor | None, ...],
    apart: bool,
    norm: str,
    across: bool,
    eps: float,
    scales: Tensor | None = None,
    center: Tensor | None = None,
) -> None:
    b, t, h, d = x.shape
    less = None if center is None else (center, center.stride(0) if center.ndim == 3 else 0, *center.stride()[-2:])
    half = 0 if tables[0] is None else tables[0].shape[-1]
    rows = (c if c is None else (c, c.stride(0) if c.ndim == 3 else 0, c.stride(-2)) for c in tables)
    block = triton.next_power_of_2(d)
    pairs = triton.next_power_of_2(half) if apart else block // 2
    heads = triton.next_power_of_2(h) if across and norm != "none" else min(triton.next_power_of_2(h), max(1, TILE // block))
    _kernel[(b * t, triton.cdiv(h, heads))](
        y, scales, (x, *x.stride()), less, *vectors, *rows,
        t, h, d, half, eps, NORM=NORMS.index(norm), ACROSS=across, APART=apart, HEADS=heads, BLOCK=block, PAIRS=pairs,
        num_warps=warps(heads * block),
    )  # fmt: skip


def refusal(q, k, v, vectors, cos, sin, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    """Why not, or None."""
    try:
        check(q, k, v, *vectors, cos, sin, rope, norm, across, eps)
    except (TypeError, ValueError) as why:
        return str(why)
    if any(t is not None and t.dtype not in FLOATS for t in (q, *vectors, cos, sin)):
        return "a tensor is not float32, float16 or bfloat16"
    for t in (q, k) if v is None else (q, k, v):
        heads = triton.next_power_of_2(t.shape[2]) if across and norm != "none" and t is not v else 1
        if heads * triton.next_power_of_2(t.shape[3]) > WIDEST:
            return f"more than {WIDEST} columns of a row"
    return None


def prepare(out, q, k, v, vectors, cos, sin, rope, norm, across, eps, scales=(None, None), center=None):  # type: ignore[no-untyped-def]
    """A call that is not refused; `scales` are q's and k's, where out holds their codes."""
    q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift = (t if t is None else t.contiguous() for t in vectors)
    tables = tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    how = (tables, rope == "half" and cos is not None, norm, across, eps)
    with torch.cuda.device_of(q):
        if q.numel():
            _launch(out[0], q, (q_bias, q_weight, q_shift), *how, scales[0])
        if k.numel():
            _launch(out[1], k, (k_bias, k_weight, k_shift), *how, scales[1], center)
        if v is not None and v.numel():
            _launch(out[2], v, (v_bias, None, None), (None, None), False, "none", False, eps)


def qkv_prep(
    out: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_shift: Tensor | None,
    k_shift: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rope: str,
    norm: str,
    across: bool,
    eps: float,
) -> str | None:
    """The op of that name on the Triton rung."""
    vectors = (q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift)
    why = refusal(q, k, v, vectors, cos, sin, rope, norm, across, eps)
    if why is None:
        prepare(out, q, k, v, vectors, cos, sin, rope, norm, across, eps)
    return why
