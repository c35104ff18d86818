"""What is particular to the ops that make 8-bit codes: rows of zeros, NaN and infinity, the extremes, ties, no gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffkernels as dk
from diffkernels import ops
from diffkernels._ladder import RUNGS, missing

HERE = [r for r in RUNGS if missing(r, "act_quantize", "cpu") is None]
NATIVE = [r for r in HERE if r not in ("triton", "reference")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
rungs, dtypes = pytest.mark.parametrize("rung", HERE), pytest.mark.parametrize("dtype", DTYPES)
widths = pytest.mark.parametrize("columns", [1, 33, 65, 257, 1152])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coded(rung: str, x: Tensor, *args, **kwargs) -> list[Tensor]:
    with dk.rung(rung):
        return ops.act_quantize(x, *args, **kwargs)


def normed(rung: str, x: Tensor, **kwargs) -> list[Tensor]:
    with dk.rung(rung):
        return ops.norm_quantize(x, **kwargs)


@rungs
@dtypes
def test_a_row_of_zeros_has_scale_1(rung, dtype) -> None:
    x = torch.zeros(4, 65, dtype=dtype)
    x[1, 64] = -2.0
    x[3] = 2.0**-110 if dtype is not torch.float16 else 0  # counts as zeros
    codes, scale = coded(rung, x)
    assert scale.tolist() == [1, pytest.approx(2 / 127, rel=1e-6), 1, 1]
    assert not codes[[0, 2, 3]].any() and codes[1].nonzero().tolist() == [[64]] and codes[1, 64] == -127
    codes, scale = normed(rung, torch.ones(3, 65, dtype=dtype))  # centred
    assert not codes.any() and (scale == 1).all()


@rungs
def test_the_least_row_that_counts(rung) -> None:
    x = torch.full((2, 40), 2.0**-100)
    x[1, 39] *= -(1 + 2.0**-23)
    codes, scale = coded(rung, x)
    assert not codes[0].any() and scale[0] == 1
    assert codes[1].abs().eq(127).all() and 0 < scale[1] < 2.0**-100


@rungs
@widths
def test_nan_wins_over_infinity_and_both_reach_the_scale(rung, columns) -> None:
    """Wherever in the row, and whatever else is there; other rows are as they were."""
    nan, inf = torch.nan, torch.inf
    where = sorted({0, columns // 2, columns - 1})
    for at in where:
        x = drawn(6, columns)
        clean = coded(rung, x)
        x[1, at], x[2, at], x[3, at] = nan, inf, -inf
        x[4, at], x[4, where[-1] - at] = inf, nan
        codes, scale = coded(rung, x)
        assert scale[1].isnan() and scale[2] == scale[3] == inf and scale[4].isnan()
        assert not codes[1:5].any()
        for row in (0, 5):
            assert torch.equal(codes[row], clean[0][row]) and scale[row] == clean[1][row]
        codes, scale = normed(rung, x, norm="rms")
        assert not scale[1:5].isfinite().any() and not codes[1:5].any() and scale[[0, 5]].isfinite().all()
        codes, scale = normed(rung, drawn(6, columns), shift=x[1], norm="rms")
        assert scale.isnan().all() and not codes.any()


@rungs
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_far_below_zero_an_activation_is_zero_and_of_minus_infinity_nan(rung, activation) -> None:
    x = torch.tensor([-1e20, -1e4, -torch.inf, torch.inf, torch.nan])[:, None].repeat(1, 65)
    codes, scale = coded(rung, x, activation)
    assert scale[:2].tolist() == [1, 1] and scale[[2, 4]].isnan().all() and not codes.any()
    assert scale[3] == torch.inf or (rung == "reference" and scale[3].isnan())  # PyTorch's own float32 GELU of infinity


@rungs
def test_a_payload_in_a_nan_changes_nothing(rung) -> None:
    x = drawn(2, 65)
    x[0, 3] = torch.tensor(-0x1, dtype=torch.int32).view(torch.float32)  # the largest bits, with a sign
    codes, scale = coded(rung, x)
    assert scale[0].isnan() and not codes[0].any() and scale[1].isfinite()


@rungs
@dtypes
@widths
def test_the_largest_magnitude_is_127_and_the_rest_is_within_half_a_step(rung, dtype, columns) -> None:
    x, smooth = drawn(9, columns, dtype=dtype), drawn(columns, seed=1).abs() + 0.5
    for factor in (None, smooth):
        codes, scale = coded(rung, x, smooth=factor)
        h = x.double() * (1 if factor is None else factor.double())
        assert codes.abs().amax(-1).eq(127).all() and codes.min() >= -127
        step = scale.double()[:, None]
        assert ((codes * step - h).abs() <= step / 2 * (1 + 1e-4)).all()
        torch.testing.assert_close(step, h.abs().amax(-1, keepdim=True) / 127, rtol=1e-6, atol=0)


@rungs
def test_ties_go_to_the_even_code(rung) -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5])
    codes, scale = coded(rung, x)
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126] and scale == 1


@rungs
@pytest.mark.parametrize("largest", [3e38, 1e-29, 65504.0])
def test_large_and_small_rows(rung, largest) -> None:
    x = drawn(3, 257)
    x *= (largest / x.abs().amax(-1, keepdim=True)) * (1 - 2.0**-20)
    codes, scale = coded(rung, x)
    assert codes.abs().amax(-1).eq(127).all()
    torch.testing.assert_close(scale, x.abs().amax(-1) / 127, rtol=1e-6, atol=0)


@dtypes
@widths
def test_codes_of_the_same_floats_are_equal_on_all_cpu_rungs(dtype, columns) -> None:
    """And are the definition's: where h is made without a sum or an exponential, there is one answer."""
    x, smooth = drawn(20, columns, dtype=dtype), drawn(columns, seed=1).abs() + 0.5
    for factor in (None, smooth, smooth.bfloat16()):
        for layout in (x, x.t().contiguous().t()):
            expected = coded("reference", layout, smooth=factor)
            for rung in NATIVE:
                assert all(map(torch.equal, coded(rung, layout, smooth=factor), expected)), rung


