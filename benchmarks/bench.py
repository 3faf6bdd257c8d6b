"""A pipeline to be measured: the sizes that it takes, and its work counted in phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bagel.config import BagelConfig, ViTConfig
from bagel.modeling import MissingHalfError
from bagel.options import make_options
from bagel.pipeline import BagelPipeline
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
        """Return the side of a picture in pixels: as wanted, or the largest that the model draws."""
        config = self.pipe.parts.model.config
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
        return self.pipe.parts.text(text).ids.shape[0]

    @property
    def itemsize(self) -> int:
        """Bytes of a weight of the model."""
        return self.pipe.dtype.itemsize

    @property
    def vit(self) -> ViTConfig:
        """Sizes of the vision encoder; raises MissingHalfError where there is none."""
        config = self.pipe.parts.model.config
        if config.vit_config is None or not config.visual_und:
            raise MissingHalfError("this model was loaded without its vision half: choose --jobs without pictures in")
        return config.vit_config

    @property
    def config(self) -> BagelConfig:
        """Sizes of the model."""
        return self.pipe.parts.model.config

    def latent_tokens(self, side: int) -> int:
        """Return the latent tokens of a square picture."""
        return (side // self.config.latent_downsample) ** 2

    def prefill(self, *sequences: Tokens) -> Phase:
        """Count the reading of what enters several contexts in one pass."""
        return floors.forward(self.config.llm_config, sequences, self.itemsize, name="prefill")

    def read_text(self, count: int, *starts: int) -> Phase:
        """Count the reading of a text of so many tokens into a context of each length in `starts`."""
        return self.prefill(*(Tokens(und=count, start=start, causal=True) for start in starts))

    def vision(self, patches: int) -> Phase:
        """Count one picture through the vision encoder."""
        return floors.vision(self.vit, self.config.llm_config.hidden_size, patches, self.itemsize)

    def decoding(self, contexts: list[int], tokens: int) -> Phase:
        """Count the decoding of so many tokens from each context."""
        return floors.decoding(self.config.llm_config, contexts, tokens, self.itemsize)

    def autoencoding(self, side: int, *, decode: bool, pictures: int = 1) -> Phase:
        """Count square pictures through half the autoencoder, one after the other."""
        vae = self.pipe.parts.drawing_vae()
        size = next(vae.parameters()).dtype.itemsize
        return replace(floors.autoencoding(vae.config, side, side, size, decode=decode), count=pictures)

    def evaluations(
        self, task: str, given: Mapping[str, Any], contexts: list[int], *, side: int, pictures: int = 1
    ) -> list[Phase]:
        """Count the evaluations of pictures drawn together.

        Args:
            task: whose default options are under those `given`.
            contexts: tokens of the context of each branch of one picture; the first has everything.
            side: of each picture in pixels.
            pictures: how many, all alike.
        """
        options = make_options(task, "image", given)
        guided = options.guidance.active(options.timesteps[:-1])
        counted = floors.computed_branches(guided, len(contexts), taylorseer=options.taylorseer)
        tokens = self.latent_tokens(side)
        phases = []
        for due, count in counted.items():
            held = [contexts[branch] for branch in due] * pictures
            one = floors.evaluation(self.config, tokens, held, self.itemsize, pictures=pictures)
            phases.append(replace(one, count=count))
        return phases
