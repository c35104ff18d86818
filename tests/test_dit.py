"""DiT against the official code's numbers, and the checks that stand before a checkpoint."""

import json
import os
import pickle
import runpy
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffkernels as dk
from diffkernels import _ladder
from diffkernels.models import CheckpointError, DiT, dit, load, save
from diffkernels.models.checkpoint import describe
from diffkernels.models.dit import PRESETS

GOLDEN = Path(os.environ.get("DIFFKERNELS_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden") / "dit.safetensors"
TINY = {"input_size": 4, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(seed: int = 0, **config) -> DiT:
    """A DiT in which every layer is drawn: as built, its modulations and last layer are zero and would hide the rest."""
    model = DiT(**{**TINY, **config}).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2, generator=draw)
    return model


def inputs(b: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(b, TINY["in_channels"], 4, 4, generator=draw)
    return x, torch.randint(1000, (b,), generator=draw), torch.randint(6, (b,), generator=draw)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("rung", ["reference", "cpu", "avx2", "avx512"])
def test_official_numbers(rung: str) -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"no golden vectors: {GOLDEN} is not there and DIFFKERNELS_GOLDEN names no other place")
    for op in ("norm_modulate", "gate_residual_norm"):
        if why := _ladder.missing(rung, op, "cpu"):
            pytest.skip(f"{op}: {why}")
    with safe_open(GOLDEN, framework="pt") as file:
        config = {k: json.loads(v) for k, v in file.metadata().items() if k not in ("arch", "note")}
    golden = load_file(GOLDEN)
    model = DiT(**config).eval()
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}
    assert torch.equal(model.pos_embed, state["pos_embed"])
    model.load_state_dict(state, strict=True)
    with torch.no_grad(), dk.rung(rung):
        y = model(golden["in.x"], golden["in.t"], golden["in.y"])
        # The second half of x must not matter: official guidance uses the first for both.
        x = torch.cat([golden["in.x"][:2], torch.full_like(golden["in.x"][:2], 9.0)])
        labels = torch.tensor([0, 3, model.null_class, model.null_class])
        cfg = model.forward_with_cfg(x, golden["in.t"][:2].repeat(2), labels, 4.0)
    assert error(y, golden["out.y"]) <= 1e-5
    assert error(cfg, golden["out.cfg4"]) <= 1e-5


def test_presets_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        for name, millions in {"S/2": 32.96, "B/2": 130.51, "L/2": 458.10, "XL/2": 675.13}.items():
            assert round(sum(p.numel() for p in dit(name).parameters()) / 1e6, 2) == millions
    assert len(PRESETS) == 12
    assert dit("DiT-S/8", depth=1, input_size=8).config["patch_size"] == 8
    with pytest.raises(ValueError, match=r"expected one of S/2, .*XL/8; got 'M/2'"):
        dit("M/2")


def test_new_model_answers_zero() -> None:
    assert not DiT(**TINY).eval()(*inputs()).any()


def test_block_is_the_papers() -> None:
    """Two blocks and the final norm, residuals and norms in one pass, beside the same in plain PyTorch."""
    model, (x, t, y) = tiny(), inputs()
    with torch.no_grad():
        h = model.x_embedder(x) + model.pos_embed
        c = F.silu(model.t_embedder(t) + model.y_embedder(y))
        for block in model.blocks:
            m = block.adaLN_modulation[1](c).unsqueeze(1).chunk(6, dim=-1)
            for branch, (shift, scale, gate) in ((block.attn, m[:3]), (block.mlp, m[3:])):
                h = h + gate * branch(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        shift, scale = model.final_layer.adaLN_modulation[1](c).unsqueeze(1).chunk(2, dim=-1)
        h = model.final_layer.linear(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        assert error(model(x, t, y), model._unpatchify(h)) <= 1e-5


def test_modulations_are_one_product() -> None:
    """All blocks' adaLN weights lie in one buffer; training, and a layer that was exchanged, go layer by layer."""
    model = tiny()
    exact = model(*inputs())  # in grad mode
    layers = [m.adaLN_modulation[1] for m in (*model.blocks, model.final_layer)]
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3
    with torch.no_grad():
        assert error(model(*inputs()), exact) <= 1e-6
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Doubled(24, 144)
    other.load_state_dict(layers[1].state_dict())
    model.blocks[1].adaLN_modulation[1] = other
    with torch.no_grad():
        changed = model(*inputs())
    assert error(changed, model(*inputs())) <= 1e-6 and error(changed, exact) > 1e-3


def test_properties() -> None:
    model = tiny()
    assert (model.labels, model.null_class, model.sample_shape) == (5, 5, (3, 4, 4))


def test_gradient_reaches_every_parameter() -> None:
    model = tiny()
    x, t, y = inputs()
    model(x, t, y).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.any()) == (name != "pos_embed"), name

    # Against differences, in float64, through one modulation.
    wide = tiny().double()
    weight = wide.blocks[0].adaLN_modulation[1].weight
    loss = wide(x.double(), t, y).square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    with torch.no_grad():
        weight += 1e-5 * direction
        up = wide(x.double(), t, y).square().mean()
        weight -= 2e-5 * direction
        down = wide(x.double(), t, y).square().mean()
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=0)


