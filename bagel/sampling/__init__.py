"""Text sampling, guidance and the rectified flow; the model is only a callable here."""

from bagel.sampling.flow import FlowStep, euler, flow_timesteps
from bagel.sampling.guidance import Guidance, guide
from bagel.sampling.guided import GuidedVelocity, PictureBranches
from bagel.sampling.taylorseer import TaylorSeer
from bagel.sampling.text import TextSampling, discard_draw, next_tokens

__all__ = [
    "FlowStep",
    "Guidance",
    "GuidedVelocity",
    "PictureBranches",
    "TaylorSeer",
    "TextSampling",
    "discard_draw",
    "euler",
    "flow_timesteps",
    "guide",
    "next_tokens",
]
