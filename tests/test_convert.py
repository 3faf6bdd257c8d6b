"""Checkpoints converted into every format: what is written, that it loads, and what happens when it is interrupted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from checkpoint_variants import MOE, TINY, edit_json, make_folder, weights_of, without_gen
from compressed import dense_of, is_matrix, loaded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bagel import BagelPipeline
from bagel.checkpoint import Checkpoint, CheckpointError, targets, verify_checksums
from bagel.checkpoint.convert import JOURNAL, NAMES, convert_checkpoint
from bagel.checkpoint.export import official_tensors
from bagel.cli import main
from bagel.demo import CHECKPOINT

ROOT = Path(__file__).parent.parent
LOSSY = [name for name in NAMES if name not in ("dfloat11", "bf16", "gguf-bf16")]
ERRORS = {"nf4": 0.12, "int8": 0.009, "float8": 0.035, "gguf-q8_0": 0.008, "gguf-q5_0": 0.06, "gguf-q4_0": 0.12}
"""Relative error of a matrix, at most; measured: 0.096, 0.0066, 0.028, 0.0056, 0.045, 0.090."""


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("source", [TINY, MOE], ids=["mot", "moe"])
def test_what_is_converted_loads_and_holds_the_same(tmp_path, source, to):
    names = convert_checkpoint(source, tmp_path / "out", to=to)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert set(verify_checksums(tmp_path / "out")) == set(names) - {"SHA256SUMS"}
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == Checkpoint.open(source).config
    assert checkpoint.weights.format == {"bf16": "safetensors"}.get(to, to.partition("-")[0])
    found = official_tensors(loaded(tmp_path / "out", expand=True), checkpoint.config)
    plain = official_tensors(loaded(source), checkpoint.config)
    for key, wanted in plain.items():
        if to in LOSSY and is_matrix(key):
            error = (found[key] - wanted).norm() / wanted.norm()
            assert 1e-4 < error < ERRORS[to], key
        else:
            assert torch.equal(found[key], wanted), key


@pytest.mark.parametrize("to", NAMES)
def test_what_is_converted_stays_compressed(tmp_path, to):
    convert_checkpoint(TINY, tmp_path / "out", to=to)
    kept, expanded = loaded(tmp_path / "out"), loaded(tmp_path / "out", expand=True)
    config = Checkpoint.open(tmp_path / "out").config
    state = official_tensors(expanded, config)
    for key, target in targets(config).items():
        path, _, leaf = target.parameter.rpartition(".")
        module = kept.get_submodule(path)
        if leaf == "weight" and hasattr(module, "in_features"):
            rows = dense_of(module)[target.start : target.start + target.shape[0]]
            assert torch.equal(rows, state[key]), key
    sizes = [sum(t.nbytes for t in model.decoder.layers.state_dict().values()) for model in (kept, expanded)]
    assert sizes[0] < {"bf16": 1.01, "gguf-bf16": 1.01, "dfloat11": 1.01}.get(to, 0.5) * sizes[1]


def test_bf16_is_the_official_file(tmp_path):
    convert_checkpoint(TINY, tmp_path / "out", to="bf16")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (TINY / "ema.safetensors").read_bytes()


def test_dfloat11_and_back_is_the_official_file(tmp_path):
    convert_checkpoint(TINY, tmp_path / "df11", to="dfloat11")
    config = json.loads((tmp_path / "df11" / "config.json").read_text())
    assert config["dfloat11_config"]["threads_per_block"] == [512]
    assert (tmp_path / "df11" / "language_model_model_layers_2.safetensors").is_file()
    convert_checkpoint(tmp_path / "df11", tmp_path / "back", to="bf16")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (TINY / "ema.safetensors").read_bytes()


def test_dfloat11_in_one_file_without_a_configuration(tmp_path):
    convert_checkpoint(TINY, tmp_path / "df11", to="dfloat11")
    tensors = {}
    for file in (tmp_path / "df11").glob("*.safetensors"):
        if file.name != "ae.safetensors":
            tensors |= load_file(file)
    folder = make_folder(tmp_path / "one", name=None)
    save_file(tensors, folder / "bagel-df11.safetensors")
    found = official_tensors(loaded(folder, expand=True), Checkpoint.open(folder).config)
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in weights_of().items())


def test_half_a_model_is_converted(tmp_path):
    source = make_folder(tmp_path / "in", change=without_gen)
    for to in ("dfloat11", "int8"):
        convert_checkpoint(source, tmp_path / to, to=to)
        assert not Checkpoint.open(tmp_path / to).config.visual_gen
        loaded(tmp_path / to)


def test_a_half_can_be_left_out_of_what_was_converted(tmp_path):
    for to in ("dfloat11", "nf4", "gguf-q8_0"):
        convert_checkpoint(TINY, tmp_path / to, to=to)
        checkpoint = Checkpoint.open(tmp_path / to, visual_gen=False)
        assert not checkpoint.config.visual_gen


# Layouts --------------------------------------------------------------------------------------------------------------


def test_nf4_is_what_bitsandbytes_reads(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    convert_checkpoint(TINY, tmp_path / "out", to="nf4")
    tensors, plain = load_file(tmp_path / "out" / "model.safetensors"), weights_of()
    for key in filter(is_matrix, plain):
        own = {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}
        state = functional.QuantState.from_dict({name: t.clone() for name, t in own.items()}, torch.device("cpu"))
        assert state.shape == plain[key].shape
        codes, wanted = functional.quantize_4bit(plain[key], quant_type="nf4", blocksize=64)
        assert torch.equal(tensors[key], codes)
        assert torch.equal(state.absmax, wanted.absmax)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_int8_is_what_bitsandbytes_writes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    convert_checkpoint(TINY, tmp_path / "out", to="int8")
    tensors, plain = load_file(tmp_path / "out" / "model.safetensors"), weights_of()
    for key in filter(is_matrix, plain):
        values, scales, _ = functional.int8_vectorwise_quant(plain[key].half())
        name = key.removesuffix(".weight")
        torch.testing.assert_close(tensors[f"{name}.SCB"], scales.float(), rtol=1e-6, atol=0)
        assert (tensors[key].int() - values.int()).abs().max() <= 1
        assert tensors[f"{name}.weight_format"].item() == 0


def test_float8_names_its_format_for_each_layer(tmp_path):
    convert_checkpoint(TINY, tmp_path / "out", to="float8")
    tensors, plain = load_file(tmp_path / "out" / "model.safetensors"), weights_of()
    for key in filter(is_matrix, plain):
        name = key.removesuffix(".weight")
        assert tensors[key].dtype == torch.float8_e4m3fn
        assert torch.equal(tensors[f"{name}.weight_scale"], plain[key].float().abs().max() / 448)
        assert json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_0", "bf16"])
def test_gguf_is_what_the_package_reads(tmp_path, kind):
    convert_checkpoint(TINY, tmp_path / "out", to=f"gguf-{kind}")
    reader = gguf.GGUFReader(tmp_path / "out" / f"bagel-{kind}.gguf")
    assert reader.fields["general.architecture"].contents() == "bagel"
    plain = weights_of()
    assert {tensor.name for tensor in reader.tensors} == plain.keys()
    for tensor in reader.tensors:
        wanted = plain[tensor.name]
        name = "F32" if wanted.ndim == 1 or wanted.dtype == torch.float32 else "BF16"
        name = kind.upper() if is_matrix(tensor.name) else name
        assert tensor.tensor_type.name == name
        packed = gguf.quants.quantize(wanted.float().numpy(), tensor.tensor_type)
        assert (packed == tensor.data.reshape(packed.shape)).all()


def test_every_linear_layer_is_quantised_if_asked(tmp_path):
    convert_checkpoint(TINY, tmp_path / "out", to="nf4", every_linear=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        packed = {key.removesuffix(".absmax") for key in file.keys() if key.endswith(".absmax")}  # noqa: SIM118
    linears = {name for name, part in loaded(TINY).named_modules() if isinstance(part, torch.nn.Linear)}
    wanted = {
        key
        for key, target in targets(Checkpoint.open(TINY).config).items()
        if target.parameter.removesuffix(".weight") in linears
    }
    assert packed == wanted
    loaded(tmp_path / "out")


def test_shards_are_small_and_listed(tmp_path):
    names = convert_checkpoint(TINY, tmp_path / "out", to="int8", max_shard_bytes=100_000)
    shards = [name for name in names if name.startswith("model-")]
    assert len(shards) > 3
    assert all((tmp_path / "out" / name).stat().st_size < 110_000 for name in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == {key for name in shards for key in load_file(tmp_path / "out" / name)}
    loaded(tmp_path / "out")


# Interruptions --------------------------------------------------------------------------------------------------------


def interrupted(tmp_path, monkeypatch, after: int, to: str = "int8") -> Path:
    """Convert until so many files are done."""
    out, done = tmp_path / "out", []

    def report(name, what):
        done.append(name)
        if len(done) == after:
            raise KeyboardInterrupt

    options = {} if to == "dfloat11" else {"max_shard_bytes": 100_000}
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(TINY, out, to=to, report=report, **options)
    return out


@pytest.mark.parametrize("to", ["int8", "dfloat11"])
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, to):
    out = interrupted(tmp_path, monkeypatch, 2, to)
    assert (out / JOURNAL).is_file()
    with pytest.raises(CheckpointError, match=r"a conversion that is not done; run the same `bagel convert` again"):
        Checkpoint.open(out)
    done = sorted(path for path in out.iterdir() if path.name != JOURNAL)
    assert len(done) == 2
    times = [path.stat().st_mtime_ns for path in done]
    reports = {}
    options = {} if to == "dfloat11" else {"max_shard_bytes": 100_000}
    convert_checkpoint(TINY, out, to=to, report=reports.__setitem__, **options)
    assert [path.stat().st_mtime_ns for path in done] == times
    assert [reports[path.name] for path in done] == ["is there already, and whole"] * 2
    assert not (out / JOURNAL).exists()
    loaded(out)


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path, monkeypatch):
    out = interrupted(tmp_path, monkeypatch, 2)
    (file, other) = sorted(path for path in out.iterdir() if path.name != JOURNAL)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other.unlink()
    reports = {}
    convert_checkpoint(TINY, out, to="int8", report=reports.__setitem__, max_shard_bytes=100_000)
    assert reports[file.name] == reports[other.name] == "written and verified"
    verify_checksums(out)


def test_another_conversion_does_not_go_on_with_it(tmp_path, monkeypatch):
    out = interrupted(tmp_path, monkeypatch, 1)
    with pytest.raises(CheckpointError, match=r"another conversion that was interrupted \(--to int8\)"):
        convert_checkpoint(TINY, out, to="nf4", max_shard_bytes=100_000)
    (out / JOURNAL).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        convert_checkpoint(TINY, out, to="int8", max_shard_bytes=100_000)


def test_a_process_that_is_killed_leaves_no_half_file(tmp_path):
    out = tmp_path / "out"
    code = """
