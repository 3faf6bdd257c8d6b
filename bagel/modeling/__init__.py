"""The MoT decoder and BAGEL around it. `Bagel` works alone: build it from a config, or load it through `checkpoint`."""

from bagel.modeling.bagel import Bagel, Losses, MissingHalfError
from bagel.modeling.cache import Context, KVCache
from bagel.modeling.denoise import Branch, Denoiser
from bagel.modeling.mot import Decoder, DecoderLayer, Streams
from bagel.modeling.plan import AttentionPlan, Sequence

__all__ = [
    "AttentionPlan",
    "Bagel",
    "Branch",
    "Context",
    "Decoder",
    "DecoderLayer",
    "Denoiser",
    "KVCache",
    "Losses",
    "MissingHalfError",
    "Sequence",
    "Streams",
]
