"""Samplers: a schedule gives noise levels, a solver their coefficients, and one loop runs them through `ops.solver_step`."""

from .guidance import cfg_weights
from .loop import Sampler, randn
from .schedules import EDM, DiscreteVP, Grid, RectifiedFlow, Schedule, VPCosine, VPLinear
from .solvers import PREDICTIONS, SOLVERS

__all__ = [
    "EDM",
    "PREDICTIONS",
    "SOLVERS",
    "DiscreteVP",
    "Grid",
    "RectifiedFlow",
    "Sampler",
    "Schedule",
    "VPCosine",
    "VPLinear",
    "cfg_weights",
    "randn",
]
