"""A table of learned vectors, looked up by id."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """torch's embedding, but left alone where it holds no values: filling it there makes torch load its compiler."""

    def reset_parameters(self) -> None:
        """Draw fresh values, unless the table is on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()
