"""The sizes that a set of weights has, read off its shapes by vote, so that one bad tensor is outvoted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bagel.checkpoint.keys import find_row

GEN_MARK = "_moe_gen"
GEN_GLUE = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
VISION = ("vit_model.", "connector.", "vit_pos_embed.")


@dataclass(frozen=True)
class Measured:
    """What the keys and shapes of a file say about the model."""

    votes: Mapping[str, Counter[int]]
    decoder_layers: int
    vit_layers: int
    has_vision: bool
    has_positions: bool
    has_head: bool
    has_qk_norm: bool
    has_gen_attention: bool
    has_gen_mlp: bool
    has_gen_glue: bool

    def size(self, name: str, stated: int | None = None) -> int | None:
        """Return the size that most tensors have; among equals the stated one; None if no tensor has it."""
        votes = self.votes.get(name)
        if not votes:
            return None
        most = max(votes.values())
        leaders = [size for size, count in votes.items() if count == most]
        return stated if stated in leaders else leaders[0]

    @property
    def has_gen(self) -> bool:
        """Whether there is any tensor of the generating half."""
        return self.has_gen_attention or self.has_gen_mlp or self.has_gen_glue


def measure(shapes: Mapping[str, tuple[int, ...]]) -> Measured:
    """Read sizes and parts off the official keys and shapes; unknown keys say nothing."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    layers = {"language_model": 0, "vit_model": 0}
    for key, shape in shapes.items():
        found = find_row(key)
        if found is None:
            continue
        row, layer = found
        if layer is not None and layer >= len(shapes):
            continue  # no such layer: it is named as unknown by whoever checks keys
        if layer is not None:
            stack = key.partition(".")[0]
            layers[stack] = max(layers[stack], layer + 1)
        if len(shape) == len(row.shape):
            for name, size in zip(row.shape, shape, strict=True):
                if isinstance(name, str):
                    votes[name][size] += 1
    return Measured(
        votes=votes,
        decoder_layers=layers["language_model"],
        vit_layers=layers["vit_model"],
        has_vision=_any(shapes, VISION),
        has_positions="vit_model.vision_model.embeddings.position_embedding.weight" in shapes,
        has_head="language_model.lm_head.weight" in shapes,
        has_qk_norm=any(".q_norm" in key or ".k_norm" in key for key in shapes),
        has_gen_attention=any(GEN_MARK in key and ".self_attn." in key for key in shapes),
        has_gen_mlp=any(GEN_MARK in key and ".mlp" in key for key in shapes),
        has_gen_glue=_any(shapes, GEN_GLUE),
    )


def _any(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)
