"""Models in 8 or 4 bits: a recipe says how, the report what was done to which layer, what it costs, what was left alone."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .models.checkpoint import KINDS
from .nn.quantized import Quantized, QuantizedConv2d, QuantizedLinear, WeightOnlyLinear
from .ops._linear import COLUMNS
from .ops._quantize import ROTATIONS
from .ops.linear_w4a8_lowrank import GROUPS

RECIPES = (*KINDS, "auto")
# The first and the last layers and the modulations: few of a model's products, much of its error (Q-DiT, ViDiT-Q).
# DiMR reads the weights of its upsampling and its long skips: they would be unpacked in every call.
SENSITIVE = (
    *("*embed*", "*input_layer*", "*conv_in", "*quant_conv", "*adaLN*", "*norm*.linear", "*upsample.*", "*skip_dense*"),
    *("final_layer*", "proj_out*", "*conv_out", "*output_layer*"),
)

LEAST_SQNR = 30.0  # dB: with less, a weight's rounding is most of the error that 8 bits make


@dataclass(frozen=True)
class Recipe:
    """How `quantize_` treats a model.

    `kind`: "int8", codes of one scale an output for the weight and one a row, found in each call, for the input; or
    "w4a8_lowrank", codes of 4 bits for the weight, with a scale for each `group` of 64 or 128 inputs, and beside them a branch
    of `rank` columns that holds what they lose most of (SVDQuant): a bit more than half the bytes, and less exact; or "w4a16",
    the same codes of the weight without a branch, and an input that stays as it is: for calls of few rows, which wait for the
    weight, and for inputs that no scale suits.
    "auto" is "int8" where that pays: a layer stays as it is where `predicted_gain` at `rows` rows, a call's samples times
    tokens, is no more than 1; it is rotated where its weight's SQNR is under 30 dB, and stays where that does not help.
    `balance`: the 16-bit operations that the machine does while it moves a byte: two cores with matrix tiles 120 to 300.
    `skip`: patterns of layer names (`fnmatch`) that stay as they are, by default embeddings, modulations, first and last
    layers; `filter_fn(name, layer)`: whether a layer is wanted at all. `min_elements`: weights smaller than this stay: their
    products take less time than the codes.
    Convolutions have 8 bits (`ops.conv2d_w8a8`), with a scale a sample, and are not rotated.
    `smooth`: "none"; "weight", the square root of each column's largest weight goes over to the input: for weights with a few
    large columns; or a function that is given the model and runs it on a few inputs: weight and input then share what is large
    in either (SmoothQuant, alpha = 1/2), but for layers that it does not call.
    `rotate`: 0, or 64, 128 or 256 columns that are mixed in weight and input alike, as many as divide a layer's, down to 64:
    for activations with a few large columns, of which the weights know nothing.
    Raises ValueError for an unknown kind, `smooth`, `rotate` or `group`, a `min_elements` or `rank` below 0, `rows`
    below 1 or a `balance` of 0 or less.
    """

    kind: str = "int8"
    skip: Sequence[str] = SENSITIVE
    filter_fn: Callable[[str, nn.Module], bool] | None = None
    min_elements: int = 2**14
    smooth: str | Callable[[nn.Module], object] = "none"
    rotate: int = 0
    group: int = 64
    rank: int = 32
    rows: int = 1024
    balance: float = 150.0

    def __post_init__(self) -> None:
        if self.kind not in RECIPES:
            raise ValueError(f"kind: expected one of {', '.join(RECIPES)}, got {self.kind!r}")
        if self.rows < 1:
            raise ValueError(f"rows: expected 1 or more, got {self.rows}")
        if not self.balance > 0:
            raise ValueError(f"balance: expected more than 0, got {self.balance}")
        for name in ("min_elements", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.group not in GROUPS:
            raise ValueError(f"group: expected 64 or 128, got {self.group!r}")
        if self.smooth not in ("none", "weight") and not callable(self.smooth):
            raise ValueError(f"smooth: expected 'none', 'weight' or a function of the model, got {self.smooth!r}")
        if self.rotate and self.rotate not in ROTATIONS:
            raise ValueError(f"rotate: expected 0, 64, 128 or 256, got {self.rotate!r}")
        if self.kind == "w4a16" and (self.smooth != "none" or self.rotate):
            raise ValueError("smooth, rotate: expected 'none' and 0 of kind 'w4a16', whose inputs are not coded")
        if isinstance(self.skip, str):
            raise ValueError(f"skip: expected a list of patterns, got the string {self.skip!r}")

    def columns(self, features: int) -> int:
        """Of a layer of so many inputs, how many columns are mixed: `rotate`, or what of 64 and 128 divides them; else 0."""
        return max((n for n in ROTATIONS if n <= self.rotate and features % n == 0), default=0)

    def reason(self, name: str, layer: nn.Module) -> str | None:
        """Why a layer is left alone, or None where it is quantized."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip):
            return "skipped by name"
        if self.filter_fn is not None and not self.filter_fn(name, layer):
            return "not wanted by filter_fn"
        if not (type(layer) is nn.Linear or type(layer) is nn.Conv2d) or hasattr(layer, "parametrizations"):
            return f"a subclass, another convolution or a parametrization: {type(layer).__name__}"
        if type(layer) is nn.Conv2d:
            if self.kind.startswith("w4"):
                return "no kernel of 4 bits for convolutions"
            if (why := QuantizedConv2d.unfit(layer)) is not None:
                return f"no kernel: {why}"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "has hooks"
        if not layer.weight.is_floating_point() or layer.weight.dtype == torch.float64 or layer.weight.is_meta:
            return f"its weight is {layer.weight.dtype} on {layer.weight.device}"
        if layer.weight.numel() < max(1, self.min_elements):
            return f"fewer than {self.min_elements} weights"
        if not layer.weight.isfinite().all():
            return "its weight is not finite"
        if self.kind == "auto" and (gain := predicted_gain(layer, self)) <= 1:
            return f"no gain: {gain:.2f} times as fast, as predicted for {self.rows} rows"
        return None

    def coded(self, layer: nn.Linear | nn.Conv2d, smooth: Tensor | None = None) -> Quantized:
        """What takes a layer's place."""
        if isinstance(layer, nn.Conv2d):
            return QuantizedConv2d.of(layer, smooth)
        if self.kind == "w4a16":
            return WeightOnlyLinear.of(layer, self.group)
        rotate, how = self.columns(layer.in_features), {}
        if self.kind == "w4a8_lowrank":
            how = {"bits": 4, "group": self.group, "rank": self.rank}
        made = QuantizedLinear.of(layer, smooth, rotate, **how)
        if self.kind == "auto" and not rotate and sqnr(layer.weight, made.weight) < LEAST_SQNR:
            made = QuantizedLinear.of(layer, smooth, replace(self, rotate=max(ROTATIONS)).columns(layer.in_features))
        return made


