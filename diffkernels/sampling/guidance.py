"""Guidance as weights of the model outputs: no pass of its own over the latents."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from .schedules import Array


@dataclass(frozen=True, eq=False)
class Weights:
    """[B or 1, G] float64 weights of the G model outputs: of the guided channels, and of the rest (None: all are guided)."""

    guided: Array
    rest: Array | None = None


UNGUIDED = Weights(np.ones((1, 1)))


def cfg_weights(scale: float | Tensor, guided_channels: int = -1) -> Weights:
    """Classifier-free guidance u + s (c - u) (Ho & Salimans, arXiv 2207.12598, eq. 6, with s = 1 + w) of the outputs [c, u].

    Rows sum to 1 for every s. s = 1 is the conditional model, s = 0 the unconditional one.

    Args:
        scale: s, a number or a float tensor [B] with one a sample.
        guided_channels: -1 for all; k guides the first k (DiT's code guides 3 of its 4) and takes the rest from c.

    Raises:
        TypeError, ValueError: scale is neither, or not finite.
    """
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.ndim != 1:
            raise TypeError(f"guidance: expected a number or a float tensor [B], got {scale.dtype} {list(scale.shape)}")
        s = scale.detach().to("cpu", torch.float64).numpy()
    elif isinstance(scale, Real) and not isinstance(scale, bool):
        s = np.array([float(scale)])
    else:
        raise TypeError(f"guidance: expected a number or a float tensor [B], got {type(scale).__name__}")
    if not np.all(np.isfinite(s)):
        raise ValueError(f"guidance: expected finite scales, got {s}")
    guided = np.stack([s, 1 - s], axis=1)
    rest = None if guided_channels == -1 else np.broadcast_to(np.array([1.0, 0.0]), guided.shape)
    return Weights(guided, rest)
