"""The pipeline: what a user calls to read, ask, draw and edit. Every task is a few lines over sessions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bagel.checkpoint.load import Convert
from bagel.generation.contexts import working
from bagel.generation.drawing import draw_all
from bagel.generation.reading import check_inputs, check_texts, read_all, task_of, with_images
from bagel.generation.session import Session
from bagel.generation.writing import stream, write_all
from bagel.modeling import Attention, Bagel
from bagel.modeling.attention import attention_of, check_backend
from bagel.options import (
    THINK_GENERATE,
    THINK_UNDERSTAND,
    ImageOptions,
    SessionOptions,
    TextOptions,
    make_options,
    one_by_one,
)
from bagel.processor import Processor
from bagel.results import ImageResult, TextResult
from bagel.sampling import branch_names
from bagel.signatures import (
    Ask,
    AskMany,
    Draw,
    DrawMany,
    Edit,
    EditMany,
    GenerateImage,
    GenerateImages,
    GenerateText,
    GenerateTexts,
    Input,
    Stream,
    takes,
)
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder


class BagelPipeline:
    """BAGEL with its autoencoder and tokenizer, ready to use.

    Args:
        model: the MoT decoder with what it has of vision and generation.
        vae: the autoencoder; None for a model that only understands.
        tokenizer: text to ids.
        attention: a name or an object, see `bagel.modeling.attention`; it becomes `model.attention`; None: as it is.
    """

    def __init__(
        self, model: Bagel, vae: Autoencoder | None, tokenizer: Tokenizer, *, attention: str | Attention | None = None
    ) -> None:
        if attention is not None:
            model.attention = attention_of(attention, device=model.device, dtype=model.dtype)
        if vae is not None and model.device.type == "cuda" and model.decoder.supply is None:  # as its convolutions like
            vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model, self.vae = model, vae
        self.processor = Processor(model.config, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | Attention = "auto",
        vae_dtype: torch.dtype | str | None = None,
        base: str | Path | None = None,
        weights: str | None = None,
        visual_gen: bool | None = None,
        visual_und: bool | None = None,
        memory: str | int | None = None,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = False,
        progress: bool = True,
        expand: bool = False,
        quantize: str | None = None,
        quantize_parts: str | Sequence[str] = ("gen", "und"),
        convert: Convert | None = None,
    ) -> BagelPipeline:
        """Load a checkpoint in the official layout, or one whose weights are compressed (they stay so).

        Args:
            source: a folder, or an id on the Hugging Face Hub such as "ByteDance-Seed/BAGEL-7B-MoT".
            device: where to; a CUDA GPU if there is one, else the CPU.
            dtype: of the model; bfloat16 on a GPU (float16 where it has none), float32 on a CPU.
            attention: "auto" (the fastest here), "sdpa", "fa3", "flash", "reference", or an object; see
                `bagel.modeling.attention`.
            vae_dtype: of the autoencoder; bfloat16 beside a bfloat16 model on a GPU, else float32.
            base: another folder or id for what the source lacks: configurations, tokenizer, autoencoder.
            weights: the weights' file, where a folder holds several.
            visual_gen: False leaves out the generating half, though it is there.
            visual_und: False leaves out the vision half.
            memory: what may be taken on the device, such as "8GiB" or a number of bytes; what is free by default. What
                does not fit arrives from the host's memory, or from the files, shortly before it is needed: results
                are the same bits, and `placement` says what it costs.
            revision, token: for the Hub.
            verify: first read every file that the source's SHA256SUMS lists and compare its checksum.
            progress: show download bars.
            expand: decode compressed weights into `dtype`, for speed where there is the memory.
            quantize: store weights in fewer bits while they are loaded, an approximation: "float8", "int8", "nf4",
                "nf4-double" or "fp4"; see `bagel.modeling.stored.quantize`.
            quantize_parts: of what: "gen" and "und" experts, "lm_head", "vit", or "all".
            convert: called as `convert(name, linear)` for every dense linear layer when it was filled; what it returns
                takes the layer's place.

        Raises:
            CheckpointError: what is wrong with the files, and the way out; with `verify` also checksums that are
                missing or differ.
            TokenizerError: what is wrong with the tokenizer's files.
            NotEnoughMemoryError: the weights do not fit.
            ValueError: a device that is not there, an unknown dtype, attention or format.
            ImportError: an attention whose package is not installed.
            TypeError: a source that is neither a path nor an id.
        """
        from bagel.loading import load_parts

        if isinstance(attention, str):
            check_backend(attention)
        model, vae, tokenizer = load_parts(
            source,
            device=device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            base=base,
            weights=weights,
            visual_gen=visual_gen,
            visual_und=visual_und,
            memory=memory,
            revision=revision,
            token=token,
            verify=verify,
            progress=progress,
            expand=expand,
            quantize=quantize,
            quantize_parts=quantize_parts,
            convert=convert,
        )
        return cls(model, vae, tokenizer, attention=attention)

    @property
    def placement(self) -> str:
        """A sentence about where the weights are, and what it costs if they do not all stay on the device."""
        from bagel.memory.plan import describe

        return describe(self.model, self.vae)

    def __repr__(self) -> str:
        from bagel.memory.plan import size_of

        model, vae = self.model, self.vae
        held = {"vision": model.config.visual_und, "generation": model.config.visual_gen, "autoencoder": vae}
        return (
            f"BagelPipeline({', '.join(['decoder', *(name for name, part in held.items() if part)])}; "
            f"{size_of(model, vae)}, on {self.device}; attention {model.attention!r})"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's type."""
        return self.model.dtype

    # The model ------------------------------------------------------------------------------------------------------

    def compile(self, *, backend: str = "inductor") -> BagelPipeline:
        """Compile the experts in place, and return this pipeline.

        Results stay the same up to rounding; prompts and images of any size then run without compiling again. What is
        compiled for a GPU calls the kernels that are used without it, and is no faster: see the README.

        Args:
            backend: of `torch.compile`.

        Raises:
            RuntimeError: this machine lacks what compiling needs: a C++ compiler, or Triton for a GPU.
        """
        from bagel.modeling.compiling import compile_model

        compile_model(self.model, self._use_once, backend=backend)
        return self

    def _use_once(self) -> None:
        """Read a text, decode, and draw a small image; no square, lest a compiler take it that all are."""
        self.understand([], "a", max_new_tokens=2, progress=False)
        if self.vae is not None:
            step = self.model.config.latent_downsample
            self.text_to_image("a", height=3 * step, width=4 * step, num_timesteps=2, progress=False)

    def use_float8(self, *, und: bool = False) -> BagelPipeline:
        """Quantise the gen experts to 8-bit floats in place, and return this pipeline: an approximation.

        For GPUs that multiply such floats faster (compute capability 8.9 on); what is quantised takes half the memory.
        A CPU computes the same, slowly. The und experts unless asked for, the first and the last layer, and all around
        them stay as they are. The result cannot be exported. Quantise before `compile`.

        Args:
            und: quantise the und experts too: faster answers, and changed ones.

        Raises:
            ValueError: done already, a GPU without 8-bit floats, a model with nothing to quantise or of sizes that do
                not fit.
            MissingHalfError: loaded without the generating half, and `und` not given.
        """
        from bagel.modeling.float8 import quantize_experts

        if self.model.decoder.supply is not None:
            raise ValueError("a model within a limit of memory cannot be quantised any more; load it quantised")
        quantize_experts(self.model, und=und)
        return self

    def save_pretrained(
        self, folder: str | Path, *, max_shard_bytes: int | None = None, overwrite: bool = False
    ) -> None:
        """Export to the official layout; see `bagel.checkpoint.save_checkpoint`.

        Raises:
            ValueError: the model is quantised.
            CheckpointError: files in the way, a full disk.
        """
        from bagel.checkpoint import save_checkpoint
        from bagel.memory.placement import take_home
        from bagel.modeling.linear import is_exact

        if not is_exact(self.model):
            raise ValueError(
                "this model is quantised and cannot be exported: `bagel convert` writes compressed checkpoints from "
                "the one that was loaded"
            )
        take_home(self.model)
        model, vae = self.model, self.vae
        save_checkpoint(
            folder, model, vae, model.config, self.tokenizer, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )

    # Conversations --------------------------------------------------------------------------------------------------

    @takes("session", SessionOptions, Session)
    def session(self, **options):
        """Begin a conversation that reads, writes and draws, and goes on from all of it.

        Args:
            options: by name, below.

        Returns:
            Session; as a context manager it frees its memory at the end.

        Raises:
            TypeError: an option that does not exist, an argument of another type.
            ValueError: a value out of its range.
        """
        return Session(self.model, self.vae, self.processor, make_options("session", options))

    # Tasks ----------------------------------------------------------------------------------------------------------

    @takes("text_to_image", Draw, ImageResult, DrawMany, list[ImageResult])
    def text_to_image(self, prompt, *, preset=None, **options):
        """Draw an image from a text, or a batch of images from a list of texts.

        Args:
            prompt: what to draw, or a list of such texts; "" draws anything.
            preset: a set of options, "notebook", "app" or "draft", under those that are given; see
                `bagel.options.PRESETS`.
            options: by name, below. A batch takes seed, generator and noise as lists, one for each prompt; height,
                width and negative_prompt as lists or once for all; the others once.

        Returns:
            ImageResult, for a list of prompts a list of them.

        Raises:
            TypeError: an option that does not exist or has no effect here, an argument of another type.
            ValueError: a value out of its range, a size that does not fit, an empty list.
            MissingHalfError: the model was loaded without its generating half.
            NotEnoughMemoryError: what was asked does not fit.
            FloatingPointError: the image came out as NaN.
        """
        single = check_texts("prompt", prompt)
        batch = [[prompt]] if single else [[text] for text in prompt]
        return self._run(batch, "text_to_image", preset, options, single=single)

    @takes("edit", Edit, ImageResult, EditMany, list[ImageResult])
    def edit(self, images, instruction, *, preset=None, **options):
        """Change an image as a text says; several images are all shown before the text.

        Args:
            images: a PIL image, or a list of them; for a batch a list of as many entries as there are instructions,
                each an image or a list of them.
            instruction: what to change, or a list of such texts.
            preset: a set of options, "notebook", "app", "gedit" or "draft", under those that are given.
            options: by name, below. A batch takes them as `text_to_image` does; posterior_noise as a list of lists.

        Returns:
            ImageResult, of the size of its last image unless another is given; for a list of instructions a list.

        Raises:
            TypeError: images that are not PIL images; otherwise as `text_to_image`.
            ValueError: no image, or not as many entries as instructions; otherwise as `text_to_image`.
            MissingHalfError: the model was loaded without its vision half or its generating half.
            NotEnoughMemoryError, FloatingPointError: as `text_to_image`.
        """
        single = check_texts("instruction", instruction)
        batch = with_images(images, instruction, needed=True)
        return self._run(batch, "edit", preset, options, single=single)

    @takes("understand", Ask, TextResult, AskMany, list[TextResult])
    def understand(self, images, question, *, preset=None, **options):
        """Answer a question about images.

        Args:
            images: a PIL image, or a list of them, which may be empty; for a batch a list of as many entries as there
                are questions, each an image or a list of them.
            question: what to ask, or a list of such texts.
            preset: a set of options, "notebook", "app" or "draft", under those that are given.
            options: by name, below. A batch takes seed and generator as lists, the others once.

        Returns:
            TextResult, for a list of questions a list of them.

        Raises:
            TypeError: images that are not PIL images; an option that does not exist or has no effect on a text.
            ValueError: a value out of its range, or not as many entries as questions.
            MissingHalfError: an image, but the model was loaded without its vision half.
            NotEnoughMemoryError: what was asked does not fit.
        """
        single = check_texts("question", question)
        batch = with_images(images, question, needed=False)
        return self._run(batch, "understand", preset, options, single=single)

    @takes("text_to_image edit understand", GenerateImage, ImageResult, GenerateText, TextResult)
    def generate(self, inputs, *, output="image", preset=None, **options):
        """Read any interleaving of texts and images, then answer in text or draw.

        Args:
            inputs: texts and PIL images, in order.
            output: "text" or "image".
            preset: a set of options under those that are given; see `bagel.options.PRESETS`.
            options: by name, below; those for the other output are refused, and those about images where there is none
                among the inputs. The defaults are those of drawing from texts: with an image among the inputs guidance
                has the defaults of `edit`.

        Returns:
            TextResult or ImageResult.

        Raises:
            TypeError: inputs that are no list, or not texts and PIL images; otherwise as `text_to_image`.
            ValueError: nothing to read; otherwise as `text_to_image`.
            MissingHalfError: the model was loaded without a half that this needs.
            NotEnoughMemoryError, FloatingPointError: as `text_to_image`.
        """
        return self._generate([inputs], output, preset, options, single=True)

    @takes("text_to_image edit understand", GenerateImages, list[ImageResult], GenerateTexts, list[TextResult])
    def generate_batch(self, batch, *, output="image", preset=None, **options):
        """Generate from several inputs at once, one seed each; the results are those of one call at a time.

        Arguments and errors as for `generate`; per-request options are lists, as for `text_to_image`. Drawings with
        and without images among their inputs do not share a batch.
        """
        return self._generate(batch, output, preset, options)

    def _generate(
        self,
        batch: Sequence[Sequence[Input]],
        output: str,
        preset: str | None,
        options: dict[str, Any],
        *,
        single: bool = False,
    ) -> Any:
        return self._run(batch, task_of(batch, output), preset, options, single=single)

    @takes("understand", Stream, Iterator[str])
    def stream(self, inputs, *, preset=None, **options):
        """Yield the text that `generate(..., output="text")` would return, as it is decoded, in whole characters.

        Args:
            inputs: texts and PIL images, in order.
            preset: a set of options, "notebook", "app" or "draft", under those that are given.
            options: by name, below.

        Returns:
            An iterator over pieces of text. Arguments are checked at once, the work is done as pieces are asked for.

        Raises:
            TypeError, ValueError, MissingHalfError, NotEnoughMemoryError: as `generate`.
        """
        check_inputs(inputs)
        return self._stream(inputs, make_options("understand", options, preset))

    def _stream(self, inputs: Sequence[Input], chosen: TextOptions) -> Iterator[str]:
        yield from stream(self._session(chosen).read(*inputs), chosen)

    def _run(
        self,
        batch: Sequence[Sequence[Input]],
        task: str,
        preset: str | None,
        given: dict[str, Any],
        *,
        single: bool = False,
    ) -> Any:
        """Read, then answer or draw: one session per request, all in the same passes."""
        if not batch:
            raise ValueError("there is nothing to do: the batch is empty")
        each = [given] if single else one_by_one(given, len(batch))
        options = [make_options(task, values, preset) for values in each]
        sessions = [self._session(own) for own in options]
        with working(sessions):  # all of it or nothing
            if task == "understand":
                read_all(sessions, batch)
                results: list[Any] = [*write_all(sessions, options[0])]
            else:
                for session, own in zip(sessions, options, strict=True):
                    session.size_of(own)  # refused here, before any work, if nothing can be drawn in it
                read_all(sessions, batch, posterior_noise=[getattr(own, "posterior_noise", None) for own in options])
                results = [*draw_all(sessions, options)]
        return results[0] if single else results

    def _session(self, options: ImageOptions | TextOptions) -> Session:
        """Return the session of one request; to think is to be told so first."""
        draws = isinstance(options, ImageOptions)
        system = options.system_prompt
        if system is None and options.think:
            system = THINK_GENERATE if draws else THINK_UNDERSTAND
        own = options.part(SessionOptions, system_prompt=system, draws=draws)
        drops_images = isinstance(options, ImageOptions) and "image_dropped" in branch_names(options.guide)
        return Session(self.model, self.vae, self.processor, own, drops_images=drops_images)
