"""The scripts in examples/ and the README run as they are; on the built-in model, and on the small reference model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REFERENCE
from PIL import Image

from bagel import BagelPipeline
from bagel.options import make_options
from bagel.png import read_info

EXAMPLES = Path(__file__).parents[1] / "examples"
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TINY = REFERENCE / "tiny" / "checkpoint"
LANDSCAPE = REFERENCE / "tiny" / "golden" / "input_landscape.png"


def run(script: str, folder: Path, *arguments: str | Path) -> str:
    """Run a script in a folder, warnings as errors, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "text_to_image.py",
        "edit.py",
        "understand.py",
        "research.py",
    }


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) <= 40


def test_text_to_image_leaves_one_picture_and_a_batch(tmp_path):
    assert "plan:" in run("text_to_image.py", tmp_path)
    assert pictures(tmp_path) == ["shape-0001.png", "shape-0002.png", "stars-0001.png"]
    assert [read_info(tmp_path / f"shape-000{n}.png")["seed"] for n in (1, 2)] == ["2", "3"]


def test_edit_keeps_the_shape_and_reports_every_step(tmp_path):
    printed = run("edit.py", tmp_path, TINY, LANDSCAPE)
    assert pictures(tmp_path) == ["edited-0001.png", "next-0001.png"]
    with Image.open(tmp_path / "edited-0001.png") as image:
        assert image.width > image.height
    assert printed.count("speed") == 11  # 12 times are 11 evaluations


def test_edit_draws_its_own_pictures_if_none_is_given(tmp_path):
    run("edit.py", tmp_path)
    assert pictures(tmp_path) == ["edited-0001.png", "next-0001.png"]


def test_understand_answers_and_streams(tmp_path):
    printed = run("understand.py", tmp_path)
    assert "tokens, " in printed
    assert len(printed.splitlines()) >= 4


def test_research_reads_every_layer_of_both_experts(tmp_path):
    printed = run("research.py", tmp_path, TINY)
    assert printed.count("mean norm of the residual stream") == 3
    assert "12 gen tokens" in printed
    assert "velocity (12, 64)" in printed


def test_research_looks_into_the_built_in_model(tmp_path):
    assert "12 gen tokens" in run("research.py", tmp_path)


def test_the_readme_on_the_built_in_model_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", BLOCKS[0])
    assert pictures(tmp_path) == ["diamond.png", "red.png"]


def test_the_readme_runs_as_it_is_written(tmp_path, monkeypatch):
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu")
    shorter = {"image": {"num_timesteps": 4, "max_think_tokens": 8}, "text": {"max_new_tokens": 8}}
    monkeypatch.setattr(
        "bagel.pipeline.make_options",
        lambda task, output, given, **preset: make_options(task, output, {**given, **shorter[output]}, **preset),
    )
    monkeypatch.setattr(BagelPipeline, "from_pretrained", lambda *_: pipe)
    monkeypatch.chdir(tmp_path)
    with Image.open(LANDSCAPE) as picture:
        picture.convert("RGB").save("photo.jpg")
    assert len(BLOCKS) >= 9
    exec(compile("\n".join(BLOCKS[1:]), "README.md", "exec"), {})
    assert pictures(tmp_path) == ["lighthouse.png", "photo-night.png", "photo.jpg"]
