"""What wraps calls of the model works on it as it is: torch.export, and sharding by FSDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close
from small_model import latents, new_model, packed_of, small_model, text, vit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bagel.modeling import Bagel
from bagel.packing import LatentImage, Packed, Text

SAMPLES = ([text(5, seed=1), latents(4, seed=2), vit(6, seed=3), text(3, seed=4)], [text(7, seed=5)])


def batch(seed: int = 0) -> Packed:
    """A batch with something to learn in both halves."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 400, (6,), generator=generator)
    z = torch.randn(4, 20, generator=generator)
    noisy = LatentImage(z, torch.arange(4), timestep=0.5, noisy=True, velocity=torch.randn(4, 20, generator=generator))
    return packed_of([Text(ids, labels=ids.roll(-1)), noisy], [text(4)])


@torch.no_grad()
def test_a_packed_forward_is_exported_and_gives_the_same():
    packed = packed_of(*SAMPLES)
    program = torch.export.export(small_model(), (packed,), strict=False)
    for found, wanted in zip(program.module()(packed), small_model()(packed), strict=True):
        assert_close(found, wanted)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Bagel) -> Bagel:
    mesh = init_device_mesh("cpu", (1,))  # also where there is a GPU
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_a_sharded_model_has_the_losses_and_gradients_of_a_whole_one(one_process):
    whole = new_model().requires_grad_(True)
    parts = sharded(new_model().requires_grad_(True))
    wanted, found = whole.losses(batch()), parts.losses(batch())
    assert_close(found.loss, wanted.loss)
    assert_close(found.ce, wanted.ce)
    wanted.loss.backward()
    found.loss.backward()
    for (name, one), other in zip(parts.named_parameters(), whole.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            assert_close(one.grad.full_tensor(), other.grad)
    for a, b in zip(parts(batch()), whole(batch()), strict=True):
        assert_close(a, b)
