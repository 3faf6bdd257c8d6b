"""The pipeline: what a user calls to read, ask, draw and edit. Every task is a short cut to `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from bagel.answering import current_gpu, stream_text, write_texts
from bagel.attention import check_backend, choose_backend
from bagel.contexts import Entry, prefill_all
from bagel.drawing import draw
from bagel.inputs import Input, Job, Parts, begin, check_inputs, check_texts, prepare, with_pictures
from bagel.memory import explain_out_of_memory
from bagel.modeling import Bagel
from bagel.options import Options, Output, make_options, one_by_one, with_options
from bagel.results import ImageResult, TextResult
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

Pictures = Image.Image | Sequence[Image.Image]
LESS = "use fewer at a time, smaller pictures, fewer pictures among the inputs, a shorter text, or dtype=torch.bfloat16"


class BagelPipeline:
    """BAGEL with its autoencoder and tokenizer, ready to use.

    Args:
        model: the MoT decoder with what it has of vision and generation.
        vae: the autoencoder; None for a model that only understands.
        tokenizer: text to ids.
        attention: backend, see `bagel.attention`.
    """

    def __init__(self, model: Bagel, vae: Autoencoder | None, tokenizer: Tokenizer, *, attention: str = "auto") -> None:
        backend = choose_backend(attention, device=model.device, dtype=model.dtype)
        if vae is not None and model.device.type == "cuda":  # laid out as the GPU's convolutions like it
            vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.parts = Parts(model, vae, tokenizer, backend)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str = "auto",
        vae_dtype: torch.dtype | str | None = None,
        base: str | Path | None = None,
        weights: str | None = None,
        visual_gen: bool | None = None,
        visual_und: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = False,
        progress: bool = True,
    ) -> BagelPipeline:
        """Load a checkpoint in the official layout.

        Args:
            source: a folder, or an id on the Hugging Face Hub such as "ByteDance-Seed/BAGEL-7B-MoT".
            device: where to; a CUDA GPU if there is one, else the CPU.
            dtype: of the model; bfloat16 on a GPU (float16 where it has none), float32 on a CPU.
            attention: "auto" (the fastest here), "sdpa", "fa3", "flash" or "reference"; see `bagel.attention`.
            vae_dtype: of the autoencoder; bfloat16 beside a bfloat16 model on a GPU, else float32.
            base: another folder or id for what the source lacks: configurations, tokenizer, autoencoder.
            weights: the weights' file, where a folder holds several.
            visual_gen: False leaves out the generating half, though it is there.
            visual_und: False leaves out the vision half.
            revision, token: for the Hub.
            verify: first read every file that the source's SHA256SUMS lists and compare its checksum.
            progress: show download bars.

        Raises:
            CheckpointError: what is wrong with the files, and the way out; with `verify` also checksums that are
                missing or differ.
            TokenizerError: what is wrong with the tokenizer's files.
            NotEnoughMemoryError: the weights do not fit.
            ValueError: a device that is not there, an unknown dtype or attention backend.
            ImportError: an attention backend whose package is not installed.
            TypeError: a source that is neither a path nor an id.
        """
        from bagel.loading import load_parts

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
            revision=revision,
            token=token,
            verify=verify,
            progress=progress,
        )
        return cls(model, vae, tokenizer, attention=attention)

    def __repr__(self) -> str:
        model, vae = self.parts.model, self.parts.vae
        held = {"vision": model.config.visual_und, "generation": model.config.visual_gen, "autoencoder": vae}
        count = sum(p.numel() for module in filter(None, (model, vae)) for p in module.parameters())
        return (
            f"BagelPipeline({', '.join(['decoder', *(name for name, part in held.items() if part)])}; "
            f"{count:,} parameters; {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"attention {self.parts.attention!r})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parts.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's type."""
        return self.parts.model.dtype

    def compile(self, *, backend: str = "inductor") -> BagelPipeline:
        """Compile the experts in place, and return this pipeline.

        Results stay the same up to rounding; prompts and pictures of any size then run without compiling again. What is
        compiled for a GPU calls the kernels that are used without it, and is no faster: see the README.

        Args:
            backend: of `torch.compile`.

        Raises:
            RuntimeError: this machine lacks what compiling needs: a C++ compiler, or Triton for a GPU.
        """
        from bagel.compiling import compile_parts

        compile_parts(self.parts, self._use_once, backend=backend)
        return self

    def _use_once(self) -> None:
        """Read a text, decode, and draw a small picture; no square, lest a compiler take it that all are."""
        self.understand([], "a", max_new_tokens=2)
        if self.parts.vae is not None:
            step = self.parts.model.config.latent_downsample
            self.text_to_image("a", height=3 * step, width=4 * step, num_timesteps=2, progress=False)

    def use_float8(self, *, und: bool = False) -> BagelPipeline:
        """Round the gen experts to 8-bit floats in place, and return this pipeline: an approximation.

        For GPUs that multiply such floats faster (compute capability 8.9 on); what is rounded takes half the memory. A
        CPU computes the same, slowly. The und experts unless asked for, the first and the last layer, and all around
        them stay as they are. The result cannot be exported. Round before `compile`.

        Args:
            und: round the und experts too: faster answers, and changed ones.

        Raises:
            ValueError: done already, a GPU without 8-bit floats, a model with nothing to round or of sizes that do not
                fit.
            MissingHalfError: loaded without the generating half, and `und` not given.
        """
        from bagel.modeling.float8 import round_experts

        round_experts(self.parts.model, und=und)
        return self

    def save_pretrained(
        self, folder: str | Path, *, max_shard_bytes: int | None = None, overwrite: bool = False
    ) -> None:
        """Export to the official layout; see `bagel.checkpoint.save_checkpoint`.

        Raises:
            ValueError: after `use_float8`.
            CheckpointError: files in the way, a full disk.
        """
        from bagel.checkpoint import save_checkpoint
        from bagel.modeling.float8 import is_rounded

        if is_rounded(self.parts.model):
            raise ValueError(
                "this model is rounded to 8-bit floats and cannot be exported: load it again and export it before"
            )
        model, vae, tokenizer = self.parts.model, self.parts.vae, self.parts.tokenizer
        save_checkpoint(
            folder, model, vae, model.config, tokenizer, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )

    @overload
    def text_to_image(self, prompt: str, *, preset: str | None = None, **options: Any) -> ImageResult: ...
    @overload
    def text_to_image(
        self, prompt: Sequence[str], *, preset: str | None = None, **options: Any
    ) -> list[ImageResult]: ...
    @with_options("text_to_image", "image")
    def text_to_image(self, prompt, *, preset=None, **options):
        """Draw a picture from a text, or a batch of pictures from a list of texts.

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
            FloatingPointError: the picture came out as NaN.
        """
        single = check_texts("prompt", prompt)
        results = self._run(
            [[prompt]] if single else [[text] for text in prompt],
            "text_to_image",
            "image",
            preset,
            options,
            single=single,
        )
        return results[0] if single else results

    @overload
    def edit(self, images: Pictures, instruction: str, *, preset: str | None = None, **options: Any) -> ImageResult: ...
    @overload
    def edit(
        self, images: Sequence[Pictures], instruction: Sequence[str], *, preset: str | None = None, **options: Any
    ) -> list[ImageResult]: ...
    @with_options("edit", "image")
    def edit(self, images, instruction, *, preset=None, **options):
        """Change a picture as a text says; several pictures are all shown before the text.

        Args:
            images: a PIL picture, or a list of them; for a batch a list of as many entries as there are
                instructions, each a picture or a list of them.
            instruction: what to change, or a list of such texts.
            preset: a set of options, "notebook", "app", "gedit" or "draft", under those that are given.
            options: by name, below. A batch takes them as `text_to_image` does; posterior_noise as a list of lists.

        Returns:
            ImageResult, of the size of its last picture unless another is given; for a list of instructions a list.

        Raises:
            TypeError: images that are not PIL pictures; otherwise as `text_to_image`.
            ValueError: no picture, or not as many entries as instructions; otherwise as `text_to_image`.
            MissingHalfError: the model was loaded without its vision half or its generating half.
            NotEnoughMemoryError, FloatingPointError: as `text_to_image`.
        """
        single = check_texts("instruction", instruction)
        batch = with_pictures(images, instruction, needed=True)
        results = self._run(batch, "edit", "image", preset, options, single=single)
        return results[0] if single else results

    @overload
    def understand(
        self, images: Pictures, question: str, *, preset: str | None = None, **options: Any
    ) -> TextResult: ...
    @overload
    def understand(
        self, images: Sequence[Pictures], question: Sequence[str], *, preset: str | None = None, **options: Any
    ) -> list[TextResult]: ...
    @with_options("understand", "text")
    def understand(self, images, question, *, preset=None, **options):
        """Answer a question about pictures.

        Args:
            images: a PIL picture, or a list of them, which may be empty; for a batch a list of as many entries as
                there are questions, each a picture or a list of them.
            question: what to ask, or a list of such texts.
            preset: a set of options, "notebook", "app" or "draft", under those that are given.
            options: by name, below. A batch takes seed and generator as lists, the others once.

        Returns:
            TextResult, for a list of questions a list of them.

        Raises:
            TypeError: images that are not PIL pictures; an option that does not exist or has no effect on a text.
            ValueError: a value out of its range, or not as many entries as questions.
            MissingHalfError: a picture, but the model was loaded without its vision half.
            NotEnoughMemoryError: what was asked does not fit.
        """
        single = check_texts("question", question)
        batch = with_pictures(images, question, needed=False)
        results = self._run(batch, "understand", "text", preset, options, single=single)
        return results[0] if single else results

    @with_options("generate", None)
    def generate(
        self, inputs: Sequence[Input], *, output: Output = "image", preset: str | None = None, **options: Any
    ) -> Any:
        """Read any interleaving of texts and pictures, then answer in text or draw.

        Args:
            inputs: texts and PIL pictures, in order.
            output: "text" or "image".
            preset: a set of options under those that are given; see `bagel.options.PRESETS`.
            options: by name, below; those for the other output are refused. The defaults are those of drawing from
                texts: with a picture among the inputs guidance has the defaults of `edit`.

        Returns:
            TextResult or ImageResult.

        Raises:
            TypeError: inputs that are no list, or not texts and PIL pictures; otherwise as `text_to_image`.
            ValueError: nothing to read; otherwise as `text_to_image`.
            MissingHalfError: the model was loaded without a half that this needs.
            NotEnoughMemoryError, FloatingPointError: as `text_to_image`.
        """
        return self._generate([inputs], output, preset, options, single=True)[0]

    @with_options("generate", None)
    def generate_batch(
        self, batch: Sequence[Sequence[Input]], *, output: Output = "image", preset: str | None = None, **options: Any
    ) -> list[Any]:
        """Generate from several inputs at once, one seed each; the results are those of one call at a time.

        Arguments and errors as for `generate`; per-request options are lists, as for `text_to_image`. Drawings with
        and without pictures among their inputs do not share a batch.
        """
        return self._generate(batch, output, preset, options)

    def _generate(
        self,
        batch: Sequence[Sequence[Input]],
        output: Output,
        preset: str | None,
        options: dict[str, Any],
        *,
        single: bool = False,
    ) -> list[Any]:
        if output not in ("text", "image"):
            raise ValueError(f'output must be "text" or "image", got {output!r}')
        for inputs in batch:
            check_inputs(inputs)
        shown = [any(isinstance(piece, Image.Image) for piece in inputs) for inputs in batch]
        pictures = any(shown)
        if output == "image" and pictures and not all(shown):
            raise ValueError(
                "a batch shares its guidance, whose defaults differ between drawing and editing: "
                "draw requests with and without pictures in separate calls"
            )
        task = "understand" if output == "text" else "edit" if pictures else "text_to_image"
        return self._run(batch, task, output, preset, options, single=single)

    @with_options("understand", "text")
    def stream(self, inputs: Sequence[Input], *, preset: str | None = None, **options: Any) -> Iterator[str]:
        """Yield the text that `generate(..., output="text")` would return, as it is decoded, in whole characters.

        Args:
            inputs: texts and PIL pictures, in order.
            preset: a set of options, "notebook", "app" or "draft", under those that are given.
            options: by name, below.

        Returns:
            An iterator over pieces of text. Arguments are checked at once, the work is done as pieces are asked for.

        Raises:
            TypeError, ValueError, MissingHalfError, NotEnoughMemoryError: as `generate`.
        """
        check_inputs(inputs)
        chosen = make_options("understand", "text", options, preset=preset)
        return self._stream(inputs, chosen)

    def _stream(self, inputs: Sequence[Input], options: Options) -> Iterator[str]:
        with explain_out_of_memory("answering", way_out=LESS):
            with current_gpu(self.device):
                job = self._prepared([inputs], [options], "text")[0]
            yield from stream_text(self.parts, job, limit=options.text_limit, stop=options.stop_strings)

    def _run(
        self,
        batch: Sequence[Sequence[Input]],
        task: str,
        output: Output,
        preset: str | None,
        given: dict[str, Any],
        *,
        single: bool = False,
    ) -> list[Any]:
        if not batch:
            raise ValueError("there is nothing to do: the batch is empty")
        each = [given] if single else one_by_one(given, len(batch))
        options = [make_options(task, output, values, preset=preset) for values in each]
        with current_gpu(self.device), explain_out_of_memory(f"working on {len(batch)} request(s)", way_out=LESS):
            jobs = self._prepared(batch, options, output)
            return self._answer(jobs) if output == "text" else self._draw(jobs)

    @torch.inference_mode()
    def _prepared(self, batch: Sequence[Sequence[Input]], options: Sequence[Options], output: Output) -> list[Job]:
        jobs = [prepare(self.parts, inputs, own, output) for inputs, own in zip(batch, options, strict=True)]
        limit = options[0].text_limit if output == "text" else options[0].max_think_tokens if options[0].think else 0
        image_dropped = output == "image" and options[0].guidance.uses_image
        for job in jobs:
            begin(self.parts, job, text_tokens=limit, image_dropped=image_dropped)
        self._prefill(jobs, [job.entries for job in jobs])
        return jobs

    def _prefill(self, jobs: Sequence[Job], entries: Sequence[Sequence[Entry]]) -> None:
        contexts = [job.contexts for job in jobs if job.contexts is not None]
        prefill_all(
            self.parts.model,
            contexts,
            entries,
            image_tokens=self.parts.image_tokens,
            attention=self.parts.attention,
        )

    def _answer(self, jobs: list[Job]) -> list[TextResult]:
        options = jobs[0].options
        written = write_texts(self.parts, jobs, limit=options.text_limit, stop=options.stop_strings)
        return [
            TextResult(text, tuple(answer.ids), answer.finish_reason, job.generator.initial_seed())
            for job, (text, answer) in zip(jobs, written, strict=True)
        ]

    def _draw(self, jobs: list[Job]) -> list[ImageResult]:
        drawn = zip(jobs, self._drawn(jobs), strict=True)
        # Cloned outside inference mode, so that the latents may take part in a gradient computation.
        return [ImageResult(image, job.plan, x.clone(), job.generator.initial_seed()) for job, (image, x) in drawn]

    @torch.inference_mode()
    def _drawn(self, jobs: list[Job]) -> list[tuple[Image.Image, Tensor]]:
        options = jobs[0].options
        if not options.think:
            self.parts.decode_steps.kept = None  # drawing may need the memory
        else:
            plans = write_texts(self.parts, jobs, limit=options.max_think_tokens)
            for job, (text, _) in zip(jobs, plans, strict=True):
                job.plan = text
            # The plan is read again as an ordinary text.
            self._prefill(jobs, [[Entry(self.parts.text(text), "plan")] for text, _ in plans])
        return draw(self.parts, jobs)
