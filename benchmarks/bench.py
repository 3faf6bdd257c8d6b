"""A pipeline to be measured: the sizes that it takes, and its work counted in phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bagel.config import BagelConfig, MissingHalfError, ViTConfig
from bagel.options import make_options
from bagel.pipeline import BagelPipeline
from bagel.vae import Autoencoder
from benchmarks import floors
from benchmarks.floors import Phase, Tokens


@dataclass(frozen=True)
class Bench:
    """A pipeline and how it is to be run.

    `taylorseer`: predict most evaluations. `quick`: small sizes, to see that everything runs.
    """

    pipe: BagelPipeline
    taylorseer: bool = False
    quick: bool = False

    def side(self, wanted: int) -> int:
        """Return the side of an image in pixels: as wanted, or the largest that the model draws."""
        config = self.config
        step = config.latent_downsample
        return min(wanted, 4 * step if self.quick else wanted, config.max_latent_size * step) // step * step

    def steps(self, wanted: int) -> int:
        """Return the number of timesteps."""
        return min(wanted, 8) if self.quick else wanted

    def tokens(self, wanted: int) -> int:
        """Return the number of tokens to write."""
        return min(wanted, 4) if self.quick else wanted

    def length(self, text: str) -> int:
        """Return the tokens of a text in a context, bos and eos with them."""
        return self.pipe.processor.text(text).length

    @property
    def itemsize(self) -> int:
        """Bytes of a weight of the model."""
        return self.pipe.dtype.itemsize

    @property
    def vit(self) -> ViTConfig:
        """Sizes of the vision encoder; raises MissingHalfError where there is none."""
        config = self.config
        if config.vit_config is None or not config.visual_und:
            raise MissingHalfError("this model was loaded without its vision half: choose --jobs without images in")
        return config.vit_config

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder; raises MissingHalfError where there is none."""
        if self.pipe.vae is None:
            raise MissingHalfError("this model was loaded without its generating half: choose --jobs that answer")
        return self.pipe.vae

    @property
    def config(self) -> BagelConfig:
        """Sizes of the model."""
        return self.pipe.model.config

    def latent_tokens(self, side: int) -> int:
        """Return the latent tokens of a square image."""
        return (side // self.config.latent_downsample) ** 2

    def prefill(self, *sequences: Tokens) -> Phase:
        """Count the reading of what enters several contexts in one pass."""
        return floors.forward(self.config.llm_config, sequences, self.itemsize, name="prefill")

    def read_text(self, count: int, *starts: int) -> Phase:
        """Count the reading of a text of so many tokens into a context of each length in `starts`."""
        return self.prefill(*(Tokens(und=count, start=start, causal=True) for start in starts))

    def vision(self, patches: int) -> Phase:
        """Count one image through the vision encoder."""
        return floors.vision(self.vit, self.config.llm_config.hidden_size, patches, self.itemsize)

    def decoding(self, contexts: list[int], tokens: int) -> Phase:
        """Count the decoding of so many tokens from each context."""
        return floors.decoding(self.config.llm_config, contexts, tokens, self.itemsize)

    def autoencoding(self, side: int, *, decode: bool, images: int = 1) -> Phase:
        """Count square images through half the autoencoder, one after the other."""
        vae = self.vae
        size = next(vae.parameters()).dtype.itemsize
        return replace(floors.autoencoding(vae.config, side, side, size, decode=decode), count=images)

    def evaluations(
        self, task: str, given: Mapping[str, Any], contexts: list[int], *, side: int, images: int = 1
    ) -> list[Phase]:
        """Count the evaluations of images drawn together.

        Args:
            task: whose default options are under those `given`.
            contexts: tokens of the context of each branch of one image; the first has everything.
            side: of each image in pixels.
            images: how many, all alike.
        """
        options = make_options(task, given)
        asked = [len(options.guide.branches(t)) for t in options.timesteps[:-1].tolist()]
        counted = floors.computed_branches(asked, taylorseer=options.taylorseer)
        tokens = self.latent_tokens(side)
        phases = []
        for due, count in counted.items():
            held = [contexts[branch] for branch in due] * images
            one = floors.evaluation(self.config, tokens, held, self.itemsize, images=images)
            phases.append(replace(one, count=count))
        return phases
