"""A session: one conversation with a model that reads, writes and draws, and goes on from all of it.

What a session writes or draws becomes part of it when it goes on; what ends with a result costs nothing more.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.generation.contexts import Contexts, Size, Utterance, working
from bagel.generation.drawing import decoded, draw_all, start_noise, velocity_of
from bagel.generation.reading import Input, Reader, catch_up, read_all
from bagel.generation.writing import plan_all, score, stream, write_all
from bagel.modeling import Bagel
from bagel.options import (
    EDIT,
    DrawOptions,
    PlanOptions,
    SessionOptions,
    VelocityOptions,
    Writing,
    make_options,
)
from bagel.processor import Processor
from bagel.results import ImageResult, TextResult
from bagel.sampling import GuidedVelocity
from bagel.signatures import takes
from bagel.vae import Autoencoder


class Velocity:
    """The guided velocity of one image of a session: `velocity(x, t)`, x (n, P) float32, t the shifted time.

    With a cache of evaluations it remembers what it was asked: one trajectory is all that it is good for.
    """

    def __init__(self, session: Session, guided: GuidedVelocity, size: Size) -> None:
        self.session, self.guided, self.size = session, guided, size
        self.shape = (guided.sizes[0], session.model.config.patch_latent_dim)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return v (n, P) float32 at x and t.

        Raises:
            ValueError: x of another shape, a time outside 0 to 1.
        """
        if tuple(x.shape) != self.shape or not 0 <= t <= 1:
            raise ValueError(f"x must be {self.shape} and t lie in [0, 1], got {tuple(x.shape)} and {t}")
        with working([self.session], "evaluating"):
            v = self.guided(x.to(self.session.model.device), t)
        return v.clone()

    def noise(self) -> Tensor:
        """Return start noise (n, P) float32 from the session's generator, on the model's device."""
        return start_noise(self.session, self.size)


