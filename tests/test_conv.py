"""Convolutions of 8-bit codes in models: the layer, what `quantize_` takes and leaves, state dicts and files, ResBlocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fuse import drawn, quantized, reasons, relative, units
from torch import nn

import diffkernels as dk
from diffkernels import ops
from diffkernels.bench.passes import count
from diffkernels.models import CheckpointError, DiMR
from diffkernels.nn import QuantizedConv2d, QuantizedLinear
from diffkernels.quantize import Recipe, predicted_gain, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = Recipe(skip=(), min_elements=0)
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _no_gradient():
    torch.manual_seed(0)  # the same numbers in any order of the tests
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [(3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 1, 1), (3, 1, 2, 2), (2, 2, 0, 1), (5, 3, 4, 1)])
def test_the_layer_is_a_convolution_of_its_codes(how, dtype) -> None:
    conv = drawn(nn.Conv2d(20, 70, *how)).to(dtype)
    x = torch.randn(2, 20, 9, 8).to(dtype)
    layer, smooth = QuantizedConv2d.of(conv), QuantizedConv2d.of(conv, torch.rand(20) + 0.5)
    coded = ops.group_norm_quantize(x.permute(0, 2, 3, 1), 0, activation="none")
    wide = (coded[0] * coded[1][:, None, None, None]).permute(0, 3, 1, 2).double()
    weight = layer._unpacked()[0] * layer.weight_scale.double()[:, None, None, None]
    exact, got = nn.functional.conv2d(wide, weight, layer.bias.double(), *how[1:]), layer(x)
    assert got.dtype == dtype and got.is_contiguous(memory_format=LAST) and got.shape == conv(x).shape
    assert relative(got, exact) < 2 * torch.finfo(dtype).eps
    assert relative(got, copy.deepcopy(conv).double()(x.double())) < 0.02 and relative(smooth(x), got) < 0.03
    for same in (x.contiguous(memory_format=LAST), x.repeat_interleave(2, 3)[..., ::2]):
        assert torch.equal(layer(same), got)
    for i in range(2):  # a scale a sample: pictures don't see each other
        assert torch.equal(layer(x[i]), got[i])
    assert layer(x[:0]).shape == got[:0].shape
    assert "kernel_size=" in repr(layer) and layer.nbytes < 2 * conv.weight.numel() + 4 * 70 + 64 * 64 * 4


def test_bad_arguments_are_named() -> None:
    layer, conv = QuantizedConv2d.of(nn.Conv2d(8, 6, 1)), nn.Conv2d(8, 6, 3)
    for shape, words in (
        ((1, 7, 4, 4), r"x: expected \[B, 8, H, W\], got shape \[1, 7, 4, 4\]"),
        ((5, 4, 4), r"x: expected \[B, 8, H, W\], got shape \[1, 5, 4, 4\]"),
        ((8, 8), r"x: expected \[B, 8, H, W\] or without B, got shape \[8, 8\]"),
        ((1, 8, 4, 4, 4), r"x: expected \[B, 8, H, W\] or without B, got shape \[1, 8, 4, 4, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x: expected \[..., 8\], got shape \[2, 7\]"):
        QuantizedLinear(8, 6)(torch.zeros(2, 7))
    for smooth, words in (
        (torch.rand(21), r"shape \[8\], got \[21\]"),
        (torch.rand(1), r"shape \[8\], got \[1\]"),
        (torch.arange(8.0), "numbers above 0, got 0"),
        (torch.full((8,), torch.nan), "numbers above 0, got nan"),
    ):
        with pytest.raises(ValueError, match="smooth: expected " + words):
            QuantizedConv2d.of(conv, smooth)
        with pytest.raises(ValueError, match="smooth: expected " + words):
            QuantizedLinear.of(nn.Linear(8, 6), smooth)
    for name in ("kernel_size", "stride", "padding", "dilation"):
        with pytest.raises(ValueError, match=rf"{name}: expected one whole number of \d or more, got \(3, 3\)"):
            QuantizedConv2d(8, 6, **{"kernel_size": 3, name: (3, 3)})
    given = {"x": torch.zeros(1, 2, 5, 8, dtype=torch.int8), "x_scale": torch.ones(1), "weight_scale": torch.ones(6)}
    given["weight"] = ops.pack_w8(torch.zeros(6, 72, dtype=torch.int8))
    for wrong, words in (
        (
            {"stride": 2, "padding": 0},
            r"x: expected pictures of 3 pixels or more with their padding of 0, got shape \[1, 2, 5, 8\]",
        ),
        ({"stride": 0}, "stride: expected 1 or more, below 2\\^31, got 0"),
        ({"padding": -1}, "padding: expected 0 or more, below 2\\^31, got -1"),
        ({"dilation": 2**31}, "dilation: expected 1 or more"),
        ({"kernel": 5, "padding": 2}, r"weight: expected \[1, 50, 64, 4\], pack_w8 of \[6, 200\], got shape \[1, 18, 64, 4\]"),
        ({"x_scale": torch.ones(2)}, r"x_scale: expected one a sample, \[1\], got shape \[2\]"),
        ({"x_scale": torch.ones(1).half()}, "x_scale: expected float32, got torch.float16"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int8)}, r"x: expected \[B, H, W, C\], got shape \[2, 5, 8\]"),
        ({"x": torch.zeros(1, 2, 5, 8)}, r"x: expected int8 codes, got torch\.float32"),
        ({"bias": torch.ones(1, 6)}, r"bias: expected \[6\], got shape \[1, 6\]"),
        ({"gate": torch.ones(2, 6)}, r"gate: expected \[6\], leading dimensions"),
        ({"residual": torch.ones(1, 3, 5, 6)}, r"residual: expected \[6\], leading dimensions"),
        ({"activation": "relu"}, "activation: expected one of none, gelu"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            ops.conv2d_w8a8(**given | wrong)
    assert ops.conv2d_w8a8(**given).shape == (1, 2, 5, 6)
    nothing = {"x": given["x"][..., :0], "weight": ops.pack_w8(torch.zeros(6, 0, dtype=torch.int8))}
    assert ops.conv2d_w8a8(**given | nothing, kernel=2**28 + 1, padding=2**27).eq(0).all()  # no tap of it is looked at


@pytest.mark.parametrize("kind", ["int8", "w4a8_lowrank"])
def test_codes_lie_as_they_are_packed(kind) -> None:
    """A memory format is about pictures: codes of four dimensions are none."""
    model = quantized(drawn(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Linear(36, 70))), Recipe(kind, min_elements=0))
    x = torch.randn(2, 8, 8, 8)
    exact = model(x)
    model.to(memory_format=LAST)
    assert all(
        t.is_contiguous() for m in model for t in (getattr(m, "packed", None), getattr(m, "down", None)) if t is not None
    )
    assert relative(model(x), exact) < 1e-6


def test_a_shared_scale_is_of_the_largest_column() -> None:
    """Columns of the weight of very different sizes, and `smooth` that shares them."""
    conv = drawn(nn.Conv2d(32, 48, 3, padding=1))
    conv.weight[:, 5] *= 60
    x = torch.randn(2, 32, 8, 8)
    x[:, 5] /= 60
    error = {}
    for smooth in ("none", "weight", lambda model: model(x)):
        model = nn.Sequential(copy.deepcopy(conv))
        (line,) = quantize_(model, Recipe(skip=(), min_elements=0, smooth=smooth)).quantized
        error[str(smooth)[:6]] = relative(model(x), conv(x))
        assert line.kind == "int8" and line.shape == (48, 32, 3, 3) and line.rotate == 0
    assert error["weight"] < error["none"] / 3 and error["<funct"] < error["none"] / 3, error


def test_what_is_taken_and_what_is_left() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "three": nn.Conv2d(64, 64, 3),
            "one": nn.Conv2d(128, 130, 1, bias=False),
            "conv_in": nn.Conv2d(64, 64, 3),
            "inner": nn.ModuleDict({"conv_out": nn.Conv2d(64, 64, 3)}),
            "none": nn.Conv2d(64, 0, 3),
            "depthwise": nn.Conv2d(2048, 2048, 3, groups=2048),
            "long": nn.Conv2d(64, 128, (1, 3)),
            "uneven": nn.Conv2d(64, 64, 3, padding=(1, 0)),
            "same": nn.Conv2d(64, 64, 3, padding="same"),
            "circular": nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
            "turned": nn.ConvTranspose2d(64, 64, 3),
            "line": nn.Conv1d(128, 128, 3),
            "own": Own(64, 64, 3),
            "small": nn.Conv2d(8, 8, 3),
        }
    )
    four = quantize_(copy.deepcopy(model), "w4a8_lowrank").layers
    assert {layer.reason for layer in four if layer.name in ("three", "one")} == {"no kernel of 4 bits for convolutions"}
    report = quantize_(model)
    found = {layer.name: layer.reason for layer in report.layers}
    other = "a subclass, another convolution or a parametrization: "
    assert found == {
        "three": None,
        "one": None,
        "conv_in": "skipped by name",
        "inner.conv_out": "skipped by name",
        "none": "fewer than 16384 weights",
        "depthwise": "no kernel: 2048 groups of channels",
        "long": "no kernel: kernel_size (1, 3) is not one number",
        "uneven": "no kernel: padding (1, 0) is not one number",
        "same": "no kernel: padding 'same' of zeros",
        "circular": "no kernel: padding (1, 1) of circular",
        "turned": other + "ConvTranspose2d",
        "line": other + "Conv1d",
        "own": other + "Own",
        "small": "fewer than 16384 weights",
    }
    assert type(model["three"]) is type(model["one"]) is QuantizedConv2d
    assert all(line.sqnr > 38 and line.after < line.before for line in report.quantized)
    with pytest.raises(ValueError, match=r"conv: expected one kernel for all channels, .* got 4 groups of channels"):
        QuantizedConv2d.of(nn.Conv2d(8, 8, 3, groups=4))


def test_auto_asks_the_roofline() -> None:
    recipe = Recipe("auto", skip=(), min_elements=0)
    few, wide = nn.Conv2d(320, 4, 3, padding=1), nn.Conv2d(320, 320, 3, padding=1)
    assert predicted_gain(few, recipe) < 1 < predicted_gain(wide, recipe) <= 2
    # A window is read nine times where it is multiplied, not in memory: a Linear of as many inputs gains less.
    assert predicted_gain(nn.Linear(320 * 9, 320), recipe) < predicted_gain(wide, recipe)
    found = {layer.name: layer.reason for layer in quantize_(nn.Sequential(few, wide), recipe).layers}
    assert found["1"] is None and found["0"].startswith("no gain: 0.")
    broken = nn.Sequential(nn.Conv2d(64, 64, 3))
    broken[0].weight.normal_(0, 0.01)
    broken[0].weight[:, 0, 0, 0] = 1
    (line,) = quantize_(broken, recipe).layers
    assert line.kind is None and line.reason.startswith("its weight in 8 bits has an SQNR of") and type(broken[0]) is nn.Conv2d


def test_state_dicts_come_whole_or_not_at_all() -> None:
    layer, other = (QuantizedConv2d.of(drawn(nn.Conv2d(12, 20, 3), seed), torch.rand(12) + 0.5) for seed in (0, 1))
    x = torch.randn(1, 12, 6, 6)
    state = layer.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "qweight": (torch.int8, (20, 12, 3, 3)),
        "weight_scale": (torch.float32, (20,)),
        "smooth": (torch.float32, (12,)),
        "bias": (torch.float32, (20,)),
    }
    before = other(x)
    for broken, words in (
        ({k: v for k, v in state.items() if k != "qweight"}, 'Missing key.*"qweight"'),
        (state | {"qweight": state["qweight"].transpose(0, 1)}, r"qweight: expected int8 \[20, 12, 3, 3\]"),
        (state | {"qweight": state["qweight"].float()}, r"qweight: expected int8 \[20, 12, 3, 3\], got torch.float32"),
        (state | {"rotate": torch.tensor(64)}, "rotate: expected 0, got 64"),
        (state | {"group_scale": torch.ones(20, 1)}, 'Unexpected key.*"group_scale"'),
    ):
        with pytest.raises(RuntimeError, match=words):
            other.load_state_dict(broken)
        other.bias.copy_(QuantizedConv2d.of(drawn(nn.Conv2d(12, 20, 3), 1)).bias)  # a parameter of its own, as in any layer
        assert torch.equal(other(x), before)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.weight, layer.weight)
    half = copy.deepcopy(layer).half()
    assert half.weight_scale.dtype == half.smooth.dtype == torch.float32 and half.bias.dtype == torch.float16
    assert relative(half(x.half()), layer(x)) < 0.01
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_file_of_a_model_with_convolutions(tmp_path) -> None:
    stage = {"block_type": "TransformerBlock", "dim": 16, "hidden_dim": 32, "num_attention_heads": 2, "num_blocks": 1}
    stage |= {"max_height": 4, "max_width": 4, "image_input_ratio": 1, "input_feature_ratio": 2, "final_kernel_size": 3}
    model = drawn(DiMR([stage], channels=4, num_classes=3))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    exact = model(x, t, y)
    names = [layer.name for layer in quantize_(model, ALL).quantized if layer.shape[2:]]
    assert names == ["stages.0.input_layer.1", "stages.0.output_layer.2"] and relative(model(x, t, y), exact) < 0.05
    path = tmp_path / "model.safetensors"
    dk.save(model, path)
    assert torch.equal(dk.load(path)(x, t, y), model(x, t, y))
    state = load_file(path)
    state["stages.0.output_layer.2.qweight"] = state["stages.0.output_layer.2.qweight"].flatten(1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"output_layer\.2\.qweight: expected shape \[\d+, 16, 3, 3\]"):
        dk.load(path)
    default = [layer.reason for layer in quantize_(DiMR([stage], channels=4, num_classes=3)).layers if layer.shape[2:]]
    assert default == ["skipped by name"] * 2


RESNETS = {
    "plain": {},
    "wider": {"out_channels": 96},
    "scaled": {"time_embedding_norm": "scale_shift"},
    "timeless": {"temb_channels": None},
    "rescaled": {"output_scale_factor": 2.0, "skip_time_act": True, "groups_out": 16},
}


def resnet(**more) -> nn.Module:
    kind = pytest.importorskip("diffusers.models.resnet").ResnetBlock2D
    return drawn(kind(**{"in_channels": 64, "temb_channels": 40, "groups": 8, "dropout": 0.1} | more))


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_resnet_block(name, dtype) -> None:
    model = nn.Sequential(block := resnet(**RESNETS[name]))
    x, time = torch.randn(2, 64, 9, 8), None if block.time_emb_proj is None else torch.randn(2, 40)
    exact = block(x, time)
    quantized(model.to(dtype))
    x, time = x.to(dtype).contiguous(memory_format=LAST), None if time is None else time.to(dtype)
    error, passes = relative(block(x, time), exact), count(lambda: block(x, time), x.numel())
    (line,) = fuse(model)
    assert line.kind == "ResnetBlock2D" and line.chain == "norm1 → codes, conv1 + time, norm2 → codes, conv2 + residual"
    assert line.reason == ("conv_shortcut codes its own input" if name == "wider" else None)
    got, fewer = block(x, time), count(lambda: block(x, time), x.numel())
    # The codes of h are of one more rounding where it is not fused: the error is no larger, but for chance.
    assert got.dtype == dtype and got.is_contiguous(memory_format=LAST) and relative(got, exact) <= 1.05 * error
    assert sum(units(fewer)) < sum(units(passes))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[0](x, time), got) and type(copied[0]) is type(block)
    torch._dynamo.reset()
    assert relative(torch.compile(block, fullgraph=True)(x, time), got) < 0.01
    seen: list[int] = []
    hook = block.norm2.register_forward_hook(lambda *_: seen.append(1))
    assert relative(block(x, time), exact) == error and seen
    hook.remove()
    assert torch.equal(block(x, time), got)
    if time is not None:
        with pytest.raises((TypeError, AttributeError, RuntimeError)):
            block(x, None)
        # What PyTorch broadcasts or promotes, the layers do.
        alone = block(x[:1], time[:1])
        assert relative(block(x, time[:1])[:1], alone) < 0.02 and block(x[:1], time).shape == got.shape
    if dtype == torch.bfloat16 and name == "scaled":
        assert block(x, time.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_norms_and_convolutions(dtype) -> None:
    own = nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16))
    layers = [nn.GroupNorm(8, 32), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(32, 48, 3, padding=1), nn.GroupNorm(4, 48)]
    layers += [nn.Conv2d(48, 24, 1), nn.SiLU(), nn.Conv2d(24, 16, 3, stride=2), nn.SiLU(inplace=True), nn.Conv2d(16, 16, 1)]
    model = drawn(nn.Sequential(*layers, nn.Conv2d(16, 16, 1), own))
    x = torch.randn(2, 32, 49, 47)
    exact = model(x)
    quantized(model.to(dtype))
    before, x = relative(model(x.to(dtype)), exact), x.to(dtype)
    whole, inner = dk.fuse_(model).modules
    assert whole.chain == "0 GroupNorm → codes, 3, 4 GroupNorm → codes, 5, 6 SiLU → codes, 7"
    assert whole.reason == "9: 8 writes into its input; 10: QuantizedConv2d writes no codes"
    assert inner.reason == "0: it comes first" and type(own) is nn.Sequential
    got = model(x)
    assert got.dtype == dtype and relative(got, exact) <= 1.1 * before
    assert torch.equal(torch.cat([model(x[i : i + 1]) for i in range(2)]), got) and model.fused  # a scale a sample
    small = drawn(nn.Sequential(nn.GroupNorm(4, 48, eps=0.5, affine=False), nn.SiLU(), nn.Conv2d(48, 24, 1)))
    unfused = quantized(small.to(dtype))(x := (0.1 * torch.randn(2, 48, 5, 5)).to(dtype))
    assert reasons(small) == {"": None} and relative(small(x), unfused) < (1e-5 if dtype == torch.float32 else 0.02)
    x = torch.randn(2, 8, 9, 7)
    alone = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3))
    unfused = quantized(alone.eval())(x[0])
    assert reasons(alone) == {"": None} and torch.equal(alone(x[0]), unfused)  # without a batch: called, not fused


def fuse(model: nn.Module) -> list:
    return dk.fuse_(model).modules


def test_a_resnet_block_that_is_left_alone() -> None:
    watched = quantized(resnet())
    hook = watched.nonlinearity.register_forward_hook(lambda *_: None)
    assert reasons(watched)[""] == "nonlinearity has hooks"
    hook.remove()
    watched.norm2.eps = -1e-9
    assert reasons(watched)[""] == "norm2 has an eps of -1e-09"
    for why, more in {
        "resizes between norm1 and conv1": {"up": True},
        "nonlinearity: Mish has no kernel": {"non_linearity": "mish"},
        "scales by time, of which it has no projection": {"time_embedding_norm": "scale_shift", "temb_channels": None},
    }.items():
        assert reasons(quantized(resnet(**more)))[""] == why
    assert reasons(resnet()) == {"": "conv1 is no QuantizedConv2d: Conv2d"}
    assert reasons(quantized(resnet().train()))[""] == "in training mode"
    half = quantized(resnet(), Recipe(skip=("conv2",), min_elements=0))
    assert reasons(half)[""] == "conv2 is no QuantizedConv2d: Conv2d" and type(half).__name__ == "ResnetBlock2D"
    alone = nn.ModuleDict({"a": QuantizedConv2d.of(nn.Conv2d(8, 8, 3))})
    assert reasons(alone) == {"a": "in ModuleDict, of which no pattern is known"}


def test_a_unet_of_diffusers() -> None:
    """Eight bits from end to end: convolutions, ResBlocks and the transformer's MLPs."""
    diffusers = pytest.importorskip("diffusers")
    model = drawn(
        diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24, attention_head_dim=8,
        )
    )  # fmt: skip
    for p in model.parameters():
        p.mul_(0.7)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([10, 800]), torch.randn(2, 7, 24)
    exact = model(x, t, text).sample
    report = quantize_(model, Recipe(min_elements=0))
    found = {layer.name: layer.kind for layer in report.layers}
    assert found["conv_in"] is found["conv_out"] is None
    assert found["mid_block.resnets.0.conv1"] == found["down_blocks.0.downsamplers.0.conv"] == "int8"
    assert found["up_blocks.0.upsamplers.0.conv"] == "int8"
    error = relative(model(x, t, text).sample, exact)
    fused = [line.kind for line in dk.fuse_(model).fused]
    assert fused.count("ResnetBlock2D") == 8 and fused.count("FeedForward") == 4
    assert error < 0.1 and relative(model(x, t, text).sample, exact) < 1.2 * error
    assert isinstance(model.mid_block.resnets[0].time_emb_proj, QuantizedLinear)


def test_a_wanted_gradient_is_refused_by_name() -> None:
    layer = QuantizedConv2d.of(nn.Conv2d(8, 8, 3))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="x: group_norm_quantize has no gradient"):
        layer(torch.randn(1, 8, 5, 5, requires_grad=True))
