"""A table of learned vectors, looked up by id."""

from __future__ import annotations

from torch import Tensor, nn

from bagel.kernels import rows_of


class Embedding(nn.Embedding):
    """torch's embedding, but left alone where it holds no values: filling it there makes torch load its compiler."""

    def reset_parameters(self) -> None:
        """Draw fresh values, unless the table is on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (T, n) of ids (T,), on their device, wherever the table is."""
        return rows_of(self.weight, ids)
