"""Shared fixtures: the folders of reference numbers and small helpers to read them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel import Bagel, BagelPipeline

REFERENCE = Path(__file__).parent / "reference"
VARIANTS = ("tiny", "variant_moe")

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cores: one thread each, see the Makefile
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


def assert_close(found: torch.Tensor, wanted: torch.Tensor, *, relative: float = 1e-5) -> None:
    """Assert that every element is within `relative` of the largest wanted magnitude."""
    assert found.shape == wanted.shape, (tuple(found.shape), tuple(wanted.shape))
    found, wanted = found.detach().double().cpu(), wanted.double().cpu()
    error = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    assert error <= relative, f"largest error {error:.2e} of the largest magnitude, allowed {relative:.0e}"


@lru_cache
def load_pipeline(variant: str, dtype: torch.dtype = torch.float32) -> BagelPipeline:
    """The pipeline of a reference model; tests must not change it."""
    return BagelPipeline.from_pretrained(REFERENCE / variant / "checkpoint", device="cpu", dtype=dtype)


def load_model(variant: str) -> Bagel:
    """A reference model in float32; tests must not change it."""
    return load_pipeline(variant).model
