"""What `fuse_` fuses answers what the layers did, in fewer passes; what it can't prove it leaves alone, and says why."""

from __future__ import annotations

import copy
import pickle
import re
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffkernels as dk
from diffkernels import _ladder
from diffkernels.bench import dit as bench
from diffkernels.bench.passes import count
from diffkernels.fuse import FusedSequential, fuse_
from diffkernels.models import DiMR, dit
from diffkernels.models.dit import DiT, DiTBlock
from diffkernels.nn import Mlp, QuantizedLinear, RMSNorm
from diffkernels.quantize import Recipe, quantize_
from diffkernels.sampling import DiscreteVP, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = Recipe(skip=(), min_elements=0)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every matrix of the size that keeps its input's, every vector drawn too, so that nothing hides."""
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=draw)
    return module.eval()


def model(**config) -> DiT:
    found = drawn(dit("S/8", **{"num_classes": 10, "input_size": 32, "depth": 2, **config}))
    assert isinstance(found, DiT)
    return found


def inputs(size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, size, size, generator=draw), torch.tensor([20.0, 700.0]), torch.tensor([1, 2])


def quantized(module: nn.Module, recipe: Recipe = ALL) -> nn.Module:
    quantize_(module, recipe)
    return module


def reasons(module: nn.Module) -> dict[str, str | None]:
    return {line.name: line.reason for line in fuse_(module).modules}


