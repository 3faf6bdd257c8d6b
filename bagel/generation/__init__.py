"""Conversations: what a model reads, writes and draws, and the contexts in between."""

from bagel.generation.batches import draw_all, read_all, write_all
from bagel.generation.contexts import Contexts
from bagel.generation.session import Session, Velocity

__all__ = ["Contexts", "Session", "Velocity", "draw_all", "read_all", "write_all"]
