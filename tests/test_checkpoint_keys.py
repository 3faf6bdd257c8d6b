from __future__ import annotations

import json

import pytest
import torch
from checkpoint_variants import MOE, TINY, weights_of
from conftest import REFERENCE

from bagel.checkpoint import Checkpoint, official_shapes, targets
from bagel.checkpoint.autoencoder import autoencoder_shapes
from bagel.checkpoint.keys import find_row, parameter_shapes
from bagel.config import BAGEL_7B, BagelConfig, DecoderConfig, VAEConfig
from bagel.modeling import Bagel

OFFICIAL = json.loads((REFERENCE / "official_7b.json").read_text())


def as_shapes(listed: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in listed.items()}


def test_official_shapes_are_exactly_the_released_files():
    assert len(OFFICIAL["model"]) == 1223
    assert official_shapes(BAGEL_7B) == as_shapes(OFFICIAL["model"])


def test_autoencoder_keys_are_exactly_the_released_files():
    assert len(OFFICIAL["vae"]) == 244
    assert autoencoder_shapes(VAEConfig()) == as_shapes(OFFICIAL["vae"])


@pytest.mark.parametrize("folder", [TINY, MOE], ids=["mot", "moe"])
def test_official_shapes_match_small_files(folder):
    stored = {key: tuple(tensor.shape) for key, tensor in weights_of(folder).items()}
    assert official_shapes(Checkpoint.open(folder).config) == stored


def dense_tied() -> BagelConfig:
    llm = DecoderConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=96,
        qk_norm=False,
        tie_word_embeddings=True,
        layer_module="Qwen2DecoderLayer",
    )
    return BagelConfig(llm_config=llm, visual_und=False, vit_config=None, max_latent_size=8)


@pytest.mark.parametrize(
    "config",
    [BAGEL_7B, dense_tied(), Checkpoint.open(MOE).config, Checkpoint.open(TINY, visual_gen=False).config],
    ids=["7b", "dense", "moe", "understanding"],
)
def test_table_fills_every_parameter_of_the_model(config):
    with torch.device("meta"):
        model = Bagel(config)
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_fused_rows_stack_q_k_v_and_gate_up():
    wanted = targets(BAGEL_7B)
    layer = "language_model.model.layers.27"
    rows = [wanted[f"{layer}.self_attn.{part}_proj_moe_gen.bias"] for part in "qkv"]
    assert [(row.parameter, row.start) for row in rows] == [
        ("decoder.layers.27.gen.attention.qkv_proj.bias", start) for start in (0, 3584, 4096)
    ]
    up = wanted[f"{layer}.mlp.up_proj.weight"]
    assert (up.parameter, up.start) == ("decoder.layers.27.und.mlp.gate_up_proj.weight", 18944)


@pytest.mark.parametrize("key", ["language_model.model.layers.x.mlp.up_proj.weight", "ema.step", "vit_model.x", ""])
def test_find_row_knows_no_foreign_key(key):
    assert find_row(key) is None
