"""LoRA as a side branch: the sum that it stands for, on codes and beside plain layers; on, rescaled, off; what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from test_fuse import STAGES, inputs, relative
from torch import Tensor, nn

import diffkernels as dk
from diffkernels import Recipe, add_lora_, fuse_, quantize_
from diffkernels.models import DiMR, dit
from diffkernels.models.checkpoint import CheckpointError
from diffkernels.nn import Fusable, QuantizedLinear, WeightOnlyLinear

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def model(depth: int = 2) -> nn.Module:
    made = dit("S/8", num_classes=10, input_size=32, depth=depth).eval()
    for p in made.parameters():
        if p.requires_grad:
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return made


def lora(
    made: nn.Module, names=LAYERS, rank: int = 4, down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> dict[str, Tensor]:
    """Of each block's layers: as large as what they add to."""
    state = {}
    for i in range(len(made.blocks)):  # type: ignore[arg-type]
        for name in names:
            layer = made.get_submodule(f"blocks.{i}.{name}")
            state[f"blocks.{i}.{name}.{down}"] = torch.randn(rank, layer.in_features) / layer.in_features**0.5
            state[f"blocks.{i}.{name}.{up}"] = torch.randn(layer.out_features, rank) / rank**0.5
    return state


def merged(made: nn.Module, state: dict[str, Tensor], scale: float = 1.0) -> nn.Module:
    """What a LoRA means: its product in the weight."""
    made = copy.deepcopy(made)
    for key in state:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            made.get_submodule(name).weight += scale * state[f"{name}.lora_B.weight"] @ state[key]
    return made


