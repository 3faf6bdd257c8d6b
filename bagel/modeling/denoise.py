"""Evaluate noisy pictures on frozen contexts: several pictures, and several guidance branches of each, at once.

All branches stand in one batch for the linears and attend each to its own context. What does not change between
evaluations (rows, positions, the tokens around the picture, embeddings of all times) is made once per generation.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.modeling.bagel import Bagel
from bagel.modeling.cache import Context, Place
from bagel.modeling.graphs import GraphMemory, Replayed
from bagel.modeling.mot import Streams
from bagel.modeling.plan import AttentionPlan, Sequence

LAUNCH_BOUND = 4096
"""Fewer latent tokens than this a fast GPU evaluates sooner than the CPU launches the kernels."""


@dataclass(frozen=True)
class Branch:
    """One picture on one context.

    Args:
        picture: which of the pictures drawn together.
        context: what it is drawn from; stays as it is.
        place: where its keys and values stand; "headroom" where the context is a prefix of another branch's.
    """

    picture: int
    context: Context
    place: Place = "tail"


class Denoiser:
    """Last-layer states and velocities of noisy pictures; lives for one generation.

    Args:
        model: with its generating half.
        branches: all that will ever be evaluated.
        position_ids: for each picture the cells (n,) of its latent tokens.
        timesteps: the times of all evaluations (S,), float32 in [0, 1].
        image_tokens: ids of `<|vision_start|>` and `<|vision_end|>`.
        attention: backend, see `bagel.attention`.
        graph_memory: where given, a GPU replays the evaluations of small pictures as CUDA graphs, to the same numbers.
    """

    def __init__(
        self,
        model: Bagel,
        branches: Many[Branch],
        *,
        position_ids: Many[Tensor],
        timesteps: Tensor,
        image_tokens: tuple[int, int],
        attention: str = "sdpa",
        graph_memory: GraphMemory | None = None,
    ) -> None:
        self.model = model
        self.branches = tuple(branches)
        self.attention = attention
        self.graph_memory = graph_memory
        device = model.device
        self.sizes = tuple(ids.shape[0] for ids in position_ids)
        cells = torch.cat(list(position_ids)).to(device)
        self.tables = model.latent_pos_embed(cells).split(self.sizes)
        self.times = model.time_embedder(timesteps.to(device))  # (S, H)
        self.around = model.decoder.embed(torch.tensor(image_tokens, device=device))  # (2, H)
        self.decoders: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
        for branch in branches:
            tokens, context = 2 + self.sizes[branch.picture], branch.context
            if branch.place == "tail":
                context.cache.reserve(tokens=context.length + tokens)
            else:
                context.cache.reserve(headroom=tokens)

    def hidden(self, latents: Many[Tensor], step: int, active: tuple[int, ...]) -> list[Tensor]:
        """Return what leaves the last layer, (n, H), for each active branch.

        Args:
            latents: x of each picture (n, P), float32.
            step: index into the timesteps.
            active: indices into the branches.
        """
        model = self.model
        decoder = self.decoders.get(active) or self._decoder(active)
        pictures = [self.branches[index].picture for index in active]
        tokens = {}
        for picture in dict.fromkeys(pictures):
            tokens[picture] = model.latent_tokens(latents[picture], self.times[step], self.tables[picture])
        gen = [tokens[picture] for picture in pictures]
        x = gen[0] if len(gen) == 1 else torch.cat(gen)
        return list(decoder(x).split([self.sizes[picture] for picture in pictures]))

    def velocity(self, hidden: Tensor) -> Tensor:
        """Return float32 velocities (n, P) of last-layer states (n, H)."""
        return self.model.velocity(hidden)

    def _decoder(self, active: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """Lay out branches, once, and return what maps their latent tokens to what leaves the last layer."""
        branches = [self.branches[index] for index in active]
        decoder, device = self.model.decoder, self.model.device
        sequences, und_positions, gen_positions = [], [], []
        start = 0
        for row, branch in enumerate(branches):
            count, position = self.sizes[branch.picture], branch.context.position
            und, gen = slice(2 * row, 2 * row + 2), slice(start, start + count)
            sequences.append(Sequence(und, gen, context=branch.context, place=branch.place))
            und_positions.append(torch.full((2,), position, device=device))  # made on the device: nothing to wait for
            gen_positions.append(torch.full((count,), position, device=device))
            start += count
        plan = AttentionPlan(sequences, backend=self.attention)
        rotary = decoder.rotary(torch.cat(und_positions)), decoder.rotary(torch.cat(gen_positions))
        und = self.around.repeat(len(branches), 1)  # the tokens around each picture

        def run(gen: Tensor) -> Tensor:
            return decoder(Streams(und, gen), rotary, plan).gen

        found: Callable[[Tensor], Tensor] = run
        if self.graph_memory is not None:
            if start < LAUNCH_BOUND:
                found = Replayed(run, self.model, self.graph_memory)
            else:
                self.graph_memory.clear()  # a large picture may need it
        self.decoders[active] = found
        return found
