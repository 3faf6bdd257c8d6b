from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from checkpoint_variants import (
    MOE,
    TINY,
    build,
    edit_json,
    load,
    make_folder,
    open_and_load,
    weights_of,
    without_gen,
    without_keys,
    without_vision,
)
from PIL import Image
from safetensors.torch import save_file

from bagel import BagelPipeline
from bagel.checkpoint import Checkpoint, CheckpointError, official_shapes
from bagel.checkpoint.measure import measure
from bagel.checkpoint.resolve import Resolver
from bagel.checkpoint.stated import read_stated
from bagel.config import BAGEL_7B, ImageTransform


@pytest.fixture(scope="module")
def tiny_state():
    return open_and_load(TINY).state_dict()


def assert_same(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float()), name


def test_load_puts_q_k_v_in_rows_of_one_parameter(tiny_state):
    stored = weights_of()
    for index, part in ((slice(0, 64), "q"), (slice(64, 96), "k"), (slice(96, 128), "v")):
        row = tiny_state["decoder.layers.2.gen.attention.qkv_proj.weight"][index]
        assert torch.equal(row, stored[f"language_model.model.layers.2.self_attn.{part}_proj_moe_gen.weight"])


def test_load_puts_gate_before_up(tiny_state):
    stored = weights_of()
    fused = tiny_state["decoder.layers.1.und.mlp.gate_up_proj.weight"]
    parts = [stored[f"language_model.model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(fused, torch.cat(parts))


def test_load_casts_weights_but_keeps_tables():
    model, vae = load(Checkpoint.open(TINY), dtype=torch.float16, vae_dtype=torch.float32)
    tables = {"vit_pos_embed.table", "latent_pos_embed.table"}
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtypes.pop(name) for name in tables} == {torch.float32}
    assert set(dtypes.values()) == {torch.float16}
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float32}


def test_load_leaves_nothing_on_meta_and_weights_trainable():
    model, vae = load(Checkpoint.open(MOE))
    for module in (model, vae):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_load_in_many_small_steps_gives_the_same_bits(tiny_state, monkeypatch):
    monkeypatch.setattr("bagel.checkpoint.load.STEP_BYTES", 1000)
    monkeypatch.setattr("bagel.checkpoint.sources.base.REOPEN_BYTES", 5000)
    assert_same(open_and_load(TINY), tiny_state)


def test_load_refuses_a_model_of_another_configuration():
    checkpoint = Checkpoint.open(TINY)
    model, _ = build(Checkpoint.open(MOE))
    with pytest.raises(CheckpointError, match=r"another configuration.*build it from checkpoint\.config"):
        checkpoint.load(model)


def test_open_takes_every_field_from_an_export():
    config = Checkpoint.open(MOE).config
    stated = json.loads((MOE / "config.json").read_text())
    assert config.interpolate_pos is True
    assert config.llm_config.rope_theta == stated["llm_config"]["rope_theta"] == 1e5
    assert config.vae_config.ch_mult == (1, 1, 1, 2)
    assert config.vae_image_transform == ImageTransform(192, 64, 16)
    assert config.vit_config.rope is True


@pytest.mark.parametrize("name", ["model.safetensors", "model_bf16.safetensors"])
def test_open_reads_other_names_of_the_weights(tmp_path, tiny_state, name):
    folder = make_folder(tmp_path / "c", name=name)
    assert Checkpoint.open(folder).weights.label == name
    assert_same(open_and_load(folder), tiny_state)


def test_open_gives_zebra_its_own_vision_rule(tmp_path):
    folder = make_folder(tmp_path / "c", name="model_bf16.safetensors")
    edit_json(folder / "config.json", vit_image_transform=None)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.vit_image_transform == ImageTransform(980, 512, 14)
    assert any("Bagel-Zebra-CoT" in note for note in checkpoint.notes)


def test_open_reads_shards(tmp_path, tiny_state):
    folder = make_folder(tmp_path / "c", name=None)
    tensors = weights_of()
    weight_map = {}
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(open_and_load(folder), tiny_state)


