"""The seeds' architectures, small and readable, in their official parameterisation: released weights load as they are."""

from .checkpoint import CheckpointError, load, save
from .dit import DiT, dit

__all__ = ["CheckpointError", "DiT", "dit", "load", "save"]
