"""Philox noise: the published vectors, its moments, and the same bits whatever the rung, the batch's split or the threads."""

from __future__ import annotations

import pytest
import torch

import diffkernels as dk
from diffkernels import ops
from diffkernels._case import Draw
from diffkernels._ladder import RUNGS, missing
from diffkernels._op import OPS
from diffkernels.ops._philox import normal, philox4x32
from diffkernels.ops._solver import width

USABLE = (rung for rung in RUNGS if rung != "reference" and missing(rung, "solver_step", "cpu") is None)
HERE = sorted(USABLE, key="triton".__eq__)  # interpreted, it comes last
FULL = 0xFFFFFFFF
SEEDS = torch.tensor([0, -5, 2**62 + 12345, 1])


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected) -> None:
    assert tuple(int(w) for w in philox4x32(words(*counter), words(*key))) == expected


def drawn(seeds: torch.Tensor, elements: int, step: int = 2, rung: str | None = None) -> list[torch.Tensor]:
    """The noise of slots 0, 1 and 2 as a rung makes it: coefficients let nothing else through."""
    x = torch.zeros(len(seeds), elements)
    tables = []
    for slot in range(3):
        row = torch.zeros(1, width(1, 0, 2, seed=True))
        row[0, 3], row[0, 4] = -torch.inf, torch.inf
        if slot == 0:
            row[0, 2] = row[0, 5] = 1  # m = z_0, y_0 = m
        else:
            row[0, 5 + 3 * (slot - 1) + 2] = 1
        tables.append(row)
    coef = torch.stack(tables)
    results = []
    for slot in range(3):
        table = coef[slot].expand(step + 1, 1, -1)
        with dk.rung(rung or HERE[0]):
            made = ops.solver_step([x], x, [], table, torch.tensor(step, dtype=torch.int32), seeds, results=2)
        results.append(made[max(slot - 1, 0)])
    return results


@pytest.mark.parametrize("rung", HERE)
def test_normals_are_within_4_ulp_of_float64(rung) -> None:
    elements = 1003 if rung == "triton" else 70_001
    for slot, got in enumerate(drawn(SEEDS, elements, rung=rung)):
        exact = normal(SEEDS, torch.tensor(2), slot, elements)
        error = (got.double() - exact).abs()
        large = exact.abs() >= 0.1
        ulp = 2.0 ** (exact.abs().log2().floor() - 23)
        assert (error[large] <= 4 * ulp[large]).all()
        assert (error[~large] <= 1e-6).all()


@pytest.mark.parametrize("rung", HERE[1:])
def test_every_rung_makes_the_same_bits(rung) -> None:
    for a, b in zip(drawn(SEEDS, 1003), drawn(SEEDS, 1003, rung=rung), strict=True):
        assert torch.equal(a, b)


def test_extremes() -> None:
    """The largest normal there is comes of u = 2^-25; a radius near 0 of u near 1."""
    z = drawn(torch.arange(64), 1 << 16)[1]
    top = (2 * 25 * torch.log(torch.tensor(2.0))).sqrt()
    assert 5 < z.abs().max() <= top and z.abs().min() < 1e-6


def test_a_sample_does_not_depend_on_its_batch_or_the_threads() -> None:
    threads = torch.get_num_threads()
    whole = drawn(SEEDS, 40_001)
    try:
        torch.set_num_threads(1)
        for i in range(len(SEEDS)):
            for a, b in zip(whole, drawn(SEEDS[i : i + 1], 40_001), strict=True):
                assert torch.equal(a[i : i + 1], b)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(whole, drawn(SEEDS, 555), strict=True):
        assert torch.equal(a[:, :555], b)


def test_seeds_steps_and_slots_are_independent() -> None:
    a = torch.stack([*drawn(torch.tensor([1, 2]), 1 << 16, 0), *drawn(torch.tensor([1, 2]), 1 << 16, 1)]).flatten(0, 1)
    correlation = torch.corrcoef(a) - torch.eye(len(a))
    assert correlation.abs().max() < 5 / 2**8  # 5 sigma


def test_moments() -> None:
    z = normal(torch.arange(16), torch.tensor(0), 1, 1 << 18).flatten()
    n = z.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * (variance / n) ** 0.5
    tail = (z.abs() > 3).double().mean()
    assert abs(tail - 0.0026998) < 5 * (0.0027 / n) ** 0.5


def test_a_nan_coefficient_spreads() -> None:
    op = OPS["solver_step"]
    args = op.bind((), next(c for c in op.cases if c.name == "seeded").args(Draw(torch.float32)))
    coef = args[3].clone()
    coef[..., 2] = torch.nan
    for rung in HERE:
        with dk.rung(rung):
            assert all(y.isnan().all() for y in ops.solver_step(*args[:3], coef, *args[4:]))


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (torch.zeros(3), TypeError, "seed: expected int64"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"seed: expected \[3\]"),
    ],
)
def test_bad_seeds(seed, error, words) -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(error, match=words):
        ops.solver_step([x], x, [], torch.zeros(1, 1, 12), torch.tensor(0, dtype=torch.int32), seed)
