"""Work counted from shapes: floating-point operations, bytes that must be read, and the time below which none can be.

Counted is what the result needs: a multiplication and an addition are two operations; causal attention counts the
pairs that see each other. Norms, activations and embeddings are left out. Bytes are those of the weights and of the
keys and values that a forward reads, each once; activations are left out, so floors are floors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bagel.config import BagelConfig, DecoderConfig, VAEConfig, ViTConfig
from bagel.sampling import TaylorSeer
from bagel.vae import Autoencoder


@dataclass(frozen=True)
class Phase:
    """Part of a job: `count` times the same work, of `flops` operations and `bytes` read each time.

    `forwards`: passes of the language model each time, one per guidance branch or decoded token.
    """

    name: str
    flops: float
    bytes: float
    count: int = 1
    forwards: int = 0

    def seconds(self, *, matmul: float, copy: float) -> float:
        """Return the least time of all `count`, at `matmul` operations and `copy` bytes per second."""
        return self.count * max(self.flops / matmul, self.bytes / copy)


@dataclass(frozen=True)
class Tokens:
    """The new tokens of one sequence: how many of each expert, on a context of `start`; text sees only backwards."""

    und: int = 0
    gen: int = 0
    start: int = 0
    causal: bool = False

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it sees."""
        new = self.und + self.gen
        return new * self.start + (new * (new + 1) / 2 if self.causal else new**2)


def attention_weights(config: DecoderConfig) -> int:
    """Count the weights of one expert's attention projections in all layers, biases and norms left out."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * hidden * (2 * hidden + 2 * kv)


def mlp_weights(config: DecoderConfig) -> int:
    """Count the weights of one expert's feed-forward parts in all layers."""
    return config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size


def expert_weights(config: DecoderConfig) -> int:
    """Count the weights that each token of an expert passes through (6.525e9 of the 7B)."""
    return attention_weights(config) + mlp_weights(config)


def kv_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers (57,344 of the 7B in bfloat16)."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def attention_flops(config: DecoderConfig, pairs: float) -> float:
    """Count the operations of attention in all layers, both products of every pair."""
    return 4 * pairs * config.hidden_size * config.num_hidden_layers


def forward(config: DecoderConfig, sequences: Sequence[Tokens], itemsize: int, *, name: str) -> Phase:
    """Count one pass of all layers over sequences that share it."""
    und, gen = sum(s.und for s in sequences), sum(s.gen for s in sequences)
    flops = 2 * (und + gen) * expert_weights(config) + attention_flops(config, sum(s.pairs for s in sequences))
    weights = expert_weights(config)
    if und and gen and config.has_gen_expert:
        weights += mlp_weights(config) + (attention_weights(config) if config.has_gen_attention else 0)
    held = sum(s.start + s.und + s.gen for s in sequences)
    return Phase(name, flops, weights * itemsize + held * kv_bytes(config, itemsize))


def evaluation(config: BagelConfig, tokens: int, contexts: Sequence[int], itemsize: int, *, images: int = 1) -> Phase:
    """Count one evaluation of noisy images of `tokens` latent tokens, with a branch on each length of context.

    Args:
        config: of the model.
        tokens: of each image.
        contexts: tokens of every branch's context, all images' together.
        itemsize: bytes of a weight.
        images: that are drawn; their latents enter once, whatever the branches.
    """
    branches = len(contexts)
    block = [Tokens(und=2, gen=tokens, start=start) for start in contexts]
    plain = forward(config.llm_config, block, itemsize, name=f"evaluation, {branches} branch{'es' * (branches > 1)}")
    projections = 2 * tokens * config.patch_latent_dim * config.llm_config.hidden_size
    flops = plain.flops + projections * (images + branches)
    return Phase(plain.name, flops, plain.bytes, forwards=branches)


def decoding(config: DecoderConfig, contexts: Sequence[int], tokens: int, itemsize: int) -> Phase:
    """Count `tokens` steps of decoding one text from each context of so many tokens, at the mean length."""
    head = config.vocab_size * config.hidden_size
    # Step i of n has the context, the bos and i - 1 tokens before it among its keys: (n - 1) / 2 more on average.
    steps = [Tokens(und=1, start=start) for start in contexts]
    plain = forward(config, steps, itemsize, name="decode")
    grown = len(contexts) * (tokens - 1) / 2
    flops = plain.flops + attention_flops(config, grown) + 2 * len(contexts) * head
    return Phase(
        plain.name, flops, plain.bytes + head * itemsize + grown * kv_bytes(config, itemsize), tokens, forwards=1
    )


def vision(config: ViTConfig, hidden: int, patches: int, itemsize: int) -> Phase:
    """Count the encoding of one image of so many patches, with the connector to a decoder of width `hidden`."""
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    weights = config.num_layers * layer + config.patch_dim * width + width * hidden + hidden**2
    flops = 2 * patches * weights + 4 * patches**2 * width * config.num_layers
    return Phase("vit", flops, weights * itemsize)


def autoencoding(config: VAEConfig, height: int, width: int, itemsize: int, *, decode: bool) -> Phase:
    """Count one image of this size in pixels through half an autoencoder, by a run that computes shapes only."""
    with torch.device("meta"):
        vae = Autoencoder(config)
        down = config.downsample
        shape = (config.z_channels, height // down, width // down) if decode else (config.in_channels, height, width)
        x = torch.empty(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        if decode:
            vae.decode(x)
        else:
            vae.encode(x, None)
    half = vae.decoder if decode else vae.encoder
    weights = sum(parameter.numel() for parameter in half.parameters())
    return Phase("vae decode" if decode else "vae encode", counter.get_total_flops(), weights * itemsize)


def computed_branches(asked: Sequence[int], *, taylorseer: bool) -> Counter[tuple[int, ...]]:
    """Count how often each set of one image's guidance branches is computed together over a flow.

    Args:
        asked: for each evaluation how many branches guidance asks for; one alone is branch 0.
        taylorseer: leave out the evaluations that it predicts.
    """
    seers = [TaylorSeer().start() for _ in range(max(asked, default=0))]
    counted: Counter[tuple[int, ...]] = Counter()
    for branches in asked:
        due = tuple(branch for branch in range(branches) if seers[branch].due or not taylorseer)
        for branch in range(branches):
            if branch in due:
                seers[branch].record(torch.zeros(1))
            else:
                seers[branch].predict()
        if due:
            counted[due] += 1
    return counted