# Both forwards round to 8 bits at the same places, by at most half a code: each error is a sum of the same many independent
# roundings, and differs by what ties and the roundings to x's dtype that only the unfused form makes add: a twentieth.
MARGIN = 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("smooth", "rotate"), [("none", 0), ("weight", 0), ("weight", 128)])
def test_a_fused_model_is_as_near_to_the_exact_one(dtype, smooth, rotate) -> None:
    x, t, y = inputs()
    exact = model()(x, t, y)
    half = quantized(model().to(dtype), Recipe(smooth=smooth, rotate=rotate))
    before = relative(half(x.to(dtype), t, y), exact)
    report = fuse_(half)
    assert [line.name for line in report.fused] == ["blocks.0", "blocks.1"] and len(report.modules) == 2
    got = half(x.to(dtype), t, y)
    after = relative(got, exact)
    assert got.dtype == dtype and after <= MARGIN * before, (before, after)
    assert after < {torch.float32: 0.01, torch.bfloat16: 0.02, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("rung", ["reference", "cpu", "avx2", "avx512"])
def test_every_rung_runs_it(rung) -> None:
    for op in ("norm_quantize", "act_quantize", "linear_w8a8"):
        if why := _ladder.missing(rung, op, "cpu"):
            pytest.skip(f"{op}: {why}")
    found, call = quantized(model(depth=1)), inputs()
    unfused = found(*call)
    fuse_(found)
    with dk.rung(rung):
        assert relative(found(*call), unfused) < 1e-3


def test_a_block_in_the_words_of_the_ops() -> None:
    """Against the formula in float64, on the weights that the codes stand for: what is left is the inputs' rounding."""
    block = drawn(DiTBlock(64, 4, 4.0))
    assert isinstance(block, DiTBlock)
    x, own = torch.randn(2, 9, 64), list(torch.randn(6, 2, 64))
    quantized(block)
    wide = copy.deepcopy(block)
    for parent, names in ((wide.attn, ("qkv", "proj")), (wide.mlp, ("fc1", "fc2"))):
        for name in names:
            old = getattr(parent, name)
            exact = nn.Linear(old.in_features, old.out_features)
            exact.weight.copy_(old.weight)
            exact.bias.copy_(old.bias)
            setattr(parent, name, exact)
    wide = wide.double()
    expected, _ = wide(x.double(), None, [m.double() for m in own], own[0].double(), own[1].double())
    fuse_(block)
    got, h = block(x, None, own, own[0], own[1])
    assert (
        h is None and relative(got, expected) < 0.015
    )  # 0.6 % a coding of a Gaussian row (Dettmers et al. 2022), four of them


def units(passes) -> tuple[int, int]:
    return round(passes.reads), round(passes.writes)


def test_passes_of_a_dit_block() -> None:
    d, x = 256, torch.randn(2, 64, 256)
    block, own = quantized(DiTBlock(d, 4, 4.0).eval()), list(torch.randn(6, 2, 256))

    def call():
        return block(x, x, own, own[1], own[0])

    before = count(call, x.numel())
    assert units(before) == (15, 15)
    assert before.by_op["act_quantize"][0] == 4
    fuse_(block)
    after = count(call, x.numel())
    assert units(after) == (9, 7)  # of which the GELU is 4 and 4
    # One pass that only codes is left, of attention's result; the other act_quantize is the GELU's.
    assert {name: calls for name, (calls, _) in after.by_op.items()} == {
        "norm_quantize": 2,
        "act_quantize": 2,
        "linear_w8a8": 2,
    }


def test_passes_of_an_mlp() -> None:
    x = torch.randn(128, 64)
    mlp = quantized(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval())
    assert units(count(lambda: mlp(x), x.numel())) == (10, 10)
    fuse_(mlp)
    assert units(count(lambda: mlp(x), x.numel())) == (5, 5)


def test_a_mixed_model_runs_each_block_as_it_can() -> None:
    """Between fused and unfused blocks, in either order, whoever has no norm yet makes it."""
    x, t, y = inputs()
    for skip in ("blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.2.*"):
        found = model(depth=3)
        exact = found(x, t, y)
        quantized(found, Recipe(skip=("*embed*", "*adaLN*", "final*", skip), min_elements=0))
        before = relative(found(x, t, y), exact)
        assert len(fuse_(found).fused) >= 2
        assert relative(found(x, t, y), exact) <= MARGIN * before


STAGES = [
    {"block_type": "TransformerBlock", "dim": 48, "hidden_dim": 96, "num_attention_heads": 2, "num_blocks": 1},
    {"block_type": "ConvNeXtBlock", "dim": 24, "hidden_dim": 48, "num_blocks": 1, "max_height": 8, "max_width": 8},
]
STAGES[0] |= {"max_height": 4, "max_width": 4, "input_feature_ratio": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dimr_codes_once_for_two_linears(dtype) -> None:
    call = torch.randn(2, 4, 8, 8), torch.tensor([30.0, 900.0]), torch.tensor([0, 3])
    found = drawn(DiMR(STAGES))
    exact = found(*call)
    quantized(found.to(dtype), Recipe(skip=("*skip*", "*upsample*", "*put_layer*"), min_elements=0))
    call = (call[0].to(dtype), *call[1:])
    before, mlp, h = relative(found(*call), exact), found.stages[1].blocks[0].block2, torch.randn(2, 8, 8, 24).to(dtype)
    assert units(count(lambda: mlp(h), h.numel())) == (8, 6)
    report = fuse_(found)
    assert [line.name for line in report.fused] == ["stages.0.blocks.0.block2", "stages.1.blocks.0.block2"]
    assert [line.name for line in report.modules if line.reason] == [
        f"stages.0.blocks.0.block1.{n}" for n in ("query_key_value", "dense")
    ]
    assert relative(found(*call), exact) <= MARGIN * before and units(count(lambda: mlp(h), h.numel())) == (5, 3)
    other = quantized(DiMR(STAGES).eval(), Recipe(min_elements=0, smooth="weight"))
    assert reasons(other)["stages.0.blocks.0.block2"] == "w0 and w1 are smoothed, each by its own"


def test_what_the_recipe_left_is_left_with_the_reason() -> None:
    found = model(depth=3)
    found.blocks[2].attn.proj.register_forward_hook(lambda *_: None)
    quantized(found, Recipe(skip=("*embed*", "*adaLN*", "blocks.0.attn.qkv", "blocks.1.mlp.fc2"), min_elements=0))
    assert reasons(found) == {
        "blocks.0": "attn.qkv is no QuantizedLinear: Linear",
        "blocks.0.mlp": None,
        "blocks.1": "mlp.fc2 is no QuantizedLinear: Linear",
        "blocks.1.mlp": "fc2 is no QuantizedLinear: Linear",
        "blocks.2": "attn.proj is no QuantizedLinear: Linear",
        "blocks.2.mlp": None,
        "final_layer.linear": "in FinalLayer, of which no pattern is known",
    }
    assert not [line for line in fuse_(model()).modules if line.chain]  # nothing is quantized: nothing is fused


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Other(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    found = model(depth=1)
    found.blocks[0].mlp = drawn(Other(384, 1536))
    quantized(found)
    assert reasons(found)["blocks.0"] == "mlp is no Mlp: Other"
    found.blocks[0].attn.forward = types.MethodType(lambda self, x: x, found.blocks[0].attn)
    found.blocks[0].mlp.__class__ = Mlp
    assert reasons(found)["blocks.0"] == "attn has a forward of its own"


def test_hooks_and_modes_that_come_later_are_met_by_the_layers() -> None:
    found, call, seen = quantized(model(depth=1)), inputs(), []
    unfused = found(*call)
    fuse_(found)
    fused = found(*call)
    assert not torch.equal(fused, unfused)
    hook = found.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(found(*call), unfused) and seen == [1]
    hook.remove()
    assert torch.equal(found(*call), fused)
    found.blocks.train()  # not the label embedder, which would drop labels
    assert torch.equal(found(*call), unfused)
    found.eval()
    assert torch.equal(found(*call), fused)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert torch.equal(found(*call), unfused) and reasons(found)["blocks.0"] == "all modules have hooks"
    finally:
        hook.remove()
    fuse_(found)
    assert torch.equal(found(*call), fused)
    assert dk.compare(found, model(depth=1), call).worst.relative < 0.1  # it hooks every layer
    found.train()
    assert reasons(found)["blocks.0"] == "in training mode" and not found.blocks[0].fused
    fuse_(found.eval())
    found.blocks[0].mlp.fc1 = nn.Linear(384, 1536)  # an exchange, too
    assert found(*call).isfinite().all()


def test_twice_is_once() -> None:
    found, call = quantized(model(depth=1)), inputs()
    first, y = fuse_(found), found(*call)
    second = fuse_(found)
    assert first.modules == second.modules and torch.equal(found(*call), y)
    mlp = quantized(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).eval())
    assert fuse_(mlp).modules == fuse_(mlp).modules and type(mlp) is FusedSequential


def test_a_fused_model_is_saved_as_the_quantized_one(tmp_path) -> None:
    found, call = quantized(model(input_size=16, depth=1), Recipe(smooth="weight")), inputs(16)
    names, unfused = list(found.state_dict()), found(*call)
    dk.save(found, tmp_path / "before.safetensors")
    fuse_(found)
    fused = found(*call)
    dk.save(found, tmp_path / "after.safetensors")
    assert list(found.state_dict()) == names
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    again = dk.load(tmp_path / "after.safetensors")
    assert torch.equal(again(*call), unfused)
    assert len(fuse_(again).fused) == 1 and torch.equal(again(*call), fused)
    dk.load(tmp_path / "before.safetensors", found)
    assert torch.equal(found(*call), fused)  # it stays fused
    assert torch.equal(copy.deepcopy(found)(*call), fused) and torch.equal(pickle.loads(pickle.dumps(found))(*call), fused)


def test_compiled_is_eager() -> None:
    d = 64
    block, own, x = quantized(drawn(DiTBlock(d, 4, 4.0))), list(torch.randn(6, 2, d)), torch.randn(2, 9, d)
    mlp = quantized(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, d)).eval())
    for module, args in ((block, (x, None, own, own[1], own[0])), (mlp, (x,))):
        assert fuse_(module).fused
        got, exact = torch.compile(module, fullgraph=True)(*args), module(*args)
        got, exact = (y[0] if isinstance(y, tuple) else y for y in (got, exact))
        assert relative(got, exact) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "before",
    [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        nn.LayerNorm(96),
        nn.LayerNorm(96, eps=1e-2, elementwise_affine=False),
        nn.LayerNorm(96, bias=False),
        nn.RMSNorm(96, eps=1e-5),
        nn.RMSNorm(96, eps=1e-5, elementwise_affine=False),
        RMSNorm(96),
    ],
    ids=lambda layer: repr(layer).replace(" ", ""),
)
def test_a_sequential(before, dtype) -> None:
    layers = nn.Sequential(nn.Linear(64, 96), copy.deepcopy(before), nn.Dropout(0.3), nn.Identity(), nn.Linear(96, 48))
    drawn(layers)
    x = 3 * torch.randn(2, 30, 64)
    exact = layers(x)
    state = list(quantized(layers.to(dtype)).state_dict())
    unfused = relative(layers(x.to(dtype)), exact)
    (line,) = fuse_(layers).modules
    assert line.chain == f"1 {type(before).__name__} → codes, 4" and line.reason == "0: it comes first"
    assert isinstance(layers, nn.Sequential) and list(layers.state_dict()) == state
    got = layers(x.to(dtype))
    assert got.dtype == dtype and relative(got, exact) <= MARGIN * unfused
    assert torch.equal(pickle.loads(pickle.dumps(layers))(x.to(dtype)), got)
    assert torch.equal(copy.deepcopy(layers)(x.to(dtype)), got)
    assert relative(layers[1:](layers[0](x.to(dtype))), got) < 0.01 and len(layers[1:]) == 4  # a slice is not fused
    with torch.autocast("cpu", torch.bfloat16):
        again = layers(x.to(dtype))
        layers.fused = False
        assert again.dtype == layers(x.to(dtype)).dtype and torch.equal(again, layers(x.to(dtype)))