@dataclass(frozen=True)
class Layer:
    """One line of a `Report`: `sqnr`, dB, is the weight's power over that of its rounding; bytes are the weight's; of `rotate`
    columns each is mixed; `gain` is `predicted_gain`'s."""

    name: str
    kind: str | None
    shape: tuple[int, ...]
    before: int
    after: int
    sqnr: float = math.nan
    rotate: int = 0
    reason: str | None = None
    gain: float = math.nan


@dataclass
class Report:
    """What `quantize_` did. `str(report)` is a table."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind is not None]

    def __str__(self) -> str:
        wide = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        kinds = [f"{layer.kind or '–'}{f' H{layer.rotate}' if layer.rotate else ''}" for layer in self.layers]
        kind = max(9, *map(len, kinds)) if kinds else 9
        rows = [f"{'layer':<{wide}}  {'weight':>14}  {'recipe':<{kind}}  {'SQNR':>7}  {'gain':>5}  why not"]
        for layer, text in zip(self.layers, kinds, strict=True):
            shape = "×".join(map(str, layer.shape))
            sqnr = "" if layer.kind is None else f"{layer.sqnr:.1f} dB"
            gain = "" if layer.kind is None else f"{layer.gain:.2f}×"
            row = f"{layer.name:<{wide}}  {shape:>14}  {text:<{kind}}  {sqnr:>7}  {gain:>5}  {layer.reason or ''}"
            rows.append(row.rstrip())
        before, after = (sum(getattr(layer, when) for layer in self.layers) for when in ("before", "after"))
        rows.append(f"{len(self.quantized)} of {len(self.layers)} layers; weights {before / 1e6:.2f} -> {after / 1e6:.2f} MB")
        return "\n".join(rows)


def quantize_(model: nn.Module, recipe: Recipe | str = "int8") -> Report:
    """Replaces the Linears and convolutions of `model` by ones of 8-bit or 4-bit codes, in place, for inference, without data.

    Args:
        model: any module; a layer that stands in several places stays one.
        recipe: a `Recipe`, or the name of a kind.

    Returns:
        A `Report` with a line for every Linear and convolution.

    Raises:
        TypeError: `model` or `recipe` is something else. ValueError: an unknown kind, or `smooth` shows a layer what is not
            finite; the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    recipe = Recipe(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe or a kind's name, got {type(recipe).__name__}")
    layers = [
        (name, layer, "the model itself: put it into a module" if layer is model else recipe.reason(name, layer))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    ]
    wanted = [layer for _, layer, why in layers if why is None]
    seen = _seen(model, wanted, recipe.smooth) if callable(recipe.smooth) else {}
    report, made = Report(), dict[nn.Module, nn.Module]()
    for name, layer, why in layers:
        size = layer.weight.numel() * layer.weight.element_size()
        shape = tuple(layer.weight.shape)
        if why is not None:
            report.layers.append(Layer(name, None, shape, size, size, reason=why))
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        smooth = shared(layer.weight, seen.get(layer)) if recipe.smooth == "weight" or layer in seen else None
        new, gain = recipe.coded(layer, smooth), predicted_gain(layer, recipe)
        found = sqnr(layer.weight, new.weight)
        if recipe.kind == "auto" and found < LEAST_SQNR:
            why = f"its weight in 8 bits has an SQNR of {found:.1f} dB, under {LEAST_SQNR:g}"
            report.layers.append(Layer(name, None, shape, size, size, reason=why, gain=gain))
            continue
        made[layer], kind = new, KINDS[0] if recipe.kind == "auto" else recipe.kind
        report.layers.append(Layer(name, kind, shape, size, new.nbytes, found, new.rotate, gain=gain))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children gives a layer of two names once
            if child in made:
                setattr(parent, name, made[child])
    return report


def predicted_gain(layer: nn.Linear | nn.Conv2d, recipe: Recipe) -> float:
    """How many times as fast as in 16 bits a layer of codes is at `recipe.rows` rows, both as fast as a roofline lets them be.

    A byte of memory takes the time of `recipe.balance` operations in 16 bits, or of twice as many in 8. The input is coded in a
    pass of its own, which `fuse_` takes away again: with it the gain is larger.
    """
    n, k, m = len(layer.weight), layer.weight[0].numel(), recipe.rows
    columns = layer.weight.shape[1]  # of the input: of a convolution fewer than of its windows
    balance, four = recipe.balance, recipe.kind == "w4a8_lowrank"
    wide = max(2 * m * n * k / balance, 2 * (n * k + m * columns + m * n))
    if recipe.kind == "w4a16":
        return wide / max(2 * m * n * k / balance, n * k / 2 + n * k / recipe.group + 2 * m * (k + n))
    r = min(recipe.rank, n, k) if four else 0
    weight = n * k / 2 + n * k / recipe.group + -(-r // COLUMNS) * COLUMNS * k + 2 * r * n if four else n * k
    operations = m * (n + r) * k + 2 * m * n * r  # in 16 bits' time: two in 8 bits take that of one
    narrow = max(operations / balance, weight + m * columns + 2 * m * n) + 3 * m * columns
    return wide / narrow


def shared(weight: Tensor, seen: Tensor | None = None) -> Tensor:
    """Of a weight [N, K, ...] what its input is multiplied by, float32 [K]: the root of each column's largest weight, over that
    of its largest input, `seen`, [K], where some were; with a geometric mean of 1."""
    logarithm = _logarithm(weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1))
    logarithm = (logarithm if seen is None else logarithm - _logarithm(seen)) / 2
    return (logarithm - logarithm.mean()).exp()


def _logarithm(largest: Tensor) -> Tensor:
    return largest.clamp(min=1e-6 * largest.max().clamp(min=1e-30)).log()


@torch.no_grad()
def _seen(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[nn.Module], object]) -> dict[nn.Module, Tensor]:
    """Of each layer that `run` calls, the largest magnitude of each column of its inputs, float32."""
    largest: dict[nn.Module, Tensor] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named["input"]
        x = x.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else x
        if x.numel():
            found = x.detach().float().abs().reshape(-1, x.shape[-1]).amax(0)
            largest[layer] = torch.maximum(largest[layer], found) if layer in largest else found

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in model.named_modules():
        if layer in largest and not largest[layer].isfinite().all():
            raise ValueError(f"smooth: expected finite inputs, but those of {name} are not")
    return largest


def sqnr(exact: Tensor, other: Tensor) -> float:
    """The power of `exact` over that of its difference to `other`, in dB; infinite where they are equal."""
    exact, other = exact.detach().double(), other.detach().double()
    noise = (exact - other).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(max(exact.square().sum().item(), 1e-300) / noise)
