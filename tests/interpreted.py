"""For kernels in the interpreter of Triton, where it is: `TRITON_INTERPRET=1 pytest tests/test_int8.py`."""

from __future__ import annotations

import importlib.util
import os

import pytest

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton, and TRITON_INTERPRET=1 before anything imports it",
)
"""Marks a test that calls kernels themselves, on a CPU."""
