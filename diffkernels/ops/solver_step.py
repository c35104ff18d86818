"""One step of any diffusion solver in one pass: guidance, parameterisation, pointwise map, update, noise and history write."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._case import Case
from .._op import empty_like, op
from ._philox import normal
from ._solver import (
    FLOATS,
    MAX_HISTORY,
    MAX_OUTPUTS,
    MAX_RESULTS,
    RUN,
    Columns,
    check_alike,
    check_per_sample,
    check_state,
    combined,
    width,
)

COPY_DTYPES = {str(dtype)[6:]: dtype for dtype in FLOATS}


def _check(  # type: ignore[no-untyped-def]
    outputs, x, history, coef, step, seed, gain, bound, mask, known, results, guided_channels, copies, copy_dtype, watch
):
    if len(history) > MAX_HISTORY:
        raise ValueError(f"history: expected at most {MAX_HISTORY} tensors, got {len(history)}")
    if not 1 <= results <= MAX_RESULTS:
        raise ValueError(f"results: expected 1 to {MAX_RESULTS}, got {results}")
    if not 0 <= copies <= MAX_OUTPUTS:
        raise ValueError(f"copies: expected 0 to {MAX_OUTPUTS}, got {copies}")
    if copy_dtype not in COPY_DTYPES:
        raise ValueError(f"copy_dtype: expected one of {', '.join(COPY_DTYPES)}; got {copy_dtype!r}")
    if (mask is None) != (known is None):
        raise ValueError(f"{'mask' if mask is None else 'known'}: expected both of mask and known, or none")
    flags = {"seed": seed is not None, "guided": guided_channels != -1, "mask": mask is not None, "copies": copies > 0}
    columns = width(len(outputs), len(history), results, **flags)
    check_state(outputs, x, step, coef, columns, guided_channels)
    check_alike(x, history=history, mask=mask, known=known)
    check_per_sample(x, gain=gain, bound=bound)
    if seed is not None and seed.shape != x.shape[:1]:
        raise ValueError(f"seed: expected [{x.shape[0]}], one a sample, got {list(seed.shape)}")
    if seed is not None and seed.dtype != torch.int64:
        raise TypeError(f"seed: expected int64, got {seed.dtype}")


def _allocate(  # type: ignore[no-untyped-def]
    outputs, x, history, coef, step, seed, gain, bound, mask, known, results, guided_channels, copies, copy_dtype, watch
):
    made = [empty_like(x) for _ in range(min(results, MAX_RESULTS))]  # runs before the check does
    dtype = COPY_DTYPES[copy_dtype]  # looked up, so refused, without copies too
    if copies:
        made.append(x.new_empty((copies * x.shape[0], *x.shape[1:]), dtype=dtype))
    if watch:
        made.append(x.new_empty((x.shape[0], -(-x.shape[1:].numel() // RUN))))
    return made


def _args(draw: Any, shape: tuple[int, ...], outputs: int = 1, history: int = 0, **more: Any) -> dict[str, Any]:
    """Random tensors and coefficients for T = 3 steps; clamp bounds wide open, or [1, 2] where a sample has its own bound."""
    wanted = more.pop("wanted", ())
    args = {"outputs": [draw(*shape) for _ in range(outputs)], "x": draw.f32(*shape), "results": 1, **more}
    args["history"] = [draw.f32(*shape) for _ in range(history)]
    if "seed" in wanted:
        args["seed"] = draw.seeds(shape[0])
    if "mask" in wanted:
        args["mask"], args["known"] = draw.f32(*shape).sigmoid().round(), draw.f32(*shape)
    for name in {"gain", "bound"} & set(wanted):
        args[name] = draw.f32(shape[0])
    if "copies" in wanted:
        args["copies"], args["copy_dtype"] = 2, str(draw.dtype)[6:]
    guided = "guided_channels" in more
    flags = {"seed": "seed" in wanted, "guided": guided, "mask": "mask" in wanted, "copies": "copies" in wanted}
    coef = draw.f32(3, shape[0] if outputs > 1 else 1, width(outputs, history, args["results"], **flags) + history).clone()
    at = outputs * (1 + guided) + 1 + flags["seed"]
    open_wide = (-1.0, 1.0) if outputs > 2 else (-torch.inf, torch.inf)
    coef[..., at], coef[..., at + 1] = (1.0, 2.0) if "bound" in wanted else open_wide
    return args | {"coef": coef, "step": draw.index(3)}


def _dpmpp_2m_cfg(draw: Any, *shape: int, noise: bool = False) -> dict[str, Any]:
    """y = a x + b m + d m1 + s z and m = (x - sigma (u + w (c - u))) / alpha, m kept as history."""
    w, sigma, alpha, a, b, d = 4.0, 0.6, 0.8, 0.9, 0.3, -0.1
    none, some = ([0.0], [0.5]) if noise else ([], [])
    row = [-sigma / alpha * (1 - w), -sigma / alpha * w, 1 / alpha, *none, -torch.inf, torch.inf]
    row += [b, a, d, *some, 1, 0, 0, *none]
    coef = draw.index(1).new_tensor([[row]], dtype=torch.float32)
    return {
        "outputs": [draw(*shape), draw(*shape)],
        "x": draw.f32(*shape),
        "history": [draw.f32(*shape)],
        "coef": coef,
        "step": draw.index(1),
        "seed": draw.seeds(shape[0]) if noise else None,
        "results": 2,
    }


def _sde_dpmpp_2m_cfg(draw: Any, *shape: int) -> dict[str, Any]:
    return _dpmpp_2m_cfg(draw, *shape, noise=True)


def _flops(*shape: int) -> float:
    return 11 * math.prod(shape)  # m of three terms, y of three


def _fuzz(draw: Any, pick: Any) -> dict[str, Any]:
    shape = (pick.size(4, 0), pick.size(3), pick.size(3000, 0))
    guided = {"guided_channels": pick.randint(0, shape[1])} if pick.random() < 0.3 else {}
    wanted = [name for name in EVERYTHING if pick.random() < 0.3]
    outputs, history, results = pick.randint(1, MAX_OUTPUTS), pick.randint(0, MAX_HISTORY), pick.randint(1, MAX_RESULTS)
    return _args(draw, shape, outputs, history, results=results, watch=pick.random() < 0.3, wanted=wanted, **guided)


def _eager(outputs, x, history):  # type: ignore[no-untyped-def]
    (u, c), m1 = outputs, history[0]
    w, sigma, alpha, a, b, d = 4.0, 0.6, 0.8, 0.9, 0.3, -0.1
    e = u + w * (c - u)
    m = (x - sigma * e) / alpha
    y = a * x + b * m + d * m1
    return y, m


def _eager_noise(outputs, x, history):  # type: ignore[no-untyped-def]
    y, m = _eager(outputs, x, history)
    return y + 0.5 * torch.randn_like(y), m


LATENTS = (16, 4, 128, 128)
EVERYTHING = ("seed", "gain", "bound", "mask", "copies")


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("one-output", lambda d: _args(d, (2, 3, 5))),
        Case("cfg-2m", lambda d: _args(d, (2, 4, 5, 7), 2, 1, results=2)),
        Case("seeded", lambda d: _args(d, (3, 1100), results=2, wanted=("seed",))),
        Case("clamp", lambda d: _args(d, (3, 40), 3)),
        Case("threshold", lambda d: _args(d, (3, 40), 2, wanted=("bound",))),
        Case("inpaint", lambda d: _args(d, (2, 3, 6, 6), wanted=("mask",))),
        Case("rescale", lambda d: _args(d, (2, 3, 6), 2, wanted=("gain",), guided_channels=2)),
        Case("model-input", lambda d: _args(d, (2, 3, 40), 2, wanted=("copies",))),
        Case("watched", lambda d: _args(d, (2, 2, 700), watch=True)),
        Case("first-channels", lambda d: _args(d, (2, 4, 3, 3), 2, guided_channels=3)),
        Case("everything", lambda d: _args(d, (2, 3, 430), 4, 5, results=3, guided_channels=1, watch=True, wanted=EVERYTHING)),
        Case("learned-sigma", lambda d: _args(d, (2, 4, 33)) | {"outputs": [d(2, 8, 33)[:, :4]]}),
        Case("vector", lambda d: _args(d, (7,), 2, 1, wanted=("seed", "copies"))),
        Case("no-samples", lambda d: _args(d, (0, 6), watch=True, wanted=("seed",))),
        Case("no-elements", lambda d: _args(d, (3, 0), 2, results=2, watch=True, wanted=("seed",))),
        Case("dpmpp-2m-cfg-512", _dpmpp_2m_cfg, (1, 4, 64, 64), "SD1.5 latent at 512²", _eager, _flops),
        Case("dpmpp-2m-cfg-1024", _dpmpp_2m_cfg, LATENTS, "SDXL latents at 1024², batch 16", _eager, _flops),
        Case("sde-dpmpp-2m-cfg-1024", _sde_dpmpp_2m_cfg, LATENTS, "the same with noise", _eager_noise),
    ],
)
def solver_step(
    outputs: list[Tensor],
    x: Tensor,
    history: list[Tensor],
    coef: Tensor,
    step: Tensor,
    seed: Tensor | None = None,
    gain: Tensor | None = None,
    bound: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    results: int = 1,
    guided_channels: int = -1,
    copies: int = 0,
    copy_dtype: str = "float32",
    watch: bool = False,
) -> list[Tensor]:
    """One row of a solver's coefficient table applied to a batch: affine, pointwise, affine and noise, in one pass.

    With the coefficients of sample b in `coef[step, b]`, and z_0, z_1, ... its standard normal noise:

        m   = gain sum_g A_g outputs_g + a x + s z_0              guidance and the change of parameterisation
        m   = clamp(m, lo, hi); with `bound`, clamp(m, -t, t) / t where t = clamp(bound, lo, hi)
        m   = (1 - l mask) m + l mask known                       with `mask`
        y_j = c_j m + d_j x + sum_k h_jk history_k + s_j z_(1+j)   the solver's update; c = 1 alone writes m itself

    Args:
        outputs: 1 to 4 raw model outputs, [B, ...] each, of one dtype (float32, float16 or bfloat16), any strides.
        x: the state, [B, ...], float32.
        history: up to 5 tensors like x: earlier results.
        coef: [T, B or 1, K], float32, on the device. A row holds A (one an output), with `guided_channels` A again for the
            other channels, then a, with `seed` s, lo, hi (-inf and inf: no clamp), with `mask` l, then for each result c, d,
            h (one a history tensor) and, with `seed`, s_j, and last, with `copies`, e. What is beyond is not read: see `width`.
        step: 0-dim int32 tensor on the same device: a host number would freeze in a CUDA graph. Outside of [0, T) the
            results are NaN on a GPU, and an IndexError on a CPU.
        seed: [B] int64: noise is a function of the sample's seed, the step, which z it is, and the element within the sample
            (Philox, see `_philox.normal`): the same whatever the batch, the threads or the rung. Not drawn where s = 0.
        gain: [B], like x: a factor of the guided outputs that only the data knows (guidance rescale).
        bound: [B], like x: how far a sample's m reaches (dynamic thresholding, `row_abs_quantile`).
        mask, known: like x: where mask is 1 (and l = 1), m is known (inpainting; the range-null-space projection of a mask).
        results: how many y_j to write, 1 to 3.
        guided_channels: the first A applies to this many leading channels (dimension 1), the second to the rest
            (DiT guides 3 of its 4); -1: all, and the row has no second A.
        copies: also write e y_0 in `copy_dtype`, that many times along the batch: what the next model evaluation takes.
        watch: also write where m was not finite before the clamp: [B, ceil(E / 1024)], 1 where a run of 1024 elements has one.

    Returns:
        `results` contiguous tensors like x, then the copies [copies B, ...], then the flags, like x.

    Raises:
        TypeError, ValueError: dtype, shape or count outside of the above. IndexError: step, on a CPU.

    Source: every step of the solvers in `docs/samplers.md` is a row of this map.
    """
    columns = Columns(coef, step, x)

    def noise(slot: int) -> Tensor:
        assert seed is not None
        return columns() * normal(seed, step, slot, x.shape[1:].numel()).to(x.dtype).reshape(x.shape)

    m = combined(columns, outputs, x, gain, guided_channels)
    if seed is not None:
        m = m + noise(0)
    elements = x.shape[1:].numel()
    runs = torch.nn.functional.pad(m.reshape(x.shape[0], elements), (0, -elements % RUN))
    bad = ~runs.reshape(x.shape[0], -(-elements // RUN), RUN).isfinite().all(-1)
    lo, hi = columns(), columns()
    if bound is None:
        m = torch.clamp(m, lo, hi)
    else:
        reach = torch.clamp(bound.reshape(columns.shape), lo, hi)
        m = torch.clamp(m, -reach, reach) / reach
    if mask is not None and known is not None:
        share = columns() * mask
        m = (1 - share) * m + share * known
    made = []
    for j in range(results):
        y = columns.combine([m, x, *history])
        made.append(y if seed is None else y + noise(1 + j))
    if copies:
        made.append((columns() * made[0]).to(COPY_DTYPES[copy_dtype]).repeat(copies, *[1] * (x.ndim - 1)))
    return [*made, bad.to(x.dtype)] if watch else made