def hadamard(n: int) -> Tensor:
    """Orthonormal, float64: -1 where row and column have an odd number of ones in common."""
    ones = [[(i & j).bit_count() % 2 for j in range(n)] for i in range(n)]
    return (1 - 2 * torch.tensor(ones, dtype=torch.float64)) * n**-0.5


rotations = pytest.mark.parametrize("rotate", [64, 128, 256])


@rungs
@dtypes
@rotations
def test_a_rotation_is_a_product_with_a_hadamard_matrix(rung, dtype, rotate) -> None:
    x, smooth = drawn(9, 2, 3 * rotate, dtype=dtype), drawn(3 * rotate, seed=1).abs() + 0.5
    h = ((x.double() * smooth.double()).unflatten(-1, (3, rotate)) @ hadamard(rotate)).flatten(-2)
    codes, scale = coded(rung, x, smooth=smooth, rotate=rotate)
    step = scale.double().unsqueeze(-1)
    assert codes.abs().amax(-1).eq(127).all() and ((codes * step - h).abs() <= step / 2 * (1 + 1e-4)).all()
    torch.testing.assert_close(step, h.abs().amax(-1, keepdim=True) / 127, rtol=1e-6, atol=0)


@dtypes
@rotations
def test_rotated_codes_are_equal_on_all_cpu_rungs(dtype, rotate) -> None:
    x, smooth = drawn(20, 3 * rotate, dtype=dtype), drawn(3 * rotate, seed=1).bfloat16()
    for factor in (None, smooth):
        for layout in (x, x.t().contiguous().t()):
            expected = coded("reference", layout, smooth=factor, rotate=rotate)
            for rung in NATIVE:
                assert all(map(torch.equal, coded(rung, layout, smooth=factor, rotate=rotate), expected)), rung


