"""The covariances of a few tensors over the elements of each sample, all of them in one read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._case import Case
from .._op import op
from ._solver import FLOATS, MAX_OUTPUTS


def _check(tensors):  # type: ignore[no-untyped-def]
    if not 1 <= len(tensors) <= MAX_OUTPUTS:
        raise ValueError(f"tensors: expected 1 to {MAX_OUTPUTS}, got {len(tensors)}")
    first = tensors[0]
    for i, t in enumerate(tensors):
        if t.ndim < 1 or t.shape != first.shape:
            raise ValueError(f"tensors[{i}]: expected [B, ...], all of one shape, got {list(t.shape)} and {list(first.shape)}")
        if t.dtype not in FLOATS or t.dtype != first.dtype:
            raise TypeError(f"tensors[{i}]: expected float32, float16 or bfloat16, all of one, got {t.dtype} and {first.dtype}")
    if first.shape[1:].numel() == 0:
        raise ValueError(f"tensors[0]: expected at least one element a sample, got {list(first.shape)}")


def _allocate(tensors):  # type: ignore[no-untyped-def]
    first = tensors[0]
    return first.new_empty((first.shape[0], len(tensors), len(tensors)), dtype=torch.promote_types(first.dtype, torch.float32))


def _args(draw: Any, shape: tuple[int, ...], count: int) -> dict[str, Any]:
    return {"tensors": [draw(*shape) for _ in range(count)]}


def _two(draw: Any, *shape: int) -> dict[str, Any]:
    return _args(draw, shape, 2)


def _flops(*shape: int) -> float:
    return 8 * math.prod(shape)  # of two: their sums, and their three products' sums


def _fuzz(draw: Any, pick: Any) -> dict[str, Any]:
    return _args(draw, (pick.size(4, 0), pick.size(3), pick.size(9000)), pick.randint(1, MAX_OUTPUTS))


def _eager(tensors):  # type: ignore[no-untyped-def]
    return [t.float().flatten(1).std(1) for t in tensors]


@op(
    allocate=_allocate,
    check=_check,
    fuzz=_fuzz,
    cases=[
        Case("one", lambda d: _args(d, (2, 3, 5), 1)),
        Case("two", _two, (3, 4, 30, 9)),
        Case("four", lambda d: _args(d, (2, 1500), 4)),
        Case("one-element", _two, (5,)),
        Case("no-samples", _two, (0, 6)),
        Case("sd15-512", _two, (8, 4, 64, 64), "SD1.5 outputs at 512², batch 8", _eager, _flops),
        Case("sdxl-1024", _two, (16, 4, 128, 128), "SDXL outputs at 1024², batch 16", _eager, _flops),
    ],
)
def row_covariance(tensors: list[Tensor]) -> Tensor:
    """Of every sample, the [K, K] matrix mean((t_i - mean t_i) (t_j - mean t_j)) over its elements.

    Standard deviations of the tensors and of any combination of them follow: guidance rescale (Lin et al., arXiv
    2305.08891, §3.4) needs those of the conditional output and of the guided one.

    Args:
        tensors: 1 to 4 tensors [B, ...] of one shape and dtype (float32, float16 or bfloat16), any strides.

    Returns:
        [B, K, K], float32 (float64 of float64, on the reference).

    Raises:
        TypeError, ValueError: dtype, shape or count outside of the above; samples without elements.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    rows = torch.stack([t.to(wide).reshape(t.shape[0], t.shape[1:].numel()) for t in tensors], 1)
    centred = rows - rows.mean(2, keepdim=True)
    return centred @ centred.transpose(1, 2) / rows.shape[2]
