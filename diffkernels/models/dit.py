"""DiT: Scalable Diffusion Models with Transformers (Peebles & Xie 2023), in the official parameterisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import (
    AdaLayerNorm,
    AdaLayerNormZero,
    Attention,
    Fusable,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    StackedLinear,
    TimestepEmbedder,
    attend,
    other_than,
    sincos_2d,
    uncoded,
)
from ._inputs import check_inputs
from .checkpoint import architecture


class DiTBlock(Fusable):
    """x += g1 · attn(adaLN(x)); x += g2 · mlp(adaLN(x)), with shift, scale and gate of both from c.

    Each residual is added in the pass of the norm that follows it, so a block begins behind its first norm and ends behind
    the next block's. Fused, it begins before its first norm, which writes codes, and ends with the last Linear, which adds.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = AdaLayerNormZero(hidden_size)

    def chain(self) -> str:
        return "adaLN → codes, qkv, attention → codes, proj + residual; adaLN → codes, fc1, GELU → codes, fc2 + residual"

    def obstacle(self) -> str | None:
        attn, mlp = self.attn, self.mlp
        return (
            other_than(Attention, "attn", attn)
            or other_than(Mlp, "mlp", mlp)
            or uncoded("attn.qkv", attn.qkv)
            or uncoded("attn.proj", attn.proj)
            or uncoded("mlp.fc1", mlp.fc1)
            or uncoded("mlp.fc2", mlp.fc2)
        )

    def forward(
        self, x: Tensor, h: Tensor | None, own: Sequence[Tensor], scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x: [B, N, D], the residual stream. h: its norm, modulated by this block's first shift and scale, or None: then the
                block makes it.
            own: the block's six modulations, [B, D] each, as `adaLN_modulation` orders them.
            scale, shift: [B, D], of the norm that follows the block.

        Returns:
            x and h for what follows; no h where the block is fused: who follows makes it, as codes if it can.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = own
        if self.fuses():
            return self._on_codes(x, own), None
        h = ops.norm_modulate(x, scale1, shift1) if h is None else h
        x, h = ops.gate_residual_norm(x, self.attn(h), gate1, scale2, shift2)
        x, h = ops.gate_residual_norm(x, self.mlp(h), gate2, scale, shift)
        return x, h

    def _on_codes(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        """The block, every Linear of which is a QuantizedLinear: nothing is read only to be coded, but attention's result."""
        shift1, scale1, gate1, shift2, scale2, gate2 = own
        linears: tuple[Any, ...] = (self.attn.qkv, self.attn.proj, self.mlp.fc1)
        qkv, proj, fc1 = linears
        packed = qkv.from_codes(ops.norm_quantize(x, scale1, shift1, **qkv.coding), x.dtype)
        o = attend(packed, self.attn.num_heads, self.attn.precision)
        x = proj.from_codes(ops.act_quantize(o, **proj.coding), x.dtype, gate1, x)
        h = fc1.from_codes(ops.norm_quantize(x, scale2, shift2, **fc1.coding), x.dtype)
        return self.mlp.activated(h, gate2, x)


class FinalLayer(nn.Module):
    """The linear map of each token to its patch, behind adaLN: [B, N, D] -> [B, N, p·p·C]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = AdaLayerNorm(hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        """h is the modulated norm: the last block has made it."""
        return self.linear(h)


@architecture
class DiT(nn.Module):
    """A class-conditional diffusion transformer. State dicts of facebookresearch/DiT load with `strict=True`.

    A new DiT answers 0, whatever its input: the modulations and the last layer start at zero (adaLN-Zero).

    Args:
        input_size: height and width of x, a multiple of `patch_size`.
        patch_size: the side of a patch, p.
        in_channels: C of x (4 for Stable Diffusion's latents).
        hidden_size: D, a multiple of 4 and of `num_heads`, at most 256 a head.
        depth, num_heads, mlp_ratio: of the transformer.
        class_dropout_prob: label dropout in training, 0 to 1. Above 0 there is a null class, number `num_classes`.
        num_classes: labels are 0 to num_classes - 1.
        learn_sigma: the output has 2·C channels, the noise and then the variance.

    Raises:
        ValueError: a size outside of the above.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if config[name] < 1:
                raise ValueError(f"{name}: expected 1 or more, got {config[name]}")
        if input_size % patch_size:
            raise ValueError(f"input_size: expected a multiple of patch_size {patch_size}, got {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4 and of num_heads {num_heads}, got {hidden_size}")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob: expected 0 to 1, got {class_dropout_prob}")
        if not hidden_size * mlp_ratio >= 1:
            raise ValueError(f"mlp_ratio: expected a width of 1 or more, got {mlp_ratio} of {hidden_size}")
        self.config: dict[str, Any] = config
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        grid = input_size // patch_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid).unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._modulations = StackedLinear()
        self._initialise()

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if name == "pos_embed":
                continue
            if "adaLN_modulation" in name or name.startswith("final_layer.") or name.endswith(".bias"):
                nn.init.zeros_(p)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.view(p.shape[0], -1))

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label, or None where the model was built without label dropout."""
        return self.config["num_classes"] if self.config["class_dropout_prob"] > 0 else None

    @property
    def labels(self) -> int:
        """How many labels there are: 0 to labels - 1; the null class is not one."""
        return self.config["num_classes"]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.config["in_channels"], self.config["input_size"], self.config["input_size"]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction for noisy `x` at timesteps `t` with labels `y`.

        Args:
            x: [B, C, H, W] in the dtype of the weights, H = W = input_size.
            t: [B], or one for all; integer or float, 0 to 1000 (the scale that it was trained on).
            y: [B] int64, 0 to num_classes - 1, or `null_class`.

        Returns:
            [B, C, H, W], or [B, 2·C, H, W] with `learn_sigma`.

        Raises:
            ValueError: x, t or y of another shape.
        """
        check_inputs(x, t, y, self.sample_shape)
        b = x.shape[0]
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t.expand(b)) + self.y_embedder(y)
        layers: list[nn.Module] = [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]  # type: ignore
        *mine, last = self._modulations(layers, F.silu(c))
        blocks = [m.chunk(6, dim=-1) for m in mine]  # views: the op reads strides
        after = [*(m[:2] for m in blocks[1:]), last.chunk(2, dim=-1)]  # shift and scale of the norm behind each block
        h = None  # the first block makes its own
        for block, own, (shift, scale) in zip(self.blocks, blocks, after, strict=True):
            tokens, h = block(tokens, h, own, scale, shift)
        h = ops.norm_modulate(tokens, scale, shift) if h is None else h
        return self._unpatchify(self.final_layer(h))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, N, p·p·C], a token ordered (row, column, channel), -> [B, C, H, W]."""
        p = self.config["patch_size"]
        grid = self.config["input_size"] // p
        x = tokens.view(tokens.shape[0], grid, grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid * p, grid * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """`forward` with classifier-free guidance on a batch of [conditional; unconditional] halves, as the official one.

        Only the first half of `x` is used, for both. The first three channels of the result are guided, and alike in both
        halves; the others are each half's own. That is what the published numbers were made with; guidance of all
        channels is the sampler's `guided_channels=-1`.

        Raises:
            ValueError: an odd batch.
        """
        if x.shape[0] % 2:
            raise ValueError(f"x: expected an even batch, conditional then unconditional, got {x.shape[0]}")
        out = self.forward(x[: x.shape[0] // 2].repeat(2, 1, 1, 1), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided.repeat(2, 1, 1, 1), rest], dim=1)


SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PRESETS = {f"{size}/{p}": {**config, "patch_size": p} for size, config in SIZES.items() for p in (2, 4, 8)}


def dit(name: str, **config: Any) -> DiT:
    """A DiT by its name in the paper, such as "XL/2"; `config` overrides what the name stands for.

    Raises:
        ValueError: an unknown name; the text lists the names.
    """
    preset = PRESETS.get(name.removeprefix("DiT-"))
    if preset is None:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}; got {name!r}")
    return DiT(**{**preset, **config})
