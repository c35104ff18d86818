"""Guidance as weights of the model outputs: no pass of its own over the latents, but for rescale's one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .schedules import Array

Scale = float | Tensor | Sequence[float]


@dataclass(frozen=True, eq=False)
class Weights:
    """[B or 1, G] float64 weights of the G model outputs: of the guided channels, and of the rest (None: all are guided)."""

    guided: Array
    rest: Array | None = None


UNGUIDED = Weights(np.ones((1, 1)))


def cfg_weights(scale: Scale, guided_channels: int = -1) -> Weights:
    """Weights of the outputs [c_1, ..., c_k, u]: u + sum_i s_i (c_i - u).

    With one condition that is classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6, with s = 1 + w), with more
    their composition (Liu et al., arXiv 2206.01714, eq. 11). Rows sum to 1 for every s; s = 1 is the conditional model.

    Args:
        scale: s, a number, a float tensor [B] with one a sample, or a list of k numbers, one a condition.
        guided_channels: -1 for all; k guides the first k (DiT's code guides 3 of its 4) and takes the rest from c_1.

    Raises:
        TypeError, ValueError: scale is none of these, or not finite.
    """
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.ndim != 1:
            raise TypeError(f"guidance: expected a number or a float tensor [B], got {scale.dtype} {list(scale.shape)}")
        s = scale.detach().to("cpu", torch.float64).numpy()[:, None]
    elif isinstance(scale, list | tuple) and all(isinstance(x, Real) and not isinstance(x, bool) for x in scale) and scale:
        s = np.array([[float(x) for x in scale]])
    elif isinstance(scale, Real) and not isinstance(scale, bool):
        s = np.array([[float(scale)]])
    else:
        raise TypeError(f"guidance: expected a number, a list of them or a float tensor [B], got {type(scale).__name__}")
    if not np.all(np.isfinite(s)):
        raise ValueError(f"guidance: expected finite scales, got {s.squeeze()}")
    guided = np.concatenate([s, 1 - s.sum(1, keepdims=True)], axis=1)
    first = np.eye(1, guided.shape[1])
    return Weights(guided, None if guided_channels == -1 else np.broadcast_to(first, guided.shape))


def rescale_gain(outputs: list[Tensor], weights: Tensor, phi: float) -> Tensor:
    """[B]: phi std(c) / std(guided) + 1 - phi, the factor of guidance rescale (Lin et al., arXiv 2305.08891, §3.4).

    Args: outputs: the model's [B, ...], the condition first. weights: [B or 1, G] of them. phi: 0 (nothing) to 1.
    """
    covariance = ops.row_covariance(outputs)
    weights = weights.to(covariance.dtype)
    guided = torch.einsum("bi,bij,bj->b", weights.expand(len(covariance), -1), covariance, weights.expand(len(covariance), -1))
    ratio = torch.where(guided > 0, torch.sqrt(covariance[:, 0, 0] / guided), 1.0)  # a constant output stays as it is
    return phi * ratio + (1 - phi)
