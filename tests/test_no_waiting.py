"""Nothing in the loops reads from the device: on the meta device, which holds no values, that is an error."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.drawing import plan_flow
from bagel.modeling import Bagel
from bagel.options import make_options
from bagel.sampling import euler
from bagel.vae import Autoencoder

PICTURE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def pipe():
    """The built-in model without its values."""
    real = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu").parts
    assert real.vae is not None
    with torch.device("meta"):
        model, vae = Bagel(real.model.config), Autoencoder(real.vae.config)
    return BagelPipeline(model.eval(), vae.eval(), real.tokenizer)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("task", "inputs", "given"),
    [
        ("text_to_image", ["a red circle"], {}),
        ("text_to_image", ["a red circle"], {"taylorseer": True, "cfg_interval": (0.0, 1.0)}),
        ("text_to_image", ["a red circle"], {"cfg_renorm_type": "channel", "negative_prompt": "blue"}),
        ("edit", [PICTURE, "make it blue"], {}),
        ("edit", [PICTURE, "make it blue"], {"cfg_renorm_type": "text_channel"}),
    ],
)
def test_drawing_reads_nothing_until_the_picture_is_there(pipe, task, inputs, given):
    options = make_options(task, "image", {"num_timesteps": 12, "height": 64, "width": 64, **given})
    (job,) = pipe._prepared([inputs], [options], "image")
    velocity, timesteps = plan_flow(pipe.parts, [job])
    tokens = pipe.parts.latent_cells(64, 64).shape[0]
    noise = [torch.empty(tokens, pipe.parts.model.config.patch_latent_dim, device="meta")]
    (latents,) = euler(velocity, noise, timesteps)
    assert latents.shape == noise[0].shape


@pytest.mark.parametrize("given", [{}, {"do_sample": True, "top_p": 0.9}])
def test_decoding_reads_what_it_wrote_only_every_few_tokens(pipe, monkeypatch, given):
    steps = []
    decode = Bagel.decode
    monkeypatch.setattr(Bagel, "decode", lambda *args, **named: steps.append(1) or decode(*args, **named))
    monkeypatch.setattr("bagel.answering.LOOK_EVERY", 5)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pipe.understand(PICTURE, "what color is it?", max_new_tokens=20, **given)
    assert len(steps) == 5
