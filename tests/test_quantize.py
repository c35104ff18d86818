"""Models in 8 bits: what is replaced, what is left alone and why, how close the answers are, and what a state dict holds."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn

import diffkernels as dk
from diffkernels import ops
from diffkernels._case import Draw
from diffkernels.models import CheckpointError, dit
from diffkernels.nn import QuantizedLinear
from diffkernels.quantize import Recipe, quantize_, shared, sqnr


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
    for k in (4, 131_071):
        x, w = (torch.full((2, k), v, dtype=torch.int8) for v in (-128, -128))
        for rung in ("cpu", "avx2", "avx512", "avx512_vnni", "amx"):
            if dk._ladder.missing(rung, "linear_w8a8", "cpu"):
                continue
            with dk.rung(rung):
                y = ops.linear_w8a8(x, torch.ones(2), ops.pack_w8(w), torch.ones(2), dtype="float32")
            assert torch.equal(y, torch.full((2, 2), float(128 * 128 * k)).float()), (rung, k)
    with pytest.raises(ValueError, match=r"x: expected .* K up to 131071"):
        ops.linear_w8a8(torch.zeros(1, 131_072, dtype=torch.int8), torch.ones(1), ops.pack_w8(w), torch.ones(2))


def test_rungs_agree_to_the_bit() -> None:
    call = next(c for c in ops.linear_w8a8.op.cases if c.name == "gated").args(Draw(torch.float32))
    call |= {"activation": "none", "gate": None, "residual": None, "bias": None}
    found = []
    for rung in ("cpu", "avx2", "avx512", "avx512_vnni", "amx"):
        if dk._ladder.missing(rung, "linear_w8a8", "cpu") is None:
            with dk.rung(rung):
                found.append(ops.linear_w8a8(**call))
    assert all(torch.equal(found[0], other) for other in found[1:])


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
            "wide": nn.Linear(128, 128).double(),
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
        "wide": "its weight is torch.float64 on cpu",
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
    with pytest.raises(ValueError, match="smooth: expected 'none', 'weight' or a function of the model, got 'half'"):
        Recipe(smooth="half")
    with pytest.raises(ValueError, match="rotate: expected 0, 64, 128 or 256, got 32"):
        Recipe(rotate=32)
    with pytest.raises(ValueError, match="min_elements: expected 0 or more, got -1"):
        Recipe(min_elements=-1)
    alone = quantize_(nn.Linear(200, 200))
    assert not alone.quantized and alone.layers[0].reason == "the model itself: put it into a module"
    assert dk.quantize_ is quantize_ and dk.Recipe is Recipe


def test_a_wanted_gradient_is_refused_by_name() -> None:
    quantized = QuantizedLinear.of(nn.Linear(64, 64))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="x: act_quantize has no gradient"):
        quantized(torch.randn(2, 64, requires_grad=True))


def test_smoothing_keeps_a_transformer_with_outlier_channels_close() -> None:
    """DiT-S/8 of random weights, a hundredth of the columns fifty times as large."""
    found = {}
    for smooth in ("none", "weight"):
        torch.manual_seed(0)
        model = dit("S/8", num_classes=10, input_size=32, depth=4).eval()
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5)
        for block in model.blocks:
            for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2):
                layer.weight[:, ::100] *= 50
        x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2) * 1000, torch.tensor([1, 2])
        exact = model(x, t, y)
        report = quantize_(model, Recipe(smooth=smooth))
        assert len(report.quantized) == 4 * 4
        found[smooth] = relative(model(x, t, y), exact)
    assert found["weight"] < 0.5 * found["none"], found


def test_smoothing_changes_the_codes_and_not_the_map() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(200, 300)
    linear.weight[:, 7] *= 100
    x = torch.randn(50, 200)
    plain, smoothed = (QuantizedLinear.of(linear, s) for s in (None, shared(linear.weight)))
    assert relative(smoothed.weight, linear.weight) < relative(plain.weight, linear.weight)
    assert relative(smoothed(x), linear(x)) < relative(plain(x), linear(x))
    exact = smoothed.smooth.clone()
    assert torch.equal(smoothed.half().smooth, exact) and shared(torch.zeros(3, 4)).equal(torch.ones(4))
    other = QuantizedLinear(200, 300, smooth=True)
    other.load_state_dict(smoothed.float().state_dict())
    assert torch.equal(other(x), smoothed(x))


def test_a_few_inputs_show_which_channels_are_large() -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(256, 192), nn.GELU(), nn.Linear(192, 192), nn.ModuleDict({"idle": nn.Linear(256, 256)}))
    run, x = exact[:3], torch.randn(60, 256)
    x[:, 7] *= 100
    exact[0].weight[:, 9] *= 50
    error = {}
    for name, smooth in (
        ("none", "none"),
        ("weight", "weight"),
        ("few", lambda m: [m[2](m[1](m[0](input=part))) for part in x.split(20)]),
    ):
        model = copy.deepcopy(exact)
        report = quantize_(model, Recipe(smooth=smooth, min_elements=0))
        assert len(report.quantized) == 3 and not any(m._forward_pre_hooks for m in model.modules())
        error[name] = relative(model[:3](x), run(x))
    assert 3 * error["few"] < min(error["none"], error["weight"]), error
    assert model[3]["idle"].smooth is None  # it was not called
    columns = x.abs().amax(0)
    torch.testing.assert_close(model[0].smooth, shared(exact[0].weight, columns))
    wanted = (exact[0].weight.abs().amax(0) / columns).sqrt()
    torch.testing.assert_close(model[0].smooth, wanted / wanted.log().mean().exp())
    before = copy.deepcopy(exact)
    with pytest.raises(ValueError, match="smooth: expected finite inputs, but those of 0 are not"):
        quantize_(before, Recipe(smooth=lambda m: m[0](x * torch.inf), min_elements=0))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quantize_(before, Recipe(smooth=lambda m: m(x[:, :3]), min_elements=0))
    assert type(before[0]) is nn.Linear and not before[0]._forward_pre_hooks


@pytest.mark.parametrize("smooth", [False, True])
def test_a_rotation_changes_the_codes_and_not_the_map(smooth) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(384, 300), torch.randn(50, 384)
    x[:, 7] *= 100
    factor = shared(linear.weight) if smooth else None
    plain, turned = (QuantizedLinear.of(linear, factor, n) for n in (0, 128))
    assert relative(turned.weight, linear.weight) < 0.02 and relative(turned(x), linear(x)) < relative(plain(x), linear(x)) / 3
    other = QuantizedLinear(384, 300, smooth=smooth, rotate=128)
    other.load_state_dict(turned.state_dict())
    assert torch.equal(other(x), turned(x)) and turned.state_dict()["rotate"] == 128
    for layer, state in ((QuantizedLinear(384, 300, smooth=smooth), turned), (other, plain)):
        with pytest.raises(RuntimeError, match=r"rotate: expected (0, got 128|128, got 0)"):
            layer.load_state_dict(state.state_dict())
    assert "rotate=128" in str(turned) and "rotate" not in str(plain)
    with pytest.raises(ValueError, match="rotate: expected 0, 64, 128 or 256, and a divisor of 384 columns, got 256"):
        QuantizedLinear(384, 300, rotate=256)


def test_a_recipe_rotates_as_many_columns_as_divide_a_layers() -> None:
    model = nn.Sequential(*(nn.Linear(n, 64) for n in (512, 384, 192, 100)))
    report = quantize_(model, Recipe(rotate=256, min_elements=0))
    assert [line.rotate for line in report.layers] == [layer.rotate for layer in model] == [256, 128, 64, 0]
    assert "int8 H128 " in str(report) and "int8       " in str(report)
    assert [Recipe(rotate=64).columns(n) for n in (512, 96)] == [64, 0]


def test_comparison_names_the_layer_that_differs() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    b = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    b.load_state_dict(a.state_dict())
    b[2].weight.mul_(1.01)
    b[2].bias.mul_(1.01)
    x = torch.randn(4, 8)
    found = dk.compare(b, a, x)
    assert [line.name for line in found] == ["0", "1", "2", ""]
    assert [line.relative for line in found[:2]] == [0, 0] and found[0].sqnr == float("inf")
    assert found.worst.name == "2" and found[-1].relative == pytest.approx(0.01, rel=1e-4)
    assert found[-1].sqnr == pytest.approx(40, abs=0.01) and found[-1].cosine == pytest.approx(1)
    assert "the model" in str(found) and not a[0]._forward_hooks
    assert dk.compare(b, a, {"input": x})[-1] == found[-1] == dk.compare(b, a, [x])[-1]
    with pytest.raises(ValueError, match="model: expected it and the reference to return one"):
        dk.compare(nn.Linear(8, 3), a, x)


def test_a_quantized_model_is_saved_and_loaded_whole(tmp_path) -> None:
    torch.manual_seed(0)
    model = dit("S/8", num_classes=10, input_size=16).eval()
    quantize_(model, Recipe(smooth="weight"))
    path = tmp_path / "q.safetensors"
    dk.save(model, path, about={"data": "none"})
    again = dk.load(path)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2) * 1000, torch.tensor([1, 2])
    assert torch.equal(again(x, t, y), model(x, t, y))
    assert isinstance(again.blocks[0].mlp.fc1, QuantizedLinear) and path.stat().st_size < 70e6  # of 131
    dk.save(model, path, dtype=torch.bfloat16)
    half = dk.load(path)
    assert torch.equal(half.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    other = dit("S/8", num_classes=10, input_size=16)
    with pytest.raises(CheckpointError, match="misses"):
        dk.load(path, other)
    quantize_(other, Recipe(smooth="weight"))
    dk.load(path, other)
    assert torch.equal(other.blocks[3].attn.qkv.packed, model.blocks[3].attn.qkv.packed)


def test_a_rotated_model_is_saved_and_loaded_as_such(tmp_path) -> None:
    torch.manual_seed(0)
    model, path = dit("S/8", num_classes=10, input_size=16, depth=2).eval(), tmp_path / "q.safetensors"
    quantize_(model, Recipe(rotate=128))
    dk.save(model, path, dtype=torch.bfloat16)
    again = dk.load(path)
    assert again.blocks[0].mlp.fc1.rotate == 128 and again.blocks[0].mlp.fc1.weight.equal(model.blocks[0].mlp.fc1.weight)
    other = dit("S/8", num_classes=10, input_size=16, depth=2)
    quantize_(other, Recipe(rotate=64))
    before = other.blocks[0].attn.qkv.packed.clone()
    with pytest.raises(CheckpointError, match=r"rotate: expected 64, got 128"):
        dk.load(path, other)
    assert torch.equal(other.blocks[0].attn.qkv.packed, before)
    for value, words in (
        (torch.tensor(100, dtype=torch.int32), "expected 0, 64, 128 or 256, and a divisor of 384 columns, got 100"),
        (torch.tensor([64, 64], dtype=torch.int32), r"expected one number of I32, got I32 \[2\]"),
        (torch.tensor(64.0), r"expected one number of I32, got F32 \[\]"),
    ):
        rewritten(path, lambda state, _, v=value: state.update({"blocks.1.attn.qkv.rotate": v}))
        with pytest.raises(CheckpointError, match=words):
            dk.load(path)


def rewritten(path, change) -> None:
    with safe_open(path, framework="pt") as file:
        state, found = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["diffkernels"])  # noqa: SIM118
    change(state, found)
    path.write_bytes(save(state, metadata={"diffkernels": json.dumps(found)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, found: found["quantized"].update(kind="int3"), "quantized: expected kind 'int8'"),
        (
            lambda _, found: found["quantized"]["layers"].append("blocks.0"),
            "expected the names of Linear layers, got 'blocks.0'",
        ),
        (lambda _, found: found["quantized"]["layers"].append(3), "expected the names of Linear layers, got 3"),
        (lambda _, found: found["quantized"]["layers"].pop(), "misses"),
        (
            lambda state, _: state.update({"blocks.0.attn.qkv.qweight": state["blocks.0.attn.qkv.qweight"].float()}),
            "qweight: expected I8; got F32",
        ),
        (lambda state, _: state["blocks.0.attn.qkv.weight_scale"].fill_(torch.inf), "weight_scale: expected finite numbers"),
        (
            lambda state, _: state.update({"blocks.0.attn.qkv.qweight": state["blocks.0.attn.qkv.qweight"][1:].clone()}),
            r"qweight: expected shape \[1152, 384\]",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, words) -> None:
    model = dit("S/8", num_classes=10, input_size=16, depth=1)
    quantize_(model)
    path = tmp_path / "q.safetensors"
    dk.save(model, path)
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=words):
        dk.load(path)
