"""Fast kernels for diffusion models, with a plain PyTorch reference under each of them."""

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
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "ops",
    "quantize_",
    "rung",
    "running",
    "scaled_dot_product_attention",
]

_LAZY = ("Recipe", "quantize_")


def __getattr__(name: str) -> Any:  # modules above the ops are imported by those who use them
    if name in _LAZY:
        from . import quantize

        return getattr(quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
