"""BAGEL-7B-MoT in PyTorch: prompt, image -> token ids, pixels -> ViT features, VAE latents -> segments ->
packed sequence -> MoT decoder -> hidden -> logits or velocity -> text, or latents -> image.

Shape letters: B batch, T tokens, Tu und tokens, Tg gen tokens, H hidden, Hq query heads, Hkv key/value heads,
D channels a head, n tokens of one picture or text, P values of a latent token, (C, H, W) a picture.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel.config import BAGEL_7B, BagelConfig
    from bagel.pipeline import BagelPipeline
    from bagel.results import ImageResult, TextResult
    from bagel.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["BAGEL_7B", "BagelConfig", "BagelPipeline", "ImageResult", "TextResult", "Tokenizer", "__version__"]

_HOMES = {
    "BAGEL_7B": "bagel.config",
    "BagelConfig": "bagel.config",
    "BagelPipeline": "bagel.pipeline",
    "ImageResult": "bagel.results",
    "TextResult": "bagel.results",
    "Tokenizer": "bagel.tokenizer",
}


def __getattr__(name: str) -> Any:
    # The public names are imported when they are first used, so that `bagel --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'bagel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
