"""What is right: an op's own body in float64, on the inputs as they are (already rounded)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._op import Op

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ULP[torch.int8] = 1 / 252  # of a code up to 127: a tie may fall to either side
RMS = {torch.float64: 1e-12, torch.float32: 2e-7, torch.float16: 2.6e-4, torch.bfloat16: 2.1e-3, torch.int8: 2e-3}


def widened(args: Any) -> Any:
    """The arguments with every floating-point tensor in float64."""
    return pytree.tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, args)


def results(op: Op, run: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What `run` returns and, after it, what it has written to: copies of the arguments."""
    given = op.apart(args)
    return [*pytree.tree_leaves(run(*given)), *(given[i] for i in op.writes)]


def exact(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The op's results in float64."""
    return results(op, op.body, widened(args))


def own_error(exact: list[Tensor], reference: list[Tensor]) -> float:
    """The definition's largest error in its own dtype, relative to the largest result, over all outputs: where one holds a
    single sum, its own error may be small by luck."""
    worst = 0.0
    for e, r in zip(exact, reference, strict=True):
        error, scale = (r.double().cpu() - e.cpu()).abs(), e.abs().max().item() if e.numel() else 0.0
        if 0 < scale < float("inf") and error.isfinite().all():
            worst = max(worst, error.max().item() / scale)
    return worst


SMALLEST = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}  # normal
SMALLEST[torch.int8] = 1.0


def compare(
    got: Tensor, exact: Tensor, reference: Tensor, c: float = 1.0, rms: bool = True, own: float = 0.0, least: float = 0.0
) -> float:
    """Raises AssertionError, in words, where `got` is further from float64 than the definition in its own dtype is.

    Allowed is `c` times the reference's largest error (or `own`, relative to the largest result, or `least`, where one of them
    is more) plus 2 ulp of the largest result; and with `rms` a relative RMS error of the dtype's rounding, or `c` times the
    reference's own where that is more. NaN and infinities must be where the definition has them. Returns the error as a share
    of the allowed.
    """
    if got.shape != exact.shape or got.dtype != reference.dtype:
        raise AssertionError(f"{got.dtype} {list(got.shape)} instead of {reference.dtype} {list(exact.shape)}")
    dtype = got.dtype
    got, exact, reference = (t.double().cpu() for t in (got, exact, reference))
    if not torch.equal(got.isnan(), exact.isnan()):
        raise AssertionError("NaN in other places than the definition has it")
    finite = exact.isfinite()
    if not finite.all():
        infinite = exact.isinf()
        if not torch.equal(got[infinite], exact[infinite]):
            raise AssertionError("infinities differ")
        got, exact, reference = got[finite], exact[finite], reference[finite]
    if exact.numel() == 0:
        return 0.0
    error, own_largest = (got - exact).abs().max().item(), (reference - exact).abs().max().item()
    own_largest = max(own_largest, own * exact.abs().max().item(), least)
    allowed = c * own_largest + 2 * ULP[dtype] * max(exact.abs().max().item(), SMALLEST[dtype])
    if not error <= allowed:
        raise AssertionError(f"error {error:.3g}, allowed {allowed:.3g} (the definition's own: {own_largest:.3g})")
    norm = exact.square().mean().sqrt().item()
    if rms and norm > 0:
        relative, usual = ((t - exact).square().mean().sqrt().item() / norm for t in (got, reference))
        enough = max(RMS[dtype], 1.1 * c * usual)
        if not relative <= enough:
            raise AssertionError(f"relative RMS error {relative:.3g}, allowed {enough:.3g} (the definition's own: {usual:.3g})")
    return error / allowed
