"""How the tokens of one forward find each other: made once per forward, or once per generation.

A plan is what turns one decoder into prefill, decoding, denoising and training: it says which rows of the two streams
belong together, what they see, and where their keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.attention import attention, lower_right_causal
from bagel.modeling.cache import Context, Place
from bagel.modeling.layers import Heads
from bagel.packing import Packed


@dataclass(frozen=True)
class Sequence:
    """The new tokens of one sequence: their rows in each stream, and the attention rule.

    Without a context the tokens see one another only; with one they see all of it as well, and their keys and values
    are written into its cache. `mask` is bool (n, context + n), its columns over [context | und rows | gen rows].
    """

    und: slice
    gen: slice
    context: Context | None = None
    place: Place = "tail"
    causal: bool = False
    mask: Tensor | None = None


class AttentionPlan:
    """Attention of both experts' tokens, sequence by sequence.

    Args:
        sequences: they must cover both streams, in order.
        backend: see `bagel.attention.attention`.
    """

    def __init__(self, sequences: list[Sequence], *, backend: str = "sdpa") -> None:
        self.sequences = sequences
        self.backend = backend

    def __call__(self, layer: int, und: Heads, gen: Heads) -> tuple[Tensor, Tensor]:
        """Return what the und tokens (Tu, Hq, D) and the gen tokens (Tg, Hq, D) gather."""
        und_out, gen_out = [], []
        for sequence, (q, k, v) in zip(self.sequences, self.remember(layer, und, gen), strict=True):
            out = attention(q, k, v, causal=sequence.causal, mask=sequence.mask, backend=self.backend)
            num_und = sequence.und.stop - sequence.und.start
            und_out.append(out[:num_und])
            gen_out.append(out[num_und:])
        return _concat(und_out), _concat(gen_out)

    def remember(self, layer: int, und: Heads, gen: Heads) -> Iterator[Heads]:
        """Write keys and values into the contexts; yield each sequence's queries, and all keys and values it sees."""
        for sequence in self.sequences:
            q, k, v = ((a[sequence.und], b[sequence.gen]) for a, b in zip(und, gen, strict=True))
            if sequence.context is None:
                yield _join(*q), _join(*k), _join(*v)
            else:
                yield _join(*q), *sequence.context.extended(layer, k, v, sequence.place)


def plan_packed(
    packed: Packed, *, contexts: list[Context] | None = None, device: torch.device, backend: str = "sdpa"
) -> AttentionPlan:
    """Plan a packed forward, each sample on top of its context if there are any; single segments need no mask."""
    sequences = []
    for index, sample in enumerate(packed.samples):
        context = contexts[index] if contexts is not None else None
        if context is not None:
            context.cache.reserve(tokens=context.length + len(sample))
        single = len(sample.splits) <= 1
        causal = single and any(split.attention == "causal" for split in sample.splits)
        mask = None if single else sample.stream_mask().to(device)
        if context is not None and context.length:
            if mask is not None:  # everything sees the whole context
                mask = torch.cat([mask.new_ones(len(sample), context.length), mask], dim=1)
            elif causal and backend == "sdpa":  # it would make this mask in every layer
                mask, causal = lower_right_causal(len(sample), context.length + len(sample), device), False
        sequences.append(Sequence(sample.und, sample.gen, context=context, causal=causal, mask=mask))
    return AttentionPlan(sequences, backend=backend)


def _join(und: Tensor, gen: Tensor) -> Tensor:
    if gen.shape[0] == 0:
        return und
    return gen if und.shape[0] == 0 else torch.cat([und, gen])


def _concat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
