"""One step of any diffusion solver in one pass: guidance, parameterisation, clamp, update, noise and history write."""

from __future__ import annotations

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_OUTPUTS, MAX_HISTORY, MAX_RESULTS = 4, 4, 3


def width(outputs: int, history: int, results: int, noise: bool, guided: bool) -> int:
    """K, the number of coefficients in a row: see `solver_step`."""
    return outputs * (2 if guided else 1) + 3 + results * (2 + history + (1 if noise else 0))


def _check(outputs, x, history, coef, step, noise, results, guided_channels):  # type: ignore[no-untyped-def]
    if not 1 <= len(outputs) <= MAX_OUTPUTS:
        raise ValueError(f"outputs: expected 1 to {MAX_OUTPUTS} model outputs, got {len(outputs)}")
    if len(history) > MAX_HISTORY:
        raise ValueError(f"history: expected at most {MAX_HISTORY} tensors, got {len(history)}")
    if not 1 <= results <= MAX_RESULTS:
        raise ValueError(f"results: expected 1 to {MAX_RESULTS}, got {results}")
    if x.ndim < 1:
        raise ValueError(f"x: expected [B, ...], got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: the sampler's state is float32 (or float64, on the reference); got {x.dtype}")
    named = [(f"outputs[{i}]", t) for i, t in enumerate(outputs)]
    named += [(f"history[{i}]", t) for i, t in enumerate(history)]
    named += [("noise", noise)] if noise is not None else []
    for name, t in named:
        if t.shape != x.shape:
            raise ValueError(f"{name}: expected x's shape {list(x.shape)}, got {list(t.shape)}")
        if not name.startswith("outputs") and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")
        if name.startswith("outputs") and t.dtype != outputs[0].dtype:
            raise TypeError(f"{name}: expected the dtype of outputs[0], {outputs[0].dtype}, got {t.dtype}")
    if guided_channels != -1 and (x.ndim < 2 or not 0 <= guided_channels <= x.shape[1]):
        raise ValueError(f"guided_channels: expected -1 (all) or 0 to x.shape[1], got {guided_channels} for {list(x.shape)}")
    if coef.dtype != x.dtype:
        raise TypeError(f"coef: expected x's dtype {x.dtype}, got {coef.dtype}")
    k = width(len(outputs), len(history), results, noise is not None, guided_channels != -1)
    if coef.ndim != 3 or coef.shape[1] not in (1, x.shape[0]) or coef.shape[2] != k:
        raise ValueError(f"coef: expected shape [T, {x.shape[0]} or 1, {k}], got {list(coef.shape)}")
    if step.dtype != torch.int32 or step.ndim != 0:
        raise TypeError(f"step: expected a 0-dim int32 tensor, got {step.dtype} of shape {list(step.shape)}")
    traced = torch.compiler.is_compiling() or type(step) is not Tensor or torch._C._len_torch_dispatch_stack()
    if step.device.type == "cpu" and not traced:
        i = int(step)
        if not 0 <= i < coef.shape[0]:
            raise IndexError(f"step: expected 0 <= step < {coef.shape[0]}, the rows of coef; got {i}")


def _allocate(outputs, x, history, coef, step, noise, results, guided_channels):  # type: ignore[no-untyped-def]
    return [empty_like(x) for _ in range(results)]


def _rows(draw, outputs, history, results, noise=False, guided=False, batch=1, clamp=False):  # type: ignore[no-untyped-def]
    """Random coefficients for T = 3 steps; clamp bounds wide open or at ±1."""
    coef = draw.f32(3, batch, width(outputs, history, results, noise, guided))
    at = outputs * (2 if guided else 1) + 1
    coef[..., at], coef[..., at + 1] = (-1.0, 1.0) if clamp else (-torch.inf, torch.inf)
    return {"coef": coef, "step": draw.index(3), "results": results}


def _dpmpp_2m_cfg(*shape: int):  # type: ignore[no-untyped-def]
    def args(draw):  # type: ignore[no-untyped-def]
        """y = a x + b m + d m1 and m = (x - sigma (u + w (c - u))) / alpha, m kept as history."""
        w, sigma, alpha, a, b, d = 4.0, 0.6, 0.8, 0.9, 0.3, -0.1
        row = [-sigma / alpha * (1 - w), -sigma / alpha * w, 1 / alpha, -torch.inf, torch.inf, b, a, d, 1, 0, 0]
        coef = draw.index(1).new_tensor([[row]], dtype=torch.float32)
        return {
            "outputs": [draw(*shape), draw(*shape)],
            "x": draw.f32(*shape),
            "history": [draw.f32(*shape)],
            "coef": coef,
            "step": draw.index(1),
            "results": 2,
        }

    return args


def _eager(outputs, x, history):  # type: ignore[no-untyped-def]
    (u, c), m1 = outputs, history[0]
    w, sigma, alpha, a, b, d = 4.0, 0.6, 0.8, 0.9, 0.3, -0.1
    e = u + w * (c - u)
    m = (x - sigma * e) / alpha
    y = a * x + b * m + d * m1
    return y, m


