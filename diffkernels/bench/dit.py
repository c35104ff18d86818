"""DiT's forward pass in 8 bits beside the same network in plain PyTorch, with random weights that are hard to code.

What makes an activation hard for one scale a row are a few channels much larger than the rest; those are drawn, so no trained
weights are needed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import peers

OUTLIERS, LARGER = 1e-3, 50.0  # of a Linear's inputs, at least one, and by how much


def drawn(name: str, outliers: str = "weights", seed: int = 0, **config: Any) -> Any:
    """A `models.DiT` of random weights, float32, each branch of which answers what is as large as its input.

    `outliers`: "weights", the columns of qkv, proj, fc1 and fc2 have log-normal sizes, and some are LARGER; "activations", some
    channels that qkv, fc1 and fc2 are given are LARGER; "shared", and the weights' columns for them as much smaller.
    """
    from ..models import dit

    model: Any = dit(name, **config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=draw)
        for block in model.blocks:
            bias, d = block.adaLN_modulation[1].bias, model.config["hidden_size"]
            qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
            if outliers == "weights":
                for layer in (qkv, proj, fc1, fc2):
                    size = torch.exp(0.5 * torch.randn(layer.in_features, generator=draw))
                    size[_some(layer.in_features, draw)] *= LARGER
                    layer.weight.mul_(size / size.square().mean().sqrt())
                continue
            for layer, scale in ((qkv, bias[d : 2 * d]), (fc1, bias[4 * d : 5 * d]), (fc2, None)):
                some = _some(layer.in_features, draw)
                if scale is None:
                    fc1.weight[some] *= LARGER
                else:
                    scale[some] = LARGER - 1
                layer.weight[:, some] /= LARGER if outliers == "shared" else 1
    return model


def _some(channels: int, draw: torch.Generator) -> Tensor:
    return torch.randperm(channels, generator=draw)[: max(1, round(OUTLIERS * channels))]


def psnr(got: Tensor, exact: Tensor) -> float:
    """In dB, of pictures whose deviation is a quarter of the range: -1 to 1, and 0.5."""
    noise = (got.double() - exact.double()).square().mean().sqrt()
    return 20 * math.log10(4 * exact.double().std().item() / noise.item())


def eager(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network of `models.DiT` as its official code computes it, op by op, with the model's own weights."""

    def norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def modulations(layer: Any, count: int) -> tuple[Tensor, ...]:
        return layer.adaLN_modulation[1](c).unsqueeze(1).chunk(count, dim=-1)

    h = model.x_embedder(x) + model.pos_embed
    c = F.silu(model.t_embedder(t) + model.y_embedder(y))
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(block, 6)
        b, n, d = h.shape
        heads, attn, mlp = model.config["num_heads"], block.attn, block.mlp
        q, k, v = attn.qkv(norm(h, shift1, scale1)).view(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        h = h + gate1 * attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        h = h + gate2 * mlp.fc2(F.gelu(mlp.fc1(norm(h, shift2, scale2)), approximate="tanh"))
    return model._unpatchify(model.final_layer.linear(norm(h, *modulations(model.final_layer, 2))))


class _Eager(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return eager(self.model, x, t, y)


def openvino(model: Any, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """OpenVINO's 8 bits, as NNCF makes them of a float32 model; nothing where these are not installed.

    "openvino": weights and activations, whose ranges are found on 16 random inputs; "openvino weights": weights alone. The rest
    is in the dtype that OpenVINO prefers: bfloat16, where the machine has it.
    """
    try:
        ov, nncf = peers.openvino_library(), peers.library("nncf")
    except peers.Skip:
        return {}
    draw, arrays = torch.Generator().manual_seed(2), [a.numpy() for a in (x, t, y)]

    def sample(_: int) -> list[Any]:
        labels = torch.randint(model.labels, y.shape, generator=draw)
        return [a.numpy() for a in (torch.randn(x.shape, generator=draw), 999 * torch.rand(t.shape, generator=draw), labels)]

    def converted() -> Any:
        return ov.convert_model(_Eager(model), example_input=(x, t, y), input=[list(a.shape) for a in (x, t, y)])

    def call(made: Any) -> Callable[[], Tensor]:
        request = peers.openvino_request(made)
        return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        some = nncf.Dataset(range(16), sample)
        coded = nncf.quantize(converted(), some, model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
        light = nncf.compress_weights(converted(), mode=nncf.CompressWeightsMode.INT8_SYM)
    return {"openvino": call(coded), "openvino weights": call(light)}


def contenders(name: str = "B/2", **config: Any) -> tuple[dict[str, Callable[[], Tensor]], Tensor, list[int]]:
    """{"ours": int8, fused; "unfused"; "eager", "compile": plain PyTorch in bfloat16}, what float32 answers, the input's shape.

    And OpenVINO's, where it and NNCF are installed. Batch 2, in bfloat16 but for the codes: 256 tokens for B/2.
    """
    from ..fuse import fuse_
    from ..quantize import quantize_

    exact = drawn(name, **config)
    draw = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, *exact.sample_shape, generator=draw), torch.tensor([500.0, 20.0]), torch.tensor([1, 2])
    with torch.no_grad():
        expected, theirs = eager(exact, x, t, y), openvino(exact, x, t, y)
        plain = exact.bfloat16()
        unfused = copy.deepcopy(plain)
        quantize_(unfused)
        ours = copy.deepcopy(unfused)
        fuse_(ours)
    x = x.bfloat16()
    fast = torch.compile(functools.partial(eager, plain), dynamic=False)
    found: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(x, t, y),
        "unfused": lambda: unfused(x, t, y),
        "eager": lambda: eager(plain, x, t, y),
        "compile": lambda: fast(x, t, y),
        **theirs,
    }
    return found, expected, list(x.shape)
