"""Two hundred steps on the shapes world, from scratch: images from captions, and answers about images."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import torch
from PIL import Image
from training_world import CONFIG, tokenizer

from bagel.config import DecoderConfig
from bagel.evaluation.samples import sample
from bagel.image import patchify
from bagel.training import Data, Generated, LatentItem, Rules, TextItem, TrainConfig, Trainer, ViTItem, fresh_model
from bagel.vae import Autoencoder

SIDE = 16  # pixels, in 4x4 latent tokens of 4x4 pixels, and 8x8 patches of 2x2
MODEL = dataclasses.replace(
    CONFIG,
    llm_config=DecoderConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=448,
    ),
    vit_config=dataclasses.replace(CONFIG.vit_config, image_size=16),
    vae_config=dataclasses.replace(CONFIG.vae_config, z_channels=12),
    vit_max_num_patch_per_side=8,
)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def text(words: str, **options) -> TextItem:
    return TextItem(tokenizer().encode(words), **options)


def drawing(rng: random.Random):
    example = sample(rng, "t2i1", side=SIDE)
    tokens = patchify(pixels(example.outputs[0]), 4)  # the pixels themselves are the latents
    return [text(example.inputs[0], droppable=True), LatentItem(tokens, torch.arange(16), loss=True)]


def answering(rng: random.Random):
    example = sample(rng, "qa", side=SIDE)
    image, question = example.inputs
    patches = ViTItem(patchify(pixels(image), 2), torch.arange(64))
    return [patches, text(question), text(example.outputs[0], loss=True)]


def test_both_losses_fall_far_on_the_shapes_world(tmp_path):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rules = Rules.of(MODEL, tokenizer())
    image_tokens = tokenizer().image_start_id, tokenizer().image_end_id
    data = Data({"draw": Generated(drawing), "answer": Generated(answering)}, rules, image_tokens, token_budget=1200)
    config = TrainConfig(steps=200, lr=3e-3, warmup=20, log_every=20)
    model, vae = fresh_model(MODEL), Autoencoder(MODEL.vae_config)
    Trainer(model, data, config, tokenizer=tokenizer(), out=tmp_path, vae=vae, device="cpu", progress=False).fit()
    torch.set_num_threads(threads)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["ce"] < 0.2 * log[0]["ce"]
    assert log[-1]["mse"] < 0.35 * log[0]["mse"]
