"""DiMR against the official code's numbers, and against the same network in plain PyTorch."""

import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_nn import NoSync
from torch import Tensor, nn

import diffkernels as dk
from diffkernels import _ladder
from diffkernels.models import CheckpointError, DiMR, DiT, dimr, load, multiscale_loss, save
from diffkernels.models.dimr import ConvNeXtBlock, TransformerBlock
from diffkernels.nn import ScheduledTimes
from diffkernels.sampling import DiscreteVP, Sampler

GOLDEN = Path(os.environ.get("DIFFKERNELS_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden") / "dimr.safetensors"
OPS = ("td_params", "norm_modulate", "gate_residual_norm", "slice_moments", "geglu", "depthwise_conv2d")
LOW = {
    "block_type": "TransformerBlock",
    "dim": 12,
    "hidden_dim": 20,
    "num_attention_heads": 2,
    "num_blocks": 3,
    "max_height": 2,
    "max_width": 4,
    "input_feature_ratio": 2,
}
MIDDLE = {"block_type": "ConvNeXtBlock", "dim": 8, "hidden_dim": 12, "num_blocks": 2, "max_height": 4, "max_width": 8}
# What the released models don't have: three stages, a picture made smaller before its patches, a transformer above a stage.
THREE = [
    {**MIDDLE, "num_blocks": 5, "max_height": 1, "max_width": 2, "image_input_ratio": 2, "input_feature_ratio": 2},
    LOW,
    {**MIDDLE, "kernel_size": 3, "final_kernel_size": 1},
]


def tiny(stages: list[dict] | None = None, seed: int = 0, **config) -> DiMR:
    """Every parameter drawn: as built, time changes nothing."""
    model = DiMR(stages or [LOW, MIDDLE], **{"channels": 3, "num_classes": 6, **config}).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1 if "param" in name else 0.3, generator=draw)
    return model


def inputs(b: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 3, 4, 8, generator=draw)
    return x, torch.randint(1000, (b,), generator=draw), torch.randint(6, (b,), generator=draw)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# The network once more, in plain PyTorch: concatenations, a norm at a time, modules as they are.


def moving(p: nn.Module, tau: Tensor, like: Tensor) -> Tensor:
    s = torch.sigmoid(tau[:, None] * (p.nodecay_weight + 1) + p.nodecay_bias)
    v = s * p.param0 + (1 - s) * p.param1
    return v.view(len(tau), *(1,) * (like.ndim - 2), -1)


def plain_norm(norm: nn.Module, x: Tensor, tau: Tensor) -> Tensor:
    if hasattr(norm, "scale"):
        return moving(norm.scale, tau, x) * x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * moving(norm.weight, tau, x) + moving(norm.bias, tau, x)