@rungs
def test_a_rotation_shares_an_outlier_and_the_error_is_a_third(rung) -> None:
    """A thousandth of the channels fifty times as large: of the rest nothing was left in 8 bits."""
    x = drawn(64, 1024)
    x[:, 77] *= 50
    errors = []
    for rotate in (0, 256):
        codes, scale = coded(rung, x, rotate=rotate)
        h = codes.double() * scale.double()[:, None]
        h = (h.unflatten(-1, (-1, rotate)) @ hadamard(rotate)).flatten(-2) if rotate else h
        errors.append((h - x).square().mean().sqrt())
    assert errors[1] * 3 < errors[0], errors


@rungs
def test_what_is_not_finite_reaches_the_scale_of_a_rotated_row(rung) -> None:
    x, nan, inf = drawn(7, 256), torch.nan, torch.inf
    clean = coded(rung, x, rotate=128)
    x[1, 200], x[2, 3], x[3, 255] = nan, inf, -inf
    x[4, 5], x[4, 6] = inf, inf  # their difference is none
    x[5] = 0
    codes, scale = coded(rung, x, rotate=128)
    assert scale[[1, 4]].isnan().all() and scale[2] == scale[3] == inf and scale[5] == 1 and not codes[1:6].any()
    for row in (0, 6):
        assert torch.equal(codes[row], clean[0][row]) and scale[row] == clean[1][row]


@pytest.mark.parametrize("rung", NATIVE)
def test_any_number_of_threads_codes_rows_of_its_own(rung) -> None:
    x = drawn(3001, 1025)
    x *= torch.arange(1, 3002)[:, None]
    expected, threads = coded("reference", x), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, coded(rung, x), expected)), n
    finally:
        torch.set_num_threads(threads)


@rungs
def test_codes_are_of_what_the_norm_writes(rung) -> None:
    """In float32 the norm's results are what is coded, to the rounding of a tie."""
    x, scale, shift = drawn(2, 9, 72), drawn(2, 72, seed=1), drawn(2, 72, seed=2)
    with dk.rung(rung):
        h = ops.norm_modulate(x, scale, shift)
    for got, expected in zip(normed(rung, x, scale=scale, shift=shift), coded(rung, h), strict=True):
        assert (got.double() - expected.double()).abs().max() <= (1 if got.dtype is torch.int8 else 1e-7)


def sampled(rung: str, x: Tensor, groups: int, *args, **kwargs) -> list[Tensor]:
    with dk.rung(rung):
        return ops.group_norm_quantize(x, groups, *args, **kwargs)


def group_normed(x: Tensor, groups: int, weight: Tensor, bias: Tensor, activation: str = "silu") -> Tensor:
    """PyTorch's own, in float64, channels last."""
    h = F.group_norm(x.double().movedim(-1, 1), groups, weight.double(), bias.double(), 1e-5).movedim(1, -1)
    return F.silu(h) if activation == "silu" else h


@rungs
@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 36), (2, 33, 65), (4, 12)])
def test_a_sample_has_one_scale_and_h_is_within_half_a_step(rung, dtype, shape) -> None:
    """Of torch's GroupNorm and SiLU in float64: no code is cut off."""
    if rung == "triton" and (dtype, shape) != (torch.float32, (4, 12)) and (dtype, shape) != (torch.float16, (3, 5, 7, 36)):
        pytest.skip("interpreted, a millisecond a program: one dtype a shape, and none of many groups")
    x, weight, bias = drawn(*shape, dtype=dtype), drawn(shape[-1], seed=1), drawn(shape[-1], seed=2)
    for groups in (1, 12 if shape[-1] == 36 else shape[-1]):
        for activation in ("silu", "none"):
            h = group_normed(x, groups, weight, bias, activation)
            codes, scale = sampled(rung, x, groups, weight, bias, activation=activation)
            assert codes.shape == x.shape and scale.shape == x.shape[:1]
            step = scale.double().view(-1, *[1] * (x.ndim - 1))
            assert ((codes * step - h).abs() <= step / 2 * (1 + 1e-4)).all()
            torch.testing.assert_close(step.flatten(), h.abs().flatten(1).amax(1) / 127, rtol=1e-6, atol=0)
            assert codes.abs().flatten(1).amax(1).eq(127).all()


