"""Text sampling, guidance and the rectified flow; the model is only a callable here."""

from bagel.sampling.flow import SHIFTS, Euler, FlowStep, OnStep, Solver, Velocity, flow_timesteps, integrate
from bagel.sampling.guidance import BRANCHES, Guidance, GuidanceRule, GuidedVelocity, Guiding, branch_names
from bagel.sampling.taylorseer import CacheState, Caching, TaylorSeer, TaylorSeries
from bagel.sampling.text import Chooser, Choosing, TextSampling

__all__ = [
    "BRANCHES",
    "SHIFTS",
    "CacheState",
    "Caching",
    "Chooser",
    "Choosing",
    "Euler",
    "FlowStep",
    "Guidance",
    "GuidanceRule",
    "GuidedVelocity",
    "Guiding",
    "OnStep",
    "Solver",
    "TaylorSeer",
    "TaylorSeries",
    "TextSampling",
    "Velocity",
    "branch_names",
    "flow_timesteps",
    "integrate",
]
