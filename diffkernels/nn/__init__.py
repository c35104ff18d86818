"""Modules that hold parameters and call ops; the pieces that several of the models share."""

from .concat import ConcatNormLinear, concat_linear, concat_norm_linear
from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d
from .fusable import Fusable, other_than, uncoded, watched
from .norms import (
    AdaLayerNorm,
    AdaLayerNormContinuous,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    RMSNorm,
    ScheduledTimes,
    TimeDependentLayerNorm,
    TimeDependentParameter,
    TimeDependentRMSNorm,
    TimeTable,
)
from .quantized import Quantized, QuantizedConv2d, QuantizedLinear, SideBranch, WeightOnlyLinear, channels_last
from .rope import axial_rope, rope_table
from .stack import Stack, StackedLinear
from .transformer import Attention, Mlp, attend

__all__ = [
    "AdaLayerNorm",
    "AdaLayerNormContinuous",
    "AdaLayerNormSingle",
    "AdaLayerNormZero",
    "Attention",
    "ConcatNormLinear",
    "Fusable",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "Quantized",
    "QuantizedConv2d",
    "QuantizedLinear",
    "RMSNorm",
    "ScheduledTimes",
    "SideBranch",
    "Stack",
    "StackedLinear",
    "TimeDependentLayerNorm",
    "TimeDependentParameter",
    "TimeDependentRMSNorm",
    "TimeTable",
    "TimestepEmbedder",
    "WeightOnlyLinear",
    "attend",
    "axial_rope",
    "channels_last",
    "concat_linear",
    "concat_norm_linear",
    "other_than",
    "rope_table",
    "sincos_2d",
    "uncoded",
    "watched",
]