class Odd(nn.GELU):
    pass


def hooked() -> nn.Module:
    layer = nn.GELU()
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (nn.ReLU(), "1: ReLU writes no codes"),
        (Odd(), "1: Odd writes no codes"),
        (nn.SiLU(inplace=True), "1: 0 writes into its input"),
        (hooked(), "1: 0 has hooks"),
        (nn.RMSNorm(64), "1: 0 has no eps"),
        (nn.LayerNorm((30, 64)), "1: 0 norms [30, 64], not [64]"),
        (nn.Identity(), "1: it comes first"),
        (nn.Linear(64, 64), "0: it comes first; 1: QuantizedLinear writes no codes"),
        (nn.Sequential(nn.GELU()), "1: Sequential writes no codes"),
    ],
)
def test_a_sequential_that_is_left_alone(before, why) -> None:
    layers = quantized(nn.Sequential(before, nn.Linear(64, 8)).eval())
    y = layers(torch.ones(2, 30, 64))
    (line,) = fuse_(layers).modules
    assert (line.chain, line.reason) == ("", why)
    assert type(layers) is nn.Sequential and "fused" not in layers.__dict__
    assert torch.equal(layers(torch.ones(2, 30, 64)), y)


def test_a_forward_that_was_set_is_left_alone() -> None:
    layers = quantized(nn.Sequential(nn.GELU(), nn.Linear(64, 8)).eval())
    layers.forward = lambda x: x  # as some offloaders do
    assert reasons(layers) == {"": "has a forward of its own"} and type(layers) is nn.Sequential
    del layers.forward
    fuse_(layers)
    layers[0].forward = lambda x: 0 * x
    assert torch.equal(layers(torch.ones(3, 64)), layers[1](torch.zeros(3, 64)))


