"""Passes over the activation, before and after: the table of docs/norms.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffkernels.bench import dimr
from diffkernels.bench.passes import count
from diffkernels.models import DiMR
from diffkernels.models.dit import DiTBlock


def units(passes) -> tuple[int, int]:
    return round(passes.reads), round(passes.writes)


def test_a_dit_block() -> None:
    d, x = 256, torch.randn(2, 64, 256)
    block, own = DiTBlock(d, 4, 4.0), list(torch.randn(6, 2, 256))

    def eager():
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in own)
        y = x + gate1 * block.attn(F.layer_norm(x, (d,), eps=1e-6) * (1 + scale1) + shift1)
        return y + gate2 * block.mlp(F.layer_norm(y, (d,), eps=1e-6) * (1 + scale2) + shift2)

    before, after = count(eager, x.numel()), count(lambda: block(x, x, own, own[1], own[0]), x.numel())
    assert units(before) == (16, 14)
    assert units(after) == (8, 8)  # of which the GELU of the MLP is 4 and 4


STAGES = [
    {"block_type": "TransformerBlock", "dim": 240, "hidden_dim": 480, "num_attention_heads": 4, "num_blocks": 1},
    {"block_type": "ConvNeXtBlock", "dim": 120, "hidden_dim": 240, "num_blocks": 1, "max_height": 16, "max_width": 16},
]
STAGES[0] |= {"max_height": 8, "max_width": 8, "input_feature_ratio": 2}


def test_dimr_blocks() -> None:
    model = DiMR(STAGES).eval()
    for stage, shape, expected in zip(model.stages, ((2, 65, 240), (2, 16, 16, 120)), ((26, 14), (21, 13)), strict=True):
        block, x, delta = stage.blocks[0], torch.randn(shape), torch.randn(shape)
        table = model.time_table(torch.tensor([300.0, 600.0]))

        def rms(h, norm, table=table):
            moved = norm.scale.of(table).view(2, *(1,) * (h.ndim - 2), -1)
            return moved * (h / (h.norm(2, dim=-1, keepdim=True) * h.shape[-1] ** -0.5 + 1e-8))

        def eager(block=block, x=x):
            if x.ndim == 3:
                y = x + block.block1(rms(x, block.block1.norm))
            else:
                conv = block.block1["1"]
                weight, pad = conv.weight, conv.padding
                y = x + F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, padding=pad, groups=x.shape[-1]).permute(0, 2, 3, 1)
            mlp, h = block.block2, rms(y, block.block2.norm)
            return y + mlp.w2(F.gelu(mlp.w0(h)) * mlp.w1(h))

        before = count(eager, x.numel())
        after = count(lambda block=block, x=x, delta=delta, table=table: block(x, delta, table), x.numel())
        assert (sum(units(before)), sum(units(after))) == expected


def test_a_whole_dimr() -> None:
    model = DiMR([STAGES[0] | {"num_blocks": 5}, STAGES[1] | {"num_blocks": 3}]).eval()
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([300.0]), torch.tensor([3])
    unit = 65 * 240
    before, after = count(lambda: dimr.eager(model, x, t, y), unit), count(lambda: model(x, t, y), unit)
    assert before.by_op["sigmoid"][0] == 21 and after.by_op["td_params"][0] == 1
    assert before.calls > 4 * after.calls
    assert before.reads + before.writes > 2 * (after.reads + after.writes)