class Session:
    """One conversation: its contexts, its random generator, and what it has still to read.

    Attributes:
        contexts: what writing and drawing start from; what was written or drawn last enters them later.
        generator: what all its random draws come from.

    Args:
        model: who reads, writes and draws.
        vae: its autoencoder; None for a model that only understands.
        processor: its rules for texts and images.
        options: those of the whole session.
        drops_images: guidance will ask for the branch without images, so texts are read for it at once.
    """

    def __init__(
        self,
        model: Bagel,
        vae: Autoencoder | None,
        processor: Processor,
        options: SessionOptions | None = None,
        *,
        drops_images: bool = True,
    ) -> None:
        self.options = SessionOptions() if options is None else options
        self.model, self.processor = model, processor
        self.reader = Reader(model, vae, processor, self.options)
        self.generator = self.options.new_generator()
        self.drops_images = drops_images and self.options.draws and vae is not None
        self.shows_progress = self.options.progress and _is_watched()
        self.open_stream: weakref.ref[Generator[str]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read, written and drawn, and free its memory; the generator goes on."""
        if self.open_stream is not None:
            self.end_stream()
        self.contexts = Contexts(self.model, self.processor, eager=self.drops_images)
        if self.options.system_prompt is not None:
            self.contexts.unread = (Utterance(self.processor.text(self.options.system_prompt), "system"),)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def fork(self) -> Session:
        """Return a session that has read the same and goes its own way from here, its generator too."""
        self.end_stream()
        other = copy.copy(self)
        other.contexts = self.contexts.fork()
        other.generator = torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        return other

    def read(self, *pieces: Input, posterior_noise: Sequence[Tensor] | None = None) -> Session:
        """Read texts and images in order, and return this session.

        Args:
            pieces: texts and PIL images.
            posterior_noise: for each image (16, h / 8, w / 8), instead of drawing it.

        Raises:
            TypeError: a piece that is neither; says how to open a file.
            ValueError: nothing to read; an image that does not fit; noise of another number or shape.
            MissingHalfError: an image, but the model was loaded without its vision half.
            NotEnoughMemoryError: what was asked does not fit. Whatever is raised, the session stays as it was.
        """
        read_all([self], [pieces], posterior_noise=[posterior_noise])
        return self

    @takes("write", Writing, TextResult)
    def write(self, **options: Any) -> TextResult:
        """Write an answer, which becomes part of the session.

        Args:
            options: by name, below.

        Raises:
            TypeError: an option that does not exist or has no effect.
            ValueError: a value out of its range.
            NotEnoughMemoryError: what was asked does not fit.
        """
        return write_all([self], make_options("write", options))[0]

    @takes("write", Writing, Generator[str])
    def stream(self, **options: Any) -> Generator[str]:
        """Yield an answer as it is decoded, in whole characters; what was yielded becomes part of the session.

        Args:
            options: by name, below; they are checked at once, errors are those of `write`.
        """
        self.end_stream()
        found = stream(self, make_options("write", options))
        self.open_stream = weakref.ref(found)
        return found

    @takes("think", PlanOptions, str)
    def think(self, **options: Any) -> str:
        """Write a plan for what is drawn next, and return it; it is read again as an ordinary text.

        Args:
            options: by name, below.
        """
        plan_all([self], make_options("think", options))
        assert self.contexts.plan is not None
        return self.contexts.plan

    @takes("draw", DrawOptions, ImageResult)
    def draw(self, **options: Any) -> ImageResult:
        """Draw an image, which becomes part of the session.

        Guidance has the defaults of an edit where the session holds images, else those of drawing from a text.

        Args:
            options: by name, below; with `think` a plan is written first.

        Raises:
            TypeError: an option that does not exist or has no effect.
            ValueError: a value out of its range, a size that does not fit.
            MissingHalfError: the model was loaded without its generating half.
            NotEnoughMemoryError: what was asked does not fit.
            FloatingPointError: the image came out as NaN.
        """
        return draw_all([self], [make_options("draw", self._guided(options))])[0]

    def _guided(self, options: dict[str, Any]) -> dict[str, Any]:
        shown = self.contexts.has_images or self.contexts.drawn is not None
        return {**EDIT, **options} if shown and options.get("guidance") is None else options

    def score(self, answer: str | Sequence[int]) -> tuple[float, ...]:
        """Return the log-probability of each token of a given answer, and of the eos after it; nothing is kept.

        Args:
            answer: a text, or its token ids without bos and eos.
        """
        written = self.processor.text(answer) if isinstance(answer, str) else self.processor.written(answer)
        with working([self], "scoring"):
            catch_up([self])
            return tuple(score(self.contexts, written))

    # What reading, writing and drawing ask of each ----------------------------------------------------------------

    def end_stream(self) -> None:
        """End an answer that is still being streamed where it stands, so that it stands before what comes next."""
        found = None if self.open_stream is None else self.open_stream()
        if found is not None and inspect.getgeneratorstate(found) != inspect.GEN_RUNNING:  # it may be what asks
            found.close()
            self.open_stream = None

    def take_unread(self) -> list[Utterance]:
        """Return what has to be read before the session goes on, and take it as read."""
        contexts = self.contexts
        found = [*contexts.unread]
        if contexts.drawn is not None:
            found += self.reader.drawn(*contexts.drawn, self.generator)
        contexts.unread, contexts.drawn = (), None
        return found

    def size_of(self, options: VelocityOptions) -> Size:
        """Return the (height, width) to draw: as asked, else the last image's, else a square as large as was trained.

        Raises:
            MissingHalfError: the model was loaded without its generating half.
            ValueError: a side that no image can have.
        """
        self.reader.drawing_vae()
        side = self.processor.default_side
        height, width = self.contexts.size or (side, side)
        height = height if options.height is None else options.height
        width = width if options.width is None else options.width
        self.processor.check_size(height, width)
        return height, width

    # For research ---------------------------------------------------------------------------------------------------

    @takes("velocity", VelocityOptions, Velocity)
    def velocity(self, **options: Any) -> Velocity:
        """Return the velocity of an image, a function of x (n, P) float32 and the time; nothing is drawn yet.

        Args:
            options: by name, below; their defaults are found as for `draw`.
        """
        chosen = make_options("velocity", self._guided(options))
        with working([self], "preparing to draw"):
            catch_up([self])
            size = self.size_of(chosen)
            return Velocity(self, velocity_of([self], [chosen], [size]), size)

    def encode(self, image: Image.Image) -> tuple[Tensor, Size]:
        """Return the latent tokens (n, P) float32 of an image, and the (height, width) that it was resized to."""
        with working([self], "encoding"):
            pixels = self.processor.pixels(image, exif=self.options.exif)
            tokens = self.processor.latents(self.reader.encoded(pixels, self.generator)).latents.float()
        return tokens.clone(), (pixels.shape[1], pixels.shape[2])

    def decode(self, x: Tensor, height: int, width: int) -> Image.Image:
        """Return the image of latent tokens x (n, P); height and width in pixels.

        Raises:
            ValueError: a side that no image can have, or another number of tokens.
        """
        height, width = operator.index(height), operator.index(width)
        self.processor.check_size(height, width)
        with working([self], "decoding"):
            return decoded(self.reader.drawing_vae(), self.processor.image(x, height, width).to(self.model.device))


def _is_watched() -> bool:
    """Whether somebody can see a progress bar: on a terminal or in a notebook."""
    try:
        return "ipykernel" in sys.modules or sys.stderr.isatty()
    except (AttributeError, ValueError):  # a service has no stderr, or a closed one
        return False
