"""From texts and images to what a conversation's contexts read; several sessions read in the same passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from bagel.config import MissingHalfError
from bagel.generation.contexts import Utterance, append_all, working
from bagel.image import PreparedImage, in_unit
from bagel.modeling import Bagel
from bagel.options import SessionOptions, check_noise
from bagel.parameters import described
from bagel.processor import Processor
from bagel.signatures import Input
from bagel.vae import Autoencoder

if TYPE_CHECKING:
    from bagel.generation.session import Session


@dataclass(frozen=True)
class Reader:
    """Turns texts and images into utterances.

    Args:
        model: who will read them.
        vae: its autoencoder, or None.
        processor: its rules.
        options: how texts and images are read.
    """

    model: Bagel
    vae: Autoencoder | None
    processor: Processor
    options: SessionOptions

    def drawing_vae(self) -> Autoencoder:
        """Return the autoencoder.

        Raises:
            MissingHalfError: there is none, or images are read only to answer.
        """
        if self.vae is None:
            raise MissingHalfError(
                "this model was loaded without its generating half: it cannot draw or edit; "
                "load a checkpoint that has it, with ae.safetensors, and without visual_gen=False"
            )
        if not self.options.draws:
            raise MissingHalfError("this session reads images only to answer: begin one with draws=True to draw")
        return self.vae

    def utterances(
        self, pieces: Sequence[Input], generator: torch.Generator, posterior_noise: Sequence[Tensor] | None
    ) -> list[Utterance]:
        """Return what pieces are read as; the posterior noise of images is drawn in order, unless it is given."""
        if posterior_noise is not None:
            self.check_noise(posterior_noise, images=sum(not isinstance(piece, str) for piece in pieces))
        found: list[Utterance] = []
        given = iter(enumerate(posterior_noise or ()))
        for piece in pieces:
            if isinstance(piece, str):
                text = self.processor.text(piece, allow_special=self.options.allow_special)
                found.append(Utterance(text, "text"))
            else:
                prepared = self.processor.prepare(piece, exif=self.options.exif, once=self.options.resize_once)
                found += self.image(prepared, generator, next(given, None))
        return found

    def check_noise(self, given: Any, *, images: int) -> None:
        """Check the posterior noise of so many images.

        Raises:
            TypeError: no list of floating-point tensors.
            ValueError: another number of them, values that are not finite, or the mean is wanted.
        """
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(z, Tensor) for z in given):
            raise TypeError(f"posterior_noise must be a list of tensors, got {described(given)}")
        for i, noise in enumerate(given):
            check_noise(f"posterior_noise[{i}]", noise)
        if len(given) != images:
            raise ValueError(f"posterior_noise needs one tensor for each of {images} input images, got {len(given)}")
        if self.options.posterior == "mean":
            raise ValueError('posterior_noise has no effect with posterior="mean": give one of them')

    def image(
        self, prepared: PreparedImage, generator: torch.Generator, noise: tuple[int, Tensor] | None = None
    ) -> list[Utterance]:
        """Return what an image is read as: its clean latents if something is to be drawn, and what the ViT sees."""
        seen = Utterance(self.processor.see(prepared), "image")
        if self.vae is None or not self.options.draws:
            return [seen]
        latents = self.encoded(self.processor.pixels(prepared), generator, noise)
        width, height = prepared.size
        return [Utterance(self.processor.latents(latents), "image", (height, width)), seen]

    def drawn(self, latents: Tensor, image: Image.Image, generator: torch.Generator) -> list[Utterance]:
        """Return what an image that was drawn is read as: its own latents (Z, h, w), and what the ViT sees of it."""
        config = self.model.config
        segment = self.processor.latents(latents.to(self.model.device))
        own = Utterance(segment, "image", (image.height, image.width))
        if not config.visual_und:  # a model that cannot see draws on from the latents alone
            return [own]
        prepared = self.processor.prepare(image, once=self.options.resize_once)
        if self.options.reread == "pixels":
            return self.image(prepared, generator)
        return [own, Utterance(self.processor.see(prepared), "image")]

    def encoded(self, pixels: Tensor, generator: torch.Generator, given: tuple[int, Tensor] | None = None) -> Tensor:
        """Return the latents (Z, h, w) of pixels (3, H, W), sampled from the posterior unless its mean is wanted."""
        vae = self.drawing_vae()
        down, noise = vae.config.downsample, None
        shape = (1, vae.config.z_channels, pixels.shape[1] // down, pixels.shape[2] // down)
        if given is not None:
            index, noise = given
            if tuple(noise.shape) not in (shape, shape[1:]):
                raise ValueError(f"posterior_noise[{index}] must be {shape[1:]}, got {tuple(noise.shape)}")
            noise = noise.reshape(shape)
        elif self.options.posterior == "sample":
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return vae.encode(in_unit(pixels[None].to(self.model.device)), noise)[0]


def read_all(
    sessions: Sequence[Session],
    pieces: Sequence[Sequence[Input]],
    *,
    posterior_noise: Sequence[Sequence[Tensor] | None] | None = None,
) -> None:
    """Let each session read its pieces; arguments and errors as for `Session.read`, one for each."""
    for own in pieces:
        check_inputs(own)
    with working(sessions):
        catch_up(sessions)
        new = []
        for session, own, noise in zip(sessions, pieces, posterior_noise or [None] * len(sessions), strict=True):
            session.contexts.begin_turn()
            new.append(session.reader.utterances(own, session.generator, noise))
        append_all([session.contexts for session in sessions], new)


def catch_up(sessions: Sequence[Session]) -> None:
    """Let each session read what it has still to read: its system prompt, what it wrote or drew last."""
    for session in sessions:
        if session.open_stream is not None:
            session.end_stream()
    late = [session for session in sessions if session.contexts.unread or session.contexts.drawn]
    if late:
        append_all([session.contexts for session in late], [session.take_unread() for session in late])


def check_inputs(inputs: Any) -> None:
    """Check that inputs are a list of texts and PIL images.

    Raises:
        TypeError: they are no list, or one of them is something else.
        ValueError: the list is empty.
    """
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
        raise TypeError(
            f"the inputs must be a list of texts and PIL images, got {described(inputs)}; put one alone in a list too"
        )
    if not inputs:
        raise ValueError("there is nothing to read: give at least one text or image")
    for piece in inputs:
        if not isinstance(piece, str | Image.Image):
            raise TypeError(f"an input must be a text or a PIL image, got {described(piece)}{opened(piece)}")


def task_of(batch: Any, output: Any) -> str:
    """Return the task of requests of any inputs: what they share their options with.

    Raises:
        TypeError: the batch is no list of lists of texts and PIL images.
        ValueError: an unknown output, an empty list of inputs, or a batch that would need options of two tasks.
    """
    if isinstance(batch, str | bytes) or not isinstance(batch, Sequence):
        raise TypeError(f"the batch must be a list of lists of inputs, got {described(batch)}")
    if output not in ("text", "image"):
        raise ValueError(f'output must be "text" or "image", got {output!r}')
    for inputs in batch:
        check_inputs(inputs)
    shown = [any(isinstance(piece, Image.Image) for piece in inputs) for inputs in batch]
    if output == "image" and any(shown) and not all(shown):
        raise ValueError(
            "a batch shares its guidance, whose defaults differ between drawing and editing: "
            "draw requests with and without images in separate calls"
        )
    return "understand" if output == "text" else "edit" if any(shown) else "text_to_image"


def check_texts(name: str, texts: Any) -> bool:
    """Check that an argument is a text or a list of texts and return whether it is a single one.

    Raises:
        TypeError: it is something else; says so under the argument's name.
    """
    if isinstance(texts, str):
        return True
    if not is_list(texts) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, got {described(texts)}")
    return False


def with_images(images: Any, texts: str | Sequence[str], *, needed: bool) -> list[list[Input]]:
    """Return the inputs of each request: its images, then its text.

    Args:
        images: for a single text an image or a list of them, for a list of texts a list of those.
        texts: one, or a list of them; see `check_texts`.
        needed: whether a request without images makes no sense.

    Raises:
        TypeError: something else than PIL images among the images.
        ValueError: not as many entries as texts, or no image where one is needed.
    """
    if isinstance(texts, str):
        return [[*_images(images, needed=needed), texts]]
    if not isinstance(images, Image.Image) and not is_list(images):
        raise _no_image(images)
    count = 1 if isinstance(images, Image.Image) else len(images)
    if isinstance(images, Image.Image) or count != len(texts):
        raise ValueError(f"a batch of {len(texts)} texts needs {len(texts)} images or lists of images, got {count}")
    return [[*_images(own, needed=needed), text] for own, text in zip(images, texts, strict=True)]


def is_list(value: Any) -> bool:
    """Whether a value is a sequence and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def opened(value: Any) -> str:
    """Return the advice to open a file, where one is named instead of shown."""
    return "; open it with bagel.open_image" if isinstance(value, str | PathLike) else ""


def _images(images: Any, *, needed: bool) -> list[Image.Image]:
    found = [images] if isinstance(images, Image.Image) or not is_list(images) else list(images)
    for image in found:
        if not isinstance(image, Image.Image):
            raise _no_image(image)
    if needed and not found:
        raise ValueError("there is no image to edit: give at least one, or draw with text_to_image")
    return found


def _no_image(value: Any) -> TypeError:
    return TypeError(f"an image must be a PIL image, got {described(value)}{opened(value)}")
