"""Choose the next token: greedy, or sampled with a temperature and a nucleus (top-p, arXiv 1904.09751)."""

from __future__ import annotations

from collections.abc import Sequence
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


def next_tokens(logits: Tensor, sampling: TextSampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next token ids (B,) long from logits (B, vocab) float32, on their device; nothing is read from there.

    A draw is that of `torch.multinomial`: the largest quotient of probability and exponential noise. The noise is drawn
    on each generator's device, so a CPU generator gives the same tokens everywhere.

    Args:
        logits: one row for each text.
        sampling: how tokens are chosen.
        generators: one a row.

    Raises:
        ValueError: not as many generators as rows.
    """
    if len(generators) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} texts need as many generators, got {len(generators)}")
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    noise = torch.stack([_noise(logits.shape[-1], generator) for generator in generators])
    if logits.is_cuda and not noise.is_cuda:
        noise = noise.pin_memory()  # from there it is copied while the GPU computes
    return (probabilities / noise.to(logits.device, non_blocking=True)).argmax(-1)


def discard_draw(vocab_size: int, sampling: TextSampling, generator: torch.Generator) -> None:
    """Advance the generator by one draw: the official loop draws once more than it keeps."""
    if not sampling.greedy:
        _noise(vocab_size, generator)


def _noise(vocab_size: int, generator: torch.Generator) -> Tensor:
    return torch.empty(vocab_size, device=generator.device).exponential_(1, generator=generator)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)
