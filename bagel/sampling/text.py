"""Choose the next token: greedy, or sampled with a temperature and a nucleus (top-p, arXiv 1904.09751)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bagel.parameters import Parameters, option


@runtime_checkable
class Chooser(Protocol):
    """Whatever chooses the next token ids (B,) long of B texts from their logits (B, vocab) float32.

    There is one generator per text; a chooser that draws must draw from those only. Two members may be missing:
    `greedy`, which promises that nothing is drawn, and `discard(vocab_size, generator)`, which moves a generator on by
    one draw where a text ends at its limit.
    """

    def __call__(self, logits: Tensor, generators: Sequence[torch.Generator], /) -> Tensor:
        """Return the ids, on the device of the logits."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choosing(Parameters):
    """The options of `TextSampling`."""

    do_sample: bool = option(False, "draw the tokens of a text instead of taking the likeliest")
    temperature: float = option(
        0.3, "the higher, the more even the draws; 0 takes the likeliest", at_least=0, needs="do_sample", metavar="T"
    )
    top_p: float = option(
        1.0, "draw among the likeliest tokens of this sum", above=0, at_most=1, needs="do_sample", metavar="P"
    )


@dataclass(frozen=True, kw_only=True)
class TextSampling(Choosing):
    """A chooser: takes the likeliest token, or draws one.

    Args:
        do_sample: draw instead of taking the likeliest.
        temperature: at least 0; 0 means greedy.
        top_p: keep the likeliest tokens whose probabilities reach this sum, in (0, 1]; 1 keeps all.

    Raises:
        ValueError: a value out of its range, named.
    """

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; divided by less than this, logits would leave the range of float32."""
        return not self.do_sample or self.temperature < 1e-30

    def __call__(self, logits: Tensor, generators: Sequence[torch.Generator], /) -> Tensor:
        """Return the next token ids (B,) long from logits (B, vocab) float32; nothing is read from their device.

        A draw is that of `torch.multinomial`: the largest quotient of probability and exponential noise. The noise is
        drawn on each generator's device, so a CPU generator gives the same tokens everywhere.

        Raises:
            ValueError: not as many generators as rows.
        """
        if len(generators) != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} texts need as many generators, got {len(generators)}")
        if self.greedy:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            probabilities = _nucleus(probabilities, self.top_p)
        noise = torch.stack([_noise(logits.shape[-1], generator) for generator in generators])
        if logits.is_cuda and not noise.is_cuda:
            noise = noise.pin_memory()  # from there it is copied while the GPU computes
        return (probabilities / noise.to(logits.device, non_blocking=logits.is_cuda)).argmax(-1)

    def discard(self, vocab_size: int, generator: torch.Generator) -> None:
        """Advance the generator by one draw: the official loop draws once more than it keeps."""
        if not self.greedy:
            _noise(vocab_size, generator)


def _noise(vocab_size: int, generator: torch.Generator) -> Tensor:
    return torch.empty(vocab_size, device=generator.device).exponential_(1, generator=generator)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)
