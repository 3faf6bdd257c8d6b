"""Shared fixtures: the folders of reference numbers and small helpers to read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REFERENCE = Path(__file__).parent / "reference"
VARIANTS = ("tiny", "variant_moe")

torch.set_num_threads(2)


def golden(variant: str, name: str) -> dict[str, torch.Tensor]:
    """Tensors of one golden file."""
    return load_file(str(REFERENCE / variant / "golden" / f"{name}.safetensors"))


def golden_json(variant: str, name: str):
    """Content of one golden JSON file."""
    return json.loads((REFERENCE / variant / "golden" / f"{name}.json").read_text())


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """Name of a reference model, one after the other."""
    return request.param
