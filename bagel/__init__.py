"""BAGEL-7B-MoT in PyTorch: texts and images -> segments (`Processor`) -> one packed layout -> MoT decoder, with a
cache for each context -> logits and so a text, or velocities and so latents, which the autoencoder turns into an image.

Shape letters: B batch, T tokens, Tu und tokens, Tg gen tokens, H hidden, Hq query heads, Hkv key/value heads,
D channels per head, n tokens of one image or text, N latent tokens of all images of a batch, P values per latent
token, (Z, h, w) latents of the autoencoder, (C, H, W) an image.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel.checkpoint import CheckpointError
    from bagel.config import BAGEL_7B, BagelConfig, ConfigError, MissingHalfError
    from bagel.generation import Session
    from bagel.image import ImageError, open_image
    from bagel.memory import NotEnoughMemoryError
    from bagel.modeling import SDPA, Attention, Bagel, Reference
    from bagel.options import Flow
    from bagel.pipeline import BagelPipeline
    from bagel.processor import Processor
    from bagel.results import ImageResult, TextResult
    from bagel.sampling import Euler, Guidance, TaylorSeer, TextSampling, flow_timesteps, integrate
    from bagel.tokenizer import Tokenizer, TokenizerError

    load = BagelPipeline.from_pretrained

__version__ = "0.1.0"
__all__ = [
    "BAGEL_7B",
    "SDPA",
    "Attention",
    "Bagel",
    "BagelConfig",
    "BagelPipeline",
    "CheckpointError",
    "ConfigError",
    "Euler",
    "Flow",
    "Guidance",
    "ImageError",
    "ImageResult",
    "MissingHalfError",
    "NotEnoughMemoryError",
    "Processor",
    "Reference",
    "Session",
    "TaylorSeer",
    "TextResult",
    "TextSampling",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "flow_timesteps",
    "integrate",
    "load",
    "open_image",
]

_NAMES = {
    "checkpoint": ["CheckpointError"],
    "config": ["BAGEL_7B", "BagelConfig", "ConfigError", "MissingHalfError"],
    "generation": ["Session"],
    "image": ["ImageError", "open_image"],
    "memory": ["NotEnoughMemoryError"],
    "modeling": ["SDPA", "Attention", "Bagel", "Reference"],
    "options": ["Flow"],
    "pipeline": ["BagelPipeline"],
    "processor": ["Processor"],
    "results": ["ImageResult", "TextResult"],
    "sampling": ["Euler", "Guidance", "TaylorSeer", "TextSampling", "flow_timesteps", "integrate"],
    "tokenizer": ["Tokenizer", "TokenizerError"],
}
_HOMES = {name: f"bagel.{home}" for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # The public names are imported when they are first used, so that `bagel --help` does not wait for torch.
    if name == "load":  # the short way: bagel.load(source, ...)
        return import_module("bagel.pipeline").BagelPipeline.from_pretrained
    if name not in _HOMES:
        raise AttributeError(f"module 'bagel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
