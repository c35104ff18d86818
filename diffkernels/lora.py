"""LoRA as a side branch: added to a model, quantized or not, rescaled and taken off again, in no weight and in no codes."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .models.checkpoint import reading
from .nn import QuantizedLinear, SideBranch, WeightOnlyLinear

# peft and diffusers; kohya's scripts; diffusers before peft. A layer's alpha lies beside them.
_DOWN = re.compile(r"(.+)\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight")
_UP = re.compile(r"(.+)\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.", "model.", "lora_unet_", "lora_transformer_")


HOLDERS = (QuantizedLinear, WeightOnlyLinear)  # layers whose epilogue adds a branch


class _Factors(NamedTuple):
    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    scale: float  # alpha / rank


class Lora:
    """What `add_lora_` added to a model. `lora.scale = 0.5` takes effect from the next call on; `remove()` takes it off.

    `layers`: the names of the layers that have a branch, with its rank. `str` is a table.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, SideBranch]], scale: float) -> None:
        self.layers = {name: branch.rank for name, (_, branch) in layers.items()}
        self._scale, self._attached, self._hooks = scale, list(layers.values()), list[Any]()
        for layer, branch in self._attached:
            if isinstance(layer, HOLDERS):
                layer.branches.append(branch)
            else:
                self._hooks.append(layer.register_forward_hook(functools.partial(_beside, branch), with_kwargs=True))

    @property
    def scale(self) -> float:
        """What the whole of it is multiplied by."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = _real(scale)
        for _, branch in self._attached:
            branch.factor = self._scale

    def remove(self) -> None:
        """Leaves the model as it was before. A second call does nothing."""
        for layer, branch in self._attached:
            if isinstance(layer, HOLDERS):
                layer.branches = [b for b in layer.branches if b is not branch]
        for hook in self._hooks:
            hook.remove()
        self._attached, self._hooks = [], []

    def __str__(self) -> str:
        wide = max(map(len, ("layer", *self.layers)))
        rows = [f"{name:<{wide}}  {rank:>4}" for name, rank in self.layers.items()]
        return "\n".join([f"{'layer':<{wide}}  rank", *rows, f"{len(rows)} layers, scale {self.scale:g}"])


@torch.no_grad()
def add_lora_(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike[str], scale: float = 1.0) -> Lora:
    """Adds scale · (alpha / rank) · up (down x) to the Linear layers that a LoRA names, in place, for inference.

    In a layer of codes the input's are used again, wherever they were made: a fused model stays fused. `down` has 8 bits,
    smoothed and rotated as the layer's weight is, and `up` is bfloat16; the layer's epilogue adds them. So does a weight-
    only layer's, in its input's dtype. An nn.Linear is called as it is, and a forward hook adds to its result. No weight
    changes, nor does a state dict: what is saved is the model without it. Several may be on at a time, and each is taken off
    by itself.

    Args:
        model: any module.
        source: a state dict, or the path of a safetensors file, with keys of peft and diffusers (`lora_A`, `lora_B`), of
            kohya's scripts (`lora_down`, `lora_up`, with or without underscores for points) or of older diffusers
            (`lora.down`, `lora.up`). down [rank, in], up [out, rank], any float; alpha is the rank where none
            lies beside them.
        scale: what the whole of it is multiplied by.

    Returns:
        A `Lora`, by which it is rescaled or taken off.

    Raises:
        TypeError: `model`, `source`, what it holds or `scale` is something else. FileNotFoundError: no such file.
        ValueError: a file or keys of another kind, layers that the model lacks or that are not Linear, shapes that don't fit,
            numbers that are not finite. The model is left as it was.

    Source: Hu et al. 2021, LoRA; Li et al. 2024, SVDQuant (a low-rank branch beside codes).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(source, str | os.PathLike):
        with reading(source) as file:
            source = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a state dict or a path, got {type(source).__name__}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear | WeightOnlyLinear)}
    uncalled = {f"{n}.{child}.".lstrip(".") for n, m in model.named_modules() for child in getattr(m, "reads_weights_of", ())}
    flat = {name.replace(".", "_"): name for name in layers}
    made: dict[str, tuple[nn.Module, SideBranch]] = {}
    for key, factors in _factors(source).items():
        name = next((n for k in _shortened(key) if (n := k if k in layers else flat.get(k)) is not None), None)
        if name is None:
            raise ValueError(f"source: {key}: the model has no Linear layer of that name")
        if name.startswith(tuple(uncalled)):
            raise ValueError(
                f"source: {key}: the model reads that layer's weight and does not call it: a branch would not be seen"
            )
        if name in made:
            raise ValueError(f"source: {key}: a second pair of projections for {name}")
        layer: Any = layers[name]
        if (factors.up.shape[0], factors.down.shape[1]) != (layer.out_features, layer.in_features):
            given = f"up {list(factors.up.shape)} and down {list(factors.down.shape)}"
            wanted = f"[{layer.out_features}, rank] and [rank, {layer.in_features}]"
            raise ValueError(f"source: {key}: expected {wanted}, got {given}")
        made[name] = layer, SideBranch(layer, *factors, _real(scale))
    return Lora(made, scale)


def _beside(branch: SideBranch, layer: Any, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> Tensor:
    """The forward hook of a Linear that is not quantized. A hook's tensors are no part of the model: they follow its input."""
    if branch.up.device != y.device:
        branch.to(y.device)
    x = args[0] if args else named["input"]
    return y + branch.beside(x.to(y.dtype)).to(y.dtype) @ branch.up.to(y.dtype)


def _factors(source: Mapping[str, Tensor]) -> dict[str, _Factors]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise TypeError(f"source: expected tensors by name, got {key!r}: {type(t).__name__}")
        for what, pattern in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
            if (match := pattern.fullmatch(key)) is not None:
                found.setdefault(match[1], {})[what] = t
                break
        else:
            raise ValueError(f"source: {key}: expected keys such as 'layer.lora_A.weight' and 'layer.lora_B.weight'")
    if not found:
        raise ValueError("source: expected keys such as 'layer.lora_A.weight' and 'layer.lora_B.weight', found none")
    return {key: _checked(key, parts) for key, parts in found.items()}


def _checked(key: str, parts: Mapping[str, Tensor]) -> _Factors:
    if parts.keys() - {"alpha"} != {"down", "up"}:
        raise ValueError(f"source: {key}: expected a down- and an up-projection, got {', '.join(sorted(parts))} alone")
    for what, t in parts.items():
        if not (t.is_floating_point() or what == "alpha") or not t.isfinite().all():
            raise ValueError(f"source: {key}: {what}: expected finite floats, got {t.dtype}, or numbers that are not finite")
        if what == "alpha" and t.numel() != 1:
            raise ValueError(f"source: {key}: alpha: expected one number, got shape {list(t.shape)}")
    down, up = (
        parts[n].flatten(1) if parts[n].ndim == 4 and parts[n].shape[2:] == (1, 1) else parts[n] for n in ("down", "up")
    )
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise ValueError(
            f"source: {key}: expected down [rank, in] and up [out, rank], got {list(down.shape)}, {list(up.shape)}"
        )
    return _Factors(down, up, parts["alpha"].item() / len(down) if "alpha" in parts else 1.0)


def _shortened(key: str) -> Iterator[str]:
    """A key, and what is left of it without what tools put before a model's own names."""
    yield key
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            yield from _shortened(key[len(prefix) :])


def _real(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)