@pytest.mark.parametrize(("weights", "factor"), [(None, 2.0), ("model.safetensors", 3.0)])
def test_open_reads_either_file_of_a_trainer_step(tmp_path, tiny_state, weights, factor):
    folder = tmp_path / "0001000"
    folder.mkdir()
    tensors = {key: tensor.float() for key, tensor in weights_of().items()}
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, folder / "ema.safetensors")
    save_file({key: tensor * 3 for key, tensor in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder, base=TINY, weights=weights)
    model, _ = load(checkpoint, dtype=torch.bfloat16)
    assert checkpoint.tokenizer_folder == TINY
    assert checkpoint.config == Checkpoint.open(TINY).config
    name = "decoder.layers.0.und.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[name], (tiny_state[name].float() * factor).bfloat16())


def test_open_finds_the_autoencoder_in_its_own_folder(tmp_path):
    folder = make_folder(tmp_path / "c", without=("ae.safetensors",))
    (folder / "vae").mkdir()
    shutil.copy(TINY / "ae.safetensors", folder / "vae" / "ae.safetensors")
    assert Checkpoint.open(folder).vae_file == folder / "vae" / "ae.safetensors"


def test_open_reads_the_autoencoders_sizes_off_its_file(tmp_path):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / "config.json", vae_config=None)
    assert Checkpoint.open(folder).config.vae_config == Checkpoint.open(TINY).config.vae_config


def test_open_without_vision_draws_and_says_so(tmp_path, tiny_state):
    checkpoint = Checkpoint.open(make_folder(tmp_path / "c", change=without_vision))
    assert not checkpoint.config.visual_und
    assert checkpoint.config.visual_gen
    assert any("vision half: it cannot see images" in sentence for sentence in checkpoint.lacks)
    model, vae = load(checkpoint)
    assert vae is not None
    assert_same(model, {name: t for name, t in tiny_state.items() if not name.startswith(("vit", "connector"))})


def test_open_without_gen_reads_and_says_so(tmp_path):
    checkpoint = Checkpoint.open(make_folder(tmp_path / "c", change=without_gen, without=("ae.safetensors",)))
    assert not checkpoint.config.visual_gen
    assert checkpoint.vae is None
    assert any("generating half: it cannot draw" in sentence for sentence in checkpoint.lacks)
    assert_same(load(checkpoint)[0], open_and_load(TINY, visual_gen=False).state_dict())


def test_open_passes_over_idle_gen_experts(tmp_path):
    change = without_keys("time_embedder", "vae2llm", "llm2vae", "latent_pos_embed")
    folder = make_folder(tmp_path / "c", change=change, without=("ae.safetensors",))
    edit_json(folder / "config.json", visual_gen=False)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.config.visual_gen
    assert any("gen experts are passed over" in note for note in checkpoint.notes)


@pytest.mark.parametrize("half", ["visual_gen", "visual_und"])
def test_open_leaves_out_a_half_that_is_there(half):
    checkpoint = Checkpoint.open(TINY, **{half: False})
    assert getattr(checkpoint.config, half) is False
    assert any(f"{half}=False" in sentence for sentence in checkpoint.lacks)
    load(checkpoint)


def test_open_refuses_a_half_that_is_not_there(tmp_path):
    folder = make_folder(tmp_path / "c", change=without_vision)
    with pytest.raises(CheckpointError, match=r"visual_und=True, but .* has no vision half"):
        Checkpoint.open(folder, visual_und=True)


BROKEN = '{"interpolate_pos": true,}'


def resolved(folder, config, **changed):
    """Resolve the configuration of weights with the sizes of `config`, of which only the shapes are made."""
    stated = read_stated(folder)
    resolver = Resolver(measure(official_shapes(dataclasses.replace(config, **changed))), stated, list(stated.notes))
    return resolver.config(config.vae_config, weights_name="ema.safetensors"), resolver.notes


def test_a_broken_config_json_is_passed_over_for_the_released_sizes(tmp_path):
    (tmp_path / "config.json").write_text(BROKEN)
    config, notes = resolved(tmp_path, BAGEL_7B)
    assert config == BAGEL_7B
    assert len(notes) == 1
    assert "config.json is not valid JSON" in notes[0]


@pytest.mark.parametrize("changed", [{"max_latent_size": 32}, {"vit_max_num_patch_per_side": 35}])
def test_a_broken_config_json_is_refused_for_other_tables(tmp_path, changed):
    (tmp_path / "config.json").write_text(BROKEN)
    with pytest.raises(CheckpointError, match="not the released 7B's sizes"):
        resolved(tmp_path, BAGEL_7B, **changed)


def test_open_refuses_a_broken_config_json_of_other_sizes(tmp_path):
    folder = make_folder(tmp_path / "c", source=MOE)
    (folder / "config.json").write_text(BROKEN)
    for base in (None, TINY):
        with pytest.raises(
            CheckpointError, match=r"config\.json is not valid JSON \(.*column.*\).*repair.*or delete it"
        ):
            Checkpoint.open(folder, base=base)


