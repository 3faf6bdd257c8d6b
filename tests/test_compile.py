"""Compiling changes nothing but speed: same images and texts, no compilation for other lengths and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.modeling.compiling import compile_experts
from bagel.modeling.mot import Expert

# torch's own compiler still uses parts of torch that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def pipe():
    """A pipeline of its own, and a compiler that has seen nothing."""
    torch._dynamo.reset()
    counters.clear()
    yield BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    torch._dynamo.reset()


def drawn(pipe, prompt: str, side: int = 64):
    result = pipe.text_to_image(prompt, height=side, width=side, num_timesteps=6, seed=3, progress=False)
    return result.latents, np.array(result.image, dtype=int)


def test_compiled_results_are_the_plain_ones(pipe):
    prompt = "a large red star in the center on a white background"
    latents, image = drawn(pipe, prompt)
    text = pipe.understand([], prompt, max_new_tokens=8)
    pipe.compile(backend="aot_eager")  # all but the last stage of the compiler, which is slow
    compiled_latents, compiled_image = drawn(pipe, prompt)
    torch.testing.assert_close(compiled_latents, latents, rtol=1e-5, atol=1e-5)
    assert abs(compiled_image - image).max() <= 1
    assert pipe.understand([], prompt, max_new_tokens=8).token_ids == text.token_ids


@torch.inference_mode()
def test_a_compiled_layer_computes_what_the_plain_one_does(pipe):
    decoder = pipe.model.decoder
    layer, x = decoder.layers[0], torch.randn(7, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary, _ = decoder.rotary(torch.arange(7), torch.arange(0))
    results = []
    for compiled in (False, True):
        if compiled:
            compile_experts(layer)
        q, k, v = layer.gen.heads(x, rotary, layer.und)
        results.append([q, k, v, layer.gen.finish(x, q, layer.und)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_other_lengths_sizes_and_batches_compile_nothing_more(pipe):
    pipe.compile(backend="eager")
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    image = pipe.text_to_image("a blue circle", height=48, width=64, num_timesteps=3, progress=False).image
    pipe.text_to_image("a much longer text about a green square", num_timesteps=3, think=True, max_think_tokens=5)
    pipe.text_to_image(["a", "a red cross on black"], seed=[1, 2], num_timesteps=3, progress=False)
    pipe.edit(image, "make it yellow", num_timesteps=3, progress=False)
    pipe.understand([image, image], ["what is this?", "how many shapes are there?"], seed=[1, 2], max_new_tokens=4)
    assert counters["stats"]["unique_graphs"] == before


def test_an_interrupted_compilation_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(BagelPipeline, "text_to_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe.compile(backend="eager")
    experts = [module for module in pipe.model.modules() if isinstance(module, Expert)]
    assert len(experts) == 2 * len(pipe.model.decoder.layers)
    assert not any("heads" in vars(expert) for expert in experts)


def test_where_nothing_can_be_compiled_the_pipeline_stays_as_it_was(pipe):
    def no_compiler(*_):
        raise RuntimeError("no working C++ compiler")

    wanted = drawn(pipe, "a red circle")[0]
    with pytest.raises(
        RuntimeError, match=r"stays as it was .*needs a C\+\+ compiler for a CPU, Triton for a GPU"
    ) as raised:
        pipe.compile(backend=no_compiler)
    assert "no working C++ compiler" in str(raised.value)
    assert torch.equal(drawn(pipe, "a red circle")[0], wanted)
