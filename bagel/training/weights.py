"""The weights before training starts: fresh ones, gen from und, and which parts stand still."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bagel.config import BagelConfig
from bagel.modeling import Bagel, DecoderLayer
from bagel.modeling.mot import RMSNorm


def initialise(model: Bagel, generator: torch.Generator) -> None:
    """Give a model fresh weights to train from scratch.

    Normal with variance 1 / inputs; what is added to the residual stream smaller by sqrt(2 layers); embeddings and head
    by 1 / sqrt(hidden); norms one, biases zero. The velocity starts at zero, so that the flow loss starts at its mean.

    Args:
        model: on the device of `generator`.
        generator: gives the draws.
    """
    layers = {"decoder": len(model.decoder.layers), "vit": len(model.vit.layers) if model.config.visual_und else 1}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj", "fc2")) and ".layers." in name:
                    std /= (2 * layers[name.partition(".")[0]]) ** 0.5
                module.weight.normal_(0, 0.0 if name == "llm2vae" else std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, module.embedding_dim**-0.5, generator=generator)
            elif isinstance(module, nn.LayerNorm | RMSNorm):
                module.weight.fill_(1)
                if isinstance(module, nn.LayerNorm):
                    module.bias.zero_()


def gen_from_und(model: Bagel) -> None:
    """Copy every weight of the und expert, its final norm included, into the gen expert, as BAGEL's training begins.

    Raises:
        ValueError: a model with one expert.
    """
    if model.decoder.norm_gen is None:
        raise ValueError("this model has one expert: there is no gen expert to fill")
    model.decoder.norm_gen.load_state_dict(model.decoder.norm.state_dict())
    for layer in model.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        assert layer.gen is not None
        own = layer.gen.state_dict()
        layer.gen.load_state_dict({name: tensor for name, tensor in layer.und.state_dict().items() if name in own})


def part_of(name: str) -> str:
    """Return the part ("und", "gen", "vit" or "connector") of a parameter of `Bagel`."""
    head = name.split(".")[0]
    if head in ("vit", "connector"):
        return head
    if head in ("vae2llm", "llm2vae", "time_embedder") or ".gen." in name or ".norm_gen." in name:
        return "gen"
    return "und"


def freeze(model: Bagel, parts: Iterable[str]) -> None:
    """Make all parameters trainable but those of the named parts.

    Raises:
        ValueError: nothing is left to train.
    """
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freezing {', '.join(sorted(frozen))} leaves nothing to train")


def fresh_model(config: BagelConfig, *, seed: int = 0) -> Bagel:
    """Return a model with fresh weights, gen a copy of und."""
    model = Bagel(config)
    initialise(model, torch.Generator().manual_seed(seed))
    if model.decoder.norm_gen is not None:
        gen_from_und(model)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