def test_open_passes_over_a_broken_config_json_of_a_base(tmp_path):
    base = make_folder(tmp_path / "b")
    (base / "config.json").write_text(BROKEN)
    folder = make_folder(tmp_path / "c")
    assert Checkpoint.open(folder, base=base).config == Checkpoint.open(folder).config
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="b/config"):
        Checkpoint.open(folder, base=base)


def test_open_without_config_json_notes_its_defaults_and_images_fit(tmp_path):
    folder = make_folder(tmp_path / "c", without=("config.json",))
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    assert (config.max_latent_size, config.vit_max_num_patch_per_side) == (16, 10)
    assert config.interpolate_pos is False
    patch = config.vit_config.patch_size
    assert config.vae_image_transform == ImageTransform(256, 256, 16)
    assert config.vit_image_transform == ImageTransform(10 * patch, min(224, 10 * patch), patch)
    for name in ("interpolate_pos", "vae_image_transform", "vit_image_transform"):
        assert sum(f"no config.json says {name}" in note for note in checkpoint.notes) == 1
    pipe = BagelPipeline.from_pretrained(folder, device="cpu")
    assert pipe.edit(Image.new("RGB", (2000, 700)), "red", num_timesteps=2, seed=0).image.width == 256


def test_open_takes_sizes_from_the_weights_and_names_the_file_that_is_wrong(tmp_path):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / "config.json", max_latent_size=32)
    edit_json(folder / "llm_config.json", vocab_size=152064)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.max_latent_size == 16
    assert checkpoint.config.llm_config.vocab_size == 448
    assert any(note.startswith("config.json says max_latent_size 32") for note in checkpoint.notes)
    assert any(note.startswith("llm_config.json says vocab_size 152064") for note in checkpoint.notes)


def test_open_takes_the_autoencoders_sizes_from_its_file(tmp_path):
    folder = make_folder(tmp_path / "c")
    vae = json.loads((folder / "config.json").read_text())["vae_config"]
    edit_json(folder / "config.json", vae_config=vae | {"num_res_blocks": 2, "scale_factor": 0.5})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.vae_config.num_res_blocks == 1
    assert checkpoint.config.vae_config.scale_factor == 0.5
    assert any("says num_res_blocks 2" in note for note in checkpoint.notes)


def test_open_finds_the_layer_kind_from_the_keys(tmp_path):
    for source, kind in ((TINY, "Qwen2MoTDecoderLayer"), (MOE, "Qwen2MoEDecoderLayer")):
        folder = make_folder(tmp_path / kind, source=source)
        for name in ("llm_config.json", "config.json"):
            edit_json(folder / name, layer_module=None, qk_norm=None, llm_config=None)
        config = Checkpoint.open(folder).config.llm_config
        assert config.layer_module == kind
        assert config.qk_norm == (source == TINY)


def test_open_reads_a_dense_model_that_draws(tmp_path):
    folder = make_folder(tmp_path / "c", change=without_keys("_moe_gen"))
    edit_json(folder / "llm_config.json", layer_module="Qwen2DecoderLayer")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.visual_gen
    assert "decoder.layers.0.gen.input_norm.weight" not in load(checkpoint)[0].state_dict()


def test_open_reads_tied_embeddings(tmp_path):
    folder = make_folder(tmp_path / "c", change=without_keys("lm_head"))
    edit_json(folder / "llm_config.json", tie_word_embeddings=True)
    assert "decoder.lm_head.weight" not in open_and_load(folder).state_dict()


def test_open_uses_the_released_values_only_for_the_released_sizes(tmp_path):
    folder = make_folder(tmp_path / "c", without=("llm_config.json", "config.json"))
    with pytest.raises(CheckpointError, match=r"no file says rope_theta.*llm_config\.json.*base="):
        Checkpoint.open(folder)
    assert BAGEL_7B.llm_config.rope_theta == 1e6


def test_latents_may_lie_on_either_side_of_zero(tmp_path):
    folder = make_folder(tmp_path / "c")
    vae = json.loads((folder / "config.json").read_text())["vae_config"]
    edit_json(folder / "config.json", vae_config=vae | {"shift_factor": -0.25})
    assert Checkpoint.open(folder).config.vae_config.shift_factor == -0.25
    edit_json(folder / "config.json", vae_config=vae | {"scale_factor": -1.0})
    with pytest.raises(CheckpointError, match=r"scale_factor must be a positive number, got -1\.0"):
        Checkpoint.open(folder)
