"""The ops. Each is a Python function whose body is its definition; kernels on faster rungs do the same, in one pass."""

from .norm_modulate import norm_modulate
from .solver_step import solver_step

__all__ = ["norm_modulate", "solver_step"]
