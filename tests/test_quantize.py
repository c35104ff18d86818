"""Models in 8 bits: what is replaced, what is left alone and why, how close the answers are, and what a state dict holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import diffkernels as dk
from diffkernels import ops
from diffkernels.models import dit
from diffkernels.nn import QuantizedLinear
from diffkernels.quantize import Recipe, quantize_, sqnr


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def test_packing_is_undone() -> None:
    for n, k in ((1, 1), (64, 4), (65, 5), (3, 130), (0, 7), (7, 0)):
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        packed = ops.pack_w8(codes)
        assert packed.shape == (-(-n // 64), -(-k // 4), 64, 4) and torch.equal(ops.unpack_w8(packed, n, k), codes)
    with pytest.raises(TypeError, match=r"codes: expected int8, got torch\.float32"):
        ops.pack_w8(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"codes: expected \[N, K\], got shape \[2\]"):
        ops.pack_w8(torch.zeros(2, dtype=torch.int8))


def test_sums_are_exact_where_every_product_is_the_largest() -> None:
    for k in (4, 133_144):
        x, w = (torch.full((2, k), v, dtype=torch.int8) for v in (-127, 127))
        for rung in ("cpu", "avx2", "avx512", "avx512_vnni"):
            if dk._ladder.missing(rung, "linear_w8a8", "cpu"):
                continue
            with dk.rung(rung):
                y = ops.linear_w8a8(x, torch.ones(2), ops.pack_w8(w), torch.ones(2), dtype="float32")
            assert torch.equal(y, torch.full((2, 2), float(-127 * 127 * k)).float()), (rung, k)
    with pytest.raises(ValueError, match=r"x: expected .* K up to 133144"):
        ops.linear_w8a8(torch.zeros(1, 133_145, dtype=torch.int8), torch.ones(1), ops.pack_w8(w), torch.ones(2))


def test_rungs_agree_to_the_bit() -> None:
    call = next(c for c in ops.linear_w8a8.op.cases if c.name == "gated").args(dk.ops.linear_w8a8.op.cases and _draw())
    call |= {"activation": "none", "gate": None, "residual": None, "bias": None}
    found = []
    for rung in ("cpu", "avx2", "avx512", "avx512_vnni"):
        if dk._ladder.missing(rung, "linear_w8a8", "cpu") is None:
            with dk.rung(rung):
                found.append(ops.linear_w8a8(**call))
    assert all(torch.equal(found[0], other) for other in found[1:])


def _draw():
    from diffkernels._case import Draw

    return Draw(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_answers_nearly_what_it_did(dtype, bias) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(200, 300, bias=bias).to(dtype)
    quantized, x = QuantizedLinear.of(linear), torch.randn(3, 50, 200).to(dtype)
    y = quantized(x)
    assert y.dtype == dtype and y.shape == (3, 50, 300) and relative(y, linear(x)) < 0.017
    assert quantized.bias is linear.bias and sqnr(linear.weight, quantized.weight) > 38
    assert "in_features=200" in repr(quantized)


def test_scales_stay_float32_when_the_model_does_not() -> None:
    quantized = QuantizedLinear.of(nn.Linear(64, 64))
    exact = quantized.weight_scale.clone()
    for move in (quantized.half, quantized.bfloat16, quantized.float):
        move()
        assert torch.equal(quantized.weight_scale, exact) and quantized.packed.dtype == torch.uint8


def test_a_state_dict_holds_codes_that_any_machine_can_pack() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 130), nn.GELU(), nn.Linear(130, 5))
    quantize_(model, Recipe(skip=(), min_elements=0))
    state = model.state_dict()
    assert set(state) == {f"{i}.{name}" for i in (0, 2) for name in ("qweight", "weight_scale", "bias")}
    assert state["0.qweight"].dtype == torch.int8 and state["0.qweight"].shape == (130, 70)
    other = nn.Sequential(QuantizedLinear(70, 130), nn.GELU(), QuantizedLinear(130, 5))
    other.load_state_dict(load(save(state)))
    x = torch.randn(9, 70)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"0\.qweight: expected int8 \[130, 70\], got torch\.float32 \[130, 70\]"):
        other.load_state_dict(state | {"0.qweight": state["0.qweight"].float()})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.qweight"'):
        other.load_state_dict({k: v for k, v in state.items() if k != "0.qweight"})


class Odd(nn.Linear):
    pass


def test_the_report_has_every_layer_and_the_reason() -> None:
    shared = nn.Linear(128, 128)
    model = nn.ModuleDict(
        {
            "a": shared,
            "b": shared,
            "twice": nn.Sequential(shared, nn.GELU(), shared),
            "x_embedder": nn.Linear(128, 128),
            "small": nn.Linear(4, 4),
            "odd": Odd(128, 128),
            "conv": nn.Conv2d(3, 4, 1),
            "hooked": nn.Linear(128, 128),
            "unwanted": nn.Linear(128, 128),
            "double": nn.Linear(128, 128).double(),
            "broken": nn.Linear(128, 128),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["broken"].weight[3, 4] = torch.nan
    report = quantize_(model, Recipe(filter_fn=lambda name, _: name != "unwanted"))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "a": None,
        "x_embedder": "skipped by name",
        "small": "fewer than 16384 weights",
        "odd": "a subclass or a parametrization: Odd",
        "conv": "no kernel for convolutions",
        "hooked": "has hooks",
        "unwanted": "not wanted by filter_fn",
        "double": "its weight is torch.float64 on cpu",
        "broken": "its weight is not finite",
    }
    assert model["a"] is model["b"] is model["twice"][0] is model["twice"][2] and isinstance(model["a"], QuantizedLinear)
    (line,) = report.quantized
    assert line.sqnr > 38 and line.before == 4 * 128**2 and line.after == 128**2 + 4 * 128
    assert "1 of 9 layers; weights" in str(report) and "a subclass" in str(report)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        quantize_(3)
    with pytest.raises(ValueError, match="kind: expected one of int8, got 'int3'"):
        quantize_(nn.Linear(2, 2), "int3")
    with pytest.raises(TypeError, match="recipe: expected a Recipe or a kind's name, got int"):
        quantize_(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match=r"skip: expected a list of patterns, got the string '\*'"):
        Recipe(skip="*")
    with pytest.raises(ValueError, match="min_elements: expected 0 or more, got -1"):
        Recipe(min_elements=-1)
    alone = quantize_(nn.Linear(200, 200))
    assert not alone.quantized and alone.layers[0].reason == "the model itself: put it into a module"
    assert dk.quantize_ is quantize_ and dk.Recipe is Recipe


def test_a_wanted_gradient_is_refused_by_name() -> None:
    quantized = QuantizedLinear.of(nn.Linear(64, 64))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="x: act_quantize has no gradient"):
        quantized(torch.randn(2, 64, requires_grad=True))


def test_a_transformer_with_outlier_channels_stays_close() -> None:
    """DiT-S/8 of random weights, a thousandth of the channels fifty times as large."""
    torch.manual_seed(0)
    model = dit("DiT-S/8", num_classes=10).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(0, p.shape[1] ** -0.5)
            p[:, torch.rand(p.shape[1]) < 1e-3] *= 50
    x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2) * 1000, torch.tensor([1, 2])
    exact = model(x, t, y)
    report = quantize_(model)
    assert len(report.quantized) == 12 * 4
    assert relative(model(x, t, y), exact) < 0.05