@rungs
@dtypes
def test_where_all_is_below_silus_minimum_amax_is_a_bound(rung, dtype) -> None:
    """No code is cut off, and the scale is larger than it need be only where an interval holds the minimum."""
    x, weight, bias = drawn(3, 40, 24, dtype=dtype), torch.full([24], 0.05), torch.full([24], -1.2)
    h, smooth = group_normed(x, 4, weight, bias), drawn(24, seed=3) + 2
    for factor in (None, smooth):
        value = h if factor is None else h * factor.double()
        codes, scale = sampled(rung, x, 4, weight, bias, smooth=factor)
        step, amax = scale.double()[:, None, None], value.abs().amax((1, 2))
        assert ((codes * step - value).abs() <= step / 2 * (1 + 1e-4)).all()
        most = 0.2784645427610738 * (1 if factor is None else factor.abs().max().item())
        assert (scale * 127 >= amax * (1 - 1e-6)).all() and (scale * 127 <= most * (1 + 1e-6)).all()
    low = sampled(rung, x, 4, weight, bias - 1)[1]  # none holds it
    exact = group_normed(x, 4, weight, bias - 1).abs().amax((1, 2)) / 127
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=0)


@rungs
def test_nan_and_infinity_reach_the_scale_of_their_sample(rung) -> None:
    """Wherever they are; with groups an infinity is a NaN, its group's mean being none; other samples are as they were."""
    nan, inf = torch.nan, torch.inf
    for at in ((0, 0), (36, 2), (9, 34)) if rung != "triton" else ((36, 2),):
        for groups, activation in ((5, "silu"), (0, "none"), (0, "silu")):
            x = drawn(7, 37, 35)
            clean = sampled(rung, x, groups, activation=activation)
            x[1][at], x[2][at], x[3][at], x[4][at], x[4][at[0] - 9, 3], x[5][at], x[5, 5, 5] = (
                nan,
                inf,
                -inf,
                inf,
                nan,
                inf,
                -inf,
            )
            codes, scale = sampled(rung, x, groups, activation=activation)
            assert scale[[1, 4]].isnan().all() and not codes[1:6].any()
            if groups:
                assert scale[1:6].isnan().all()
            elif activation == "none":
                assert scale[[2, 3, 5]].eq(inf).all()
            else:  # silu of minus infinity
                assert scale[2] == inf and scale[[3, 5]].isnan().all()
            for sample in (0, 6):
                assert torch.equal(codes[sample], clean[0][sample]) and scale[sample] == clean[1][sample]
    for name in ("weight", "bias", "smooth"):
        operand = torch.ones(35)
        operand[33] = nan
        codes, scale = sampled(rung, drawn(2, 3, 35), 5, **{name: operand})
        assert scale.isnan().all() and not codes.any()


@rungs
def test_a_mean_far_from_zero_costs_no_digits(rung) -> None:
    x, weight, bias = drawn(2, 900, 40) + 1000, drawn(40, seed=1), drawn(40, seed=2)
    for first in (1000.0, 0.0):  # also where the first pixel is not like the others
        x[:, 0] = first
        h = group_normed(x, 8, weight, bias)
        codes, scale = sampled(rung, x, 8, weight, bias)
        torch.testing.assert_close(scale.double(), h.abs().amax((1, 2)) / 127, rtol=1e-4, atol=0)
        assert (codes - h / scale[:, None, None]).abs().max() <= 0.52


