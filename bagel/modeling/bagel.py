"""BAGEL as a whole: embeds packed segments, runs the decoder, and reads out text or velocities.

Shapes: Tu und tokens, Tg gen tokens (latents), H hidden, P values per latent token (64).
Source: arXiv 2505.14683.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.config import BagelConfig, MissingHalfError
from bagel.image import in_unit
from bagel.modeling.attention import SDPA
from bagel.modeling.cache import Claim, Context, KVCache, claim_all
from bagel.modeling.graphs import Graphs
from bagel.modeling.linear import Float32Linear
from bagel.modeling.mot import Decoder, Streams
from bagel.packing import Layout, Packed
from bagel.vit import SiglipViT


def sincos_table(side: int, channels: int) -> Tensor:
    """Return the 2-D sin-cos table (side * side, channels) float32, row-major over the grid.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] over frequencies
    10000^(-i / (channels / 4)). Source: DiT, arXiv 2212.09748.

    Raises:
        ValueError: channels not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a 2-D sin-cos table needs a multiple of 4 channels, got {channels}")
    quarter = channels // 4
    cpu: Any = {"dtype": torch.float64, "device": "cpu"}  # not every device has this type
    frequencies = 10000.0 ** (-torch.arange(quarter, **cpu) / quarter)
    angles = torch.arange(side, **cpu)[:, None] * frequencies  # (side, channels / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, channels / 2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float().to(torch.get_default_device())


class PositionTable(nn.Module):
    """A fixed 2-D sin-cos table, looked up by grid cell; a stored table wins over the computed one."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.table: Tensor
        shape_alone = torch.get_default_device().type == "meta"
        self.register_buffer("table", torch.empty(side**2, channels) if shape_alone else sincos_table(side, channels))

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return rows (n, channels) for cells (n,)."""
        return self.table[position_ids]


