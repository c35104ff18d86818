"""Where randomness comes from: the first noise from torch, a solver's from a seed a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | Tensor | None


def _one_each(generator: Sequence[torch.Generator], batch: int) -> Sequence[torch.Generator]:
    if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"generator: expected None, a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != batch:
        raise ValueError(f"generator: expected one a sample, {batch}, got {len(generator)}")
    return generator


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` [B, ...].

    Args:
        generator: None, one torch.Generator, or B of them: then a sample does not depend on its neighbours in the batch.
            A generator on the CPU serves any device: the same picture everywhere, at the price of a copy.

    Raises ValueError for a list of another length, TypeError for anything else.
    """
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    each = _one_each(generator, shape[0])
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in each])


def seeds(batch: int, generator: Generators = None, device: torch.device | str | None = None) -> Tensor:
    """[batch] int64, from which `ops.solver_step` draws: one a sample, so that a sample's noise is its own.

    Args:
        generator: None (torch's own), a torch.Generator, one a sample, or the seeds themselves, [batch] int64.

    Raises ValueError for another length, TypeError for anything else.
    """
    if isinstance(generator, Tensor):
        if generator.dtype != torch.int64 or generator.shape != (batch,):
            raise ValueError(f"generator: expected int64 seeds [{batch}], got {generator.dtype} {list(generator.shape)}")
        return generator.to(device)
    most = 2**63 - 1
    if generator is None:
        return torch.randint(most, (batch,), device=device)
    if isinstance(generator, torch.Generator):
        return torch.randint(most, (batch,), generator=generator, device=generator.device).to(device)
    each = _one_each(generator, batch)
    return torch.cat([torch.randint(most, (1,), generator=g, device=g.device).to(device) for g in each])
