from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_variants import MOE, TINY, build, edit_json, load, make_folder, weights_of, without_gen, without_keys
from safetensors.torch import save_file

from bagel.checkpoint import Checkpoint, CheckpointError

UP = "language_model.model.layers.1.mlp.up_proj.weight"
LAST = "language_model.model.layers.2."


def error_of(folder: Path, **options) -> str:
    """Open and load a folder and return what the error says."""
    with pytest.raises(CheckpointError) as caught:
        load(Checkpoint.open(folder, **options))
    return str(caught.value)


def changed(key: str, tensor: torch.Tensor):
    """Replace or add one tensor."""
    return lambda tensors: tensors | {key: tensor}


def test_error_names_a_missing_key_its_file_and_shape(tmp_path):
    message = error_of(make_folder(tmp_path / "c", change=without_keys(UP)))
    assert f"ema.safetensors lacks {UP}, wanted with shape 128x64" in message
    assert "more tensors" not in message


def test_error_names_an_unknown_key(tmp_path):
    message = error_of(make_folder(tmp_path / "c", change=changed("rotary.inv_freq", torch.ones(8))))
    assert "ema.safetensors holds rotary.inv_freq 8, which the model does not know" in message


@pytest.mark.parametrize("shape", [(129, 64), (128, 65), (128,), (64, 128)])
def test_error_names_one_wrong_shape_and_nothing_else(tmp_path, shape):
    message = error_of(make_folder(tmp_path / "c", change=changed(UP, torch.ones(shape))))
    found = "x".join(map(str, shape))
    assert message.partition(". llm_config")[0].endswith(
        f"ema.safetensors holds {UP} with shape {found}, wanted 128x64"
    )


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("language_model.model.embed_tokens.weight", (447, 64), "448x64"),
        ("latent_pos_embed.pos_embed", (255, 64), "256x64"),
        ("vit_pos_embed.pos_embed", (99, 64), "100x64"),
        ("connector.fc1.weight", (64, 47), "64x48"),
        ("vae2llm.weight", (64, 60), "64x64"),
    ],
)
def test_error_blames_the_tensor_that_disagrees_with_all_others(tmp_path, key, shape, wanted):
    message = error_of(make_folder(tmp_path / "c", change=changed(key, torch.ones(shape))))
    assert f"{key} with shape {shape[0]}x{shape[1]}, wanted {wanted}" in message
    assert ";" not in message.partition(". llm_config")[0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_error_names_a_tensor_that_is_no_floating_point(tmp_path, dtype):
    message = error_of(make_folder(tmp_path / "c", change=changed(UP, torch.ones(128, 64).to(dtype))))
    assert re.search(rf"holds {re.escape(UP)} as \w+, wanted floating point", message)


def test_error_for_a_layer_that_is_not_there_names_the_file_that_counts_it(tmp_path):
    message = error_of(make_folder(tmp_path / "c", change=without_keys(LAST)))
    assert f"lacks {LAST}input_layernorm.weight" in message
    assert "llm_config.json says 3 layers" in message


def test_error_for_more_layers_than_stated_names_both(tmp_path):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / "llm_config.json", num_hidden_layers=2)
    message = error_of(folder)
    assert f"holds {LAST}" in message
    assert "llm_config.json says 2 layers" in message


def test_error_counts_the_vision_layer_that_is_not_stored(tmp_path):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / "vit_config.json", num_hidden_layers=4)
    message = error_of(folder)
    assert "lacks vit_model.vision_model.encoder.layers.2." in message
    assert "vit_config.json says 4 layers" in message


def test_error_lists_few_keys_and_counts_the_rest(tmp_path):
    message = error_of(make_folder(tmp_path / "c", change=without_keys("mlp_moe_gen")))
    assert message.count("mlp_moe_gen") == 5
    assert "and 4 more tensors" in message


def test_error_for_a_rotary_vit_that_nobody_stated(tmp_path):
    folder = make_folder(tmp_path / "c", source=MOE)
    for name in ("vit_config.json", "config.json"):
        edit_json(folder / name, rope=None, vit_config=None)
    assert "lacks vit_model.vision_model.embeddings.position_embedding.weight" in error_of(folder)


