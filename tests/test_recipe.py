"""The recipe in examples/shapes: tasks make samples, images are encoded ahead, stages train and are exported."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.evaluation.language import LOOKS, WORDINGS, plain
from bagel.evaluation.samples import reworded, sample
from bagel.loading import load_parts
from bagel.training import ItemMaker, LatentItem, TextItem, ViTItem

FOLDER = Path(__file__).parents[1] / "examples" / "shapes"
sys.path.insert(0, str(FOLDER))
import data as recipe_data  # noqa: E402
import pool as recipe_pool  # noqa: E402
import train as recipe  # noqa: E402

sys.path.remove(str(FOLDER))
SIDE = 64


@pytest.fixture(scope="module")
def parts():
    return load_parts(CHECKPOINT, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def vae_run(parts, tmp_path_factory):
    """The built-in autoencoder as a run of `train.py vae` leaves it."""
    run = tmp_path_factory.mktemp("vae")
    step = run / "0000001"
    step.mkdir()
    save_file(dict(parts[1].state_dict()), step / "ae.safetensors")
    (step / "vae_config.json").write_text(json.dumps(dataclasses.asdict(parts[1].config)))
    return run


@pytest.fixture(scope="module")
def pool(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_pool, "BLOCK", 60)
        recipe_pool.write_pool(folder, ItemMaker(parts[0].config, parts[2]), parts[1], blocks=1, side=SIDE)
    return folder


@pytest.mark.parametrize("task", recipe_data.WEIGHTS)
def test_a_task_shows_its_conditions_then_what_is_learned(parts, task):
    shapes = recipe_data.Shapes(task, ItemMaker(parts[0].config, parts[2]), SIDE)
    items = list(shapes(random.Random(1)))
    learned = [getattr(item, "loss", False) for item in items]
    if task == "qa":
        assert isinstance(items[0], ViTItem)
        assert learned[1:] == [False, True] * recipe_data.QUESTIONS
    elif task == "caption":
        assert learned == [False, False, True]
    else:
        assert learned[-recipe_data.TARGETS :] == [True] * recipe_data.TARGETS
        assert len({id(item) for item in items[-recipe_data.TARGETS :]}) == 1
        assert isinstance(items[-1], LatentItem)
        assert sum(learned) == recipe_data.TARGETS + (task == "think")


def is_plain(scene) -> bool:
    return plain(scene, LOOKS) == scene or plain(scene, {*LOOKS, "relation"}) == scene


def test_other_words_say_the_same():
    rng = random.Random(0)
    for task in ("t2i1", "t2i2", "t2i3", "think"):
        for _ in range(20):
            example = sample(rng, task, side=16)
            other = reworded(rng, example)
            assert (other.scenes, other.outputs[-1]) == (example.scenes, example.outputs[-1])
    beside = sample(rng, "t2i2", side=16, detail="count")
    while len({shape.pair for shape in beside.scenes[0].objects}) < 2:
        beside = sample(rng, "t2i2", side=16, detail="count")
    only = {wording: {name: float(name == wording) for name in WORDINGS[2]} for wording in WORDINGS[2]}
    for wording, weights in only.items():
        assert reworded(rng, beside, weights).detail == wording
    free = next(
        e for e in (sample(rng, "t2i2", side=16, detail="full") for _ in range(99)) if not is_plain(e.scenes[0])
    )
    assert {reworded(rng, free).detail for _ in range(20)} == {"full"}
    with pytest.raises(ValueError, match="weights"):
        reworded(rng, free, only["count"])
    recolored = sample(rng, "edit", side=16, detail="recolor")
    others = [reworded(rng, recolored) for _ in range(20)]
    for other in others:
        assert other.inputs[0] is recolored.inputs[0]
        assert (other.scenes, other.outputs) == (recolored.scenes, recolored.outputs)
    assert len({other.inputs[1] for other in others}) > 4
    chat = sample(rng, "qa", side=16)
    assert reworded(rng, chat) is chat


def test_edits_are_drawn_until_one_is_wanted():
    rng = random.Random(5)
    shapes = recipe_data.Shapes("edit", None, 16)
    edits = [shapes.example(rng) for _ in range(300)]
    dark = [edit for edit in edits if "black" in {scene.background for scene in edit.scenes}]
    assert 0.4 < len(dark) / len(edits) < 0.6, "as many as were asked for, and one in five of the others"
    assert {edit.detail for edit in edits} == set(recipe_data.CHANGED)
    several = [edit for edit in edits if len(edit.scenes[0].objects) > 1]
    assert 0.75 < len(several) / len(edits) < 0.97
    with pytest.raises(ValueError, match="wanted is for edits, got task 'caption'"):
        sample(rng, "caption", side=16, wanted=lambda edit: True)


def test_a_pool_holds_the_latents_of_its_images(parts, pool):
    model, vae, tokenizer = parts
    shapes = recipe_data.Shapes("t2i1", recipe_pool.EncodedMaker(model.config, tokenizer), SIDE)
    examples = recipe_pool.read_pool(pool)["t2i1"]
    targets = recipe_pool.Pooled(shapes, examples)(random.Random(1))[-recipe_data.TARGETS :]
    assert {target.content.shape for target in targets} == {(16, model.config.patch_latent_dim)}
    fresh = sample(random.Random("pool/0"), "t2i1", side=SIDE)  # any image: its latents are of the same scale
    pixels = ItemMaker(model.config, tokenizer).latent(fresh.outputs[0]).content
    with torch.inference_mode():
        z = vae.encode(pixels[None].float() / 127.5 - 1, None)
    assert 0.3 < targets[0].content.std() / z.std() < 3


def test_a_pool_of_another_autoencoder_is_refused(parts, pool):
    other = type(parts[1])(parts[1].config)
    with pytest.raises(SystemExit, match="another autoencoder; choose another folder"):
        recipe_pool.write_pool(pool, ItemMaker(parts[0].config, parts[2]), other, blocks=1, side=SIDE)


def test_a_run_trains_from_the_pool_and_is_exported(pool, vae_run, tmp_path, monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        recipe.main()

    settings = json.dumps({"steps": 2, "warmup": 1, "compile": False, "log_every": 1})
    # As many tokens as it takes for both steps to hold a text to learn.
    common = ("--vae", vae_run, "--pool", pool, "--device", "cpu", "--tokens", 1500, "--set", settings)
    run("model", "--start", CHECKPOINT, "--out", tmp_path / "first", *common)
    run("model", "--start", tmp_path / "first", "--out", tmp_path / "second", *common)
    monkeypatch.setattr(recipe, "tell", lambda *_: None)  # reconstructs hundreds of images
    once = json.dumps({"steps": 1, "warmup": 0, "log_every": 1})
    run("decoder", "--vae", vae_run, "--out", tmp_path / "decoder", "--device", "cpu", "--set", once)
    run("export", "--run", tmp_path / "second", "--vae", tmp_path / "decoder", "--to", tmp_path / "exported")
    log = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(line["ce"] > 0 < line["mse"] for line in log)
    pipe = BagelPipeline.from_pretrained(tmp_path / "exported", device="cpu")
    assert pipe.text_to_image("a red circle", num_timesteps=3, progress=False).image.size == (SIDE, SIDE)
    trained, exported = recipe.trained_vae(tmp_path / "decoder").state_dict(), pipe.vae.state_dict()
    before = recipe.trained_vae(vae_run).state_dict()
    for name in trained:
        assert torch.equal(exported[name], trained[name].bfloat16().to(exported[name].dtype)), name
        assert torch.equal(trained[name], before[name]) == name.startswith("encoder."), name


def test_conditions_are_left_out_as_often_as_stated(parts):
    rng = random.Random(3)
    for task, images in (("t2i2", 0), ("edit", 1), ("frames", 3)):
        shapes = recipe_data.Shapes(task, ItemMaker(parts[0].config, parts[2]), SIDE)
        example = shapes.example(rng)
        kinds = [[type(item) for item in shapes.items(example, rng)] for _ in range(400)]
        without_text = sum(TextItem not in items for items in kinds) / len(kinds)
        assert abs(without_text - recipe_data.DROPPED[task]) < 0.09
        if images:
            seen = [items.count(ViTItem) for items in kinds]
            assert set(seen) == {0, images}
            assert abs(seen.count(0) / len(seen) - recipe_data.IMAGES_DROPPED) < 0.06
