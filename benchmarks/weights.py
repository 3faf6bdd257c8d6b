"""Random weights of healthy scale: speed and memory do not depend on their values."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bagel import BAGEL_7B, BagelPipeline
from bagel.config import BagelConfig
from bagel.demo import CHECKPOINT
from bagel.loading import choose_device, choose_dtype, choose_vae_dtype
from bagel.modeling import Attention, Bagel
from bagel.modeling.bagel import PositionTable, sincos_table
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

M = TypeVar("M", bound=nn.Module)


def mean_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation for a parameter: norms near one, biases small, matrices that keep sizes."""
    if len(shape) == 1:
        return (1.0 if "norm" in name and name.endswith("weight") else 0.0), 0.02
    table = any(part in name for part in ("embed_tokens", "pos_embed", "position_embedding"))
    return 0.0, 0.02 if table else torch.Size(shape[1:]).numel() ** -0.5


def random_pipeline(
    config: BagelConfig = BAGEL_7B,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | Attention = "auto",
    tokenizer: Path = CHECKPOINT,
) -> BagelPipeline:
    """Return a pipeline with random weights made where they are used, without files.

    Its texts never end before their limit: token ids that the tokenizer cannot spell, and the one that ends a text,
    have an output weight of zero, and among thousands of random logits the largest is never theirs.

    Args:
        config: sizes of the model.
        device, dtype, attention: as `BagelPipeline.from_pretrained`.
        tokenizer: folder of one whose ids the model has.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    words = Tokenizer.from_pretrained(tokenizer)
    with torch.device("meta"):
        model = Bagel(config)
        vae = Autoencoder(config.vae_config) if config.visual_gen and config.vae_config else None
    model = filled(model.to(kind), where)
    head = model.decoder.lm_head
    if head is not None:
        with torch.no_grad():
            head.weight[words.vocab_size :] = 0
            head.weight[words.eos_id] = 0
    if vae is not None:
        vae = filled(vae.to(choose_vae_dtype(None, kind, where)), where)
    return BagelPipeline(model, vae, words, attention=attention)


@torch.no_grad()
def filled(module: M, device: torch.device, *, seed: int = 0) -> M:
    """Return a module from the meta device with random values on `device`, ready to be run."""
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(*mean_and_spread(name, tuple(parameter.shape)), generator=generator)
    for part in module.modules():
        if isinstance(part, PositionTable):
            side, channels = round(part.table.shape[0] ** 0.5), part.table.shape[1]
            part.table.copy_(sincos_table(side, channels))
    return module.eval().requires_grad_(False)