@op(
    allocate=_allocate,
    check=_check,
    cases=[
        Case("one-output", lambda d: {"outputs": [d(2, 3, 5)], "x": d.f32(2, 3, 5), "history": [], **_rows(d, 1, 0, 1)}),
        Case(
            "cfg-2m",
            lambda d: {
                "outputs": [d(2, 4, 5, 7), d(2, 4, 5, 7)],
                "x": d.f32(2, 4, 5, 7),
                "history": [d.f32(2, 4, 5, 7)],
                **_rows(d, 2, 1, 2, batch=2),
            },
        ),
        Case(
            "noise-clamp",
            lambda d: {
                "outputs": [d(3, 40)],
                "x": d.f32(3, 40),
                "history": [],
                "noise": d.f32(3, 40),
                **_rows(d, 1, 0, 2, noise=True, batch=3, clamp=True),
            },
        ),
        Case(
            "first-channels",
            lambda d: {
                "outputs": [d(2, 4, 3, 3), d(2, 4, 3, 3)],
                "x": d.f32(2, 4, 3, 3),
                "history": [],
                "guided_channels": 3,
                **_rows(d, 2, 0, 1, guided=True),
            },
        ),
        Case(
            "everything",
            lambda d: {
                "outputs": [d(2, 3, 130) for _ in range(4)],
                "x": d.f32(2, 3, 130),
                "history": [d.f32(2, 3, 130) for _ in range(4)],
                "noise": d.f32(2, 3, 130),
                "guided_channels": 1,
                **_rows(d, 4, 4, 3, noise=True, guided=True, batch=2, clamp=True),
            },
        ),
        Case(
            "learned-sigma",
            lambda d: {"outputs": [d(2, 8, 33)[:, :4]], "x": d.f32(2, 4, 33), "history": [], **_rows(d, 1, 0, 1)},
        ),
        Case("vector", lambda d: {"outputs": [d(7)], "x": d.f32(7), "history": [d.f32(7)], **_rows(d, 1, 1, 1, batch=7)}),
        Case("no-samples", lambda d: {"outputs": [d(0, 6)], "x": d.f32(0, 6), "history": [], **_rows(d, 1, 0, 1)}),
        Case("no-elements", lambda d: {"outputs": [d(3, 0)], "x": d.f32(3, 0), "history": [], **_rows(d, 1, 0, 2, batch=3)}),
        Case("dpmpp-2m-cfg-512", _dpmpp_2m_cfg(1, 4, 64, 64), model="SD1.5 latent at 512²", eager=_eager),
        Case("dpmpp-2m-cfg-1024", _dpmpp_2m_cfg(16, 4, 128, 128), model="SDXL latents at 1024², batch 16", eager=_eager),
    ],
)
def solver_step(
    outputs: list[Tensor],
    x: Tensor,
    history: list[Tensor],
    coef: Tensor,
    step: Tensor,
    noise: Tensor | None = None,
    results: int = 1,
    guided_channels: int = -1,
) -> list[Tensor]:
    """One row of a solver's coefficient table applied to a batch: affine, clamp, affine and noise, in one pass.

    With A, a, lo, hi and, for each result j, (c_j, d_j, h_j, s_j) read from `coef[step, b]` for sample b:

        m     = clamp(sum_g A_g outputs_g + a x, lo, hi)          guidance and the change of parameterisation
        y_j   = c_j m + d_j x + sum_k h_jk history_k + s_j noise   the solver's update; c = 1 alone writes m itself

    Args:
        outputs: 1 to 4 raw model outputs, [B, ...] each, of one dtype (float32, float16 or bfloat16), any strides.
        x: the state, [B, ...], float32.
        history: up to 4 earlier results, like x.
        coef: [T, B or 1, K], float32, on the device. A row holds A (one an output), with `guided_channels` A again for the
            other channels, then a, lo, hi (-inf and inf: no clamp), then for each result c, d, h (one a history tensor)
            and, with `noise`, s. K = `width(...)`.
        step: 0-dim int32 tensor on the same device: a host number would freeze in a CUDA graph. Outside of [0, T) the
            results are NaN on a GPU, and an IndexError on a CPU.
        noise: standard normal, like x, or None.
        results: how many y_j to write, 1 to 3.
        guided_channels: the first A applies to this many leading channels (dimension 1), the second to the rest
            (DiT guides 3 of its 4); -1: all, and the row has no second A.

    Returns:
        `results` contiguous tensors like x.

    Raises:
        TypeError, ValueError: dtype, shape or count outside of the above. IndexError: step, on a CPU.

    Source: every step of DDIM, DDPM, DPM-Solver++, Heun and flow matching is a row of this map (`docs/samplers.md`).
    """
    wide = x.dtype
    i = step.to(torch.int64).clamp(0, coef.shape[0] - 1)
    row = coef.index_select(0, i.reshape(1))[0]
    row = torch.where(step.eq(i), row, torch.nan)
    shape = (-1,) + (1,) * (x.ndim - 1)
    columns = iter(row.unbind(-1))

    def combine(tensors: list[Tensor]) -> Tensor:
        total = None
        for t in tensors:
            term = next(columns).reshape(shape) * t.to(wide)
            total = term if total is None else total + term
        assert total is not None
        return total

    m = combine(outputs)
    if guided_channels != -1:
        rest = combine(outputs)
        first = torch.arange(x.shape[1], device=x.device) < guided_channels
        m = torch.where(first.reshape((1, -1) + (1,) * (x.ndim - 2)), m, rest)
    m = m + next(columns).reshape(shape) * x
    m = torch.clamp(m, next(columns).reshape(shape), next(columns).reshape(shape))
    terms = [m, x, *history, *([noise] if noise is not None else [])]
    return [combine(terms) for _ in range(results)]
