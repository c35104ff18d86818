"""Fast kernels for diffusion models, with a plain PyTorch reference under each of them."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import ops
from ._ladder import RungError, explain, rung, running
from ._sdpa import disable_sdpa, enable_sdpa
from .attention import scaled_dot_product_attention

try:
    __version__ = version("diffkernels")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

__all__ = [
    "Recipe",
    "RungError",
    "__version__",
    "add_lora_",
    "compare",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "fuse_",
    "load",
    "ops",
    "quantize_",
    "rung",
    "running",
    "save",
    "scaled_dot_product_attention",
]

_LAZY = {
    "Recipe": "quantize",
    "add_lora_": "lora",
    "compare": "_compare",
    "fuse_": "fuse",
    "load": "models",
    "quantize_": "quantize",
    "save": "models",
}


def __getattr__(name: str) -> Any:  # what stands above the ops is imported by those who use it
    if name in _LAZY:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
