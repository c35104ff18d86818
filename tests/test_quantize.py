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
from diffkernels.nn import QuantizedLinear, WeightOnlyLinear
from diffkernels.quantize import Recipe, predicted_gain, quantize_, shared, sqnr


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


def test_packing_of_4_bits_is_undone() -> None:
    for n, k, group in ((1, 1, 64), (64, 8, 64), (65, 129, 64), (65, 129, 128), (0, 7, 64), (7, 0, 64)):
        codes, scale = (
            torch.randint(-8, 8, (n, k), dtype=torch.int8),
            torch.randint(1, 17, (n, -(-k // group)), dtype=torch.uint8),
        )
        packed, scales = ops.pack_w4(codes, scale)
        assert packed.shape == (-(-n // 64), -(-k // 8), 64, 4) and scales.shape == (-(-n // 64), -(-k // group), 64)
        found = ops.unpack_w4(packed, scales, n, k)
        assert torch.equal(found[0], codes) and torch.equal(found[1], scale) and found[1].dtype == torch.uint8
    eights, ones = torch.zeros(2, 70, dtype=torch.int8), torch.ones(2, 2, dtype=torch.uint8)
    for error, codes, scale, words in (
        (TypeError, eights.float(), ones, r"expected int8 and uint8, got torch\.float32 and torch\.uint8"),
        (ValueError, eights[0], ones, r"expected \[N, K\] and \[N, groups\], got \[70\], \[2, 2\]"),
        (ValueError, eights, ones[:, [0, 0, 0]], "group_scale: expected groups of 64 or 128 of 70 inputs, got 3 groups"),
        (ValueError, eights + 8, ones, "codes: expected -8 to 7"),
        (ValueError, eights, ones * 17, "group_scale: expected 1 to 16"),
        (ValueError, eights, ones * 0, "group_scale: expected 1 to 16"),
    ):
        with pytest.raises(error, match=words):
            ops.pack_w4(codes, scale)


@pytest.mark.parametrize("group", [64, 128])
def test_each_group_has_the_scale_of_the_smallest_error(group) -> None:
    torch.manual_seed(0)
    w = torch.randn(9, 300) * torch.rand(9, 300)
    w[3], w[4, :200] = 0, 0
    codes, scale, unit = ops.code_w4(w, group)
    assert codes.amin() == -8 and codes.amax() == 7 and scale.amin() >= 1 and 12 < scale.amax() <= 16 and unit[3] == 1

    def errors(codes, scale):
        wide = scale.float().repeat_interleave(group, 1)[:, :300]
        square = torch.nn.functional.pad((w - codes * wide * unit[:, None]).square(), (0, -300 % group))
        return square.unflatten(1, (-1, group)).sum(-1)

    found = errors(codes, scale)
    for s in range(1, 17):
        other = (w / (s * unit[:, None])).round().clamp(-8, 7)
        assert (found <= errors(other, torch.full_like(scale, s)) * (1 + 1e-5) + 1e-12).all(), s
    w[5, 7], w[6, 8] = torch.nan, torch.inf
    unit = ops.code_w4(w, group)[2]
    assert unit[5].isnan() and unit[6].isinf() and unit[[0, 1, 2, 3, 4, 7, 8]].isfinite().all()
    assert (codes[3] == 0).all() and (codes[4, : 200 // group * group] == 0).all()
    with pytest.raises(ValueError, match="group: expected 64 or 128, got 32"):
        ops.code_w4(w, 32)


def test_sums_are_exact_where_every_product_is_the_largest() -> None:
    for k in (4, 131_071):
        x, w = (torch.full((2, k), v, dtype=torch.int8) for v in (-128, -128))
        for rung in ("cpu", "avx2", "avx512", "avx512_vnni", "amx"):
            if dk._ladder.missing(rung, "linear_w8a8", "cpu"):
                continue
            with dk.rung(rung):
                y = ops.linear_w8a8(x, torch.ones(2), ops.pack_w8(w), torch.ones(2), dtype="float32")
                four = ops.pack_w4(w // 16, torch.full((2, -(-k // 128)), 16, dtype=torch.uint8))
                z = ops.linear_w4a8_lowrank(x, torch.ones(2), *four, torch.ones(2), dtype="float32")
            assert torch.equal(y, torch.full((2, 2), float(128 * 128 * k)).float()) and torch.equal(y, z), (rung, k)
    with pytest.raises(ValueError, match=r"x: expected .* K up to 131071"):
        ops.linear_w8a8(torch.zeros(1, 131_072, dtype=torch.int8), torch.ones(1), ops.pack_w8(w), torch.ones(2))


@pytest.mark.parametrize("op", [ops.linear_w8a8, ops.linear_w4a8_lowrank])
def test_rungs_agree_to_the_bit(op) -> None:
    call = next(c for c in op.op.cases if c.name == "gated").args(Draw(torch.float32))
    call |= {"activation": "none", "gate": None, "residual": None, "bias": None}
    found = []
    for rung in ("cpu", "avx2", "avx512", "avx512_vnni", "amx"):
        if dk._ladder.missing(rung, op.op.name, "cpu") is None:
            with dk.rung(rung):
                found.append(op(**call))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_more_ranks_than_there_is_memory_for_are_refused() -> None:
    x, w = torch.zeros(1, 64, dtype=torch.int8), ops.pack_w8(torch.zeros(1, 64, dtype=torch.int8))
    low, up = torch.zeros(1, 1).expand(1, 2**58), torch.zeros(1, 1).expand(2**58, 1)
    for rung in ("cpu", "avx2", "avx512", "avx512_vnni", "amx"):
        if dk._ladder.missing(rung, "linear_w8a8", "cpu") is None:
            with dk.rung(rung), pytest.raises(RuntimeError, match=r"low: more than 2\^31 ranks"):
                ops.linear_w8a8(x, torch.ones(1), w, torch.ones(1), low=low, up=up)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_of_4_bits_answers_nearly_what_it_did(dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(200, 300).to(dtype), torch.randn(3, 50, 200).to(dtype)
    linear.weight[:, 17] *= 20
    error = {}
    for name, how in (("plain", {}), ("wide", {"group": 128}), ("branch", {"rank": 32})):
        made = QuantizedLinear.of(linear, bits=4, **how)
        y = made(x)
        assert y.dtype == dtype and y.shape == (3, 50, 300) and made.bias is linear.bias
        error[name] = relative(y, linear(x))
        # A weight that is one of its codes' is their map, and nothing but the input is rounded.
        again = nn.Linear(200, 300)
        again.weight.copy_(made.weight)
        again.bias.copy_(linear.bias)
        assert relative(y, again(x.float())) < 0.02
    assert 3 * error["branch"] < error["plain"] < error["wide"] < 0.5 and error["branch"] < 0.1, error
    assert "bits=4, group=64, rank=32" in repr(made)
    assert QuantizedLinear.of(nn.Linear(200, 20), bits=4, rank=32).rank == 20


def test_a_branch_is_found_alike_each_time() -> None:
    torch.manual_seed(0)
    linear, state = nn.Linear(128, 128), torch.get_rng_state()
    a, b = (QuantizedLinear.of(linear, bits=4, rank=8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    linear.weight[:, 5] *= 50  # one rank's worth, in 8 bits as well
    with_branch, without = (sqnr(linear.weight, QuantizedLinear.of(linear, rank=r).weight) for r in (8, 0))
    assert with_branch > without + 6


def test_scales_stay_float32_when_the_model_does_not() -> None:
    quantized = QuantizedLinear.of(nn.Linear(64, 64))
    exact = quantized.weight_scale.clone()
    for move in (quantized.half, quantized.bfloat16, quantized.float):
        move()
        assert torch.equal(quantized.weight_scale, exact) and quantized.packed.dtype == torch.uint8
    low = QuantizedLinear.of(nn.Linear(64, 64), bits=4, rank=4)
    before = low.state_dict()
    for move in (low.half, low.double, low.float):
        after = move().state_dict()
        assert all(torch.equal(t, after[name]) and t.dtype == after[name].dtype for name, t in before.items() if name != "bias")


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


def test_a_state_dict_holds_4_bits_and_their_branch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 130), nn.GELU(), nn.Linear(130, 5))
    report = quantize_(model, Recipe("w4a8_lowrank", skip=(), min_elements=0, group=128, rank=4, rotate=64, smooth="weight"))
    state, x = model.state_dict(), torch.randn(9, 384)
    names = ("qweight", "group_scale", "weight_scale", "down", "down_scale", "up", "smooth", "bias")
    assert set(state) == {f"{i}.{name}" for i in (0, 2) for name in names} | {"0.rotate"}
    assert [tuple(state[f"0.{name}"].shape) for name in names[:6]] == [(130, 384), (130, 3), (130,), (4, 384), (4,), (4, 130)]
    assert report.layers[0].after == model[0].nbytes and "w4a8_lowrank H64" in str(report)

    def empty(bits=4, group=128, rank=4):
        how = {"smooth": True, "bits": bits, "group": group, "rank": rank}
        return nn.Sequential(QuantizedLinear(384, 130, rotate=64, **how), nn.GELU(), QuantizedLinear(130, 5, **how))

    other = empty()
    other.load_state_dict(load(save(state)))
    assert torch.equal(other(x), model(x))
    for layers, words in (
        (empty(bits=8), r'Unexpected key.*"0\.group_scale"'),
        (empty(group=64), r"0\.group_scale: expected uint8 \[130, 6\], got torch\.uint8 \[130, 3\]"),
        (empty(rank=5), r"0\.down: expected int8 \[5, 384\], got torch\.int8 \[4, 384\]"),
        (empty(rank=0), r'Unexpected key.*"0\.down'),
    ):
        with pytest.raises(RuntimeError, match=words):
            layers.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.codes: expected -8 to 7"):
        other.load_state_dict(state | {"0.qweight": state["0.qweight"] + 8})
    # The weight's parts come together or not at all, whatever is wrong with one of them.
    torch.manual_seed(1)
    other = nn.Sequential(QuantizedLinear.of(nn.Linear(384, 130), torch.ones(384), 64, 4, 128, 4), nn.GELU())
    before, part = other.state_dict(), {name: t for name, t in state.items() if name[0] == "0"}
    before = {name: t.clone() for name, t in before.items()}
    for changed in (
        {"0.qweight": state["0.qweight"] + 8},
        {"0.qweight": state["0.qweight"][:3]},
        {"0.group_scale": state["0.group_scale"] * 0},
        {"0.weight_scale": state["0.weight_scale"][:3]},
        {"0.smooth": None},
        {"0.up": None},
        {"0.rotate": torch.tensor(128)},
    ):
        with pytest.raises(RuntimeError):
            other.load_state_dict({name: t for name, t in (part | changed).items() if t is not None})
        after = other.state_dict()
        assert all(torch.equal(t, after[name]) for name, t in before.items() if name != "0.bias"), changed
    eight = nn.Sequential(QuantizedLinear(384, 130, smooth=True, rotate=64), nn.GELU())
    found = eight.load_state_dict(part, strict=False)
    assert set(found.unexpected_keys) == {f"0.{name}" for name in ("group_scale", "down", "down_scale", "up")}
    assert not eight[0].weight.any()
    for how, words in (
        ({"bits": 3}, "bits: expected 4 or 8, got 3"),
        ({"group": 7}, "group: expected"),
        ({"rank": -1}, "rank: "),
    ):
        with pytest.raises(ValueError, match=words):
            QuantizedLinear(64, 64, **how)


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
        "odd": "a subclass, another convolution or a parametrization: Odd",
        "conv": "fewer than 16384 weights",
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
    with pytest.raises(ValueError, match="kind: expected one of int8, w4a8_lowrank, w4a16, auto, got 'int3'"):
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
    with pytest.raises(ValueError, match="rank: expected 0 or more, got -1"):
        Recipe("w4a8_lowrank", rank=-1)
    with pytest.raises(ValueError, match="group: expected 64 or 128, got 32"):
        Recipe("w4a8_lowrank", group=32)
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


def test_auto_leaves_alone_what_would_lose_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in ((1152, 16), (512, 512), (512, 512), (200, 4096), (512, 2048))))
    for layer in (model[1], model[3]):
        layer.weight[:, 3] *= 200  # a rotation mends it; no group of 64 divides 200 columns
    report = quantize_(model, Recipe("auto"))
    assert [line.kind for line in report.layers] == [None, "int8", "int8", None, "int8"]
    assert [layer.rotate for layer in report.layers] == [0, 256, 0, 0, 0]
    assert all(line.sqnr > 30 and 1 < line.gain < 2 for line in report.quantized)
    slow, _, _, rough, _ = (line.reason for line in report.layers)
    assert slow.startswith("no gain: 0.5") and slow.endswith("times as fast, as predicted for 1024 rows")
    assert rough.startswith("its weight in 8 bits has an SQNR of") and rough.endswith("dB, under 30")
    assert type(model[0]) is type(model[3]) is nn.Linear and f"{report.layers[2].gain:.2f}×" in str(report)
    assert [line.kind for line in quantize_(nn.Sequential(nn.Linear(1152, 16)), Recipe("auto", rows=2)).layers] == ["int8"]
    with pytest.raises(ValueError, match="rows: expected 1 or more, got 0"):
        Recipe("auto", rows=0)
    with pytest.raises(ValueError, match=r"balance: expected more than 0, got -1\.0"):
        Recipe("auto", balance=-1.0)


def test_the_predicted_gain_is_a_rooflines() -> None:
    wide, tall = (nn.Linear(k, n, device="meta") for k, n in ((8192, 8192), (8192, 64)))
    assert predicted_gain(wide, Recipe(rows=2**20)) == pytest.approx(2, rel=0.06)  # bound by arithmetic
    assert predicted_gain(wide, Recipe(rows=1)) == pytest.approx(2, rel=0.01)  # by the weight's bytes
    # ... of which 4 bits, a scale a group and the branch's share are fewer.
    share = 1 / 2 + 1 / 64 + 32 * (8192 + 2 * 8192) / 8192**2
    assert predicted_gain(wide, Recipe("w4a8_lowrank", rows=1)) == pytest.approx(2 / share, rel=0.01)
    assert predicted_gain(tall, Recipe(rows=2**20)) == pytest.approx(
        1 / 2, rel=0.05
    )  # by the input's, read twice and written once


def test_a_weight_only_layer_is_the_map_of_its_weight() -> None:
    """Whatever the input: none of it is coded. Of few rows the gain is that of the bytes, of many there is none."""
    torch.manual_seed(0)
    linear = nn.Linear(200, 130)
    model = nn.Sequential(linear, nn.Conv2d(1, 1, 3))
    report = quantize_(model, Recipe("w4a16", skip=(), min_elements=0, group=128, rows=4))
    layer = model[0]
    assert type(layer) is WeightOnlyLinear and report.layers[0].kind == "w4a16" and report.layers[0].after == layer.nbytes
    assert report.layers[1].reason == "no kernel of 4 bits for convolutions" and 18 < report.layers[0].sqnr < 24
    x = torch.randn(3, 200) * torch.logspace(-8, 8, 3)[:, None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got, exact = (
            layer(x[1:2].to(dtype)),
            nn.functional.linear(x[1:2].to(dtype).double(), layer.weight.double(), layer.bias.double()),
        )
        assert got.dtype == dtype and (got - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    # Each row as exact as if it were alone: there is no scale for one to take from another.
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))
    state = model.state_dict()
    assert set(state) >= {f"0.{name}" for name in ("qweight", "group_scale", "weight_scale", "bias")}
    other = WeightOnlyLinear(200, 130, group=128)
    other.load_state_dict({name[2:]: t for name, t in load(save(state)).items() if name[0] == "0"})
    assert torch.equal(other(x), layer(x)) and torch.equal(other.half().packed, layer.packed)
    assert other.weight_scale.dtype == torch.float32 and "group=128" in str(other)
    with pytest.raises(ValueError, match=r"x: expected \[..., 200\], got shape \[3, 100\]"):
        layer(x[:, :100])
    with pytest.raises(ValueError, match="group: expected 64 or 128, got 32"):
        WeightOnlyLinear(8, 8, group=32)
    for wrong in ({"smooth": "weight"}, {"rotate": 64}):
        with pytest.raises(ValueError, match="smooth, rotate: expected 'none' and 0 of kind 'w4a16'"):
            Recipe("w4a16", **wrong)
    big = nn.Linear(8192, 8192, device="meta")
    assert predicted_gain(big, Recipe("w4a16", rows=1)) == pytest.approx(4 / (1 + 1 / 32), rel=0.01)
    assert predicted_gain(big, Recipe("w4a16", rows=2**20)) == 1


def test_a_weight_only_model_is_saved_loaded_and_fused(tmp_path) -> None:
    torch.manual_seed(0)
    model, path = dit("S/8", num_classes=10, input_size=16, depth=2).eval(), tmp_path / "q.safetensors"
    for p in model.parameters():
        p.data.normal_(0, 0.05)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2) * 1000, torch.tensor([1, 2])
    plain, mixed = model(x, t, y), ["blocks.1.mlp.fc2"]
    quantize_(model, Recipe("w4a16", filter_fn=lambda name, _: name not in mixed))
    quantize_(model, Recipe(filter_fn=lambda name, _: name in mixed))
    before = model(x, t, y)
    assert 0.01 < (before - plain).norm() / plain.norm() < 0.3
    dk.save(model, path)
    again = dk.load(path)
    assert torch.equal(again(x, t, y), before) and type(again.blocks[1].mlp.fc2) is QuantizedLinear
    report = dk.fuse_(model)
    assert [(line.name, line.chain) for line in report.fused] == [(f"blocks.{i}.mlp", "fc1 + GELU, fc2") for i in range(2)]
    assert (model(x, t, y) - before).abs().max() < 1e-4 * before.abs().max() + 1e-6
    other = dit("S/8", num_classes=10, input_size=16, depth=2)
    quantize_(other, Recipe("w4a8_lowrank", rank=0, filter_fn=lambda name, _: name not in mixed))
    quantize_(other, Recipe(filter_fn=lambda name, _: name in mixed))
    with pytest.raises(CheckpointError, match=r"weight_only: expected the model's \[\], got \['blocks.0.attn.qkv'"):
        dk.load(path, other)
    dk.load(path, model)
    hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert not model.blocks[0].mlp.fuses()
    hook.remove()
    alone = nn.Sequential(nn.GELU(), nn.Linear(128, 128))
    quantize_(alone, Recipe("w4a16"))
    assert [(line.name, line.reason) for line in dk.fuse_(alone).modules] == [("1", "its input is not coded")]
    for change, words in (
        (
            lambda _, found: found["quantized"].update(weight_only=["blocks.9"]),
            "weight_only: expected some of the layers, of kind w4a16 alone",
        ),
        (lambda _, found: found["quantized"].update(kind="int8"), "weight_only: expected some of the layers, of kind w4a16"),
        (lambda _, found: found["quantized"].update(weight_only=[["blocks.0.mlp.fc1"]]), "weight_only: expected some of"),
        (
            lambda _, found: found["quantized"].update(weight_only=mixed),
            "expected codes of 4 bits alone, got no blocks.1.mlp.fc2",
        ),
        (
            lambda state, _: state.update({"blocks.0.mlp.fc1.smooth": torch.ones(384)}),
            "codes of 4 bits alone, got blocks.0.mlp.fc1.smooth",
        ),
    ):
        dk.save(model, path)
        rewritten(path, change)
        with pytest.raises(CheckpointError, match=words):
            dk.load(path)


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


def test_a_model_of_4_bits_is_saved_and_loaded_whole(tmp_path) -> None:
    torch.manual_seed(0)
    model, path = dit("S/8", num_classes=10, input_size=16, depth=2).eval(), tmp_path / "q.safetensors"
    whole = sum(t.numel() * t.element_size() for block in model.blocks for t in (block.attn.qkv.weight, block.mlp.fc1.weight))
    quantize_(model, Recipe("w4a8_lowrank", rank=16, group=128))
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2) * 1000, torch.tensor([1, 2])
    assert sum(layer.nbytes for block in model.blocks for layer in (block.attn.qkv, block.mlp.fc1)) < whole / 6
    dk.save(model, path, dtype=torch.bfloat16)
    again = dk.load(path)
    layer = again.blocks[1].mlp.fc2
    assert (layer.bits, layer.group, layer.rank) == (4, 128, 16) and layer.weight.equal(model.blocks[1].mlp.fc2.weight)
    dk.save(model, path)
    assert torch.equal(dk.load(path)(x, t, y), model(x, t, y))
    other = dit("S/8", num_classes=10, input_size=16, depth=2)
    quantize_(other)
    with pytest.raises(CheckpointError, match="has unexpected"):
        dk.load(path, other)
    file, name = path.read_bytes(), "blocks.1.attn.qkv.down"
    for shape in ((0, 384), (385, 384), (16, 385), (384,), (2**62, 0), (2**64 - 1, 0)):
        small = torch.zeros(shape if max(shape) < 1000 else (0,), dtype=torch.int8)
        rewritten(path, lambda state, _, t=small: state.update({name: t}))
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header, rest = json.loads(path.read_bytes()[8 : 8 + size]), path.read_bytes()[8 + size :]
        header[name]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.down: expected \[rank, 384\]"):
            dk.load(path)
    path.write_bytes(file)
    rewritten(path, lambda state, _: state["blocks.1.attn.qkv.qweight"].fill_(8))
    before = again.blocks[0].attn.qkv.packed.clone()
    for into in (None, again):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv: codes: expected -8 to 7"):
            dk.load(path, into)
    assert torch.equal(again.blocks[0].attn.qkv.packed, before)


def rewritten(path, change) -> None:
    with safe_open(path, framework="pt") as file:
        state, found = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["diffkernels"])  # noqa: SIM118
    change(state, found)
    path.write_bytes(save(state, metadata={"diffkernels": json.dumps(found)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, found: found["quantized"].update(kind="int3"), "quantized: expected kind int8 or w4a8_lowrank"),
        (
            lambda _, found: found["quantized"]["layers"].append("blocks.0"),
            "expected the names of Linear layers and convolutions, got 'blocks.0'",
        ),
        (
            lambda _, found: found["quantized"]["layers"].append(3),
            "the names of Linear layers and convolutions, got 3",
        ),
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
