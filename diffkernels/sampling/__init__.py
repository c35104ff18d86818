"""Samplers: a schedule gives noise levels, a solver their coefficients, and one loop runs them through `ops.solver_step`."""

from .adaptive import Adaptive, dpm_adaptive
from .guidance import cfg_weights
from .loop import Sampler
from .lower import PREDICTIONS
from .noise import randn, seeds
from .prepared import Prepared
from .schedules import EDM, DiscreteVP, Grid, RectifiedFlow, Schedule, VPCosine, VPLinear
from .solvers import SOLVERS

__all__ = [
    "EDM",
    "PREDICTIONS",
    "SOLVERS",
    "Adaptive",
    "DiscreteVP",
    "Grid",
    "Prepared",
    "RectifiedFlow",
    "Sampler",
    "Schedule",
    "VPCosine",
    "VPLinear",
    "cfg_weights",
    "dpm_adaptive",
    "randn",
    "seeds",
]
