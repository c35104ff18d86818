"""What the products over codes share: checks, what their tests draw, and what follows the unpacked weight."""

from __future__ import annotations

import torch

from . import _broadcast, _norm
from .act_quantize import PLAIN as ACTIVATIONS

COLUMNS, DEPTH = 64, 4  # of a packed panel: outputs side by side, and consecutive inputs of each
MOST = (2**31 - 1) // 128**2  # inputs whose products always fit into 32 bits
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    """Everything but the packed weight: what the Linears over 8-bit codes share."""
    if x.dtype != torch.int8:
        raise TypeError(f"x: expected int8 codes, got {x.dtype}")
    if x.ndim < 1 or not x.shape[-1] <= MOST:
        raise ValueError(f"x: expected [..., K] with K up to {MOST}, got shape {list(x.shape)}")
    check_scales(weight_scale, x_scale=x_scale)
    if x_scale.shape != x.shape[:-1]:
        raise ValueError(f"x_scale: expected one a row of x, {list(x.shape[:-1])}, got shape {list(x_scale.shape)}")
    check_dtype(dtype)
    check_rows(x, weight_scale.shape[0], bias, low, up, gate, residual, activation)


def check_rows(x, n, bias, low, up, gate, residual, activation):  # type: ignore[no-untyped-def]
    """What follows a Linear's sums, [..., n] of x's rows."""
    out = x.new_empty((*x.shape[:-1], n), device="meta")
    if (low is None) != (up is None):
        raise ValueError(f"{'low' if low is None else 'up'}: expected low and up, or neither, got one of them")
    check_epilogue(out, activation, bias=bias, low=low, up=up, gate=gate, residual=residual)
    if up is not None and (up.ndim != 2 or up.shape[1] != n):
        raise ValueError(f"up: expected [R, {n}], got shape {list(up.shape)}")
    if low is not None and (low.ndim != x.ndim or low.shape[:-1] != x.shape[:-1]):
        raise ValueError(f"low: expected {[*x.shape[:-1]]} with R behind, got shape {list(low.shape)}")
    if low is not None and low.shape[-1] != up.shape[0]:
        raise ValueError(f"up: expected [{low.shape[-1]}, {n}] for low's shape {list(low.shape)}, got {list(up.shape)}")
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"residual: expected the result's shape {list(out.shape)}, got {list(residual.shape)}")


def check_dtype(dtype):  # type: ignore[no-untyped-def]
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def check_scales(weight_scale, **others):  # type: ignore[no-untyped-def]
    for name, t in (others | {"weight_scale": weight_scale}).items():
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32, got {t.dtype}")
    if weight_scale.ndim != 1:
        raise ValueError(f"weight_scale: expected [N], got shape {list(weight_scale.shape)}")


def check_epilogue(out, activation, **operands):  # type: ignore[no-untyped-def]
    """What follows the sums; `out` is of the result's shape."""
    for name, t in operands.items():
        if t is None:
            continue
        if t.dtype not in _norm.FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if name == "bias" and t.shape != out.shape[-1:]:
            raise ValueError(f"bias: expected [{out.shape[-1]}], got shape {list(t.shape)}")
        if name == "gate" and not _broadcast.matches(t, out):
            raise ValueError(f"gate: expected {_broadcast.expected(out)}, got shape {list(t.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_packed(weight, n, k, depth, how):  # type: ignore[no-untyped-def]
    if weight.dtype != torch.uint8:
        raise TypeError(f"weight: expected uint8, as {how} returns it, got {weight.dtype}")
    packed = (-(-n // COLUMNS), -(-k // depth), COLUMNS, DEPTH)
    if tuple(weight.shape) != packed:
        raise ValueError(f"weight: expected {list(packed)}, {how} of [{n}, {k}], got shape {list(weight.shape)}")


def allocate(x, x_scale, weight_scale, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=result(x_scale, dtype))


def result(x_scale, dtype):  # type: ignore[no-untyped-def]
    return torch.float64 if x_scale.dtype == torch.float64 else DTYPES[dtype]


def named(draw):  # type: ignore[no-untyped-def]
    return str(draw.dtype).removeprefix("torch.") if draw.dtype in DTYPES.values() else "float32"


def low_rank(draw, *lead, r, n):  # type: ignore[no-untyped-def]
    """As large as the rest."""
    return {"low": draw(*lead, r), "up": draw(r, n) / max(1, r) ** 0.5}


def fuzzed(draw, pick, drawn, **how):  # type: ignore[no-untyped-def]
    lead = [pick.size(4, 0), pick.size(40, 0)][pick.randrange(3) :]
    k, n = pick.size(700, 0), pick.size(300, 0)
    gates = [(n,), *(((*lead[:1], n),) if len(lead) == 2 else ())]
    return drawn(
        draw,
        *lead,
        k,
        n=n,
        bias=pick.maybe(lambda: pick.choice((draw, draw.f32))(n)),
        gate=pick.maybe(lambda: draw(*pick.choice(gates))),
        residual=pick.maybe(lambda: pick.choice((draw, draw.f32))(*lead, n)),
        activation=pick.choice(tuple(ACTIVATIONS)),
        **(pick.maybe(lambda: low_rank(draw, *lead, r=pick.size(70, 0), n=n)) or {}),
        **how,
    )


def define(codes, x, x_scale, weight_scale, bias, low, up, gate, residual, activation, dtype):  # type: ignore[no-untyped-def]
    """What the Linears and the convolution over 8-bit codes share, of the weight's int8 codes [N, K]."""
    h = (x.double() @ codes.double().T).to(torch.promote_types(x_scale.dtype, torch.float32))  # exact, then rounded once
    h = h * x_scale.unsqueeze(-1) * weight_scale
    return epilogue(h, bias, low, up, gate, residual, activation).to(result(x_scale, dtype))


def epilogue(h, bias, low, up, gate, residual, activation):  # type: ignore[no-untyped-def]
    """What follows scaled sums, in their dtype."""
    if bias is not None:
        h = h + bias.to(h.dtype)
    if low is not None:
        h = h + low.to(h.dtype) @ up.to(h.dtype)
    h = ACTIVATIONS[activation](h)
    if gate is not None:
        h = h * _broadcast.align(gate, h).to(h.dtype)
    if residual is not None:
        h = h + _broadcast.align(residual, h).to(h.dtype)
    return h