def test_beside_plain_layers_it_is_what_merging_gives() -> None:
    plain, call = model(), inputs()
    state = lora(plain, (*LAYERS, "adaLN_modulation.1"))  # which are one product, until something hangs on one of them
    exact, without = merged(plain, state, 0.7)(*call), plain(*call)
    added = add_lora_(plain, state, scale=0.7)
    assert relative(plain(*call), exact) < 1e-5 and relative(without, exact) > 0.1
    assert len(added.layers) == 10 and set(added.layers.values()) == {4} and "10 layers, scale 0.7" in str(added)
    added.remove()
    assert torch.equal(plain(*call), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "most"),
    [(Recipe(), 0.05), (Recipe(smooth="weight", rotate=128), 0.05), (Recipe("w4a8_lowrank"), 0.2)],
    ids=["plain", "smooth-rotated", "4-bits"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_beside_codes_it_is_as_near_as_the_codes_are(dtype, recipe, most, fused) -> None:
    plain, (x, t, y) = model(), inputs()
    state = lora(plain)
    exact, without = merged(plain, state)(x, t, y), plain(x, t, y)
    coded, fixed = copy.deepcopy(plain).to(dtype), merged(plain, state).to(dtype)
    for made in (coded, fixed):
        quantize_(made, recipe)
        if fused:
            fuse_(made)
    before, error = coded(x.to(dtype), t, y), relative(fixed(x.to(dtype), t, y), exact)
    keys, codes = list(coded.state_dict()), coded.blocks[0].attn.qkv.packed.clone()
    added = add_lora_(coded, state)
    got = coded(x.to(dtype), t, y)
    assert got.dtype == dtype and relative(got, exact) < 1.2 * error < most < relative(without, exact)
    assert list(coded.state_dict()) == keys and torch.equal(coded.blocks[0].attn.qkv.packed, codes)
    assert all(m.fuses() == fused for m in coded.blocks)
    added.scale = 0.0
    assert relative(coded(x.to(dtype), t, y), before) < (1e-6 if dtype == torch.float32 else 0.02)
    added.remove()
    added.remove()
    assert torch.equal(coded(x.to(dtype), t, y), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_weight_only_layers_it_is_what_merging_gives(dtype) -> None:
    plain, (x, t, y) = model().to(dtype), inputs()
    quantize_(plain, "w4a16")
    fuse_(plain)
    layers = [m for m in plain.modules() if isinstance(m, WeightOnlyLinear)]
    state, before = lora(plain), plain(x.to(dtype), t, y)
    exact = copy.deepcopy(plain).float()
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, WeightOnlyLinear):
            made = nn.Linear(layer.in_features, layer.out_features)
            made.weight.copy_(layer.weight), made.bias.copy_(layer.bias)
            exact.set_submodule(name, made)
    exact = merged(exact, state, 0.7)(x, t, y)
    added = add_lora_(plain, state)
    added.scale = 0.7
    got = plain(x.to(dtype), t, y)
    assert any(layer.branches for layer in layers) and all(block.mlp.fuses() for block in plain.blocks)
    assert relative(got, exact) < (1e-5 if dtype == torch.float32 else 0.03) < relative(before, exact)
    added.remove()
    assert torch.equal(plain(x.to(dtype), t, y), before)


def test_beside_weight_only_layers_it_keeps_its_own_digits() -> None:
    """A call in another dtype rounds nothing for good, and is compiled whole; what float16 cannot hold goes around it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 130, bias=False))
    quantize_(net, Recipe("w4a16", skip=(), min_elements=0))
    down, up = torch.randn(8, 1024), torch.randn(130, 8) / 2000
    add_lora_(net, {"0.lora_down.weight": down, "0.lora_up.weight": up, "0.alpha": torch.tensor(32)})
    x = torch.randn(3, 1024)
    before = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert relative(compiled(x.bfloat16()), before) < 0.01 and torch.equal(net(x), before)
    large = (1e4 * x).half()
    assert torch.nn.functional.linear(large, down.half()).isinf().any()
    assert relative(net(large), net(large.float())) < 1e-3


def test_several_are_added_up_and_taken_off_one_by_one() -> None:
    coded, call = model(), inputs()
    one, two = lora(coded), lora(coded, ("mlp.fc1",), rank=2)
    exact = merged(merged(coded, one, 0.5), two)(*call)
    quantize_(coded)
    fuse_(coded)
    first, second = add_lora_(coded, one), add_lora_(coded, two)
    first.scale = 0.5
    assert first.scale == 0.5 and relative(coded(*call), exact) < 0.03
    alone = copy.deepcopy(coded)
    first.remove()
    again = add_lora_(coded, one, 0.5)
    assert relative(coded(*call), alone(*call)) < 1e-3  # in another order: a code may fall to the other side of a tie
    second.remove(), again.remove()
    assert not coded.blocks[0].mlp.fc1.branches and alone.blocks[0].mlp.fc1.branches


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_it_joins_before_the_activation_the_gate_and_the_residual(activation) -> None:
    linear = nn.Linear(100, 130)
    x, gate, residual = torch.randn(2, 9, 100), torch.randn(2, 130), torch.randn(2, 9, 130)
    net = nn.Sequential(linear)
    down, up = torch.randn(3, 100) / 10, torch.randn(130, 3)
    layer = QuantizedLinear.of(linear)
    net[0] = layer
    coded = dk.ops.act_quantize(x)
    add_lora_(net, {"0.lora_down.weight": down, "0.lora_up.weight": up, "0.alpha": torch.tensor(6)})  # kohya's may be whole
    exact = nn.functional.linear(coded[0] * coded[1][..., None], layer.weight + 2 * up @ down, layer.bias)
    exact = {"none": exact, "silu": nn.functional.silu(exact)}.get(
        activation, nn.functional.gelu(exact, approximate="tanh" if activation == "gelu_tanh" else "none")
    )
    got = layer.from_codes(coded, torch.float32, gate, residual, activation)
    assert relative(got, exact * gate[:, None] + residual) < 0.01
    part = layer.from_codes(coded, torch.float32, activation=activation, outputs=(64, None))
    assert relative(part, exact[..., 64:]) < 0.01


@pytest.mark.parametrize(
    ("down", "up", "rename"),
    [
        ("lora_A.weight", "lora_B.weight", lambda key: f"transformer.{key}"),
        ("lora_A.default.weight", "lora_B.default.weight", lambda key: f"base_model.model.{key}"),
        ("lora.down.weight", "lora.up.weight", lambda key: f"unet.{key}"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", lambda key: key),
        (
            "lora_down.weight",
            "lora_up.weight",
            lambda key: "lora_unet_" + key.removesuffix(end := key[key.index(".lora") :]).replace(".", "_") + end,
        ),
    ],
    ids=["diffusers", "peft", "diffusers-old", "diffusers-oldest", "kohya"],
)
def test_the_names_of_other_tools(tmp_path, down, up, rename) -> None:
    plain, call = model(depth=1), inputs()
    state = lora(plain)
    exact = merged(plain, state)(*call)
    path = tmp_path / "style.safetensors"
    save_file({rename(k.replace("lora_A.weight", down).replace("lora_B.weight", up)): t for k, t in state.items()}, path)
    add_lora_(plain, path)
    assert relative(plain(*call), exact) < 1e-5


def test_by_keyword_and_twice() -> None:
    net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    state = {"0.lora_A.weight": torch.randn(2, 8), "0.lora_B.weight": torch.randn(4, 2)}
    exact = merged(net, state)[0](x)
    added = add_lora_(net, state)
    torch.testing.assert_close(net[0](input=x), exact)
    added.remove()
    with pytest.raises(ValueError, match=r"unet\.0: a second pair of projections for 0"):
        add_lora_(net, state | {f"unet.{k}": t for k, t in state.items()})
    assert not net[0]._forward_hooks


def test_a_branch_goes_where_its_model_goes() -> None:
    coded = model(depth=1)
    state = lora(coded)
    quantize_(coded, Recipe(skip=("*mlp*", "*adaLN*", "*embed*", "final_layer*")))
    add_lora_(coded, state)
    x, t, y = inputs()
    wide = coded(x, t, y)
    coded.bfloat16()
    (branch,) = coded.blocks[0].attn.qkv.branches
    assert branch.up.dtype == torch.bfloat16 and branch.down.weight_scale.dtype == torch.float32
    assert relative(coded(x.bfloat16(), t, y), wide) < 0.03
    coded.to("meta")
    assert branch.up.is_meta and branch.down.packed.is_meta


def test_a_compiled_model_sees_it() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 256)).eval()
    exact = merged(net, state := {"0.lora_A.weight": torch.randn(2, 256) / 16, "0.lora_B.weight": torch.randn(128, 2)})
    quantize_(net, Recipe(min_elements=0))
    fuse_(net)
    assert isinstance(net, Fusable)
    added, x = add_lora_(net, state), torch.randn(8, 256)
    fast = torch.compile(net, fullgraph=True, backend="eager")
    assert relative(fast(x), exact(x)) < 0.03
    added.remove()
    assert relative(fast(x), net(x)) < 1e-6


def test_what_is_saved_is_without_it(tmp_path) -> None:
    coded, path, call = model(depth=1), tmp_path / "q.safetensors", inputs()
    state = lora(coded)
    quantize_(coded)
    before = coded(*call)
    add_lora_(coded, state)
    dk.save(coded, path)
    assert torch.equal(dk.load(path)(*call), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.clear(), "expected keys such as 'layer.lora_A.weight' and 'layer.lora_B.weight', found none"),
        (lambda s: s.update({"blocks.0.what": torch.ones(1)}), "blocks.0.what: expected keys such as"),
        (
            lambda s: s.pop("blocks.0.mlp.fc1.lora_B.weight"),
            "blocks.0.mlp.fc1: expected a down- and an up-projection, got down",
        ),
        (
            lambda s: s.update({"blocks.7.x.lora_A.weight": torch.ones(1, 2), "blocks.7.x.lora_B.weight": torch.ones(2, 1)}),
            r"blocks\.7\.x: the model has no Linear layer of that name",
        ),
        (
            lambda s: s.update({"blocks.0.mlp.fc1.lora_A.weight": torch.ones(4, 8)}),
            r"blocks\.0\.mlp\.fc1: expected \[1536, rank\] and \[rank, 384\], got up \[1536, 4\] and down \[4, 8\]",
        ),
        (
            lambda s: s.update({"blocks.0.mlp.fc1.lora_A.weight": torch.ones(3, 384)}),
            r"expected down \[rank, in\] and up \[out, rank\], got \[3, 384\], \[1536, 4\]",
        ),
        (lambda s: s["blocks.0.mlp.fc1.lora_A.weight"].fill_(torch.nan), "fc1: down: expected finite floats"),
        (lambda s: s.update({"blocks.0.mlp.fc1.alpha": torch.ones(2)}), r"fc1: alpha: expected one number, got shape \[2\]"),
        (lambda s: s.update({"blocks.0.mlp.fc1.alpha": torch.tensor(torch.inf)}), "fc1: alpha: expected finite floats"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_added(change, words) -> None:
    plain = model(depth=1)
    state = lora(plain)
    change(state)
    with pytest.raises(ValueError, match=words):
        add_lora_(plain, state)
    assert not any(m._forward_hooks for m in plain.modules())


def test_bad_arguments_are_named(tmp_path) -> None:
    plain = model(depth=1)
    for call, kind, words in (
        (lambda: add_lora_(3, {}), TypeError, r"model: expected an nn\.Module, got int"),
        (lambda: add_lora_(plain, 3), TypeError, "source: expected a state dict or a path, got int"),
        (lambda: add_lora_(plain, lora(plain), "1"), TypeError, "scale: expected a number, got str"),
        (
            lambda: add_lora_(plain, {"x.lora_A.weight": 3}),
            TypeError,
            "source: expected tensors by name, got 'x.lora_A.weight': int",
        ),
        (lambda: add_lora_(plain, lora(plain), float("nan")), ValueError, "scale: expected a finite number, got nan"),
        (lambda: add_lora_(plain, tmp_path / "no.safetensors"), FileNotFoundError, "no such file"),
        (lambda: add_lora_(plain, "style.pt"), CheckpointError, "pickles"),
        (lambda: setattr(add_lora_(plain, lora(plain)), "scale", None), TypeError, "scale: expected a number, got NoneType"),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_a_layer_that_is_not_called_is_refused() -> None:
    """DiMR reads the weights of its long skips and upsampling: a branch there would be silently without effect."""
    found = DiMR(STAGES).eval()
    names = [n for n, m in found.named_modules() if isinstance(m, nn.Linear) and ("skip_denses" in n or "upsample" in n)]
    assert names
    for name in names:
        layer = found.get_submodule(name)
        state = {
            f"{name}.lora_A.weight": torch.ones(1, layer.in_features),
            f"{name}.lora_B.weight": torch.ones(layer.out_features, 1),
        }
        with pytest.raises(ValueError, match="the model reads that layer's weight and does not call it"):
            add_lora_(found, state)
