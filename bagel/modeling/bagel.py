"""BAGEL as a whole: embeds packed segments, runs the decoder, and reads out text or velocities.

Shapes: Tu und tokens, Tg gen tokens (latents), H hidden, P values of a latent token (64).
Source: arXiv 2505.14683.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.config import BagelConfig
from bagel.image import in_unit
from bagel.modeling.cache import Context, KVCache
from bagel.modeling.embeddings import Connector, PositionTable, TimestepEmbedder
from bagel.modeling.mot import Attend, Decoder, Streams
from bagel.modeling.plan import AttentionPlan, Sequence, plan_packed
from bagel.modeling.rope import Rotary
from bagel.packing import Packed
from bagel.vit import SiglipViT


class MissingHalfError(ValueError):
    """The model was built without the half that this call needs (vision or generation)."""


@dataclass(frozen=True)
class Losses:
    """Training losses of one packed batch; a batch without text or picture targets has zero for that part.

    `ce` (Nl,) per labelled token, `mse` (Nm, P) per noisy latent and channel; `loss` is the sum of their means, the
    cross-entropies weighted by the labels' weights.
    """

    loss: Tensor
    ce: Tensor
    mse: Tensor


class Bagel(nn.Module):
    """The model without its autoencoder and tokenizer.

    Args:
        config: sizes; `visual_und` False leaves out the ViT and its connector, `visual_gen` False the gen expert and
            everything around latents.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm_config.hidden_size
        self.decoder = Decoder(config.llm_config, with_gen=config.visual_gen)
        if config.visual_und and config.vit_config is not None:
            self.vit = SiglipViT(config.vit_config)
            self.connector = Connector(config.vit_config.hidden_size, hidden)
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, hidden)
        if config.visual_gen:
            self.vae2llm = nn.Linear(config.patch_latent_dim, hidden)
            self.llm2vae = nn.Linear(hidden, config.patch_latent_dim)
            self.time_embedder = TimestepEmbedder(hidden)
            self.latent_pos_embed = PositionTable(config.max_latent_size, hidden)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.decoder.dtype

    def new_context(self, *, capacity: int = 256, headroom: int = 0) -> Context:
        """Return an empty context whose cache holds `capacity` tokens and a headroom block before it has to grow."""
        config = self.config.llm_config
        return Context(KVCache(config, device=self.device, dtype=self.dtype, capacity=capacity, headroom=headroom))

    def embed_patches(self, patches: Tensor, position_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return ViT tokens (n, H) of packed patches (n, 588), see `ViTImage`: encoder, connector, sin-cos position."""
        if not self.config.visual_und:
            raise MissingHalfError(
                "this model was built without its vision half: it cannot see pictures; build it with visual_und=True"
            )
        features = self.connector(self.vit(in_unit(patches), position_ids, lengths))
        return (features + self.vit_pos_embed(position_ids)).to(self.decoder.residual_dtype)

    def embed_latents(self, latents: Tensor, position_ids: Tensor, timesteps: Tensor) -> Tensor:
        """Return latent tokens (n, H) of latents (n, P) at times (n,) in [0, 1]."""
        if not self.config.visual_gen:
            raise MissingHalfError(
                "this model was built without its generating half: it cannot draw or edit; build it with "
                "visual_gen=True"
            )
        return self.latent_tokens(latents, self.time_embedder(timesteps), self.latent_pos_embed(position_ids))

    def latent_tokens(self, latents: Tensor, times: Tensor, positions: Tensor) -> Tensor:
        """Return latent tokens (n, H) from latents (n, P) and the embeddings of their times and positions.

        Raises:
            ValueError: latents of another width than P.
        """
        width = self.config.patch_latent_dim
        if latents.ndim != 2 or latents.shape[1] != width:
            raise ValueError(
                f"latents must have shape (n, {width}), got {tuple(latents.shape)}; see `bagel.image.patchify`"
            )
        tokens = _linear_float32(latents, self.vae2llm) + times + positions
        return tokens.to(self.decoder.residual_dtype)

    def embed(self, packed: Packed) -> Streams:
        """Return both input streams (Tu, H), (Tg, H) of a packed batch on this device."""
        und = self.decoder.embed(packed.text_ids)
        if packed.vit_lengths:
            seen = self.embed_patches(packed.vit_patches, packed.vit_position_ids, packed.vit_lengths)
            rows = torch.cat([packed.text_rows, packed.vit_rows])
            und = torch.cat([und, seen]).index_select(0, rows.argsort())
        if packed.latents.shape[0] == 0:
            return Streams(und, und.new_empty(0, und.shape[1]))
        # Pictures share few distinct times; embedding every token's own keeps this free of host reads.
        gen = self.embed_latents(packed.latents, packed.latent_position_ids, packed.timesteps)
        return Streams(und, gen)

    def forward(
        self,
        packed: Packed,
        contexts: list[Context] | None = None,
        *,
        attention: str = "sdpa",
        attend: Attend | None = None,
    ) -> Streams:
        """Run a packed batch, each sample on top of its context if there are any.

        Args:
            packed: from `bagel.packing.pack`, on this device.
            contexts: one a sample; their caches receive the new keys and values, but their lengths stay: a clean
                segment becomes part of a context by `prefill`.
            attention: backend, see `bagel.attention`.
            attend: attention of the whole batch instead of one made here, sample by sample, with `attention`.

        Returns:
            Both streams (Tu, H), (Tg, H) as they leave the last layer, not yet normed.

        Raises:
            ValueError: another number of contexts than of samples, latents of a wrong width.
            MissingHalfError: a picture for which the model lacks the half.
        """
        attend = attend or self._plan(packed, contexts, attention)
        return self.decoder(self.embed(packed), self._rotary(packed), attend)

    def prefill(self, packed: Packed, contexts: list[Context], *, attention: str = "sdpa") -> Streams:
        """Append every sample to its context; same arguments, result and errors as calling the model.

        A sample of several segments is kept as [und tokens | gen tokens]; so only where one `prefill` ends and the
        next begins is a shorter view of the context a prefix of the sequence.
        """
        hidden = self(packed, contexts, attention=attention)
        _advance(contexts, packed)
        return hidden

    def read(self, packed: Packed, contexts: list[Context], *, attention: str = "sdpa") -> None:
        """Append every sample to its context as `prefill` does, without the states that leave the last layer.

        A context holds keys and values alone; so the last layer's attention and MLP need not run.
        """
        plan = self._plan(packed, contexts, attention)
        heads = self.decoder.heads_of_last(self.embed(packed), self._rotary(packed), plan)
        for _ in plan.remember(len(self.decoder.layers) - 1, *heads):
            pass
        _advance(contexts, packed)

    def _plan(self, packed: Packed, contexts: list[Context] | None, attention: str) -> AttentionPlan:
        if contexts is not None and len(contexts) != len(packed.samples):
            raise ValueError(f"{len(packed.samples)} packed samples need as many contexts, got {len(contexts)}")
        return plan_packed(packed, contexts=contexts, device=self.device, backend=attention)

    def _rotary(self, packed: Packed) -> tuple[Rotary, Rotary]:
        return self.decoder.rotary(packed.und_positions), self.decoder.rotary(packed.gen_positions)

    def decode(self, ids: Tensor, contexts: list[Context], *, attention: str = "sdpa") -> Tensor:
        """Append one token (B,) to each of B contexts and return the logits (B, vocab) float32 of what follows."""
        sequences = []
        for row, context in enumerate(contexts):
            context.cache.reserve(tokens=context.length + 1)
            sequences.append(Sequence(slice(row, row + 1), slice(0, 0), context=context))
        positions = torch.tensor([context.position for context in contexts])
        if self.device.type == "cuda":  # from page-locked memory, so that the copy does not wait for the GPU
            positions = positions.pin_memory()
        positions = positions.to(self.device, non_blocking=True)
        empty = self.decoder.rotary(positions[:0])
        x = self.decoder.embed(ids)
        plan = AttentionPlan(sequences, backend=attention)
        hidden = self.decoder(Streams(x, x[:0]), (self.decoder.rotary(positions), empty), plan)
        for context in contexts:
            context.length += 1
            context.position += 1
        return self.decoder.logits(hidden.und)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Return float32 velocities (n, P) of gen tokens (n, H) as they leave the last layer."""
        return _linear_float32(self.decoder.norm_of_gen(hidden.float()), self.llm2vae)

    def losses(self, packed: Packed, *, attention: str = "sdpa", attend: Attend | None = None) -> Losses:
        """Return the training losses of a packed batch (section 2.3 of the paper); differentiable.

        Arguments as for calling the model, without contexts. Both experts take part in `loss` whatever the batch
        holds, so that processes with different batches have gradients for the same parameters.
        """
        hidden = self(packed, attention=attention, attend=attend)
        loss = 0 * (hidden.und.float().sum() + hidden.gen.float().sum())
        ce, mse = loss.new_empty(0), loss.new_empty(0, packed.velocity.shape[1])
        if packed.labels.shape[0]:
            logits = self.decoder.logits(hidden.und[packed.label_rows])
            ce = F.cross_entropy(logits, packed.labels, reduction="none")
            loss = loss + (ce * packed.label_weights).sum() / packed.label_weights.sum()
        if packed.target_rows.shape[0]:
            mse = (self.velocity(hidden.gen[packed.target_rows]) - packed.velocity).square()
            loss = loss + mse.mean()
        return Losses(loss=loss, ce=ce, mse=mse)


def _advance(contexts: list[Context], packed: Packed) -> None:
    """Count a packed batch's tokens into its contexts."""
    for context, sample, position in zip(contexts, packed.samples, packed.next_positions, strict=True):
        context.length += len(sample)
        context.position = position


def _linear_float32(x: Tensor, linear: nn.Linear) -> Tensor:
    """Apply the narrow projections between latents and hidden states in float32.

    They cost nothing, and rounding the flow's state and velocity to bfloat16 at every evaluation would show.
    """
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())
