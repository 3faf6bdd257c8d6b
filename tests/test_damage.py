"""Damaged compressed checkpoints: one sentence that names what is wrong, and never other weights without a word."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from checkpoint_variants import TINY, edit_json, make_folder
from compressed import loaded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel import BagelPipeline
from bagel.checkpoint import Checkpoint, CheckpointError, resolve_source
from bagel.checkpoint.convert import JOURNAL, convert_checkpoint
from bagel.cli import main
from bagel.memory.sizes import parse_bytes

LAYER = "language_model.model.layers.1.self_attn.q_proj"
Tensors = dict[str, Tensor]


def refused(folder: Path, **options) -> str:
    """Open and load a folder, which must fail with one sentence; return it."""
    with pytest.raises(CheckpointError) as caught:
        loaded(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(folder: Path, change: Callable[[Tensors], object], metadata: dict[str, str] | None = None) -> Path:
    """Change the tensors of a converted folder in place."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        said = handle.metadata() or {}
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, said | (metadata or {}))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Callable[[str], Path]:
    """Return what converts the small reference checkpoint into a format, once."""
    home = tmp_path_factory.mktemp("sound")

    def convert(to: str) -> Path:
        if not (home / to).exists():
            convert_checkpoint(TINY, home / to, to=to)
        return home / to

    return convert


@pytest.fixture
def converted(tmp_path, sound) -> Callable[[str], Path]:
    """Return what gives a copy of the small reference checkpoint in a format."""
    return lambda to: shutil.copytree(sound(to), tmp_path / to)


# Scales and tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(
    ("to", "end", "value", "says"),
    [
        ("nf4", ".weight.quant_map", 3e38, "does not hold the 16 values of nf4"),
        ("nf4", ".weight.quant_map", float("nan"), "does not hold the 16 values of nf4"),
        ("nf4", ".weight.quant_map", 0.5, "does not hold the 16 values of nf4"),
        ("nf4", ".weight.absmax", -1.0, "negative"),
        ("int8", ".SCB", -1.0, "negative"),
        ("float8", ".weight_scale", -1.0, "negative"),
        ("float8", ".weight_scale", 3e38, "NaN or infinite"),
    ],
)
def test_scales_that_cannot_be_meant_are_named(converted, to, end, value, says, expand):
    folder = edited(converted(to), lambda tensors: tensors[LAYER + end].fill_(value))
    assert says in refused(folder, expand=expand)


@pytest.mark.parametrize(
    "layers",
    [{"format": ["float8_e4m3fn"]}, {"format": 5}],
)
def test_a_format_that_is_no_name_is_refused(converted, layers):
    def undescribed(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(".comfy_quant")]:
            del tensors[key]

    said = {"_quantization_metadata": json.dumps({"layers": {LAYER: layers}})}
    assert "in a damaged way" in refused(edited(converted("float8"), undescribed, said))


def test_descriptions_that_are_nested_too_deep_are_refused(converted):
    deep = {"_quantization_metadata": "[" * 100_000}
    assert "not valid JSON" in refused(edited(converted("float8"), lambda tensors: None, deep))

    def describe(text: bytes) -> Callable[[Tensors], object]:
        key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        return lambda tensors: tensors.update({key: torch.tensor(list(text), dtype=torch.uint8)})

    folder = converted("nf4")
    for text in (b"[" * 100_000, b'{"shape": [1e999, 1], "dtype": "bfloat16"}'):
        assert "in a damaged way" in refused(edited(folder, describe(text)))


def test_an_offset_of_magnitudes_that_is_no_number_is_refused(converted):
    state = {"blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], "nested_offset": "x"}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    folder = converted("nf4")

    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"] = text

    assert "only blocks of 64 and 256 can be read" in refused(edited(folder, change))


def test_a_layout_of_several_numbers_is_refused(converted):
    folder = converted("int8")
    edited(folder, lambda tensors: tensors.update({f"{LAYER}.weight_format": torch.ones(2, dtype=torch.uint8)}))
    assert "in tiles for one kind of GPU" in refused(folder)


# Names and places -----------------------------------------------------------------------------------------------------


def test_a_weight_with_and_without_a_prefix_is_refused(tmp_path):
    def twice(tensors: Tensors) -> Tensors:
        key = f"{LAYER}.weight"
        return tensors | {f"model.{key}": tensors[key] + 1}

    assert f"holds {LAYER}.weight with and without the prefix model." in refused(
        make_folder(tmp_path / "twice", change=twice)
    )


@pytest.mark.parametrize("offset", [0, 32, 2**64 - 32])
def test_a_gguf_tensor_at_the_place_of_another_is_refused(converted, offset):
    folder = converted("gguf-q8_0")
    file = folder / "bagel-q8_0.gguf"
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == f"{LAYER.replace('q_proj', 'k_norm')}.weight")
    content = bytearray(file.read_bytes())
    at = tensor.field.offset + 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4
    assert struct.unpack_from("<Q", content, at)[0] > 32
    struct.pack_into("<Q", content, at, offset)
    file.write_bytes(content)
    assert "its header is damaged, fetch it again" in refused(folder) or offset > 2**63


