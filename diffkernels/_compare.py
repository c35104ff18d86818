"""A model against another, layer by layer: where an approximation, such as 8 bits, loses what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantize import sqnr


@dataclass(frozen=True)
class Difference:
    """Of a layer's result to the reference's: |a - b| / |b|, the power of b over that of a - b in dB, the cosine."""

    name: str
    relative: float
    sqnr: float
    cosine: float


class Comparison(list[Difference]):
    """One line a layer, in the order in which they ran; the last, named "", is the model itself. `str` is a table."""

    @property
    def worst(self) -> Difference:
        """The layer of the largest relative error; the first of them where one is not finite."""
        return max(self, key=lambda d: float("inf") if d.relative != d.relative else d.relative)

    def __str__(self) -> str:
        wide = max([len("the model"), *(len(d.name) for d in self)])
        rows = [f"{'layer':<{wide}}  {'relative':>9}  {'SQNR':>8}  cosine"]
        rows += [f"{d.name or 'the model':<{wide}}  {d.relative:>9.2e}  {d.sqnr:>5.1f} dB  {d.cosine:.6f}" for d in self]
        return "\n".join(rows)


def compare(model: nn.Module, reference: nn.Module, inputs: Tensor | Iterable[Any] | Mapping[str, Any]) -> Comparison:
    """Runs both models on the same inputs, without gradients, and compares what their layers of one name return.

    The errors of a layer are those of everything before it too. Every result of the reference is kept until the end.

    Args:
        model, reference: two modules whose layers bear the same names; one of them may be quantized. Both are run in the mode
            they are in, and left as they were.
        inputs: one tensor, positional arguments, or keyword arguments.

    Returns:
        A line for every layer that ran once in both and returned one floating-point tensor of one shape.

    Raises:
        ValueError: the models themselves don't return tensors of one shape.
    """
    theirs, ours, lines = _results(reference, inputs), _results(model, inputs), Comparison()
    for name, found in ours.items():
        other = theirs.get(name, [])
        if len(found) == len(other) == 1 and found[0].shape == other[0].shape:
            a, b = (t.double().cpu().flatten() for t in (found[0], other[0]))
            norm = b.norm().clamp(min=1e-300)
            cosine = (a @ b / (a.norm().clamp(min=1e-300) * norm)).item()
            lines.append(Difference(name, ((a - b).norm() / norm).item(), sqnr(b, a), cosine))
    if not lines or lines[-1].name != "":
        raise ValueError("model: expected it and the reference to return one floating-point tensor each, of one shape")
    return lines


def _results(model: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
    """What each layer returned, in the order in which they ended: the model itself last."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_layer: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                found.setdefault(name, []).append(out.detach().clone())

        return keep

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in model.named_modules()]
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*([inputs] if isinstance(inputs, Tensor) else inputs))
    finally:
        for handle in hooks:
            handle.remove()
    return found
