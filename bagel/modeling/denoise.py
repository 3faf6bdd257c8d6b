"""Evaluate noisy images on frozen contexts: several images, and several guidance branches of each, at once.

All branches stand in one batch for the linears and attend each to its own context. What does not change between
evaluations (rows, positions, the tokens around the image, embeddings of all times) is made once per generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.modeling.bagel import Bagel
from bagel.modeling.cache import Context, claim_all
from bagel.modeling.graphs import Replayed
from bagel.modeling.mot import Streams
from bagel.packing import Frames, LatentImage, Packed

LAUNCH_BOUND = 4096
"""Fewer latent tokens than this a fast GPU evaluates sooner than the CPU launches the kernels."""
REPLAYS = ("cuda",)
"""Devices whose work is captured and replayed."""
Pack = Callable[..., Packed]


@dataclass(frozen=True)
class Branch:
    """One image on one context, which stays as it is.

    Args:
        image: which of the images denoised together.
        context: what it is drawn from.
    """

    image: int
    context: Context


class Denoiser:
    """Last-layer states of noisy images; lives for one generation.

    Args:
        model: with its generating half.
        targets: what is denoised: noisy images, or noisy frames of one film as a group; their latents are not looked
            at.
        branches: all that will ever be evaluated.
        pack: from samples and the rotary positions they start at to a packed batch, as `Processor.pack`.
        times: those of the evaluations, as far as they are known; in [0, 1].
    """

    def __init__(
        self,
        model: Bagel,
        targets: Sequence[LatentImage | Frames],
        branches: Sequence[Branch],
        *,
        pack: Pack,
        times: Sequence[float] = (),
    ) -> None:
        self.model, self.targets, self.branches, self.pack = model, tuple(targets), tuple(branches), pack
        self.sizes = tuple(sum(count for _, _, count, _ in target.runs()) for target in targets)
        model.expect(2 * len(branches), sum(self.sizes[branch.image] for branch in branches))
        cells = [image.position_ids for target in targets for image, *_ in target.runs()]  # pyright: ignore
        self.table = model.latent_pos_embed(torch.cat(cells).to(model.device))
        embedded = model.time_embedder(torch.tensor([*times], dtype=torch.float32).to(model.device)) if times else ()
        self.times = dict(zip(times, embedded, strict=True))
        contexts = [branch.context for branch in branches]
        self.starts = [context.position for context in contexts]  # of this moment: a context may go on meanwhile
        self.claims = claim_all(contexts, [targets[branch.image].length for branch in branches], keeps=False)
        self.decoders: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}

    def states(self, x: Tensor, t: float, active: tuple[int, ...]) -> list[Tensor]:
        """Return what leaves the last layer, (n, H), for each active branch.

        Args:
            x: latent tokens of all images, one after the other, (N, P) float32.
            t: their time, in [0, 1].
            active: indices into the branches.
        """
        decoder = self.decoders.get(active) or self._decoder(active)
        if t not in self.times:
            self.times[t] = self.model.time_embedder(torch.full((1,), t, device=self.model.device))[0]
        tokens = self.model.latent_tokens(x, self.times[t], self.table).split(self.sizes)
        images = [self.branches[index].image for index in active]
        gen = tokens[images[0]] if len(images) == 1 else torch.cat([tokens[image] for image in images])
        return list(decoder(gen).split([self.sizes[image] for image in images]))

    def _decoder(self, active: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """Lay out branches, once, and return what maps their latent tokens to what leaves the last layer."""
        decoder, graphs = self.model.decoder, self.model.graphs
        branches = [self.branches[index] for index in active]
        packed = self.pack(
            [[self.targets[branch.image]] for branch in branches],
            starts=[self.starts[index] for index in active],
        ).to(self.model.device)
        attend = self.model.attention.plan(packed.layout, [self.claims[index] for index in active])
        rotary = decoder.rotary(packed.und_positions, packed.gen_positions)
        und = decoder.embed_tokens(packed.text_ids)  # the tokens around each image

        def run(gen: Tensor) -> Tensor:
            return decoder(Streams(und, gen), rotary, attend).gen

        self.decoders[active] = run
        stays = decoder.supply is None
        if stays and self.model.device.type in REPLAYS and packed.gen_positions.shape[0] < LAUNCH_BOUND:
            self.decoders[active] = Replayed(run, decoder, graphs.memory)
        elif self.model.device.type in REPLAYS:
            graphs.memory.clear()  # a large image may need it
        return self.decoders[active]
