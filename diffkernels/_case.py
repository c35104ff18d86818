"""What tests and benchmarks run: an op's declaration lists its cases, and a Draw makes their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One named call of an op: what tests run and, where `model` names its origin, what the bench times.

    `args(draw)` returns the keyword arguments; `draw(*shape)` draws a tensor of the dtype under test, `draw.f32(*shape)`
    one that is always float32, `draw.index(n)` a 0-dim int32 below n, `draw.seeds(n)` n random int64. `eager` is the formula
    as users write it today; with `backward` the bench also times forward and backward, with every input's gradient.
    """

    name: str
    args: Callable[[Any], dict[str, Any]]
    model: str | None = None
    eager: Callable[..., Any] | None = None
    backward: bool = False


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

    def seeds(self, n: int) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (n,), generator=self.generator).to(self.device)

    def index(self, n: int) -> Tensor:
        return torch.tensor(n // 2, dtype=torch.int32, device=self.device)
