"""DiMR's forward pass but for its GEMMs and its attention: ours beside the same network written in plain PyTorch.

A whole XL forward is nine tenths GEMMs, which both have in common and whose noise is larger than all the rest. So both run
with stand-ins that answer a fixed tensor of the right shape, at once: what is left is what this package is about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Linear layers, matrix products and attention answer a tensor that was drawn before, of the shape that is due."""
    drawn: dict[tuple[Any, ...], Tensor] = {}

    def answer(shape: tuple[int, ...], like: Tensor) -> Tensor:
        key = (shape, like.dtype)
        if key not in drawn:
            drawn[key] = torch.randn(shape, dtype=like.dtype)
        return drawn[key]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return answer((*x.shape[:-1], weight.shape[0]), x)

    def attention(q: Tensor, k: Tensor, v: Tensor, precision: str | None = None) -> Tensor:
        return answer(tuple(q.shape), q)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, d = q.shape
        return answer((b, n, heads, d), q).transpose(1, 2)  # as torch's own lays its answer

    with (
        mock.patch.object(F, "linear", linear),
        mock.patch.object(ops, "attention", attention),
        mock.patch.object(F, "scaled_dot_product_attention", sdpa),
        mock.patch.object(torch, "addmm", lambda total, a, b, **_: total),
        mock.patch.object(Tensor, "addmm_", lambda total, a, b, **_: total),
    ):
        yield


def eager(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network of `models.DiMR` as its official code computes it, op by op, with the model's own weights."""
    tau = (2 * (t + 1) / 1000 - 1)[:, None]

    def moving(p: Any, ndim: int) -> Tensor:
        s = torch.sigmoid(tau * (1 + p.nodecay_weight) + p.nodecay_bias)
        v = s * p.param0 + (1 - s) * p.param1
        return v.view(v.shape[0], *(1,) * (ndim - 2), v.shape[-1])

    def rms(h: Tensor, norm: Any) -> Tensor:
        root = h.norm(2, dim=-1, keepdim=True) * h.shape[-1] ** -0.5
        return moving(norm.scale, h.ndim) * (h / (root + 1e-8))

    def layer_norm(h: Tensor, norm: Any) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-5) * moving(norm.weight, h.ndim) + moving(norm.bias, h.ndim)

    def attend(h: Tensor, block: Any, heads: int) -> Tensor:
        b, n, d = h.shape
        q, k, v = F.linear(h, block.query_key_value.weight).view(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        return _apply(block.dense, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    def mlp(h: Tensor, block: Any) -> Tensor:
        return _apply(block.w2, F.gelu(_apply(block.w0, h)) * _apply(block.w1, h))

    def convolve(h: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.conv2d(h.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)

    outs: list[Tensor] = []
    answer = x
    below: dict[str, Any] = {}
    for stage, config in zip(model.stages, model.config["stages"], strict=True):
        transformer = config["block_type"] == "TransformerBlock"
        source = F.avg_pool2d(x, config["image_input_ratio"]) if config["image_input_ratio"] > 1 else x
        embed = stage.input_layer["1"]
        h = F.conv2d(source, embed.weight, embed.bias, embed.stride).permute(0, 2, 3, 1)
        rows, columns = h.shape[1:3]
        position = stage.input_layer["3"]["position_embeddings"].weight.view(config["max_height"], config["max_width"], -1)
        h = h + position[:rows, :columns]
        if outs:
            up = stage.upsample
            flat = _apply(up["1"]["kernel"], layer_norm(torch.cat(outs, dim=-1), up["0"]))
            b, r = flat.shape[0], rows // below["max_height"]
            low = flat.view(b, rows // r, columns // r, r, r, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1)
            h = h + layer_norm(low, up["2"])
        if transformer:
            h = torch.cat([stage.class_embeds(y)[:, None], h.flatten(1, 2)], dim=1)
        outs, count = [h], len(stage.blocks)
        skips: list[Tensor] = []
        for i, block in enumerate(stage.blocks):
            if i > count // 2:
                h = _apply(stage.skip_denses[i - count // 2 - 1], torch.cat([h, skips.pop()], dim=-1))
            if transformer:
                h = h + attend(rms(h, block.block1.norm), block.block1, config["num_attention_heads"])
            else:
                h = h + convolve(h, block.block1["1"]).permute(0, 2, 3, 1)
            h = h + mlp(rms(h, block.block2.norm), block.block2)
            if i < count // 2:
                skips.append(h)
            outs.append(h)
        if transformer:
            outs = [o[:, 1:].reshape(o.shape[0], rows, columns, -1) for o in outs]
        below = config
        answer = convolve(layer_norm(outs[-1], stage.output_layer["0"]), stage.output_layer["2"])
    return answer


def _apply(layer: Any, h: Tensor) -> Tensor:
    return F.linear(h, layer.weight, layer.bias)


def contenders() -> tuple[dict[str, Callable[[], object]], list[int]]:
    """DiMR-XL/2R, one picture of 32×32 latents (257 tokens), float32: {"ours", "eager"}, and the input's shape."""
    from ..models import dimr

    torch.manual_seed(0)
    model = dimr("XL/2R").eval()
    x, t, y = torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.tensor([207])
    return {"ours": lambda: model(x, t, y), "eager": lambda: eager(model, x, t, y)}, list(x.shape)
