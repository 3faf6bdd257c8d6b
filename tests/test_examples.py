"""The scripts in examples/ and the README run as they are; on the built-in model, and on the small reference model."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
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


LINES = {
    "attention_maps.py": 12,
    "conversation.py": 10,
    "guidance.py": 15,
    "heun.py": 15,
    "image_to_image.py": 10,
    "logprob.py": 8,
    "lora.py": 40,
}
"""What research takes: lines of code at most, without the docstring, imports and empty lines."""


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


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Run a script as `run` does, in this process: no second import of torch."""

    def run_here(script: str) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("error")
                runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out.splitlines()

    return run_here


def images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def code_lines(source: str) -> int:
    """Count the lines of a script without its docstring, imports and empty lines."""
    tree = ast.parse(source)
    aside: list[ast.stmt] = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    if ast.get_docstring(tree) is not None:
        aside.append(tree.body[0])
    left_out = {number for node in aside for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return sum(bool(line.strip()) and number not in left_out for number, line in enumerate(source.splitlines(), 1))


def test_every_example_is_run_here():
    scripts = {"text_to_image.py", "edit.py", "understand.py", "research.py", *LINES}
    assert {path.name for path in EXAMPLES.glob("*.py")} == scripts


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short(script):
    source = (EXAMPLES / script).read_text(encoding="utf-8")
    assert code_lines(source) <= LINES.get(script, 30)
    assert max(map(len, source.splitlines())) <= 120


def test_lines_of_code_are_counted():
    assert (
        code_lines('"""A\ndocstring."""\n\nimport os\nfrom a import (\n    b,\n)\n\n\nx = """\ny"""  # one\n# two\n')
        == 3
    )


def test_text_to_image_leaves_one_image_and_a_batch(tmp_path):
    assert "plan:" in run("text_to_image.py", tmp_path)
    assert images(tmp_path) == ["shape-0001.png", "shape-0002.png", "stars-0001.png"]
    assert [read_info(tmp_path / f"shape-000{n}.png")["seed"] for n in (1, 2)] == ["2", "3"]


def test_edit_keeps_the_shape_and_reports_every_step(tmp_path):
    printed = run("edit.py", tmp_path, TINY, LANDSCAPE)
    assert images(tmp_path) == ["edited-0001.png", "next-0001.png"]
    with Image.open(tmp_path / "edited-0001.png") as image:
        assert image.width > image.height
    assert printed.count("speed") == 11  # 12 times are 11 evaluations


def test_edit_draws_its_own_images_if_none_is_given(tmp_path):
    run("edit.py", tmp_path)
    assert images(tmp_path) == ["edited-0001.png", "next-0001.png"]


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


def test_heun_comes_nearer_than_euler_in_as_many_evaluations(run_here):
    euler, heun = (float(line.rpartition(" ")[2]) for line in run_here("heun.py"))
    assert heun < 0.7 * euler < 0.01


def test_a_guidance_of_ones_own_draws_what_was_asked(run_here, tmp_path):
    path, caption = run_here("guidance.py")
    assert images(tmp_path) == [path] == ["fading-0001.png"]
    assert caption.count("blue star") == 3


def test_the_right_answer_is_the_likeliest(run_here):
    scores = {line.partition(":")[0]: float(line.rpartition(" ")[2]) for line in run_here("logprob.py")}
    assert scores["red"] > -0.1
    assert max(scores["pink"], scores["blue"]) < -5


def test_an_attention_map_shows_where_the_word_is_drawn(run_here, tmp_path):
    (path,) = run_here("attention_maps.py")
    with Image.open(tmp_path / path) as image:
        assert (image.mode, image.size) == ("L", (64, 64))
        look = np.asarray(image, dtype=float)
    assert look[:16, :16].mean() > 2 * look.mean()


def test_lora_learns_in_twenty_steps(run_here):
    lines = [line.replace(",", "").split() for line in run_here("lora.py")]
    texts, drawn = ([float(line[index]) for line in lines] for index in (3, 5))
    assert len(lines) == 20
    assert texts[-1] < texts[0] / 3
    assert drawn[-1] < drawn[0] / 5


def test_a_conversation_draws_and_answers_in_turn(run_here, tmp_path):
    assert run_here("conversation.py") == ["red", "large"]
    assert images(tmp_path) == ["blue.png", "white.png"]


def test_image_to_image_keeps_the_scene_and_takes_the_new_color(run_here, tmp_path):
    assert run_here("image_to_image.py") == ["a large orange circle in the center on a white background"]
    assert images(tmp_path) == ["varied.png"]


def test_the_readme_on_the_built_in_model_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", BLOCKS[0])
    assert images(tmp_path) == ["diamond.png", "red.png"]


def test_the_readme_runs_as_it_is_written(tmp_path, monkeypatch):
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu")

    def shortened(task, given, preset=None):
        shorter: dict[str, int] = {"max_new_tokens": 8} if task in ("understand", "write") else {"num_timesteps": 4}
        if given.get("think") and task not in ("understand", "write"):
            shorter["max_think_tokens"] = 8
        return make_options(task, {**given, **shorter} if task != "session" else given, preset)

    for module in ("bagel.pipeline", "bagel.generation.session"):
        monkeypatch.setattr(f"{module}.make_options", shortened)
    monkeypatch.setattr(BagelPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.chdir(tmp_path)
    with Image.open(LANDSCAPE) as image:
        image.convert("RGB").save("photo.jpg")
    assert len(BLOCKS) >= 9
    exec(compile("\n".join(BLOCKS[1:]), "README.md", "exec"), {})
    assert images(tmp_path) == ["lighthouse.png", "photo-night.png", "photo.jpg"]
