"""Fast kernels for diffusion models, with a plain PyTorch reference under each of them."""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from ._ladder import RungError, explain, rung, running
from ._sdpa import disable_sdpa, enable_sdpa
from .attention import scaled_dot_product_attention

try:
    __version__ = version("diffkernels")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

__all__ = [
    "RungError",
    "__version__",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "ops",
    "rung",
    "running",
    "scaled_dot_product_attention",
]
