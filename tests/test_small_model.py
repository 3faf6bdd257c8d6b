"""What the built-in model can do: it fails when a change makes a trained model draw, answer or plan worse."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
import pytest
from safetensors import safe_open

from bagel import BagelPipeline
from bagel.checkpoint import verify_checksums
from bagel.demo import CHECKPOINT
from bagel.evaluation.evaluate import evaluate
from bagel.evaluation.samples import sample
from bagel.evaluation.table import Row, line

LARGEST = 12_000_000  # bytes of all files together
TIMESTEPS = 16
COUNT = {"t2i": 20, "qa": 3, "caption": 10, "think": 8, "edit": 4, "frames": 5}
"""Examples a row of each task; a topic, and a change, is a row of its own."""

# Measured when the model was made, less a little for other processors' rounding.
LEAST_RIGHT = {
    "t2i": {
        "draw: one object, everything stated": 19,
        "draw: two objects and their relation": 19,
        "draw: three objects, counted": 19,
    },
    "qa": {"question: all": 20},
    "caption": {"caption: all attributes": 9},
    "think": {"think: plan right, facts and caption": 7, "think: indirect prompts drawn with": 7},
    "edit": {"edit: all": 16},
    "frames": {"next frames: place, frame by frame": 19},
}
TOTAL = {
    "draw: one object, everything stated": 20,
    "draw: two objects and their relation": 20,
    "draw: three objects, counted": 20,
    "question: all": 21,
    "caption: all attributes": 10,
    "think: plan right, facts and caption": 8,
    "think: indirect prompts drawn with": 8,
    "edit: all": 20,
    "next frames: place, frame by frame": 20,
}
LEAST_PSNR = 28.0  # dB, of the middle one of some images against the same scene ideally drawn


@lru_cache
def built_in() -> BagelPipeline:
    return BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")


@lru_cache
def rows(task: str) -> dict[str, Row]:
    """Measure held-out examples of a task, always the same."""
    found = evaluate(built_in(), tasks=(task,), count=COUNT[task], batch_size=20, seed=1, num_timesteps=TIMESTEPS)
    return {row.name: row for row in found}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, least in LEAST_RIGHT.items() for name in least])
def test_small_model_is_right_often_enough(task, name):
    row = rows(task)[name]
    assert row.total == TOTAL[name]
    wrong = "\n".join(f"{t.prompt}\n  wanted: {t.wanted}\n  seen: {t.seen}" for t in row.trials if not t.right)
    assert row.right is not None
    assert row.right >= LEAST_RIGHT[task][name], f"{line(row)}\n{wrong}"


def test_small_model_draws_clean_images():
    rng = random.Random(2)
    examples = [sample(rng, "t2i1", "held_out", detail="full") for _ in range(8)]
    prompts = [str(example.inputs[0]) for example in examples]
    results = built_in().text_to_image(prompts, seed=list(range(8)), num_timesteps=TIMESTEPS)
    pairs = [(result.image, example.outputs[0]) for result, example in zip(results, examples, strict=True)]
    errors = [np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean() for a, b in pairs]
    assert 10 * math.log10(255**2 / np.median(errors)) >= LEAST_PSNR


def test_small_model_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= LARGEST


def test_small_model_is_in_the_official_layout():
    names = {path.name for path in CHECKPOINT.iterdir()}
    settings = {"config.json", "llm_config.json", "vit_config.json", "tokenizer_config.json"}
    assert names == settings | {"ema.safetensors", "ae.safetensors", "vocab.json", "merges.txt", "SHA256SUMS"}


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_small_model_is_in_bfloat16(name):
    with safe_open(CHECKPOINT / name, framework="pt") as file:
        wide = {key for key in file.keys() if file.get_slice(key).get_dtype() != "BF16"}  # noqa: SIM118
    assert wide <= {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}


def test_small_model_is_what_was_exported():
    assert {"ema.safetensors", "ae.safetensors"} <= set(verify_checksums(CHECKPOINT))