def plain_block(block: nn.Module, x: Tensor, tau: Tensor) -> Tensor:
    if isinstance(block, TransformerBlock):
        a = block.block1
        b, n, d = x.shape
        q, k, v = a.query_key_value(plain_norm(a.norm, x, tau)).chunk(3, -1)
        q, k, v = (t.view(b, n, a.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + a.dense((weights @ v).transpose(1, 2).reshape(b, n, d))
    else:
        x = x + block.block1["1"](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    h = plain_norm(block.block2.norm, x, tau)
    return x + block.block2.w2(F.gelu(block.block2.w0(h)) * block.block2.w1(h))


def plain(model: DiMR, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    tau, outs, lower = 2 * (t.to(x.dtype) + 1) / 1000 - 1, [], None
    for config, stage in zip(model.config["stages"], model.stages, strict=True):
        height, width, dim = config["max_height"], config["max_width"], config["dim"]
        images = F.avg_pool2d(x, config["image_input_ratio"])
        place = stage.input_layer["3"]["position_embeddings"].weight.view(height, width, dim)
        h = stage.input_layer["1"](images).permute(0, 2, 3, 1) + place
        if lower is not None:
            up = stage.upsample
            h2 = up["1"]["kernel"](plain_norm(up["0"], lower, tau))
            r = up.ratio
            # torch's pixel_shuffle wants (channel, row, column)
            h2 = h2.unflatten(-1, (r * r, dim)).transpose(-1, -2).flatten(-2)
            h2 = F.pixel_shuffle(h2.permute(0, 3, 1, 2), r).permute(0, 2, 3, 1)
            h = h + plain_norm(up["2"], h2, tau)
        transformer = stage.class_embeds is not None
        if transformer:
            h = torch.cat([stage.class_embeds(y)[:, None], h.flatten(1, 2)], 1)
        seen, skips, half = [h], [], len(stage.blocks) // 2
        for i, block in enumerate(stage.blocks):
            if i > half:
                h = stage.skip_denses[i - half - 1](torch.cat([h, skips.pop()], -1))
            h = plain_block(block, h, tau)
            seen.append(h)
            if i < half:
                skips.append(h)
        if transformer:
            seen = [s[:, 1:].unflatten(1, (height, width)) for s in seen]
        lower = torch.cat(seen, -1)
        if model.config["block_grad_to_lowres"]:
            lower = lower.detach()
        outs.append(stage.output_layer["2"](plain_norm(stage.output_layer["0"], seen[-1], tau).permute(0, 3, 1, 2)))
    return outs


# Right


@pytest.mark.parametrize("rung", [None, "reference", "cpu", "avx2", "avx512"])
def test_official_numbers(rung: str | None) -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"no golden vectors: {GOLDEN} is not there and DIFFKERNELS_GOLDEN names no other place")
    for op in OPS if rung else ():
        if why := _ladder.missing(rung, op, "cpu"):
            pytest.skip(f"{op}: {why}")
    with safe_open(GOLDEN, framework="pt") as file:
        config = {k: json.loads(v) for k, v in file.metadata().items() if k not in ("arch", "note")}
    golden = load_file(GOLDEN)
    model = DiMR(**config).eval()
    model.load_state_dict({k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}, strict=True)
    x, t, y = golden["in.x"], golden["in.n"] - 1, golden["in.y"]
    for grad in (False, True) if rung is None else (False,):
        with torch.set_grad_enabled(grad), dk.rung(rung) if rung else nullcontext():
            low, high = model.forward_stages(x, t, y)
            assert error(low, golden["out.stage0"]) <= 1e-5
            assert error(high, golden["out.stage1"]) <= 1e-5
            assert torch.equal(model(x, t, y), high)
            for one in (t[0], t[:1]):
                assert error(model(x, one, y), golden["out.last_shared_t"]) <= 1e-5
            assert error(model(x, t[:1].expand(len(t)), y), golden["out.last_shared_t"]) <= 1e-5


@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN"])
@pytest.mark.parametrize("stages", [[LOW, MIDDLE], THREE, [MIDDLE]], ids=["two", "three", "one"])
def test_whole_model_is_the_plain_one(stages: list[dict], norm_type: str) -> None:
    model, (x, t, y) = tiny(stages, norm_type=norm_type), inputs()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            exact = plain(model, x, t, y)
            ours = model.forward_stages(x, t, y)
            assert len(ours) == len(stages)
            for a, b in zip(ours, exact, strict=True):
                assert a.shape == b.shape and error(a, b) <= 1e-5
            assert torch.equal(model(x, t, y), ours[-1])
    assert error(model(x, t.flip(0), y), exact[-1]) > 1e-2  # time matters
    assert (error(model(x, t, (y + 1) % 6), exact[-1]) > 1e-2) == (stages != [MIDDLE])  # so does the class, where it enters


@torch.no_grad()
def test_blocks_are_the_plain_ones() -> None:
    """A block adds what is pending in its first norm's pass, and leaves its own last sum pending."""
    model, (x, t, _) = tiny(), inputs()
    table, tau = model.time_table(t), 2 * (t + 1) / 1000 - 1
    draw = torch.Generator().manual_seed(4)
    for stage, shape in zip(model.stages, ((3, 9, 12), (3, 4, 8, 8)), strict=True):
        block = stage.blocks[0]
        assert isinstance(block, TransformerBlock if len(shape) == 3 else ConvNeXtBlock)
        x, delta = (torch.randn(shape, generator=draw) for _ in range(2))
        for pending in (None, delta):
            whole = x if pending is None else x + pending
            start, out, rest = block(x, pending, table)
            assert torch.equal(start, whole)
            assert error(out + rest, plain_block(block, whole, tau)) <= 1e-5


@pytest.mark.parametrize("block_grad", [False, True])
def test_gradients_are_the_plain_ones(block_grad: bool) -> None:
    model, (x, t, y) = tiny(block_grad_to_lowres=block_grad).double(), inputs()
    x, noise = x.double(), torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(outs: list[Tensor], **coefficients) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(multiscale_loss(outs, noise, **coefficients).mean(), parameters, allow_unused=True)

    for coefficients in ((1 / 4, 1), (0, 1)):
        ours = gradients(model.forward_stages(x, t, y), coefficients=coefficients)
        exact = gradients(plain(model, x, t, y), coefficients=coefficients)
        for name, a, b in zip(names, ours, exact, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or not b.any() or error(a, b) <= 1e-9, name
            if coefficients[0] and name != "stages.0.class_embeds.weight":
                assert a.any(), name
        low = [a for name, a in zip(names, ours, strict=True) if name.startswith("stages.0.blocks") and a is not None]
        assert any(a.any() for a in low) == (not block_grad or coefficients[0] > 0)


def test_training_lowers_the_loss() -> None:
    model = tiny().train()
    x, t, y = inputs(8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.no_grad():
            model(x, t, y)  # evaluation in between lays the parameters in buffers
        loss = multiscale_loss(model.forward_stages(x, t, y), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_multiscale_loss() -> None:
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = noise.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) / 2
    assert abs(boxes.var().item() - 1) < 0.05
    loss = multiscale_loss([boxes + 2, noise - 1], noise)
    torch.testing.assert_close(loss, torch.full((4,), 4 / 4 + 1.0))
    torch.testing.assert_close(multiscale_loss([boxes + 2, noise], noise, (3, 1)), torch.full((4,), 12.0))
    with pytest.raises(ValueError, match="coefficients: expected one a stage, 1, got 2"):
        multiscale_loss([noise], noise)
    for shape in ((4, 3, 48, 48), (4, 3, 32, 16), (4, 2, 32, 32), (4, 3, 128, 128)):
        with pytest.raises(ValueError, match=r"outputs\[0\]: expected a whole fraction of noise's \[4, 3, 64, 64\], got "):
            multiscale_loss([torch.zeros(shape), noise], noise)


def test_dropout_is_for_training() -> None:
    x, t, y = inputs()
    stages = [{**stage, "dropout_prob": 0.5} for stage in (LOW, MIDDLE)]
    model = tiny(stages)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), tiny()(x, t, y))
        torch.manual_seed(0)
        first = model.train()(x, t, y)
        assert not torch.equal(first, model(x, t, y))
        for stage in model.stages:
            for block in stage.blocks:
                block.dropout = 1e-9
        assert error(model(x, t, y), tiny()(x, t, y)) <= 1e-5
        for stage, shape in zip(model.stages, ((3, 9, 12), (3, 4, 8, 8)), strict=True):
            block, h = stage.blocks[0], torch.ones(shape)
            block.dropout = 1.0  # both branches dropped: nothing is left of the block
            start, out, delta = block(h, None, model.time_table(t))
            assert torch.equal(out + delta, h) and torch.equal(start, h)


# In use


def test_presets_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        for name, millions, width in (("XL/2R", 505.05, 165600), ("DiMR-G/2R", 1056.35, 286272)):
            model = dimr(name)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
            assert model._times.width == width
    assert [len(stage.blocks) for stage in model.stages] == [57, 29]
    assert model.stages[0].cascade_dim == 66816
    assert (model.null_class, model.labels, model.sample_shape) == (1000, 1000, (4, 32, 32))
    with pytest.raises(ValueError, match="expected one of XL/2R, G/2R; got 'XL/3R'"):
        dimr("XL/3R")


def test_only_the_last_head_runs() -> None:
    model, args, ran = tiny(THREE), inputs(), []
    for i, stage in enumerate(model.stages):
        stage.output_layer["2"].register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    model(*args)
    assert ran == [2]
    model.forward_stages(*args)
    assert ran == [2, 0, 1, 2]


def test_official_times() -> None:
    """t counts from 0 as our samplers do; the official n from 1: tau = 2 n / 1000 - 1."""
    model = tiny()
    for t in (torch.tensor([0, 1, 500, 999]), torch.tensor([0.5, 17.25])):
        tau = (2 * (t.double() + 1) / 1000 - 1).float()
        torch.testing.assert_close(model.time_table(t), model._times(tau), rtol=0, atol=2e-6)
    with torch.no_grad():
        times = tiny().bfloat16().time_table(torch.tensor([998, 999]))  # in bfloat16 they would be one
    assert times.dtype == torch.bfloat16 and not torch.equal(times[0], times[1])


@torch.no_grad()
def test_scheduled_sampling_without_a_host_sync() -> None:
    model, (x, _, y) = tiny(), inputs(2)
    sampler = Sampler("heun", schedule=DiscreteVP.linear(), clip=3.0)
    times = sampler.grid(4).time
    null = torch.full_like(y, model.null_class)
    options = {"steps": 4, "guidance": 1.5, "cond": {"y": y}, "uncond": {"y": null}}
    exact = sampler(model, x, **options)
    for shared in (False, True):
        made = sampler(ScheduledTimes(model, times, shared), x, **options)
        assert made.isfinite().all() and error(made, exact) <= 1e-4  # seven calls of a random network: roundings grow
    with pytest.raises(FloatingPointError, match="step 0, sample 0, 1"):  # another schedule
        sampler(ScheduledTimes(model, times), x, **{**options, "steps": 3})

    scheduled = ScheduledTimes(model, times)
    t = torch.from_numpy(times[:1].copy())
    with NoSync():
        scheduled(x, t.expand(2), y=y)
        model(x, t.expand(2), y)
        model(x, t, y)


def test_buffers_follow_the_model() -> None:
    model, (x, t, y) = tiny(), inputs()
    names = list(model.state_dict())
    with torch.inference_mode():
        exact = model(x, t, y)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.zero_()
    with torch.no_grad():
        assert not twin(x, t, y).any()
        assert torch.equal(model(x, t, y), exact)
        twin.load_state_dict(model.state_dict(), assign=True)
        assert error(twin(x, t, y), exact) <= 1e-6
        assert error(model.double()(x.double(), t, y), exact) <= 1e-5
        assert model(x.double(), t, y).dtype == torch.float64
    assert error(model(x.double(), t, y), exact) <= 1e-5  # and it can be trained still
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_half_precision_follows_float32() -> None:
    model, (x, t, y) = tiny(), inputs()
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(x, t, y), exact) < 0.1
        for dtype, close in ((torch.bfloat16, 0.1), (torch.float16, 0.015)):
            half = tiny().to(dtype)(x.to(dtype), t, y)
            assert half.dtype == dtype and error(half, exact) < close


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_is_eager(grad: bool) -> None:
    stages = [{**LOW, "num_blocks": 1}] if grad else [LOW, {**MIDDLE, "num_blocks": 1}]
    model, args = tiny(stages), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        got, exact = compiled(*args), model(*args)
        assert error(got, exact) <= 1e-5
        if grad:
            parameters = [p for name, p in model.named_parameters() if "blocks.0" in name]
            ours, eager = (torch.autograd.grad(out.square().mean(), parameters) for out in (got, exact))
            assert max(error(a, b) for a, b in zip(ours, eager, strict=True)) <= 1e-4


def test_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "dimr.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    made: dict = {}
    exec(compile(code, "docs/dimr.md", "exec"), made)
    assert made["latents"].shape == (2, 4, 8, 8) and made["latents"].isfinite().all()
    assert made["model"].stages[0].blocks[0].block2.w0.weight.grad.any()


# Refused, in words


def test_wrong_inputs_are_named() -> None:
    model, (x, t, y) = tiny(), inputs()
    for args, words in (
        ((x[:, :2], t, y), r"x: expected shape \[B, 3, 4, 8\], got \[3, 2, 4, 8\]"),
        ((x.mT, t, y), r"x: expected shape \[B, 3, 4, 8\], got \[3, 3, 8, 4\]"),
        ((x, t[:2], y), r"t: expected shape \[3\], \[1\] or \[\], got \[2\]"),
        ((x, t, y[:1]), r"y: expected shape \[3\], got \[1\]"),
        ((x, t, y, torch.zeros(2, 10)), r"time: expected \[1 or 3, \d+\], got \[2, 10\]"),
    ):
        with pytest.raises(ValueError, match=words):
            model(*args)


def test_wrong_configurations_are_named() -> None:
    for stages, words in (
        ([], "stages: expected a list of one dict or more"),
        ("XL", "stages: expected a list"),
        ([3], r"stages\[0\]: expected a dict, got 3"),
        ([{}], r"stages\[0\].block_type: expected one of TransformerBlock, ConvNeXtBlock; got None"),
        ([LOW, {**MIDDLE, "pe_type": "Axial_RoPE"}], r"stages\[1\]: expected keys among .*; got 'pe_type'"),
        ([{**LOW, "kernel_size": 7}], r"stages\[0\]: expected keys among .*; got 'kernel_size'"),
        ([{k: v for k, v in LOW.items() if k != "dim"}], r"stages\[0\].dim: expected an int of 1 or more, got None"),
        ([{**LOW, "num_blocks": True}], r"stages\[0\].num_blocks: expected an int of 1 or more, got True"),
        ([{**LOW, "hidden_dim": 1.5}], r"stages\[0\].hidden_dim: expected an int of 1 or more, got 1.5"),
        ([{**MIDDLE, "kernel_size": 4}], r"stages\[0\].kernel_size: expected an odd int of 1 or more, got 4"),
        ([{**LOW, "dropout_prob": 1}], r"stages\[0\].dropout_prob: expected a number, 0 <= p < 1, got 1"),
        ([{**LOW, "num_attention_heads": 5}], r"stages\[0\].dim: expected a multiple of num_attention_heads 5, got 12"),
        ([LOW, {**MIDDLE, "max_width": 6}], r"stages\[1\].max_height, max_width: expected a multiple .* 2 × 4, got 4 × 6"),
        ([MIDDLE, LOW], r"stages\[1\].max_height, max_width: expected a multiple"),
        ([LOW, {**MIDDLE, "image_input_ratio": 2}], r"stages\[1\]: expected samples of \(4, 8\) .*, got \(8, 16\)"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(stages) if stages else DiMR(stages)
    for config, words in (
        ({"norm_type": "RMSN"}, "norm_type: expected one of TDRMSN, LN; got 'RMSN'"),
        ({"num_classes": 1}, "num_classes: expected 2 or more"),
        ({"channels": 0}, "channels: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(**config)


def test_save_and_load(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "tiny.safetensors"
    with torch.no_grad():
        exact = model(*inputs())  # its parameters are views now
        save(model, path, about={"steps": 7})
        again = load(path)
        assert again.config == model.config and not again.training
        assert torch.equal(again(*inputs()), exact)
        other = tiny([{**LOW, "dropout_prob": 0.1}, MIDDLE], seed=5, block_grad_to_lowres=True)
        assert torch.equal(load(path, other)(*inputs()), exact)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path)  # as converted official weights come
    assert torch.equal(
        load(path, tiny(seed=9)).state_dict()["stages.0.class_embeds.weight"], model.stages[0].class_embeds.weight
    )

    def refused(words: str, into: nn.Module | None = None, **change) -> None:
        entry = {"format": 1, "arch": "DiMR", "config": {**model.config, **change}}
        save_file({k: v.clone() for k, v in model.state_dict().items()}, path, metadata={"diffkernels": json.dumps(entry)})
        with pytest.raises(CheckpointError, match=words):
            load(path, into)

    refused("stages: expected the model's", tiny([{**LOW, "num_attention_heads": 3}, MIDDLE]))
    refused("expected arch 'DiT', got 'DiMR'", DiT(4, 2, 3, 24, 1, 2))
    refused(r"stages: expected list\[dict\], got 'XL'", stages="XL")
    refused(r"config: stages\[0\]: expected a dict, got 3", stages=[3])
    refused(r"config: stages\[0\].dim: expected an int", stages=[{**LOW, "dim": "12"}, MIDDLE])
    refused("config: depth 1000000002, but the file holds", stages=[{**LOW, "num_blocks": 10**9}, MIDDLE])
    refused(r"expected shape \[.*\], got", stages=[{**LOW, "hidden_dim": 24}, MIDDLE])
    refused("it has unexpected", stages=[LOW])
