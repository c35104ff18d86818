"""Weights in safetensors files: everything is checked before anything is loaded, and nothing is unpickled.

A file of ours carries one metadata entry, "diffkernels", a JSON object: {"format": 1, "arch": "DiT", "config": {…},
"about": {…}}, and of a quantized model also "quantized": {"kind": "int8", "layers": […]}, or kind "w4a8_lowrank" where a layer
has 4 bits or a branch, or kind "w4a16" and "weight_only": […] where the inputs of such layers are not coded. Converted official
weights have none; they load into a model that the caller has built.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..nn import Quantized, QuantizedConv2d, QuantizedLinear, WeightOnlyLinear
from ..ops.linear_w4a8_lowrank import GROUPS, check_w4

FORMAT = 1
KINDS = ("int8", "w4a8_lowrank", "w4a16")  # of quantized layers
KEY = "diffkernels"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INTEGERS = {torch.int8: ("I8",), torch.uint8: ("U8",), torch.int32: ("I32",)}
# That there is a null class shows in the shapes.
TRAINING_ONLY = ("class_dropout_prob", "dropout_prob", "block_grad_to_lowres")
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "list[dict]": list}

M = TypeVar("M", bound=type[nn.Module])
ARCHITECTURES: dict[str, type[nn.Module]] = {}


class CheckpointError(ValueError):
    """A checkpoint that is not what was expected; the text names the file, what was expected and what came."""


def architecture(cls: M) -> M:
    """Registers a model class that `load` may build. It keeps its constructor's arguments in `self.config`."""
    ARCHITECTURES[cls.__name__] = cls
    return cls


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Loads a safetensors file into `model`, or into a new float32 model on the CPU that its metadata describes.

    Names and shapes must be the model's own, and its configuration where the file has one; the numbers are finite floats
    of any width, and are converted to the dtype and device of the model's parameters. A quantized model's codes are int8, and
    packed for this machine; a given model must be quantized as the file's was. If anything is wrong, the model is left as it
    was.

    Returns:
        The model, in evaluation mode where it is new.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a pickle, a damaged or foreign file, or a configuration, names, shapes, dtypes or
            numbers that don't fit.
    """
    path = Path(path)
    with reading(path) as file:
        names = set(file.keys())
        metadata = file.metadata() or {}
        if model is not None and KEY in metadata:
            _same(path, _describe(path, metadata), model)
        target = _build(path, metadata, file) if model is None else model
        expected = target.state_dict()
        _match(path, names, expected)
        for name, own in expected.items():
            shape, dtype = list(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
            if shape != list(own.shape):
                raise CheckpointError(f"{path}: {name}: expected shape {list(own.shape)}, got {shape}")
            if dtype not in (wanted := INTEGERS.get(own.dtype, tuple(FLOATS))):
                raise CheckpointError(f"{path}: {name}: expected {', '.join(wanted)}; got {dtype}")
        state: dict[str, Tensor] = {}
        for name, own in expected.items():
            state[name] = file.get_tensor(name).to(own.dtype)
            if not state[name].isfinite().all():  # after the conversion: a large float32 is no float16
                raise CheckpointError(f"{path}: {name}: expected finite numbers in {own.dtype}, found infinity or NaN")
            if own.dtype == torch.int32 and not torch.equal(state[name], own):  # a setting, no weight
                raise CheckpointError(f"{path}: {name}: expected {own.tolist()}, got {state[name].tolist()}")
        for name in state:
            layer, _, last = name.rpartition(".")
            if last == "group_scale":
                try:
                    check_w4(state[f"{layer}.qweight"], state[name])
                except ValueError as error:
                    raise CheckpointError(f"{path}: {layer}: {error}") from error
    target.load_state_dict(state, strict=True, assign=model is None)
    return target if model is not None else target.eval()


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of ours says of itself: {"format", "arch", "config", "about"}. Raises as `load` does."""
    path = Path(path)
    with reading(path) as file:
        return _describe(path, file.metadata() or {})


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model` to a safetensors file that `load(path)` can build it from; the file appears whole or not at all.

    `dtype` is the width of storage (None: as it is), but of a quantized layer's codes and scales; `about` is free JSON about
    the weights.

    Raises:
        CheckpointError: numbers that are not finite in that dtype. TypeError: a model without `architecture`.
    """
    path = Path(path)
    arch = type(model).__name__
    if ARCHITECTURES.get(arch) is not type(model):
        raise TypeError(f"model: expected one of {', '.join(ARCHITECTURES)}; got {arch}")
    layers = _quantized_layers(model)
    state: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        exact = dtype is None or (layer in layers and last != "bias")
        state[name] = t.detach().to("cpu", t.dtype if exact else dtype).contiguous()
    for name, t in state.items():
        if not t.isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite numbers in {t.dtype}, found infinity or NaN")
    # One entry, sorted: safetensors writes its entries in no fixed order, and the same weights shall be the same bytes.
    found = {"format": FORMAT, "arch": arch, "config": model.config, "about": dict(about or {})}
    if layers:
        alone = [name for name in layers if isinstance(model.get_submodule(name), WeightOnlyLinear)]
        found["quantized"] = {"kind": _kind(model, layers), "layers": layers} | ({"weight_only": alone} if alone else {})
    text = json.dumps(found, sort_keys=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(to_bytes(state, metadata={KEY: text}))  # not save_file, which hides its file from other users
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def reading(path: str | os.PathLike[str]) -> Any:
    """A safetensors file, open, as safetensors reads it. Raises FileNotFoundError, or CheckpointError: something else."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: expected a .safetensors file; {path.suffix} files are pickles, which can run any code when they are "
            "opened. Convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), …)"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a safetensors file, got a directory or a device")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got something else ({error})") from error


def _describe(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise CheckpointError(
            f"{path}: expected metadata {KEY!r} that says which model this is, found none; for other people's weights, "
            "build the model yourself: load(path, model)"
        )
    try:
        found = json.loads(metadata[KEY])
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON in the metadata {KEY!r}, got something else ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {version!r}")
    if not isinstance(found.get("config"), dict) or not isinstance(found.get("about", {}), dict):
        raise CheckpointError(f"{path}: expected JSON objects 'config' and 'about' in the metadata")
    return found


def _build(path: Path, metadata: Mapping[str, str], file: Any) -> nn.Module:
    """The model that the metadata describes, on the meta device: a wrong size costs nothing before it is found."""
    found = _describe(path, metadata)
    arch, config = found.get("arch"), found["config"]
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise CheckpointError(f"{path}: expected arch to be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    parameters = inspect.signature(ARCHITECTURES[arch]).parameters
    for key, value in config.items():
        if key not in parameters:
            raise CheckpointError(f"{path}: config: expected keys among {', '.join(parameters)}; got {key!r}")
        kind = str(parameters[key].annotation)
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):  # type: ignore[arg-type]
            raise CheckpointError(f"{path}: config: {key}: expected {kind}, got {value!r}")
    if (depth := _depth(config)) > len(file.keys()):
        raise CheckpointError(f"{path}: config: depth {depth}, but the file holds {len(file.keys())} tensors")
    try:
        with torch.device("meta"):
            model = ARCHITECTURES[arch](**config)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: config: {error}") from error
    return _with_codes(path, found, model, file)


def _quantized_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, Quantized)]


def _kind(model: nn.Module, layers: Sequence[str]) -> str:
    """What a reader has to know; a layer's own tensors say which it is, but for whether its input is coded."""
    if any(isinstance(m, WeightOnlyLinear) for m in map(model.get_submodule, layers)):
        return KINDS[2]
    plain = all(m.bits == 8 and not m.rank for m in map(model.get_submodule, layers))
    return KINDS[0] if plain else KINDS[1]


def _with_codes(path: Path, found: Mapping[str, Any], model: nn.Module, file: Any) -> nn.Module:
    """The model, on the meta device, with the layers that the file says are quantized."""
    said = found.get("quantized", {"kind": "int8", "layers": []})
    if not isinstance(said, dict) or said.get("kind") not in KINDS or not isinstance(said.get("layers"), list):
        raise CheckpointError(f"{path}: quantized: expected kind {' or '.join(KINDS)} and a list of layers, got {said!r:.80}")
    alone = said.get("weight_only", [])
    named = {name for name in said["layers"] if isinstance(name, str)}  # a list may stand there, that no set takes
    some = isinstance(alone, list) and all(isinstance(name, str) and name in named for name in alone)
    if not some or bool(alone) != (said["kind"] == KINDS[2]):
        raise CheckpointError(
            f"{path}: quantized: weight_only: expected some of the layers, of kind {KINDS[2]} alone; got {alone!r:.80}"
        )
    alone = set(alone)
    modules, names = dict(model.named_modules()), set(file.keys())
    for name in said["layers"]:
        layer = modules.get(name) if isinstance(name, str) else None
        if type(layer) is not nn.Linear and (type(layer) is not nn.Conv2d or QuantizedConv2d.unfit(layer)):
            raise CheckpointError(f"{path}: quantized: expected the names of Linear layers and convolutions, got {name!r}")
        parent, _, last = name.rpartition(".")
        has = (layer.bias is not None, f"{name}.smooth" in names)
        if isinstance(layer, nn.Conv2d) and name not in alone:
            conv = QuantizedConv2d(*QuantizedConv2d.settings(layer), *has, device="meta")
            setattr(modules[parent], last, conv)
            continue
        rotate = _setting(path, file, f"{name}.rotate") if f"{name}.rotate" in names else 0
        groups, down = (
            _shape(file, f"{name}.{part}") if f"{name}.{part}" in names else None for part in ("group_scale", "down")
        )
        if isinstance(layer, nn.Conv2d):
            raise CheckpointError(f"{path}: quantized: weight_only: expected the names of Linear layers, got {name!r}")
        k, bits = layer.in_features, 8 if groups is None else 4
        if down is not None and (len(down) != 2 or not 1 <= down[0] <= min(k, layer.out_features) or down[1] != k):
            raise CheckpointError(f"{path}: {name}.down: expected [rank, {k}] with a rank of the weight's, got shape {down}")
        group = next((g for g in GROUPS if groups and groups[-1] == -(-k // g)), GROUPS[0])
        if name in alone:
            odd = [part for part in ("rotate", "smooth", "down") if f"{name}.{part}" in names]
            if groups is None or odd:
                what = f"{name}.{odd[0]}" if odd else f"no {name}.group_scale"
                raise CheckpointError(f"{path}: quantized: weight_only: expected codes of 4 bits alone, got {what}")
            only = WeightOnlyLinear(k, layer.out_features, has[0], group, device="meta")
            setattr(modules[parent], last, only)
            continue
        try:
            new = QuantizedLinear(k, layer.out_features, *has, rotate, bits, group, down[0] if down else 0, device="meta")
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
        setattr(modules[parent], last, new)
    return model


def _shape(file: Any, name: str) -> list[int]:
    return list(file.get_slice(name).get_shape())


def _setting(path: Path, file: Any, name: str) -> int:
    kind, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
    if kind != "I32" or shape:
        raise CheckpointError(f"{path}: {name}: expected one number of I32, got {kind} {shape}")
    return int(file.get_tensor(name))


def _depth(config: Mapping[str, Any]) -> int:
    """How many blocks a configuration asks for: too many would take for ever even on the meta device."""
    stages = [stage.get("num_blocks", 0) for stage in config.get("stages", []) if isinstance(stage, dict)]
    return config.get("depth", 0) + sum(n for n in stages if isinstance(n, int))


def _lasting(value: Any) -> Any:
    """A configuration's value without what matters in training only."""
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in TRAINING_ONLY}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def _same(path: Path, found: Mapping[str, Any], model: nn.Module) -> None:
    """What shapes can't show, such as the number of heads, would load without a word and answer nonsense."""
    arch, config = type(model).__name__, getattr(model, "config", {})
    if found.get("arch") != arch:
        raise CheckpointError(f"{path}: expected arch {arch!r}, got {found.get('arch')!r}")
    said, own = found.get("quantized"), [name for name, m in model.named_modules() if isinstance(m, WeightOnlyLinear)]
    alone = said.get("weight_only", []) if isinstance(said, dict) else []
    if alone != own:  # no tensor shows it
        raise CheckpointError(f"{path}: quantized: weight_only: expected the model's {own!r:.200}, got {alone!r:.200}")
    for key, value in _lasting(found["config"]).items():
        if _lasting(config.get(key)) != value:
            raise CheckpointError(f"{path}: config: {key}: expected the model's {config.get(key)!r}, got {value!r}")


def _match(path: Path, names: set[str], expected: Mapping[str, Tensor]) -> None:
    for what, odd in (("misses", expected.keys() - names), ("has unexpected", names - expected.keys())):
        if odd:
            some = ", ".join(sorted(odd)[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
            raise CheckpointError(f"{path}: expected {len(expected)} tensors, got {len(names)}; it {what} {some}")
