"""The public names: there, documented, and imported when they are first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bagel
from bagel.demo import CHECKPOINT

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(set(bagel.__all__) - {"__version__", "BAGEL_7B"}))
def test_a_public_name_is_there_and_documented(name):
    assert (getattr(bagel, name).__doc__ or "").strip()


def test_all_public_names_are_listed():
    assert set(bagel.__all__) <= set(dir(bagel))
    with pytest.raises(AttributeError, match="'bagel' has no attribute 'Bagl'"):
        _ = bagel.Bagl


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, bagel; assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_load_is_short_for_from_pretrained():
    pipe = bagel.load(CHECKPOINT, device="cpu", visual_gen=False)
    assert isinstance(pipe, bagel.BagelPipeline)
    assert pipe.vae is None
