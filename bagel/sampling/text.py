"""Choose the next token: greedy, or sampled with a temperature and a nucleus (top-p, arXiv 1904.09751)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextSampling:
    """How tokens are chosen.

    Args:
        do_sample: draw instead of taking the likeliest.
        temperature: at least 0; 0 means greedy.
        top_p: keep the likeliest tokens whose probabilities reach this sum, in (0, 1]; 1 keeps all.

    Raises:
        ValueError: a value out of its range, named.
    """

    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.do_sample or self.temperature == 0


def next_token(logits: Tensor, sampling: TextSampling, generator: torch.Generator | None = None) -> Tensor:
    """Return the next token id, a scalar long tensor on the device of `logits` (vocab,) float32.

    A draw uses `torch.multinomial` on the generator's device, so a CPU generator gives the same tokens everywhere.
    """
    if sampling.greedy:
        return logits.argmax()
    device = logits.device
    if generator is not None:
        logits = logits.to(generator.device)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[0].to(device)


def discard_draw(vocab_size: int, sampling: TextSampling, generator: torch.Generator) -> None:
    """Advance the generator by one draw: the official loop draws once more than it keeps."""
    if not sampling.greedy:
        weights = torch.ones(vocab_size, device=generator.device)
        torch.multinomial(weights, 1, generator=generator)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, ids = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    return torch.zeros_like(probabilities).scatter(0, ids, kept)
