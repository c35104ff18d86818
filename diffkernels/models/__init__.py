"""The seeds' architectures, small and readable, in their official parameterisation: released weights load as they are."""

from .checkpoint import CheckpointError, load, save
from .dimr import DiMR, dimr, multiscale_loss
from .dit import DiT, dit

__all__ = ["CheckpointError", "DiMR", "DiT", "dimr", "dit", "load", "multiscale_loss", "save"]