def test_compiled_is_eager() -> None:
    model = tiny(depth=1)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert error(compiled(*inputs()), model(*inputs())) <= 1e-5


def test_half_precision_follows_float32() -> None:
    model, (x, t, y) = tiny(), inputs()
    with torch.no_grad():
        exact = model(x, t, y)
        assert model(x, t[0], y).shape == exact.shape  # one timestep for all
        for dtype, close in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
            assert error(tiny().to(dtype)(x.to(dtype), t, y).float(), exact) < close


def test_timesteps_stay_apart_in_half_precision() -> None:
    embed = tiny().bfloat16().t_embedder
    a, b = embed(torch.tensor([998.0, 999.0]))
    assert not torch.equal(a, b)


def test_label_dropout() -> None:
    x, t, y = inputs()
    model = tiny(class_dropout_prob=1.0).train()
    null = torch.full_like(y, model.null_class)
    assert torch.equal(model(x, t, y), model.eval()(x, t, null))
    assert not torch.equal(model(x, t, y.clamp(max=4)), model(x, t, null))  # in evaluation labels count
    without = tiny(class_dropout_prob=0.0)
    assert without.null_class is None
    assert without.y_embedder.embedding_table.weight.shape[0] == 5


def test_guidance_of_three_channels() -> None:
    model = tiny(in_channels=4)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 4, 4, generator=draw).repeat(2, 1, 1, 1)
    t, y = torch.tensor([7, 900, 7, 900]), torch.tensor([1, 2, 5, 5])
    with torch.no_grad():
        plain, guided = model(x, t, y), model.forward_with_cfg(x, t, y, 3.0)
    cond, uncond = plain[:, :3].chunk(2)
    torch.testing.assert_close(guided[:2, :3], uncond + 3 * (cond - uncond))
    assert torch.equal(guided[:2, :3], guided[2:, :3])
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:])
    with pytest.raises(ValueError, match="even batch"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 3.0)


