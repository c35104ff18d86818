"""What is particular to the reductions over a sample: torch.quantile's answer, large and constant samples, any threads."""

from __future__ import annotations

import pytest
import torch

import diffkernels as dk
from diffkernels import ops
from diffkernels._ladder import RUNGS, missing

STEP = torch.tensor(0, dtype=torch.int32)
QUANTILE, COVARIANCE = ([r for r in RUNGS if missing(r, op, "cpu") is None] for op in ("row_abs_quantile", "row_covariance"))


def quantile(x: torch.Tensor, q: float, rung: str) -> torch.Tensor:
    """Of |x|: m = 0 * output + x."""
    with dk.rung(rung):
        return ops.row_abs_quantile([torch.zeros_like(x)], x, torch.tensor([[[0.0, 1.0]]]), STEP, q=q)


def samples(batch: int, elements: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, elements, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rung", QUANTILE)
@pytest.mark.parametrize("q", [0.0, 0.5, 0.95, 0.995, 1.0])
@pytest.mark.parametrize("elements", [1, 2, 33, 5000])
def test_quantile_is_torchs(elements, q, rung) -> None:
    x = samples(3, elements)
    x[1] *= 1e-41  # subnormal numbers have their order too
    torch.testing.assert_close(quantile(x, q, rung), torch.quantile(x.abs(), q, dim=1), rtol=2e-6, atol=3e-45)


@pytest.mark.parametrize("rung", [r for r in QUANTILE if r != "triton"])
def test_quantile_of_many_parts(rung) -> None:
    """A sample of several chunks, that no thread takes alone; ties, and a gap that no histogram bin bridges."""
    x = samples(2, 70_000)
    x[1] = torch.where(x[1] > 0, 1.0, 1000.0)
    for q in (0.3, 0.4999, 0.5, 0.995):
        torch.testing.assert_close(quantile(x, q, rung), torch.quantile(x.abs(), q, dim=1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("rung", QUANTILE)
def test_quantile_between_two_far_values_and_of_nan_and_infinity(rung) -> None:
    x = torch.tensor([[1.0, -3.0], [torch.nan, 1.0], [torch.inf, 2.0], [torch.inf, -torch.inf], [0.0, -0.0]])
    expected = torch.tensor([2.0, torch.nan, torch.inf, torch.inf, 0.0])
    torch.testing.assert_close(quantile(x, 0.5, rung), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("rung", [r for r in COVARIANCE if r not in ("triton", "reference")])
def test_covariance_of_many_parts_far_from_zero(rung) -> None:
    x = [samples(2, 70_000, i) * (i + 1) + 1e4 for i in range(3)]
    exact = torch.stack([torch.cov(torch.stack([t[b].double() for t in x]), correction=0) for b in range(2)])
    with dk.rung(rung):
        torch.testing.assert_close(ops.row_covariance(x).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rung", [r for r in COVARIANCE if r != "reference"])
def test_a_constant_sample_has_no_variance_and_an_outlier_in_front_costs_nothing(rung) -> None:
    constant = torch.full((1, 3001), 0.1)
    late = samples(1, 3001)
    late[0, 0] = 3e4
    with dk.rung(rung):
        got = ops.row_covariance([constant, late])[0]
    assert got[0].tolist() == [0.0, 0.0] and got[1, 0] == 0
    torch.testing.assert_close(got[1, 1].double(), late.double().var(correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rung", [r for r in COVARIANCE if r not in ("triton", "reference")])
def test_threads_change_nothing(rung) -> None:
    x, threads = samples(2, 50_000), torch.get_num_threads()
    with dk.rung(rung):
        before = ops.row_covariance([x, x + 1]), quantile(x, 0.995, rung)
        torch.set_num_threads(1)
        try:
            after = ops.row_covariance([x, x + 1]), quantile(x, 0.995, rung)
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantile(samples(2, 3), 1.5, "reference"), ValueError, "q: expected 0 to 1, got 1.5"),
        (lambda: quantile(samples(2, 0), 0.5, "reference"), ValueError, "x: expected at least one element"),
        (lambda: ops.row_covariance([]), ValueError, "tensors: expected 1 to 4, got 0"),
        (lambda: ops.row_covariance([samples(2, 3), samples(2, 4)]), ValueError, r"tensors\[1\]: expected \[B, ...\]"),
        (lambda: ops.row_covariance([samples(2, 3), samples(2, 3).half()]), TypeError, r"tensors\[1\]: expected float32"),
    ],
)
def test_bad_input(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
