"""How a tensor may lie in memory, and what may stand in it: each function copies, poison lies between the elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._case import Draw, Pick


def poison(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else -128


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger buffer."""
    if t.ndim == 0:
        return t
    buffer = torch.full([2 * n + 1 for n in t.shape], poison(t.dtype), dtype=t.dtype, device=t.device)
    return buffer[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def sliced(t: Tensor) -> Tensor:
    """The first columns of a wider buffer."""
    if t.ndim == 0:
        return t
    buffer = torch.full([*t.shape[:-1], 2 * t.shape[-1] + 3], poison(t.dtype), dtype=t.dtype, device=t.device)
    return buffer[..., : t.shape[-1]].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """Dimensions stored in reverse order."""
    back = tuple(reversed(range(t.ndim)))
    return t.permute(back).contiguous().permute(back)


def misaligned(t: Tensor) -> Tensor:
    """One element past an aligned address."""
    buffer = torch.full([t.numel() + 1], poison(t.dtype), dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


def expanded(t: Tensor) -> Tensor:
    """Its first row for all, by a stride of 0."""
    return t[:1].expand(t.shape) if t.ndim and t.shape[0] else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "strided": strided,
    "sliced": sliced,
    "transposed": transposed,
    "misaligned": misaligned,
    "expanded": expanded,
}

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda t: t,
    "integers": lambda t: t.clamp(-1, 1).round(),
    "zeros": torch.zeros_like,
    "small": lambda t: t * 1e-3,
    "large": lambda t: t * 8,
    "large-mean": lambda t: t + 100,
}


class FuzzDraw(Draw):
    """Draws every tensor in a layout of its own, all of them with the same kind of values; with `nan`, one of them has one."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int, pick: Pick, gradient: bool = False) -> None:
        super().__init__(dtype, device, seed)
        self.pick = pick
        kinds = [kind for kind in VALUES if not gradient or kind != "large-mean"]  # cancels in a gradient: no digit is left
        self.kind = pick.choice(("normal", "normal", "normal", *kinds))
        self.nan: int | None = 0 if pick.random() < 0.1 else None  # how many were put
        self.laid: list[str] = []

    def values(self, shape: tuple[int, ...]) -> Tensor:
        return VALUES[self.kind](super().values(shape))

    def lay(self, t: Tensor) -> Tensor:
        layout = self.pick.choice(("contiguous", "contiguous", *LAYOUTS))
        self.laid.append(layout)
        return LAYOUTS[layout](t)

    def __call__(self, *shape: int) -> Tensor:
        t = self.values(shape).to(self.dtype)
        if self.nan == 0 and t.numel():
            t.view(-1)[self.pick.randrange(t.numel())], self.nan = torch.nan, 1
        return self.lay(t.to(self.device))