import sys, time
from bagel.checkpoint.convert import convert_checkpoint, plan
write, files = plan.write_file, []

def until_killed(pieces):
    yield next(pieces)
    print("half", flush=True)
    time.sleep(600)

def stopping(path, layout, pieces, **options):
    files.append(path)
    write(path, layout, until_killed(pieces) if len(files) == 3 else pieces, **options)

plan.write_file = stopping
convert_checkpoint(sys.argv[1], sys.argv[2], to="int8", max_shard_bytes=100_000)
"""
    with subprocess.Popen([sys.executable, "-c", code, TINY, out], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert list(out.glob(".model*.tmp"))  # what it was at, under a name that nothing reads
    assert len(list(out.glob("model-*.safetensors"))) == 2
    for file in out.glob("model-*.safetensors"):
        load_file(file)
    reports = {}
    convert_checkpoint(TINY, out, to="int8", max_shard_bytes=100_000, report=reports.__setitem__)
    assert list(reports.values()).count("is there already, and whole") == 2
    assert not list(out.glob(".*"))
    loaded(out)


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(tmp_path, source=TINY, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "out", **{"to": "int8"} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_converted_is_refused(tmp_path):
    assert "no format 'fp4'; choose one of dfloat11, nf4" in refused(tmp_path, to="fp4")
    assert "leave the size of shards out" in refused(tmp_path, to="gguf-q8_0", max_shard_bytes=10)
    assert "leave every_linear out" in refused(tmp_path, to="bf16", every_linear=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "already holds notes.txt; choose another folder" in refused(tmp_path)


def test_dfloat11_wants_bfloat16(tmp_path):
    source = make_folder(tmp_path / "in", change=lambda ts: {key: tensor.float() for key, tensor in ts.items()})
    message = refused(tmp_path, source, to="dfloat11")
    assert "as F32, and DFloat11 holds bfloat16 weights: convert --to bf16 first" in message


def test_a_disk_that_is_too_small_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: os.terminal_size((0, 0)) and type("U", (), {"free": 1000}))
    assert "are still to be written; make room" in refused(tmp_path)


@pytest.mark.parametrize("to", NAMES)
def test_a_disk_that_lies_is_found_out(tmp_path, monkeypatch, to):
    from bagel.checkpoint.convert import plan

    write = plan.write_file

    def lying(path, layout, pieces, **options):
        write(path, layout, pieces, **options)
        with path.open("r+b") as file:  # one bit of the last tensor's last byte but some
            file.seek(-40 if to.startswith("gguf") else -3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x40]))

    monkeypatch.setattr(plan, "write_file", lying)
    with pytest.raises(CheckpointError):
        convert_checkpoint(TINY, tmp_path / "out", to=to)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    def spoil(tensors):
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
        return tensors

    source = make_folder(tmp_path / "in", change=spoil)
    for to in ("nf4", "int8", "dfloat11"):
        message = refused(tmp_path, source, to=to)
        assert "cannot be stored as" in message
        assert "layers.1" in message
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_what_a_release_lacks_comes_from_its_base(tmp_path):
    source = make_folder(
        tmp_path / "in", without=("vocab.json", "merges.txt", "tokenizer_config.json", "ae.safetensors")
    )
    (source / "llm_config.json").unlink()
    edit_json(source / "config.json", llm_config=None)
    convert_checkpoint(source, tmp_path / "out", to="nf4", base=TINY)
    loaded(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").tokenizer_folder == tmp_path / "out"


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_converts_and_its_result_answers(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", "demo", out, "--to", "gguf-q8_0"]) == 0
    said = capsys.readouterr()
    assert "bagel-q8_0.gguf: written and verified" in said.err
    assert said.out.startswith(f"{out}: ")
    assert main(["inspect", out]) == 0
    text = capsys.readouterr().out
    assert "weights in the format gguf" in text
    stored, dense = (re.search(rf"all it has +{kind} +([\d.]+) MiB", text) for kind in ("as stored", "bfloat16"))
    assert stored is not None
    assert dense is not None
    assert float(stored[1]) < 0.8 * float(dense[1])
    assert "(memory=...; as stored; an image of 64x64, " in text
    assert main(["inspect", "demo"]) == 0
    assert "as stored" not in capsys.readouterr().out.replace("stored as", "")
    assert main(["convert", "demo", out, "--to", "int8"]) == 1
    assert "choose another folder" in capsys.readouterr().err
    assert main(["convert", "demo", str(tmp_path / "x"), "--to", "int8", "--shard", "many"]) == 2
    assert "--shard must be a size such as" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["dfloat11", "nf4", "int8", "float8", "gguf-q8_0"])
def test_a_compressed_model_answers_and_draws(tmp_path, to):
    convert_checkpoint(CHECKPOINT, tmp_path / "out", to=to)
    small, plain = (BagelPipeline.from_pretrained(folder, device="cpu") for folder in (tmp_path / "out", CHECKPOINT))
    options = {"seed": 1, "num_timesteps": 8, "progress": False}
    prompt = "a large red circle in the center on a white background"
    drawn, wanted = (pipe.text_to_image(prompt, **options) for pipe in (small, plain))
    error = (drawn.latents - wanted.latents).norm() / wanted.latents.norm()
    # Measured: 0, 0.136, 0.011, 0.056, 0.007.
    assert error <= {"dfloat11": 0, "nf4": 0.2, "int8": 0.02, "float8": 0.1, "gguf-q8_0": 0.012}[to]
    question = "what color is the circle?"
    assert small.understand(wanted.image, question).text == plain.understand(wanted.image, question).text == "red"
