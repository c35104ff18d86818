"""The tables of rotary position embeddings (Su et al. 2021), for `ops.qkv_prep`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(positions: Tensor, dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i / dim), i < dim / 2: [...] -> two of [..., dim / 2].

    `dim` columns of a head are rotated. Positions may be fractions. Angles are float64, the tables float32: an angle of
    thousands has three digits less than its sine wants.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number of columns, got {dim}")
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions.double().unsqueeze(-1) * frequencies
    return angles.cos().float(), angles.sin().float()


def axial_rope(sizes: Sequence[int], dims: Sequence[int], theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Tables for the tokens of a grid in row-major order, the last axis fastest: two of [tokens, sum(dims) / 2].

    `sizes` are the grid's: (columns,), (rows, columns), (frames, rows, columns). Of a head's columns dims[i] turn with the
    position on axis i, one axis after the other in the table (FLUX, Wan; "interleaved" pairs keep that order in the head).
    Tokens of another kind, such as a text's before an image's, are rows of `rope_table`'s concatenated with these.
    """
    if not 1 <= len(sizes) <= 3 or len(dims) != len(sizes):
        raise ValueError(f"dims: expected one for each of 1 to 3 sizes, got {len(dims)} for {len(sizes)}")
    axes = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    tables = [rope_table(axis.flatten(), dim, theta) for axis, dim in zip(axes, dims, strict=True)]
    return torch.cat([cos for cos, _ in tables], -1), torch.cat([sin for _, sin in tables], -1)
