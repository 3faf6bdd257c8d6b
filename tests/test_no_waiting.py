"""Nothing in the loops reads from the device: on the meta device, which holds no values, that is an error."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.generation import drawing
from bagel.modeling import Bagel
from bagel.vae import Autoencoder

IMAGE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def pipe():
    """The built-in model without its values."""
    real = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    assert real.vae is not None
    with torch.device("meta"):
        model, vae = Bagel(real.model.config), Autoencoder(real.vae.config)
    return BagelPipeline(model.eval(), vae.eval(), real.tokenizer)


class Arrived(Exception):
    """All that is left is to decode an image, which reads its pixels."""


@pytest.mark.parametrize(
    ("task", "inputs", "given"),
    [
        ("text_to_image", ["a red circle"], {}),
        ("text_to_image", ["a red circle"], {"taylorseer": True, "cfg_interval": (0.0, 1.0)}),
        ("text_to_image", ["a red circle"], {"cfg_renorm_type": "channel", "negative_prompt": "blue"}),
        ("edit", [IMAGE, "make it blue"], {}),
        ("edit", [IMAGE, "make it blue"], {"cfg_renorm_type": "text_channel"}),
        ("edit", [IMAGE, "make it blue"], {"drop": "turn", "on_step": lambda step: step.next_latents}),
    ],
)
def test_drawing_reads_nothing_until_the_image_is_there(pipe, monkeypatch, task, inputs, given):
    found = []

    def decoded(vae, latents):
        found.append(latents)
        raise Arrived

    monkeypatch.setattr(drawing, "decoded", decoded)
    with pytest.raises(Arrived):
        getattr(pipe, task)(*inputs, num_timesteps=12, height=64, width=64, progress=False, **given)
    (latents,), config = found, pipe.vae.config
    assert latents.is_meta
    assert latents.shape == (config.z_channels, 64 // config.downsample, 64 // config.downsample)


@pytest.mark.parametrize("given", [{}, {"do_sample": True, "top_p": 0.9}, {"logprobs": True}])
def test_decoding_reads_what_it_wrote_only_every_few_tokens(pipe, monkeypatch, given):
    steps = []
    decode = Bagel.decode
    monkeypatch.setattr(Bagel, "decode", lambda *args, **named: steps.append(1) or decode(*args, **named))
    monkeypatch.setattr("bagel.generation.writing.LOOK_EVERY", 5)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pipe.understand(IMAGE, "what color is it?", max_new_tokens=20, **given)
    assert len(steps) == 5
