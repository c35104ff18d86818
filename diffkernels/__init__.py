"""Fast kernels for diffusion models, with a plain PyTorch reference under each of them."""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from ._ladder import RungError, explain, rung, running

try:
    __version__ = version("diffkernels")
except PackageNotFoundError:  # the source tree, not installed
    __version__ = "0+unknown"

__all__ = ["RungError", "__version__", "explain", "ops", "rung", "running"]
