"""Whole jobs against the official code: from a seed to tokens, trajectories and images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE, VARIANTS, assert_close, golden, load_pipeline

from bagel.image import open_image

NAMES = {"max_think_token_n": "max_new_tokens", "text_temperature": "temperature", "enable_taylorseer": "taylorseer"}


def cases() -> list[tuple[str, str]]:
    listed = []
    for variant in VARIANTS:
        found = json.loads((REFERENCE / variant / "golden" / "cases.json").read_text())["cases"]
        listed += [(variant, name) for name in found]
    return listed


def load_case(variant: str, name: str):
    """Inputs, output, options and wanted numbers of a case; official limits count bos, ours do not."""
    case = json.loads((REFERENCE / variant / "golden" / "cases.json").read_text())["cases"][name]
    folder = REFERENCE / variant / "golden"
    inputs = [open_image(folder / f"input_{x['image']}.png") if "image" in x else x["text"] for x in case["inputs"]]
    options = dict(case["args"], seed=case["seed"], progress=False)
    output = "text" if options.pop("understanding_output", False) else "image"
    if "max_think_token_n" in options:
        limit = options.pop("max_think_token_n") - 1
        options["max_new_tokens" if output == "text" else "max_think_tokens"] = limit
    if "image_shapes" in options:
        options["height"], options["width"] = options.pop("image_shapes")
    options = {NAMES.get(key, key): value for key, value in options.items()}
    return inputs, output, options, case, golden(variant, f"e2e_{name}")


@pytest.mark.parametrize(("variant", "name"), cases())
def test_whole_job_agrees(variant, name):
    inputs, output, options, case, want = load_case(variant, name)
    pipe = load_pipeline(variant)
    steps = []
    if output == "image":
        options["on_step"] = steps.append
    result = pipe.generate(inputs, output=output, **options)
    if output == "text":
        assert list(result.token_ids) == want["tokens0"][1:].tolist()
        assert case["error"] or result.text == case["output_text"][0]
        limit = options["max_new_tokens"]
        assert result.finish_reason == ("length" if len(result.token_ids) == limit else "stop")
        return
    assert result.text == (case["output_text"][0] if options.get("think") else None)
    assert [step.index for step in steps] == list(range(len(want["t"])))
    assert torch.tensor([step.t for step in steps]).equal(want["t"])
    assert_close(torch.stack([step.latents for step in steps]), want["x_t"], relative=1e-4)
    assert_close(torch.stack([step.velocity for step in steps]), want["v_t"], relative=1e-4)
    assert_close(result.latents, want["latent0"][0], relative=1e-4)
    image = next(value for key, value in want.items() if key.startswith("image"))
    difference = np.abs(np.asarray(result.image).astype(int) - image.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_noise_from_a_seed_is_the_official_noise():
    want = golden("tiny", "e2e_edit_two_images")
    generator = torch.Generator().manual_seed(67)
    for key in ("posterior_noise0", "posterior_noise1", "init_noise0"):
        assert torch.randn(want[key].shape, generator=generator).equal(want[key])
