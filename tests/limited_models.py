"""Small models within limits of memory, and what they make: shared by the tests of limits."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import load_pipeline
from PIL import Image

from bagel.memory.choice import nbytes, passing
from bagel.memory.placement import place, weight_bytes
from bagel.pipeline import BagelPipeline

HOST = torch.device("cpu")
PHOTO = Image.effect_noise((70, 52), 80).convert("RGB")
SMALL = {"height": 32, "width": 48, "num_timesteps": 4, "progress": False}


def limited(variant: str, share: float, dtype: torch.dtype = torch.float32) -> BagelPipeline:
    """A pipeline within the least memory that its weights can do with (share 0), up to what they all take (1)."""
    pipe = load_pipeline.__wrapped__(variant, dtype)  # one of its own, which may be changed
    supply = place(pipe.model, pipe.vae, HOST, limit=0, smallest=0)
    units = [unit for pair in supply.layers for unit in pair if unit is not None]
    head = supply.guests[pipe.model.decoder.lm_head].nbytes
    least = max(*(guest.nbytes for guest in supply.guests.values()), head + passing(units, 2))
    every = nbytes(units) + nbytes(supply.guests.values())
    supply.limit, supply.work = int(supply.fixed + least + share * (every - least)), Nothing()
    supply._cached = lambda: 0  # caches are small, but not beside weights of this size
    return pipe


class Nothing:
    """The work of a model that computes in no memory at all."""

    def __call__(self, und: int, gen: int) -> int:
        return 0

    def seeing(self, _: torch.Tensor) -> int:
        return 0

    encoding = decoding = seeing


def results(pipe: BagelPipeline) -> list:
    drawn = pipe.text_to_image("a red circle", seed=1, **SMALL)
    several = pipe.text_to_image(["one", "two words"], seed=[1, 2], **SMALL)
    edited = pipe.edit(PHOTO, "make it blue", seed=3, **SMALL)
    planned = pipe.text_to_image("a red circle", seed=4, think=True, max_think_tokens=6, **SMALL)
    answer = pipe.understand(PHOTO, "What is it?", max_new_tokens=7, progress=False)
    latents = [result.latents for result in (drawn, *several, edited, planned)]
    return [latents, planned.text, answer.token_ids]


def same(found: list, wanted: list) -> bool:
    return all(a.equal(b) for a, b in zip(found[0], wanted[0], strict=True)) and found[1:] == wanted[1:]


def from_files(folder: Path, dtype: str = "float32") -> BagelPipeline:
    """A pipeline that reads about half of its experts again and again, in a limit that does not count its caches."""
    whole = BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    left = [name for name, _ in whole.model.named_parameters() if "layers" in name and "proj.weight" in name]
    nbytes_left = sum(whole.model.get_parameter(name).nbytes for name in left)
    size = weight_bytes(whole.model, whole.vae)
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype, memory=size - nbytes_left // 2)
    pipe.model.decoder.supply.work = Nothing()
    pipe.model.decoder.supply.make_room = lambda _: None
    pipe.model.decoder.supply._cached = lambda: 0
    return pipe
