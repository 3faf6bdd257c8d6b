from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from checkpoint_variants import MOE, TINY, build, load, make_folder, weights_of, without_gen, without_vision
from safetensors.torch import load_file

from bagel.checkpoint import Checkpoint, CheckpointError, inspect_checkpoint, save_checkpoint, verify_checksums
from bagel.tokenizer import Tokenizer


def export(source, folder, **options):
    """Load a checkpoint as it is stored and write it again."""
    checkpoint = Checkpoint.open(source)
    model, vae = load(checkpoint)
    tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    save_checkpoint(folder, model, vae, checkpoint.config, tokenizer, **options)
    return model


@pytest.mark.parametrize("source", [TINY, MOE], ids=["mot", "moe"])
def test_export_of_a_loaded_checkpoint_is_the_same_file(tmp_path, source):
    export(source, tmp_path / "out")
    for name in ("ema.safetensors", "ae.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("source", [TINY, MOE], ids=["mot", "moe"])
def test_export_keeps_the_whole_configuration(tmp_path, source):
    export(source, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == Checkpoint.open(source).config
    assert checkpoint.notes == ()


def test_export_spells_out_every_field(tmp_path):
    export(TINY, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    config = Checkpoint.open(TINY).config
    assert {field.name for field in dataclasses.fields(config)} <= written.keys()
    for name in ("llm_config", "vit_config"):
        part = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert part == written[name]
        assert {field.name for field in dataclasses.fields(getattr(config, name))} <= part.keys()


def test_sharded_export_holds_the_same_tensors_in_small_files(tmp_path):
    out = tmp_path / "out"
    model = export(TINY, out, max_shard_bytes=100_000)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) == int(shards[0].stem[-5:]) > 5
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert {key: torch.equal(tensor, tensors[key]) for key, tensor in weights_of().items()} == dict.fromkeys(
        tensors, True
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    again, _ = load(Checkpoint.open(out))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("change", [without_gen, without_vision])
def test_export_of_half_a_model_comes_back(tmp_path, change):
    source = make_folder(tmp_path / "in", change=change)
    export(source, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config.visual_gen == (tmp_path / "out" / "ae.safetensors").exists()
    assert checkpoint.lacks == Checkpoint.open(source).lacks
    load(checkpoint)


def test_export_in_another_dtype_is_smaller(tmp_path):
    checkpoint = Checkpoint.open(TINY)
    model, vae = load(checkpoint, dtype=torch.float32)
    save_checkpoint(tmp_path / "out", model, vae, checkpoint.config, Tokenizer.from_pretrained(TINY))
    again, _ = load(Checkpoint.open(tmp_path / "out"), dtype=torch.bfloat16)
    first, _ = load(checkpoint)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_export_refuses_to_overwrite_unless_told(tmp_path):
    export(TINY, tmp_path / "out")
    before = (tmp_path / "out" / "ema.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=r"already holds config\.json.*overwrite=True"):
        export(TINY, tmp_path / "out")
    assert (tmp_path / "out" / "ema.safetensors").stat().st_mtime_ns == before
    export(TINY, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "ema.safetensors").stat().st_mtime_ns > before


def test_export_refuses_to_leave_other_weights_beside_its_own(tmp_path):
    export(TINY, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"other weights \(ema\.safetensors\)"):
        export(TINY, tmp_path / "out", max_shard_bytes=10**6, overwrite=True)


def test_export_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bagel.checkpoint.export._write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        export(TINY, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_refuses_a_model_of_another_configuration(tmp_path):
    model, vae = build(Checkpoint.open(MOE))
    with pytest.raises(CheckpointError, match="another configuration"):
        save_checkpoint(tmp_path / "out", model, vae, Checkpoint.open(TINY).config, Tokenizer.from_pretrained(TINY))


def test_checksums_cover_every_file_and_notice_one_bit(tmp_path):
    export(TINY, tmp_path / "out")
    names = verify_checksums(tmp_path / "out")
    assert sorted([*names, "SHA256SUMS"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    file = tmp_path / "out" / "ae.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "out" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt \(No such file.*ae\.safetensors \(its content differs\)"):
        verify_checksums(tmp_path / "out")


@pytest.mark.parametrize(("text", "says"), [(None, "has no SHA256SUMS"), ("", "lists no files")])
def test_checksums_without_a_list_verify_nothing(tmp_path, text, says):
    folder = make_folder(tmp_path / "c")
    if text is not None:
        (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        verify_checksums(folder)


def test_inspect_counts_every_part():
    text = inspect_checkpoint(TINY)
    tensors = weights_of()
    gen = [tensor for key, tensor in tensors.items() if "_moe_gen" in key]
    assert f"{'decoder, gen expert':<26}{len(gen):>8}{sum(t.numel() for t in gen):>17,}" in text
    everything = [*tensors.values(), *weights_of(name="ae").values()]
    assert f"all{len(everything):>31}{sum(t.numel() for t in everything):>17,}" in text
    assert all(word in text for word in ("vision encoder", "BF16, F32", "up to 256x256 pixels", "host: yes"))


def test_inspect_says_what_is_missing_and_noted(tmp_path):
    folder = make_folder(tmp_path / "c", change=without_vision, without=("ae.safetensors", "vocab.json"))
    (folder / "config.json").unlink()
    text = inspect_checkpoint(folder)
    assert "no ae.safetensors" in text
    assert "no tokenizer" in text
    assert "no vision half" in text
    assert "no config.json says interpolate_pos" in text


def test_inspect_judges_memory_by_what_is_free(monkeypatch):
    monkeypatch.setattr("bagel.checkpoint.report.free_places", lambda: {"host": 0, "GPU 0": 3_500_000})
    lines = [line for line in inspect_checkpoint(TINY).splitlines() if "host: no" in line]
    assert [line.partition("GPU 0: ")[2] for line in lines] == ["the weights, but little more", "no", "yes", "yes"]