def test_error_for_a_missing_autoencoder_tells_the_ways_out(tmp_path):
    folder = make_folder(tmp_path / "c", without=("ae.safetensors",))
    message = error_of(folder)
    assert all(part in message for part in ("ae.safetensors", "fetch it", "base=...", "visual_gen=False"))
    load(Checkpoint.open(folder, visual_gen=False))
    load(Checkpoint.open(folder, base=TINY))


def test_error_names_a_missing_shard(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    tensors = weights_of()
    save_file(dict(list(tensors.items())[:70]), folder / "model-00001-of-00002.safetensors")
    weight_map = {key: f"model-0000{1 + (i >= 70)}-of-00002.safetensors" for i, key in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = error_of(folder)
    assert re.search(r"the shard .*model-00002-of-00002\.safetensors is missing; .* 69 tensors there", message)


def test_error_for_a_shard_that_lacks_what_the_index_promises(tmp_path):
    folder = make_folder(tmp_path / "c", name="model-00001-of-00001.safetensors", change=without_keys(UP))
    weight_map = dict.fromkeys(weights_of(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"model-00001-of-00001.safetensors lacks {UP}" in error_of(folder)


@pytest.mark.parametrize("name", ["../ema.safetensors", "/etc/passwd", "evil.bin"])
def test_error_for_an_index_that_points_elsewhere(tmp_path, name):
    folder = make_folder(tmp_path / "c", name=None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: name}}))
    assert "not a safetensors file of the same folder" in error_of(folder)


@pytest.mark.parametrize("size", [0, 7, 500, -1, -1000])
def test_error_for_a_truncated_file_names_it_and_its_size(tmp_path, size):
    file = make_folder(tmp_path / "c") / "ema.safetensors"
    content = file.read_bytes()[:size]
    file.write_bytes(content)
    message = error_of(tmp_path / "c")
    assert f"{file} ({len(content)} bytes) is no whole safetensors file" in message
    assert "fetch it again" in message


def test_flipped_bits_in_a_header_are_errors(tmp_path):
    file = make_folder(tmp_path / "c") / "ema.safetensors"
    content = bytearray(file.read_bytes())
    first = content.index(b'"connector')
    for place in range(first, 8 + int.from_bytes(content[:8], "little"), 499):
        content[place] ^= 0x04
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
            Checkpoint.open(tmp_path / "c")
        content[place] ^= 0x04


def test_error_for_a_file_that_changed_since_it_was_opened(tmp_path):
    folder = make_folder(tmp_path / "c")
    checkpoint = Checkpoint.open(folder)
    save_file(without_gen(weights_of()), folder / "ema.safetensors")
    model, vae = build(checkpoint)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors changed since it was opened"):
        checkpoint.load(model, vae)


def test_error_for_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bagel.checkpoint.files.safe_open", refuse)
    assert "may not be read by this user" in error_of(make_folder(tmp_path / "c"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_error_names_weights_that_are_not_finite(tmp_path, value):
    def spoil(tensors):
        tensors[UP][127, 63] = value
        tensors["llm2vae.bias"][3] = value
        return tensors

    message = error_of(make_folder(tmp_path / "c", change=spoil))
    assert "ema.safetensors has values that are NaN or infinite" in message
    assert UP in message
    assert "llm2vae.bias" in message


def test_error_for_weights_too_large_for_the_wanted_dtype(tmp_path):
    folder = make_folder(tmp_path / "c", change=changed("llm2vae.bias", torch.full((64,), 1e6)))
    with pytest.raises(CheckpointError, match=r"NaN or infinite as float16.*llm2vae\.bias.*wider dtype"):
        load(Checkpoint.open(folder), dtype=torch.float16)


def test_error_before_a_host_runs_out_of_memory(monkeypatch):
    checkpoint = Checkpoint.open(TINY)
    model, _ = build(checkpoint)
    monkeypatch.setattr("bagel.checkpoint.load.free_bytes", lambda device: 1_000_000)
    with pytest.raises(MemoryError, match=r"Bagel takes 0\.0 GiB, more than cpu has free .*visual_gen=False"):
        checkpoint.load(model, dtype=torch.float32)
    checkpoint.load(model, dtype=torch.bfloat16)


def test_error_for_an_allocation_that_fails_names_the_size(monkeypatch):
    checkpoint = Checkpoint.open(TINY)
    model, _ = build(checkpoint)

    def full(*args, **options):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 PiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=r"Bagel takes 0\.0 GiB, more than cpu has free .*narrower dtype"):
        checkpoint.load(model, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "is a pickle"),
        ("ema.pt", "is a pickle"),
        ("bagel-q4.gguf", "is no whole GGUF file"),
        ("model_int8.safetensors", "is no whole safetensors file"),
    ],
)
def test_error_for_files_that_are_not_read(tmp_path, name, reason):
    folder = make_folder(tmp_path / "c", name=None)
    (folder / name).write_bytes(b"\0" * 64)
    for options in ({}, {"weights": name}):
        message = error_of(folder, **options)
        assert f"{folder / name} " in message
        assert reason in message