def test_a_gguf_tensor_of_a_narrower_type_is_refused(converted):
    folder = converted("gguf-q8_0")
    file = folder / "bagel-q8_0.gguf"
    name = f"{LAYER}.bias"
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    content = bytearray(file.read_bytes())
    at = tensor.field.offset + 8 + len(name.encode()) + 4 + 8
    assert struct.unpack_from("<I", content, at)[0] == gguf.GGMLQuantizationType.F32
    struct.pack_into("<I", content, at, gguf.GGMLQuantizationType.Q4_0)
    file.write_bytes(content)
    assert "its header is damaged, fetch it again" in refused(folder)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "llm_config.json"])
def test_a_pipe_is_not_waited_for(converted, name):
    folder = converted("dfloat11")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "it is no file" in refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_configuration_that_is_nested_too_deep_is_named(converted, text):
    folder = converted("dfloat11")
    (folder / "config.json").write_text(text)
    assert "config.json is not valid JSON" in refused(folder)


def test_a_bare_file_is_told_how_to_be_named(converted):
    file = converted("gguf-q8_0") / "bagel-q8_0.gguf"
    for call in (Checkpoint.open, resolve_source):
        with pytest.raises(CheckpointError) as caught:
            call(file)
        assert f"name the folder that holds it, {file.parent}, and the file with weights=" in str(caught.value)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quantize": ["nf4"]}, TypeError, "quantize must be text, got list"),
        ({"quantize": True}, TypeError, "quantize must be text, got bool"),
        ({"quantize": ""}, ValueError, "no format named ''"),
        ({"quantize": "int8", "quantize_parts": None}, TypeError, "quantize_parts must be names of parts"),
        ({"quantize": "int8", "quantize_parts": [["gen"]]}, TypeError, "quantize_parts must be text, got list"),
        ({"quantize": "int8", "quantize_parts": "wall"}, ValueError, "parts of a model are"),
        ({"quantize": "int8", "quantize_parts": ()}, ValueError, "got none"),
        ({"quantize": "nf5"}, ValueError, "no format named 'nf5'"),
        ({"convert": 5}, TypeError, "convert must be called as convert"),
    ],
)
def test_options_of_the_weights_are_checked_before_anything_is_fetched(options, error, says):
    with pytest.raises(error, match=says):
        BagelPipeline.from_pretrained("nobody/nothing-like-this", device="cpu", **options)


@pytest.mark.parametrize("made", [None, 5])
def test_what_a_conversion_returns_must_be_a_module(made):
    with pytest.raises(TypeError, match=r"convert must return a module in the place of connector"):
        BagelPipeline.from_pretrained(TINY, device="cpu", convert=lambda name, linear: made)


