"""Memory: models larger than their device, and one clear sentence where it does not suffice."""

from bagel.memory.errors import NotEnoughMemoryError, explain_out_of_memory, is_out_of_memory

__all__ = ["NotEnoughMemoryError", "explain_out_of_memory", "is_out_of_memory"]
