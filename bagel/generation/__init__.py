"""Conversations: what a model reads, writes and draws, and the contexts in between."""

from bagel.generation.contexts import Contexts
from bagel.generation.drawing import draw_all
from bagel.generation.reading import read_all
from bagel.generation.session import Session, Velocity
from bagel.generation.writing import write_all

__all__ = ["Contexts", "Session", "Velocity", "draw_all", "read_all", "write_all"]