@rungs
def test_a_sample_of_equal_values_or_of_none_has_scale_1(rung) -> None:
    codes, scale = sampled(rung, torch.full((2, 9, 33), 5.25), 3)
    assert not codes.any() and (scale == 1).all()
    codes, scale = sampled(rung, drawn(2, 0, 3, 33), 3)
    assert codes.shape == (2, 0, 3, 33) and (scale == 1).all()


@pytest.mark.parametrize("rung", NATIVE)
@pytest.mark.parametrize("shape", [(3, 1023, 65), (1, 70, 2049), (2, 5000, 3)])
def test_any_number_of_threads_and_any_strides_give_a_sample_the_same_codes(rung, shape) -> None:
    """Of several chunks, the last one of other pixels than the registers hold."""
    x, adaptive = drawn(*shape), drawn(2, shape[0], shape[-1], seed=1)
    expected, threads = sampled(rung, x, shape[-1], None, None, *adaptive), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for layout in (x, x.mT.contiguous().mT):
                assert all(map(torch.equal, sampled(rung, layout, shape[-1], None, None, *adaptive), expected)), n
    finally:
        torch.set_num_threads(threads)


@rungs
@dtypes
def test_without_norm_a_sample_of_one_pixel_is_a_row(rung, dtype) -> None:
    x, smooth = drawn(9, 65, dtype=dtype), drawn(65, seed=1)
    assert all(map(torch.equal, sampled(rung, x, 0, activation="none", smooth=smooth), coded("reference", x, smooth=smooth)))


@pytest.mark.parametrize("name", ["norm_quantize", "act_quantize", "group_norm_quantize"])
def test_a_gradient_is_refused_by_name(name) -> None:
    x, more = drawn(3, 8).requires_grad_(), (2,) * (name == "group_norm_quantize")
    with pytest.raises(RuntimeError, match=f"x: {name} has no gradient"):
        getattr(ops, name)(x, *more)
    with torch.no_grad():
        assert getattr(ops, name)(x, *more)[0].dtype is torch.int8


def test_what_is_wrong_is_named() -> None:
    x = drawn(2, 7)
    with pytest.raises(ValueError, match="activation: expected one of none, gelu"):
        ops.act_quantize(x, "relu")
    with pytest.raises(ValueError, match="x: expected an even number of columns for 'swiglu'"):
        ops.act_quantize(x, "swiglu")
    with pytest.raises(ValueError, match="rotate: expected 0, 64, 128 or 256, and a divisor of 7 columns, got 64"):
        ops.act_quantize(x, rotate=64)
    with pytest.raises(ValueError, match="rotate: expected 0, 64, 128 or 256, and a divisor of 96 columns, got 32"):
        ops.norm_quantize(drawn(2, 96), rotate=32)
    with pytest.raises(ValueError, match=r"smooth: expected shape \[7\], got \[8\]"):
        ops.norm_quantize(x, smooth=drawn(8))
    with pytest.raises(TypeError, match="smooth: expected float32"):
        ops.act_quantize(x, smooth=torch.ones(7, dtype=torch.int8))
    with pytest.raises(ValueError, match="x: expected at least one column"):
        ops.act_quantize(drawn(2, 0))
    with pytest.raises(ValueError, match="groups: expected 0, or a divisor of 7 channels, got 2"):
        ops.group_norm_quantize(x, 2)
    with pytest.raises(ValueError, match="activation: expected one of none, silu; got 'gelu'"):
        ops.group_norm_quantize(x, 1, activation="gelu")
    with pytest.raises(ValueError, match=r"scale: expected shape \[2, 7\], got \[7\]"):
        ops.group_norm_quantize(x, 1, scale=drawn(7))
    with pytest.raises(ValueError, match=r"x: expected at least two dimensions, \[B, ..., C\]; got shape \[7\]"):
        ops.group_norm_quantize(x[0], 1)
    with pytest.raises(ValueError, match="x: expected at least one column"):
        ops.group_norm_quantize(drawn(2, 3, 0), 0)
