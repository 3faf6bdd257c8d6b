"""A toy world to train on in seconds: images of one flat colour, and the word for it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from conftest import REFERENCE

from bagel.config import BagelConfig, DecoderConfig, ImageTransform, VAEConfig, ViTConfig
from bagel.loading import load_parts
from bagel.modeling import Bagel
from bagel.processor import Processor
from bagel.tokenizer import Tokenizer
from bagel.training import Data, Generated, LatentItem, Rules, TextItem, TrainConfig, Trainer, ViTItem, fresh_model
from bagel.vae import Autoencoder

COLORS = 4
CELLS = torch.arange(4)
VAE_CONFIG = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=2)
CONFIG = BagelConfig(
    llm_config=DecoderConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=448,
    ),
    vit_config=ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    ),
    vae_config=VAE_CONFIG,
    max_latent_size=4,
    vit_max_num_patch_per_side=4,
    vae_image_transform=ImageTransform(16, 8, 4),
    vit_image_transform=ImageTransform(8, 4, 2),
)


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(REFERENCE / "tiny" / "checkpoint")


@lru_cache
def reference(variant: str) -> tuple[Bagel, Autoencoder, Processor]:
    """A reference model in float32 with its autoencoder and processor; tests must not change it."""
    return new_reference(variant)


def new_reference(variant: str) -> tuple[Bagel, Autoencoder, Processor]:
    """The same, to be changed."""
    model, vae, tokenizer = load_parts(
        REFERENCE / variant / "checkpoint", device="cpu", dtype="float32", progress=False
    )
    assert vae is not None
    return model, vae, Processor(model.config, tokenizer)


@contextmanager
def attending(model: Bagel, attention) -> Iterator[None]:
    """Let a model attend with another object for a while."""
    before, model.attention = model.attention, attention
    try:
        yield
    finally:
        model.attention = before


def color_latents(color: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(color)
    return torch.randn((1, 8), generator=generator).expand(4, 8)


def color_patches(color: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + color)
    return torch.rand((1, 12), generator=generator).expand(4, 12)


def drawing(rng: random.Random):
    color = rng.randrange(COLORS)
    return [TextItem([10 + color], droppable=True), LatentItem(color_latents(color), CELLS, loss=True)]


def naming(rng: random.Random):
    color = rng.randrange(COLORS)
    return [ViTItem(color_patches(color), CELLS), TextItem([20]), TextItem([10 + color, 30, 31], loss=True)]


def repainting(rng: random.Random):
    before, after = rng.randrange(COLORS), rng.randrange(COLORS)
    conditions = [LatentItem(color_latents(before), CELLS, droppable=True), ViTItem(color_patches(before), CELLS, True)]
    return [*conditions, TextItem([10 + after], droppable=True), LatentItem(color_latents(after), CELLS, loss=True)]


def writing(rng: random.Random):
    return [TextItem([40, 41, 42, 43][: rng.randrange(1, 5)], loss=True)]


SOURCES = {"draw": Generated(drawing), "name": Generated(naming), "repaint": Generated(repainting)}


def toy_data(sources=None, *, token_budget: int = 120, streams: int = 4, **options) -> Data:
    rules = Rules.of(CONFIG, tokenizer())
    image_tokens = tokenizer().image_start_id, tokenizer().image_end_id
    options = {"token_budget": token_budget, "streams": streams, **options}
    return Data(sources or SOURCES, rules, image_tokens, **options)


def toy_model(seed: int = 0) -> Bagel:
    return fresh_model(CONFIG, seed=seed)


@lru_cache
def toy_vae() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(VAE_CONFIG)


def toy_trainer(out: Path, *, model: Bagel | None = None, data: Data | None = None, **settings) -> Trainer:
    """A trainer of the toy world; settings beyond the usual ones are fields of TrainConfig."""
    settings = {"steps": 6, "warmup": 2, "lr": 2e-3, "log_every": 1, "keep": 10, **settings}
    options = {name: settings.pop(name) for name in ("on_step", "device") if name in settings}
    return Trainer(
        model or toy_model(),
        data or toy_data(),
        TrainConfig(**settings),
        tokenizer=tokenizer(),
        out=out,
        vae=toy_vae(),
        progress=False,
        **{"device": "cpu", **options},
    )


PROCESS = """
import sys, torch
from pathlib import Path
from training_world import toy_trainer
from bagel.training.distributed import leave

torch.set_num_threads(1)
toy_trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), device=sys.argv[3], batches=2).fit()
leave()
"""


def run_two_processes(out: Path, *, steps: int, device: str) -> None:
    """Train the toy world sharded over two processes."""
    script = out.parent / "process.py"
    script.write_text(PROCESS)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(out), str(steps), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