def test_wrong_inputs_are_named() -> None:
    model, (x, t, y) = tiny(), inputs()
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 3, 4, 4\], got \[3, 2, 4, 4\]"):
        model(x[:, :2], t, y)
    with pytest.raises(ValueError, match=r"t: expected shape \[3\], \[1\] or \[\], got \[2\]"):
        model(x, t[:2], y)
    with pytest.raises(ValueError, match=r"y: expected shape \[3\], got \[3, 1\]"):
        model(x, t, y[:, None])
    for config, words in (
        ({"input_size": 5}, "multiple of patch_size"),
        ({"hidden_size": 26}, "hidden_size: expected a multiple of 4"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"depth": 0}, "depth: expected 1 or more"),
        ({"class_dropout_prob": 1.5}, "expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            DiT(**{**TINY, **config})


def test_save_and_load(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "tiny.safetensors"
    save(model, path, about={"steps": 7})
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]
    again = load(path)
    assert again.config == model.config and not again.training
    assert not again.pos_embed.requires_grad and again.x_embedder.proj.weight.requires_grad
    assert torch.equal(again(*inputs()), model(*inputs()))
    assert describe(path)["about"] == {"steps": 7}

    assert load(path, tiny(seed=9, class_dropout_prob=0.5)).pos_embed is not None
    for change, words in (
        ({"num_heads": 4}, "num_heads: expected the model's 4, got 2"),
        ({"learn_sigma": False}, "learn_sigma"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load(path, tiny(**change))

    first = path.read_bytes()
    save(model, path, about={"steps": 7})
    assert path.read_bytes() == first
    save(model, path, dtype=torch.float16)
    assert 2 * path.stat().st_size < 1.2 * len(first)
    assert load(path).x_embedder.proj.weight.dtype == torch.float32
    assert torch.equal(load(path, tiny(seed=9)).pos_embed, model.pos_embed.half().float())

    save_file(model.state_dict(), path)  # as converted official weights come: without our metadata
    with pytest.raises(CheckpointError, match="build the model yourself"):
        load(path)
    assert torch.equal(load(path, tiny(seed=9))(*inputs()), model(*inputs()))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PKL"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match="pickles"):
        load(path)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


@pytest.mark.parametrize("damage", ["cut", "cut-header", "empty", "text", "pickle", "zip", "long", "header-length"])
def test_damaged_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.safetensors"
    save(tiny(), path)
    whole = path.read_bytes()
    if damage == "zip":
        torch.save({"weight": torch.ones(3)}, path)
    else:
        path.write_bytes({
            "cut": whole[:-1],
            "cut-header": whole[:100],
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "pickle": pickle.dumps(Harm()),
            "long": whole + b"\0",
            "header-length": struct.pack("<Q", 1 << 62) + whole[8:],
        }[damage])  # fmt: skip
    model = tiny(seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for target in (None, model):
        with pytest.raises(CheckpointError, match=r"tiny.safetensors: expected a whole safetensors file"):
            load(path, target)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not (tmp_path / "harm-done").exists()


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        load(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model, target = tiny(), tiny(seed=5)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    bias = "final_layer.linear.bias"

    def refused(change: dict[str, Tensor | None], words: str, into: DiT = target) -> None:
        state = {**model.state_dict(), **change}
        save_file({k: v.clone() for k, v in state.items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=words):
            load(path, into)
        assert all(torch.equal(v, before[k].to(v.dtype)) for k, v in into.state_dict().items())

    own = model.state_dict()[bias]
    refused({bias: None}, r"expected \d+ tensors, got \d+; it misses final_layer.linear.bias")
    refused({"blocks.2.attn.qkv.bias": own}, r"has unexpected blocks.2.attn.qkv.bias")
    refused({bias: own[:-1]}, r"final_layer.linear.bias: expected shape \[24\], got \[23\]")
    refused({bias: own.to(torch.int8)}, r"final_layer.linear.bias: expected F16, .*; got I8")
    refused({bias: own.clone().fill_(float("nan"))}, r"final_layer.linear.bias: expected finite numbers in torch.float32")
    refused({bias: own.clone().fill_(1e6)}, r"finite numbers in torch.float16", tiny(seed=5).half())


def test_configurations_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = tiny()

    def refused(entry: str, words: str) -> None:
        save_file(model.state_dict(), path, metadata={"diffkernels": entry})
        with pytest.raises(CheckpointError, match=words):
            load(path)

    def config(**change) -> str:
        return json.dumps({"format": 1, "arch": "DiT", "config": {**model.config, **change}})

    refused("{", "expected JSON")
    refused("[]", "expected format 1, got None")
    refused(json.dumps({"format": 2, "arch": "DiT", "config": {}}), "expected format 1, got 2")
    refused(json.dumps({"format": 1, "arch": "Module", "config": {}}), "expected arch to be one of .*DiT.*; got 'Module'")
    refused(json.dumps({"format": 1, "arch": "DiT", "config": []}), "JSON objects")
    refused(config(width=3), "expected keys among .*; got 'width'")
    refused(config(depth="2"), "depth: expected int, got '2'")
    refused(config(depth=True), "depth: expected int, got True")
    refused(config(depth=10**9), "depth 1000000000, but the file holds")
    refused(config(hidden_size=2**60), "config: ")
    refused(config(num_heads=7), "config: hidden_size")
    refused(config(hidden_size=48), r"expected shape \[.*\], got")
    refused(config(mlp_ratio=float("nan")), "mlp_ratio")


def test_training_example_is_seeded(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_digits.py"))
    (first, about), (second, _), (other, _) = (example["train"]("dit", 3, seed) for seed in (0, 0, 1))
    a, b, c = (model.state_dict()["blocks.0.attn.qkv.weight"] for model in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert first.final_layer.linear.weight.any()  # it learnt: as built this is zero
    save(first, tmp_path / "m.safetensors", about=about)
    assert describe(tmp_path / "m.safetensors")["about"]["steps"] == 3


def test_save_refuses(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = tiny()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"finite numbers in torch.float16"):
        save(model, path, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"expected one of .*DiT.*; got Linear"):
        save(torch.nn.Linear(2, 2), path)
    assert not list(tmp_path.iterdir())
