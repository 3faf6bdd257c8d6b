from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_variants import TINY, load, make_folder, weights_of
from hub_server import COMMIT, TOKEN, FakeHub
from safetensors.torch import save_file

from bagel.checkpoint import Checkpoint, CheckpointError, resolve_source
from bagel.checkpoint.convert import convert_checkpoint
from bagel.checkpoint.hub import needed_files

ROOT = Path(__file__).parent.parent
OFFICIAL_FILES = [
    ".gitattributes",
    "README.md",
    "ae.safetensors",
    "assets/teaser.json",
    "config.json",
    "ema.safetensors",
    "generation_config.json",
    "llm_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vit_config.json",
    "vocab.json",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let the client see only this server and a cache of its own."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    folder = make_folder(tmp_path / "repository")
    (folder / "README.md").write_text("not needed")
    with FakeHub(folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """Let the client's retries follow at once."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def fetch(hub: FakeHub, **options) -> Path:
    return resolve_source(hub.repo_id, progress=False, **options)


def test_resolve_source_returns_a_folder_that_is_there():
    assert resolve_source(str(TINY)) == TINY
    assert resolve_source(TINY) == TINY


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", "a b/c", "", Path("owner/name")])
def test_resolve_source_names_what_is_neither_folder_nor_id(source):
    with pytest.raises(CheckpointError, match="neither an existing folder nor a Hub id"):
        resolve_source(source)


def test_needed_files_of_the_official_repository():
    left = {".gitattributes", "README.md", "assets/teaser.json", "model.safetensors.index.json"}
    assert sorted(needed_files(OFFICIAL_FILES)) == sorted(set(OFFICIAL_FILES) - left)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["ema.safetensors", "model.safetensors", "ae.safetensors"], ["ema.safetensors", "ae.safetensors"]),
        (["model.safetensors", "vae/ae.safetensors"], ["model.safetensors", "vae/ae.safetensors"]),
        (
            ["vae/ae.safetensors", "ae.safetensors", "model_bf16.safetensors"],
            ["model_bf16.safetensors", "ae.safetensors"],
        ),
        (
            [
                "m.safetensors.index.json",
                "m-00001-of-00002.safetensors",
                "m-00002-of-00002.safetensors",
                "x.safetensors",
            ],
            ["m.safetensors.index.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
        ),
        (["ema-fp8.safetensors", "ae.safetensors", "a/b.gguf"], ["ema-fp8.safetensors", "ae.safetensors"]),
        (["README.md", "bagel-q8_0.gguf"], ["bagel-q8_0.gguf"]),
    ],
)
def test_needed_files_take_one_set_of_weights(names, weights):
    assert needed_files(names) == weights


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["bagel-q8_0.gguf", "bagel-q4_0.gguf"], r"several files of weights \(bagel-q8_0.gguf, bagel-q4_0.gguf\)"),
        (["pytorch_model.bin"], "pickle"),
        (["README.md"], "no weights"),
    ],
)
def test_needed_files_are_refused_before_any_download(names, reason):
    with pytest.raises(CheckpointError, match=reason):
        needed_files(names)


def test_fetch_brings_only_the_needed_files_and_they_load(hub):
    folder = fetch(hub)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in TINY.iterdir())
    assert "README.md" not in hub.fetched()
    load(Checkpoint.open(folder))


def test_fetch_twice_transfers_once(hub):
    first = fetch(hub)
    count = len(hub.fetched())
    assert fetch(hub) == first
    assert len(hub.fetched()) == count


def test_fetch_takes_a_revision(hub):
    assert fetch(hub, revision=COMMIT).name == COMMIT
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        fetch(hub, revision="v9")


def test_fetch_goes_on_after_a_broken_transfer(hub, impatient):
    hub.broken, hub.breaks = "ema.safetensors", 1
    folder = fetch(hub)
    assert filecmp.cmp(folder / "ema.safetensors", TINY / "ema.safetensors", shallow=False)
    first, second = hub.ranges("ema.safetensors")
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < (TINY / "ema.safetensors").stat().st_size


def break_off(hub, monkeypatch) -> CheckpointError:
    """Fetch with a connection that dies for good half way through the weights."""
    monkeypatch.setattr("bagel.checkpoint.hub.RESUMABLE_BYTES", (500_000, 10**9))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: setattr(hub, "down", True))
    hub.broken, hub.breaks = "ema.safetensors", 1
    with pytest.raises(CheckpointError) as caught:
        fetch(hub)
    hub.down = False
    hub.asked.clear()
    return caught.value


def test_a_later_fetch_resumes_where_an_earlier_one_was_cut_off(hub, monkeypatch):
    assert "what has arrived is kept" in str(break_off(hub, monkeypatch))
    folder = fetch(hub)
    assert filecmp.cmp(folder / "ema.safetensors", TINY / "ema.safetensors", shallow=False)
    (asked,) = hub.ranges("ema.safetensors")
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 400_000
    assert not list(folder.parents[1].glob("blobs/*.part"))


def test_a_resumed_file_that_is_damaged_is_thrown_away(hub, monkeypatch, tmp_path):
    break_off(hub, monkeypatch)
    (part,) = (tmp_path / "cache").glob("*/blobs/*.part")
    part.write_bytes(b"\0" * part.stat().st_size)
    with pytest.raises(CheckpointError, match="arrived damaged"):
        fetch(hub)
    assert filecmp.cmp(fetch(hub) / "ema.safetensors", TINY / "ema.safetensors", shallow=False)


def test_fetch_of_an_unknown_repository_tells_what_to_do(hub):
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing is neither .*spelling.*hf download nobody/nothing --local-dir"
    ):
        resolve_source("nobody/nothing", progress=False)


def test_fetch_of_a_private_repository_wants_a_token(hub):
    hub.private = True
    with pytest.raises(CheckpointError, match="token="):
        fetch(hub)
    assert fetch(hub, token=TOKEN).is_dir()


def test_fetch_of_a_gated_repository_wants_its_terms_accepted(hub):
    hub.gated = True
    with pytest.raises(CheckpointError, match=rf"is gated: accept its terms at {hub.url}/{hub.repo_id}"):
        fetch(hub)
    assert fetch(hub, token=TOKEN).is_dir()


def test_fetch_without_a_network_tells_how_to_fetch_by_hand(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError) as caught:
        fetch(hub)
    assert f"hf download {hub.repo_id} --local-dir FOLDER" in str(caught.value)
    assert "http://127.0.0.1:9" in str(caught.value)


def test_fetch_without_a_network_uses_a_copy_that_is_there(hub, monkeypatch):
    from huggingface_hub import constants

    folder = fetch(hub)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(hub) == folder


def test_fetch_that_breaks_after_the_weights_blames_the_network_and_goes_on_later(hub, impatient, monkeypatch):
    from huggingface_hub import constants

    hub.broken, hub.breaks = "ae.safetensors", 100
    with pytest.raises(CheckpointError, match=r"could not be fetched from .*what has arrived is kept, so try again"):
        fetch(hub)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(CheckpointError, match=r"could not be fetched from .*when the network is back"):
            fetch(hub)
        assert (fetch(hub, alone=False) / "ema.safetensors").is_file()  # a base supplies the autoencoder
    hub.breaks = 0
    load(Checkpoint.open(fetch(hub)))
    assert hub.ranges("ema.safetensors") == [None]


def test_fetch_without_a_network_misses_a_shard(hub, monkeypatch):
    from huggingface_hub import constants

    tensors = weights_of()
    (hub.folder / "ema.safetensors").unlink()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in names if names[key] == name}, hub.folder / name)
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    folder = fetch(hub)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(hub) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could not be fetched"):
        fetch(hub)


def test_fetch_honours_the_clients_environment(tmp_path):
    folder = make_folder(tmp_path / "repository")
    code = "import sys; from bagel.checkpoint import resolve_source; print(resolve_source(sys.argv[1]))"
    with FakeHub(folder, private=True) as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, server.repo_id],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")


@pytest.mark.parametrize("to", ["dfloat11", "gguf-q8_0", "nf4"])
def test_fetch_of_a_compressed_repository_loads_by_name(hub, tmp_path, monkeypatch, to):
    from huggingface_hub import constants

    hub.folder = tmp_path / to
    convert_checkpoint(TINY, hub.folder, to=to)
    (hub.folder / "extra.bin").write_text("not needed")
    folder = fetch(hub)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in hub.folder.iterdir() if path.name != "extra.bin"
    )
    load(Checkpoint.open(folder))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(hub) == folder


def test_fetch_of_one_of_several_files_by_name(hub):
    (hub.folder / "ema.safetensors").rename(hub.folder / "a.safetensors")
    save_file(weights_of(), hub.folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of weights \(a.safetensors, b.safetensors\)"):
        fetch(hub)
    with pytest.raises(CheckpointError, match=r"no c.safetensors among its files: it has a.safetensors"):
        fetch(hub, weights="c.safetensors")
    folder = fetch(hub, weights="b.safetensors")
    assert (folder / "b.safetensors").is_file()
    assert not (folder / "a.safetensors").exists()
    load(Checkpoint.open(folder))


def test_importing_checkpoint_leaves_the_client_unloaded():
    code = "import sys, bagel.checkpoint; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