class TimestepEmbedder(nn.Module):
    """Embed the time of the flow: 256 sinusoidal features, [cos | sin] over frequencies from 1 to 1e-4, through an MLP.

    Source: DiT, arXiv 2212.09748; times are not multiplied by 1000 here.
    """

    def __init__(self, hidden_size: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.fc1 = nn.Linear(features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """Return embeddings (n, hidden) of times t (n,) in [0, 1]."""
        half = self.features // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype)
        return self.fc2(F.silu(self.fc1(features)))


class Connector(nn.Module):
    """Two-layer MLP (gelu-tanh) from the ViT's width to the decoder's."""

    def __init__(self, vit_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vit_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (n, vit) to (n, hidden)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@dataclass(frozen=True)
class Losses:
    """Training losses of one packed batch; a batch without text or image targets has zero for that part.

    `ce` (Nl,) per labelled token, `mse` (Nm, P) per noisy latent and channel; `loss` is the sum of their means, the
    cross-entropies weighted by the labels' weights.
    """

    loss: Tensor
    ce: Tensor
    mse: Tensor


class Bagel(nn.Module):
    """The model without its autoencoder and tokenizer.

    `attention` is what its decoder attends with, an object of `bagel.modeling.attention` or one like it; another may be
    put in its place at any time, and likewise in `vit.attention`.

    Args:
        config: sizes; `visual_und` False leaves out the ViT and its connector, `visual_gen` False the gen expert and
            everything around latents.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention: Any = SDPA()
        self.graphs = Graphs()
        hidden = config.llm_config.hidden_size
        self.decoder = Decoder(config.llm_config, with_gen=config.visual_gen)
        if config.visual_und and config.vit_config is not None:
            self.vit = SiglipViT(config.vit_config)
            self.connector = Connector(config.vit_config.hidden_size, hidden)
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, hidden)
        if config.visual_gen:
            self.vae2llm = Float32Linear(config.patch_latent_dim, hidden)
            self.llm2vae = Float32Linear(hidden, config.patch_latent_dim)
            self.time_embedder = TimestepEmbedder(hidden)
            self.latent_pos_embed = PositionTable(config.max_latent_size, hidden)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes."""
        return self.decoder.dtype

    def new_context(self) -> Context:
        """Return an empty context; its cache grows as it is extended, see `Context.reserve`."""
        config = self.config.llm_config
        shape = (config.num_hidden_layers, 0, config.num_key_value_heads, config.head_dim)
        keys, values = (torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        return Context(KVCache(keys, values, self.decoder.supply))

    def expect(self, und: int, gen: int) -> None:
        """Make room for a forward of so many tokens of each expert, before anything of their size is made."""
        if self.decoder.supply is not None:
            self.decoder.supply.expect(und, gen)

    # What enters ------------------------------------------------------------------------------------------------------

    def embed_patches(self, patches: Tensor, position_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return ViT tokens (n, H) of packed patches (n, 588), see `ViTImage`: encoder, connector, sin-cos position."""
        if not self.config.visual_und:
            raise MissingHalfError(
                "this model was built without its vision half: it cannot see images; build it with visual_und=True"
            )
        features = self.connector(self.vit(in_unit(patches), position_ids, lengths))
        return (features + self.vit_pos_embed(position_ids)).to(features.dtype)

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
        return (self.vae2llm(latents) + times + positions).to(times.dtype)

    def embed(self, packed: Packed) -> Streams:
        """Return both input streams (Tu, H), (Tg, H) of a packed batch on this device."""
        self.expect(packed.und_positions.shape[0], packed.gen_positions.shape[0])
        und = self.decoder.embed_tokens(packed.text_ids)
        if packed.vit_lengths:
            seen = self.embed_patches(packed.vit_patches, packed.vit_position_ids, packed.vit_lengths)
            rows = torch.cat([packed.text_rows, packed.vit_rows])
            und = torch.cat([und, seen]).index_select(0, rows.argsort())
        if packed.latents.shape[0] == 0:
            return Streams(und, und.new_empty(0, und.shape[1]))
        # Images share few distinct times; embedding every token's own keeps this free of host reads.
        gen = self.embed_latents(packed.latents, packed.latent_position_ids, packed.timesteps)
        return Streams(und, gen)

    # Running ----------------------------------------------------------------------------------------------------------

    def forward(
        self, packed: Packed, claims: Sequence[Claim] | None = None, *, only_keys: bool = False, losses: bool = False
    ) -> Any:
        """Run a packed batch.

        Everything but decode steps and evaluations of a flow passes through here, so that what wraps calls of the model
        (FSDP, a compiler, hooks) sees them.

        Args:
            packed: from `bagel.packing.pack`, on this device.
            claims: for each sample the place in a context on top of which it runs; see `prefill`.
            only_keys: the last layer's attention and MLP need not run: only keys and values are wanted.
            losses: return the training losses instead; see `losses`.

        Returns:
            Both streams (Tu, H), (Tg, H) as they leave the last layer, not yet normed; or `Losses`.

        Raises:
            ValueError: latents of a wrong width.
            MissingHalfError: an image for which the model lacks the half.
        """
        last = len(self.decoder.layers) - 1
        attend = self.attention.plan(packed.layout, claims, only_keys_from=last if only_keys else None)
        rotary = self.decoder.rotary(packed.und_positions, packed.gen_positions)
        hidden = self.decoder(self.embed(packed), rotary, attend)
        return self._losses(packed, hidden) if losses else hidden

    def prefill(self, packed: Packed, contexts: Sequence[Context], *, only_keys: bool = False) -> Streams:
        """Append every sample to its context, and return what calling the model does.

        A sample of several segments is kept as [und tokens | gen tokens]; so only where one `prefill` ends and the
        next begins is a shorter view of the context a prefix of the sequence.

        Args:
            packed: as for calling the model.
            contexts: one per sample.
            only_keys: a context holds keys and values alone, so the last layer's attention and MLP need not run; what
                is returned then is of no use.

        Raises:
            ValueError: another number of contexts than of samples; otherwise as for calling the model.
        """
        layout = packed.layout
        if len(contexts) != len(layout.samples):
            raise ValueError(f"{len(layout.samples)} packed samples need as many contexts, got {len(contexts)}")
        claims = claim_all(contexts, layout.lengths, keeps=True)
        hidden = self(packed, claims, only_keys=only_keys)
        for context, length, position in zip(contexts, layout.lengths, layout.next_positions, strict=True):
            context.advance(length, position)
        return hidden

    def decode(self, ids: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Append one token (B,) to each of B contexts and return the logits (B, vocab) float32 of what follows."""
        claims = claim_all(contexts, [1] * len(contexts), keeps=True)
        positions = torch.tensor([context.position for context in contexts])
        if ids.is_cuda:  # from page-locked memory, so that the copy does not wait for the GPU
            positions = positions.pin_memory()
        positions = positions.to(ids.device, non_blocking=ids.is_cuda)
        logits = self.decoder.next_logits(ids, positions, self.attention.plan(Layout.of_tokens(len(contexts)), claims))
        for context in contexts:
            context.advance(1, context.position + 1)
        return logits

    # What leaves ------------------------------------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (T, vocab) of und tokens (T, H) as they leave the last layer."""
        return self.decoder.logits(hidden)

    def velocity(self, hidden: Tensor) -> Tensor:
        """Return float32 velocities (n, P) of gen tokens (n, H) as they leave the last layer."""
        norm = self.decoder.norm_gen or self.decoder.norm
        return self.llm2vae(norm(hidden.float()))

    def losses(self, packed: Packed) -> Losses:
        """Return the training losses of a packed batch (section 2.3 of the paper); differentiable.

        Both experts take part in `loss` whatever the batch holds, so that processes with different batches have
        gradients for the same parameters.
        """
        return self(packed, losses=True)

    def _losses(self, packed: Packed, hidden: Streams) -> Losses:
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
