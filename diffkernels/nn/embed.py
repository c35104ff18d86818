"""How patches, positions, timesteps and class labels become vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, (H/p)·(W/p), D], patches in row-major order. Parameters: proj (Dosovitskiy et al. 2021)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous here, or the residual stream would carry the convolution's channel-major strides to the last block.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """[B] timesteps -> [B, D]: a sinusoid [cos | sin], then Linear, SiLU, Linear. Parameters: mlp.0, mlp.2.

    Frequencies are exp(-ln(max_period) · i / half) for i < half = frequency_size / 2. They and the angles are float32 (or
    wider, with the weights): in half precision, neighbouring steps of 1000 would be one.

    Source: Peebles & Xie 2023; the order [cos | sin] and the divisor `half` are GLIDE's (others use [sin | cos], half - 1).
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        wide = torch.promote_types(weight.dtype, torch.float32)
        half = self.frequency_size // 2
        # Made anew in each call: a buffer would be rounded by model.half().
        frequencies = torch.exp(-math.log(self.max_period) * torch.arange(half, dtype=wide, device=t.device) / half)
        angles = t.to(wide)[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


class LabelEmbedder(nn.Module):
    """[B] labels -> [B, D], and label dropout for classifier-free guidance. Parameters: embedding_table.

    With `dropout > 0` the table has one row more, number `num_classes`: the null class. In training each label becomes
    the null class with that probability (Ho & Salimans 2022).
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)


def sincos_2d(hidden_size: int, grid: int) -> Tensor:
    """The fixed position embedding of a square of patches: float32 [grid · grid, hidden_size].

    The first half of the columns encodes x (the column of the patch), the second half y; each is [sin | cos].
    `hidden_size` is a multiple of 4. Source: MAE (He et al. 2022), as DiT has it.
    """
    quarter = hidden_size // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    x = line[None, :, :].expand(grid, grid, -1)
    y = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([x, y], dim=-1).reshape(grid * grid, hidden_size).float()