def test_error_for_compressed_tensors_in_an_ordinary_name(tmp_path):
    change = changed(UP.replace("weight", "encoded_exponent"), torch.zeros(9, dtype=torch.uint8))
    message = error_of(make_folder(tmp_path / "c", change=change, name="model.safetensors"))
    assert "language_model.model.layers.1.mlp.up_proj" in message


def test_error_for_a_folder_without_weights_lists_what_is_there(tmp_path):
    message = error_of(make_folder(tmp_path / "c", name=None))
    assert "wanted one of ema.safetensors" in message
    assert "ae.safetensors, config.json" in message


def test_error_for_a_folder_that_is_not_there(tmp_path):
    assert "does not exist" in error_of(tmp_path / "nowhere")
    assert "is a file; name the folder" in error_of(TINY / "ema.safetensors")


def test_error_for_a_missing_tokenizer_waits_until_it_is_wanted(tmp_path):
    folder = make_folder(tmp_path / "c", without=("vocab.json", "merges.txt", "tokenizer_config.json"))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"no tokenizer.*base="):
        _ = checkpoint.tokenizer_folder


@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_error_names_a_broken_part_config(tmp_path, name, text):
    folder = make_folder(tmp_path / "c")
    (folder / name).write_text(text)
    assert re.search(rf"{name} (is not valid JSON|must hold a JSON object)", error_of(folder))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llm_config.json", "hidden_size", "64"),
        ("llm_config.json", "rope_theta", -1),
        ("llm_config.json", "num_attention_heads", 0),
        ("llm_config.json", "hidden_act", "relu"),
        ("llm_config.json", "rope_scaling", {"factor": 4}),
        ("llm_config.json", "layer_module", "Mamba"),
        ("vit_config.json", "rope", 1),
        ("vit_config.json", "hidden_act", "gelu"),
        ("config.json", "interpolate_pos", "yes"),
        ("config.json", "vae_config", {"ch_mult": [1], "scale_factor": "a"}),
        ("config.json", "vit_image_transform", {"max_image_size": 980}),
    ],
)
def test_error_names_the_file_and_field_of_a_bad_value(tmp_path, name, field, value):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / name, **{field: value})
    message = error_of(folder)
    assert name.removesuffix(".json") in message
    assert field in message


def test_error_for_a_damaged_autoencoder_names_its_file(tmp_path):
    folder = make_folder(tmp_path / "c")
    vae = weights_of(name="ae")
    del vae["decoder.up.3.block.0.conv1.weight"]
    save_file(vae, folder / "ae.safetensors")
    assert "ae.safetensors lacks decoder.up.3.block.0.conv1.weight" in error_of(folder)


def test_error_for_a_file_that_is_no_autoencoder(tmp_path):
    folder = make_folder(tmp_path / "c")
    edit_json(folder / "config.json", vae_config=None)
    save_file({"x": torch.ones(2)}, folder / "ae.safetensors")
    assert "ae.safetensors is not an autoencoder file" in error_of(folder)
