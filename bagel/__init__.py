"""BAGEL-7B-MoT in PyTorch: prompt, image -> token ids, pixels -> ViT features, VAE latents -> segments ->
packed sequence -> MoT decoder -> hidden -> logits or velocity -> text, or latents -> image.

Shape letters: B batch, T tokens, Tu und tokens, Tg gen tokens, H hidden, Hq query heads, Hkv key/value heads,
D channels a head, n tokens of one picture or text, P values of a latent token, (C, H, W) a picture.
"""

from bagel.config import BAGEL_7B, BagelConfig
from bagel.pipeline import BagelPipeline, ImageResult, TextResult
from bagel.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["BAGEL_7B", "BagelConfig", "BagelPipeline", "ImageResult", "TextResult", "Tokenizer", "__version__"]
