"""Modules that hold parameters and call ops; the pieces that several of the models share."""

from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d
from .transformer import Attention, Mlp

__all__ = ["Attention", "LabelEmbedder", "Mlp", "PatchEmbed", "TimestepEmbedder", "sincos_2d"]