def test_a_dropout_that_drops_is_in_the_way() -> None:
    layers = quantized(nn.Sequential(nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 8)).eval())
    fuse_(layers)
    layers[1].train()
    x, found = torch.randn(40, 64), []
    for call in (layers, lambda x: layers[2](layers[1](layers[0](x)))):
        torch.manual_seed(0)
        found.append(call(x))
    assert torch.equal(*found)
    assert reasons(layers) == {"": "2: Dropout writes no codes"} and type(layers) is nn.Sequential


FEED_FORWARDS = ["gelu", "gelu-approximate", "geglu", "swiglu", "linear-silu"]


@pytest.mark.parametrize("activation", FEED_FORWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_feed_forward(activation, dtype) -> None:
    FeedForward = pytest.importorskip("diffusers.models.attention").FeedForward
    layers = nn.Sequential(drawn(FeedForward(64, 40, dropout=0.2, activation_fn=activation, final_dropout=True)))
    x = 2 * torch.randn(2, 30, 64)
    exact = layers(x)
    quantized(layers.eval().to(dtype), Recipe(skip=(), min_elements=0, smooth="weight"))
    before, passes = relative(layers(x.to(dtype)), exact), count(lambda: layers(x.to(dtype)), x.numel())
    (line,) = fuse_(layers).modules
    assert (line.name, line.kind, line.reason) == ("0", "FeedForward", None) and line.chain.endswith(" → codes, 2")
    got, fewer = layers(x.to(dtype)), count(lambda: layers(x.to(dtype)), x.numel())
    assert got.dtype == dtype and relative(got, exact) <= MARGIN * before
    gated = 4 if activation in ("geglu", "swiglu") else 0  # one half is read by the other's epilogue
    assert sum(units(passes)) - sum(units(fewer)) == (8 if not gated else 28 - 12)
    assert isinstance(layers[0], FeedForward) and fuse_(layers).modules == [line]
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert torch.equal(copied(x.to(dtype)), got) and type(copied[0]) is type(layers[0])
    torch._dynamo.reset()  # Sequential's forward is compiled anew for each activation
    assert relative(torch.compile(layers, fullgraph=True)(x.to(dtype)), got) < 0.01
    seen: list[int] = []
    layers[0].net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    assert relative(layers(x.to(dtype)), exact) == before and seen
    assert reasons(layers) == {"0": "net.0.proj has hooks"} and type(layers[0]) is FeedForward


def test_a_feed_forward_that_is_left_alone() -> None:
    FeedForward = pytest.importorskip("diffusers.models.attention").FeedForward
    for why, args in {
        "net.0: ApproximateGELU has no kernel": {"activation_fn": "geglu-approximate"},
        "net.2: 72 inputs are no multiple of 64": {"inner_dim": 72},
    }.items():
        assert reasons(quantized(FeedForward(64, **args).eval())) == {"": why}
    found = quantized(FeedForward(64).eval())
    found.net[1] = nn.ReLU()
    assert reasons(found) == {"": "net.1 is no idle Dropout"}
    assert reasons(FeedForward(64).eval()) == {"": "net.0.proj is no QuantizedLinear: Linear"}


def test_a_block_of_diffusers() -> None:
    """Its MLP is proven; its norms and its attention are not, and are left alone."""
    diffusers = pytest.importorskip("diffusers.models.attention")
    block = drawn(diffusers.BasicTransformerBlock(64, 2, 32))
    x, exact = torch.randn(2, 9, 64), None
    exact = block(x)
    quantized(block)
    before = relative(block(x), exact)
    found = reasons(block)
    assert found.pop("ff") is None and relative(block(x), exact) <= MARGIN * before
    assert set(found) == {f"attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
    assert found["attn1.to_q"] == "in Attention, of which no pattern is known"


def test_half_of_the_outputs() -> None:
    layer, x = quantized(nn.Sequential(nn.Linear(40, 150)))[0], torch.randn(7, 40)
    coded, whole = dk.ops.act_quantize(x), layer(x)
    for first, last in ((0, 64), (64, 128), (128, None), (64, None)):
        assert torch.equal(layer.from_codes(coded, x.dtype, outputs=(first, last)), whole[:, first:last])
    for wrong in ((10, None), (0, 100)):
        with pytest.raises(ValueError, match="outputs: expected multiples of 64"):
            layer.from_codes(coded, x.dtype, outputs=wrong)


def test_the_report_and_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fuse_(3)  # type: ignore[arg-type]
    assert dk.fuse_ is fuse_
    assert reasons(QuantizedLinear(8, 8)) == {"": "the model itself"}
    assert fuse_(nn.Linear(8, 8)).modules == [] and str(fuse_(nn.Linear(8, 8))).endswith("0 of 0 fused")
    text = str(fuse_(quantized(nn.ModuleDict({"a": nn.Sequential(nn.GELU(), nn.Linear(9, 9)), "b": nn.Linear(9, 9)}).eval())))
    assert "0 GELU → codes, 1" in text and "in ModuleDict, of which no pattern is known" in text
    assert text.endswith("1 of 2 fused")


def test_a_wanted_gradient_is_refused_by_name() -> None:
    layers = quantized(nn.Sequential(nn.GELU(), nn.Linear(64, 8)).eval())
    fuse_(layers)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="x: act_quantize has no gradient"):
        layers(torch.randn(2, 64, requires_grad=True))


def test_the_docs_are_run() -> None:
    text = (Path(__file__).parents[1] / "docs" / "quantization.md").read_text()
    made: dict = {"print": lambda *_: None}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/quantization.md", "exec"), made)
    head = quantized(nn.ModuleDict({"head": made["Head"](64, 32)}).eval())["head"]
    x = torch.randn(5, 64)
    unfused = head(x)
    assert [line.kind for line in fuse_(head).fused] == ["Head"] and relative(head(x), unfused) < 1e-3


def shown(found: DiT) -> Tensor:
    """One call, for `smooth`."""
    return found(torch.randn(2, 4, 32, 32).bfloat16(), *inputs()[1:])


SMALL = {"num_classes": 10, "patch_size": 4, "hidden_size": 256, "num_heads": 4, "depth": 4, "learn_sigma": False}


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param("S/4", SMALL, id="small"), pytest.param("B/2", {"learn_sigma": False}, id="B/2", marks=pytest.mark.big)],
)
@pytest.mark.parametrize(
    ("outliers", "how", "least"),
    [
        ("weights", {}, 27),
        ("weights", {"rotate": 256}, 27),
        ("shared", {}, 27),
        ("shared", {"smooth": "weight"}, 27),
        ("activations", {}, 24),
        ("activations", {"rotate": 256}, 27),
        ("activations", {"smooth": shown}, 27),
        ("weights", {"kind": "w4a8_lowrank"}, 21),
        ("shared", {"kind": "w4a8_lowrank"}, 21),
        ("shared", {"kind": "w4a8_lowrank", "smooth": shown}, 21),
        ("activations", {"kind": "w4a8_lowrank"}, 18),
        ("activations", {"kind": "w4a8_lowrank", "rotate": 256}, 17),
        ("activations", {"kind": "w4a8_lowrank", "smooth": shown}, 21),
    ],
)
def test_pictures_are_those_of_float32(name, config, outliers, how, least) -> None:
    """20 steps of a model that answers the picture itself, outliers fifty times as large; W8A8 is held to 27 dB, W4A8 to 21.

    Outliers that the weights know nothing of set a row's scale alone, which no smoothing by the weight sees: 25.8 dB for B/2.
    """
    found = bench.drawn(name, outliers, **config)
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    sampler = Sampler("dpmpp_2m", schedule=DiscreteVP.linear(), prediction="x0")

    def pictures(model) -> Tensor:
        return sampler(lambda x, t, y: model(x.to(dtype), t, y).float(), noise, steps=20, cond={"y": torch.tensor([1, 2])})

    dtype = torch.float32
    exact = pictures(found)
    dtype = torch.bfloat16
    fuse_(quantized(found.bfloat16(), Recipe(**how)))
    assert all(block.fuses() for block in found.blocks)
    decibels = bench.psnr(pictures(found), exact)
    print(f"{name}, outliers in {outliers}, {', '.join(how) or 'as it is'}: {decibels:.1f} dB")
    assert decibels >= least


def test_the_benchmark_compares_what_is_the_same() -> None:
    torch._dynamo.reset()
    contenders, exact, shape = bench.contenders("S/8", **SMALL | {"patch_size": 8, "depth": 2})
    assert shape == [2, 4, 32, 32] and list(contenders) == ["ours", "unfused", "eager", "compile"]
    errors = {name: relative(call(), exact) for name, call in contenders.items()}
    assert errors["eager"] < 0.02 and errors["compile"] < 0.02 and errors["ours"] <= MARGIN * errors["unfused"] < 0.1, errors
    model = bench.drawn("S/8", **SMALL)
    x, t, y = inputs()
    assert relative(model(x, t, y), bench.eager(model, x, t, y)) < 1e-5
