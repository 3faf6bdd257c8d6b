"""The order of the library: imports only go backwards, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "bagel"
ORDER = (
    "config",
    "tokenizer",
    "image",
    "packing",
    "processor",
    "formats",
    "kernels",
    "parameters",
    "embedding",
    "vit",
    "vae",
    "modeling",
    "sampling",
    "memory",
    "checkpoint",
    "results",
    "options",
    "signatures",
    "generation",
    "loading",
    "pipeline",
    "png",
    "evaluation",
    "demo",
    "cli",
)
APART = ("training",)
"""Beside the flow of data: no module of it may need this."""


def imports_of(file: Path) -> set[str]:
    """Return the modules of the library that a file imports, anywhere in it, as "part" or "part.module"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full, from bagel..."
            assert node.module is not None
            # `from bagel import x` may name a module as well as a public name.
            found |= {f"bagel.{a.name}" for a in node.names} if node.module == "bagel" else {node.module}
    return {name.removeprefix("bagel.") for name in found if name.startswith("bagel.")}


def parts_of(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(file)}


def files_of(part: str) -> list[Path]:
    folder = LIBRARY / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [LIBRARY / f"{part}.py"]


def test_every_module_has_its_place_in_the_order():
    parts = {path.stem for path in LIBRARY.glob("*.py")} | {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert parts - {"__init__", *APART} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_imports_only_go_backwards(part):
    earlier = set(ORDER[: ORDER.index(part) + 1])
    for file in files_of(part):
        assert parts_of(file) <= earlier, f"{file.relative_to(ROOT)} imports {sorted(parts_of(file) - earlier)}"


def test_imports_are_seen_by_this_test():
    assert {"modeling", "sampling", "image"} <= parts_of(LIBRARY / "generation" / "drawing.py")
    assert "loading" in parts_of(LIBRARY / "pipeline.py")  # inside a function


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("vit", {"modeling", "packing"}),
        ("vae", {"modeling", "packing", "vit"}),
        ("sampling", {"modeling", "vit", "vae"}),
        ("processor", {"modeling", "vit", "vae", "kernels"}),
        ("parameters", {"modeling", "sampling", "packing"}),
    ],
)
def test_parts_know_nothing_of(part, forbidden):
    for file in files_of(part):
        assert not parts_of(file) & forbidden, file


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_importing_the_command_does_not_import_torch():
    assert run_python("import sys, bagel.cli; assert 'torch' not in sys.modules") == ""


def test_importing_the_library_does_nothing():
    code = """
import torch
threads, dtype, state = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state()
import bagel.pipeline, bagel.checkpoint, bagel.loading
from bagel import BAGEL_7B, BagelConfig, BagelPipeline, ImageResult, TextResult, Tokenizer
assert not torch.cuda.is_initialized()
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
assert torch.equal(state, torch.random.get_rng_state())
import sys
assert not {"flash_attn", "transformers", "diffusers"} & set(sys.modules)
"""
    assert run_python(code) == ""


def test_loading_does_not_import_torchs_compiler():
    code = """
import sys
from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
assert "torch._dynamo" not in sys.modules
"""
    assert run_python(code) == ""


def test_files_are_small():
    for file in LIBRARY.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 450, file