@pytest.mark.parametrize("given", [None, 5, True, b"x"])
def test_what_is_no_path_is_refused(tmp_path, given):
    with pytest.raises(TypeError, match="a checkpoint's folder must be a path, got"):
        Checkpoint.open(given)
    with pytest.raises(TypeError, match="the folder to write into must be a path, got"):
        convert_checkpoint(TINY, given, to="bf16")


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="the folder to write into is empty; give"):
        convert_checkpoint(TINY, "", to="bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"max_shard_bytes": "4GB"}, {"max_shard_bytes": True}, {"weights": 5}])
def test_options_of_a_conversion_are_checked(tmp_path, options):
    with pytest.raises(TypeError, match="must be"):
        convert_checkpoint(TINY, tmp_path / "out", to="bf16", **options)
    assert not (tmp_path / "out").exists()


def test_one_part_may_be_named_by_itself():
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu", quantize="int8", quantize_parts="gen", progress=False)
    kinds = {name: type(part).__name__ for name, part in pipe.model.named_modules()}
    assert kinds["decoder.layers.1.gen.attention.qkv_proj"] == "Int8Linear"
    assert kinds["decoder.layers.1.und.attention.qkv_proj"] == "Linear"


def test_what_is_compressed_is_not_quantised_without_a_word(converted):
    folder = converted("nf4")
    with pytest.raises(ValueError, match="compressed already, so there is nothing to store as int8"):
        BagelPipeline.from_pretrained(folder, device="cpu", quantize="int8")
    BagelPipeline.from_pretrained(folder, device="cpu", quantize="int8", expand=True)


# Conversions ----------------------------------------------------------------------------------------------------------


def test_a_conversion_that_was_stopped_at_its_very_beginning_goes_on(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{JOURNAL}.tmp").write_text("{")  # as a full disk or a kill leaves it
    convert_checkpoint(TINY, tmp_path / "out", to="bf16")
    assert not list((tmp_path / "out").glob(".*"))


def stop(name: str, what: str) -> None:
    raise KeyboardInterrupt


def test_other_shards_of_the_same_number_are_another_conversion(tmp_path):
    sizes = (500_000, 480_000)
    for number, size in enumerate(sizes):
        convert_checkpoint(TINY, tmp_path / f"{number}", to="bf16", max_shard_bytes=size)
    names = [[file.name for file in sorted((tmp_path / f"{number}").glob("*.safetensors"))] for number in (0, 1)]
    assert names[0] == names[1]
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(TINY, tmp_path / "out", to="bf16", max_shard_bytes=sizes[0], report=stop)
    with pytest.raises(CheckpointError, match="its source or --shard has changed"):
        convert_checkpoint(TINY, tmp_path / "out", to="bf16", max_shard_bytes=sizes[1])
    convert_checkpoint(TINY, tmp_path / "out", to="bf16", max_shard_bytes=sizes[0])


def test_two_conversions_into_one_folder_do_not_mix(tmp_path):
    def report(name: str, what: str) -> None:
        with pytest.raises(CheckpointError, match="another process is converting into"):
            convert_checkpoint(TINY, tmp_path / "out", to="bf16")

    convert_checkpoint(TINY, tmp_path / "out", to="bf16", report=report)
    loaded(tmp_path / "out")


@pytest.mark.parametrize("text", ['{"settings": [], "done": {}}', "[]", "[" * 100_000, '{"settings": {}}'])
def test_a_damaged_journal_is_named(tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged .*; empty the folder and begin again"):
        convert_checkpoint(TINY, tmp_path / "out", to="bf16")


def test_a_source_that_vanishes_is_named(tmp_path):
    source = make_folder(tmp_path / "source", change=lambda tensors: tensors)
    with pytest.raises(CheckpointError, match=r"ae\.safetensors cannot be read: .*; run the same again to go on"):
        convert_checkpoint(
            source, tmp_path / "out", to="bf16", report=lambda name, what: (source / "ae.safetensors").unlink()
        )
    with pytest.raises(CheckpointError, match="a conversion that is not done"):
        Checkpoint.open(tmp_path / "out")


def test_whoever_stops_listening_is_not_a_full_disk(tmp_path):
    def report(name: str, what: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        convert_checkpoint(TINY, tmp_path / "out", to="bf16", report=report)


def test_a_closed_output_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["convert", str(TINY), str(tmp_path / "out"), "--to", "bf16"]) == 0
    assert "NoneType" not in capsys.readouterr().err


# Absurd numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json"])
def test_absurdly_many_layers_are_refused_at_once(converted, name):
    folder = converted("bf16")
    edit_json(folder / name, num_hidden_layers=10**19)
    assert "says num_hidden_layers 10000000000000000000, but the weights hold 3" in refused(folder)


@pytest.mark.parametrize("size", [10**19, 10**400])
def test_an_autoencoder_of_absurd_sizes_is_refused(converted, size):
    folder = converted("bf16")
    values = json.loads((folder / "config.json").read_text())
    values["vae_config"]["ch_mult"][-1] = size
    (folder / "config.json").write_text(json.dumps(values))
    assert "has sizes that no autoencoder has" in refused(folder)


def test_a_layer_of_an_absurd_number_is_unknown(tmp_path):
    def far(tensors: Tensors) -> Tensors:
        key = f"{LAYER}.bias"
        return tensors | {key.replace("layers.1.", "layers.99999999999."): tensors[key].clone()}

    assert "layers.99999999999.self_attn.q_proj.bias" in refused(make_folder(tmp_path / "far", change=far))


@pytest.mark.parametrize("size", ["9" * 400, 10**400])
def test_a_size_beyond_all_numbers_is_refused(size):
    with pytest.raises(ValueError, match="--shard must be a size"):
        parse_bytes(size, "--shard")
