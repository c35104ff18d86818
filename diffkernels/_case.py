"""What tests, `verify` and benchmarks run: an op's declaration lists its cases, and a Draw makes their tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One named call of an op: what tests run and, where `model` names its origin, what the bench times.

    `make(draw, *shape)` returns the keyword arguments; `draw(*shape)` draws a tensor of the dtype under test,
    `draw.f32(*shape)` one that is always float32, `draw.codes(*shape)` one of int8 from -127, `draw.index(n)` a 0-dim int32
    below n, `draw.seeds(n)` n random int64.
    Of a timed case `eager` is the formula as users write it today, `flops(*shape)` counts its operations, of float numbers or
    of what `arithmetic` says ("int8"), and with `backward` the bench also times forward and backward, with every input's
    gradient.
    """

    name: str
    make: Callable[..., dict[str, Any]]
    shape: tuple[int, ...] = ()
    model: str | None = None
    eager: Callable[..., Any] | None = None
    flops: Callable[..., float] | None = None
    backward: bool = False
    arithmetic: str | None = None

    def args(self, draw: Draw, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
        """The keyword arguments, drawn; at another shape than the case's own where one is given."""
        return self.make(draw, *(self.shape if shape is None else shape))


class Draw:
    """Seeded standard normal tensors: see `Case`. Subclasses say how values and memory differ."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def lay(self, t: Tensor) -> Tensor:
        return t

    def __call__(self, *shape: int) -> Tensor:
        return self.lay(self.values(shape).to(self.dtype).to(self.device))

    def f32(self, *shape: int) -> Tensor:
        return self.lay(self.values(shape).to(self.device))

    def codes(self, *shape: int) -> Tensor:
        return self.lay(torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8).to(self.device))

    def seeds(self, n: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (n,), generator=self.generator).to(self.device)

    def index(self, n: int) -> Tensor:
        return torch.tensor(n // 2, dtype=torch.int32, device=self.device)


class Pick(random.Random):
    """What an op's `fuzz(draw, pick)` chooses with, besides `choice` and `random`."""

    def size(self, most: int, least: int = 1) -> int:
        """A size up to `most`: few, whole vectors and their neighbours as often as any other; `least` is rare where it is 0."""
        if least == 0 and self.random() < 0.03:
            return 0
        near = [n + d for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) for d in (-1, 0, 1) if n + d <= most]
        return self.choice((self.randint(1, min(most, 8)), self.choice(near or [1]), self.randint(1, most)))

    def maybe(self, make: Callable[[], Any], chance: float = 0.5) -> Any:
        """make(), or None."""
        return make() if self.random() < chance else None
