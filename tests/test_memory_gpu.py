"""Within a limit of a GPU's memory: the same bits as without, copies beside kernels, graphs that follow the weights."""

from __future__ import annotations

import gc

import pytest
import torch
from limited_models import Nothing
from PIL import Image

from bagel.demo import CHECKPOINT
from bagel.memory.placement import place, weight_bytes
from bagel.pipeline import BagelPipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PHOTO = Image.effect_noise((64, 64), 80).convert("RGB")


def results(pipe: BagelPipeline) -> list:
    options = {"num_timesteps": 6, "progress": False}
    drawn = pipe.text_to_image("a red circle", seed=1, **options)
    several = pipe.text_to_image(["one", "two words"], seed=[1, 2], **options)
    edited = pipe.edit(PHOTO, "make it blue", seed=3, **options)
    answers = [pipe.understand(PHOTO, "What is it?", max_new_tokens=40, progress=False).token_ids for _ in range(2)]
    return [*(one.latents.tolist() for one in (drawn, *several, edited)), answers]


def limited(share: float, **types) -> BagelPipeline:
    """The built-in model on the GPU with so much of its weights there at once, however little its work takes."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", **types)
    room = 256 * 2**20
    limit = int(share * weight_bytes(pipe.model, pipe.vae)) + room
    supply = place(pipe.model, pipe.vae, torch.device("cuda"), limit=limit, smallest=4096)
    supply.slack = room  # what images and caches take, which the limit is not about here
    supply._cached = lambda: 0
    supply.work = Nothing()
    pipe.model.attention = BagelPipeline(pipe.model, None, pipe.tokenizer, attention="auto").model.attention
    return pipe


@pytest.mark.parametrize("share", [0.45, 0.7, 1.5])
@pytest.mark.parametrize("types", [{"dtype": torch.bfloat16, "vae_dtype": torch.bfloat16}, {"dtype": torch.float32}])
def test_results_are_the_same_bits(share, types):
    wanted = results(BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", **types))
    pipe = limited(share, **types)
    assert results(pipe) == wanted
    assert results(pipe) == wanted
    supply = pipe.model.decoder.supply
    assert supply.fixed + supply._taken() <= supply.limit - supply.slack
    assert pipe.model.decoder.embed_tokens.weight.is_pinned()


def test_a_graph_follows_weights_that_left_and_came_back():
    pipe = limited(1.5, dtype=torch.bfloat16)
    first = pipe.understand(PHOTO, "What is it?", max_new_tokens=40, progress=False).token_ids
    assert pipe.model.graphs.decode_step is not None
    pipe.model.decoder.supply.release()
    torch.cuda.empty_cache()
    spoil = torch.full((2**24,), torch.nan, device="cuda")
    again = pipe.understand(PHOTO, "What is it?", max_new_tokens=40, progress=False).token_ids
    assert again == first
    del spoil


def test_two_pipelines_on_one_card():
    pipes = [limited(0.5, dtype=torch.bfloat16) for _ in range(2)]
    found = [[results(pipe) for pipe in pipes] for _ in range(2)]
    assert found[0][0] == found[0][1] == found[1][0] == found[1][1]


def test_reading_from_the_files(monkeypatch):
    monkeypatch.setattr("bagel.loading.host_free_bytes", lambda: 0)
    whole = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", dtype=torch.bfloat16)
    wanted, size = results(whole), weight_bytes(whole.model, whole.vae)
    monkeypatch.setattr("bagel.memory.placement.SLACK", 0)
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cuda", dtype=torch.bfloat16, memory=size // 2)
    supply = pipe.model.decoder.supply
    supply._cached, supply.work = (lambda: 0), Nothing()
    supply.make_room = lambda _: None
    assert any(parameter.is_meta for parameter in pipe.model.parameters())
    assert results(pipe) == wanted


def test_memory_is_given_back():
    def used() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    limited(0.5, dtype=torch.bfloat16).text_to_image("a", seed=1, num_timesteps=3, progress=False)
    before = used()
    pipe = limited(0.5, dtype=torch.bfloat16)
    pipe.text_to_image("a red circle", seed=1, num_timesteps=3, progress=False)
    table = pipe.model.decoder.embed_tokens.weight
    assert table.is_pinned()
    del pipe
    assert used() <= before + 2**20
    assert not table.is_pinned()
