"""Compile a loaded pipeline, and use it once, so that nobody waits later or learns then that it does not work here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagel.inputs import Parts
from bagel.modeling.layers import Expert, compile_experts

if TYPE_CHECKING:
    from bagel.pipeline import BagelPipeline


def compile_pipeline(pipe: BagelPipeline, *, backend: str) -> None:
    """Compile a pipeline's experts and its autoencoder's decoder in place; see `BagelPipeline.compile`."""
    parts = pipe.parts
    compile_experts(parts.model, backend=backend)
    if parts.vae is not None:
        parts.vae.decoder.compile(dynamic=True, backend=backend)
    try:
        _use_once(pipe)
    except RuntimeError as error:  # what torch raises where its compilers are missing or fail
        _restore(parts)
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"this pipeline cannot be compiled here and stays as it was ({reason}): compiling needs a C++ compiler for "
            "a CPU, Triton for a GPU"
        ) from error


def _use_once(pipe: BagelPipeline) -> None:
    """Read a text, decode from it, and draw a small picture: between them they use every compiled function.

    The picture is no square, lest the compiler take it that all pictures are.
    """
    pipe.understand([], "a", max_new_tokens=2)
    if pipe.parts.vae is not None:
        step = pipe.parts.model.config.latent_downsample
        pipe.text_to_image("a", height=3 * step, width=4 * step, num_timesteps=2, progress=False)


def _restore(parts: Parts) -> None:
    for module in parts.model.modules():
        if isinstance(module, Expert):
            for name in ("heads", "finish"):
                module.__dict__.pop(name, None)
    if parts.vae is not None:
        parts.vae.decoder._compiled_call_impl = None  # what nn.Module.compile sets
