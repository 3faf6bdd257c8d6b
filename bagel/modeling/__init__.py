"""The MoT decoder and BAGEL around it. `Bagel` works alone: build it from a config, or load it through `checkpoint`."""

from bagel.config import MissingHalfError
from bagel.modeling.attention import SDPA, Attention, Flash, Flash3, Reference
from bagel.modeling.bagel import Bagel, Losses
from bagel.modeling.cache import Claim, Context, KVCache
from bagel.modeling.denoise import Branch, Denoiser
from bagel.modeling.linear import Linear
from bagel.modeling.mot import Decoder, DecoderLayer, Streams

__all__ = [
    "SDPA",
    "Attention",
    "Bagel",
    "Branch",
    "Claim",
    "Context",
    "Decoder",
    "DecoderLayer",
    "Denoiser",
    "Flash",
    "Flash3",
    "KVCache",
    "Linear",
    "Losses",
    "MissingHalfError",
    "Reference",
    "Streams",
]
