"""Every weight is used by calling its module: for each module a hook fires and a replacement takes effect.

On the plain path, and on those that pass modules by where they can: kernels (functions that compute the same stand in
for them here), graphs (a recorded trace stands in), 8-bit layers, and the reading of a context, which leaves out what
follows the last layer's keys.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import REFERENCE
from PIL import Image
from test_fused import KERNELS, choose
from test_graphs import Recorded
from torch import nn

from bagel import BagelPipeline
from bagel.config import VAEConfig
from bagel.modeling import denoise, graphs
from bagel.modeling.float8 import quantize_experts
from bagel.modeling.graphs import GraphMemory
from bagel.vae import Autoencoder

PIPE = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", dtype=torch.float32)
PIPE.vae = Autoencoder(VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)).eval().requires_grad_(False)  # a quick one
RNG = torch.Generator().manual_seed(0)
PIXELS, LATENTS = torch.rand(1, 3, 4, 6, generator=RNG) * 2 - 1, torch.randn(1, 16, 2, 3, generator=RNG)
NOISE = torch.randn(6, 64, generator=RNG)
PHOTO = Image.effect_noise((70, 52), 60).convert("RGB")

NOT_CALLED = {
    nn.ModuleList: "a list of modules, each of which is called",
    "Expert": "holds the weights of one expert in a layer, which calls its two halves around attention",
    "Projections": "holds projections and norms, each of which is called by the expert",
}
"""Modules that are never called, by class, with the reason."""
IN_PARTS = {"model.decoder": "the model calls its parts, too: embeddings and head by themselves in a decode step"}
"""Modules that are called, but cannot be replaced as a whole, with the reason: that fails with an error."""


class Wrapped(nn.Module):
    """Somebody's wrapper, which knows nothing of this library: what it wraps, called plainly, and changed a little."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args, **options):
        self.calls += 1
        return changed(self.inner(*args, **options))


def changed(out):
    """Return tensors that differ by far more than rounding, in every element."""
    if isinstance(out, torch.Tensor):
        return out * 1.25 + 0.01 if out.is_floating_point() else out
    parts = [changed(part) for part in out]
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)


@torch.inference_mode()
def run(pipe: BagelPipeline, name: str, *, evaluations: int = 1) -> list[torch.Tensor]:
    """Do what a module of this name has a part in: encode and decode, or see, or read, write and draw."""
    if name.startswith("vae."):
        return [pipe.vae.encode(PIXELS, None), pipe.vae.decode(LATENTS)]
    if name.startswith(("model.vit", "model.connector")):
        seen = pipe.processor.see(PHOTO)
        return [pipe.model.embed_patches(seen.patches, seen.position_ids, (seen.patches.shape[0],))]
    session = pipe.session(seed=0).read("a riddle")
    written = session.fork().write(max_new_tokens=2, logprobs=True)
    velocity = session.velocity(height=32, width=48, cfg_interval=(0.0, 1.0))
    x = NOISE
    for index in range(evaluations):
        x = x - 0.1 * velocity(x, 1.0 - 0.1 * index)
    return [*(part.clone() for part in session.contexts.full.held()), torch.tensor(written.logprobs), x]


def modules_of(pipe: BagelPipeline) -> dict[str, nn.Module]:
    """All modules of the model and the autoencoder that are to be called, by their names."""
    found = {}
    for root, module in (("model", pipe.model), ("vae", pipe.vae)):
        for name, part in module.named_modules():
            skipped = type(part) in NOT_CALLED or type(part).__name__ in NOT_CALLED
            found |= {} if skipped or not name else {f"{root}.{name}": part}
    return found


def parent_of(pipe: BagelPipeline, name: str) -> tuple[nn.Module, str]:
    root, _, path = name.partition(".")
    above, _, last = path.rpartition(".")
    return getattr(pipe, root).get_submodule(above), last


def differs(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def pipe() -> BagelPipeline:
    """A pipeline with modules of its own, to be changed, which share their weights."""
    pipe = copy.copy(PIPE)
    weights = {id(x): x for part in (PIPE.model, PIPE.vae) for x in (*part.parameters(), *part.buffers())}
    pipe.model, pipe.vae = copy.deepcopy((PIPE.model, PIPE.vae), weights)
    return pipe


@pytest.fixture
def kernels(monkeypatch):
    choose(monkeypatch, lambda name, x, *, narrow=False: KERNELS.get(name))


@pytest.fixture
def replayed(monkeypatch):
    def capture(memory, compute):
        graph = Recorded(compute)
        return graph, graph.out

    def plain(decoder):
        known = all(graphs._repeats(module) for module in decoder.modules())
        return known and not torch.is_grad_enabled()

    monkeypatch.setattr(GraphMemory, "capture", capture)
    monkeypatch.setattr(graphs, "can_capture", plain)
    monkeypatch.setattr(denoise, "REPLAYS", ("cpu",))


DECODER = [name for name in modules_of(PIPE) if name.startswith("model.decoder.")]


def check(pipe: BagelPipeline, name: str, *, exact: bool = True, **options) -> None:
    """Assert that a hook fires, that nothing is computed otherwise for it, and that a wrapper is called and counts."""
    wanted, calls = run(pipe, name, **options), []
    handle = modules_of(pipe)[name].register_forward_hook(lambda *_: calls.append(name))
    found = run(pipe, name, **options)
    handle.remove()
    assert calls, f"a hook on {name} saw nothing"
    for one, other in zip(found, wanted, strict=True):
        assert not exact or torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    parent, last = parent_of(pipe, name)
    wrapper = Wrapped(getattr(parent, last))
    setattr(parent, last, wrapper)
    if name in IN_PARTS:
        with pytest.raises(AttributeError):
            run(pipe, name, **options)
        return
    found = run(pipe, name, **options)
    assert wrapper.calls, f"what stands in the place of {name} was not called"
    assert differs(found, wanted), f"what stands in the place of {name} changed nothing"


@pytest.mark.parametrize("name", list(modules_of(PIPE)))
def test_a_hook_fires_and_a_replacement_takes_effect(pipe, name):
    check(pipe, name)


@pytest.mark.parametrize("name", DECODER)
def test_they_do_beside_kernels(pipe, kernels, name):
    check(pipe, name)


@pytest.mark.parametrize("name", [name for name in DECODER if ".layers." not in name or ".layers.1." in name])
def test_they_do_where_graphs_are_replayed(pipe, replayed, name):
    check(pipe, name, evaluations=3)


def one_row(x, weight, scale=None, bias=None, plus=None):
    """Stand in for the product of one token with a weight of 8 bits."""
    out = nn.functional.linear(x, weight.to(x.dtype) * (1 if scale is None else scale.to(x.dtype)), bias)
    return out if plus is None else plus + out


@pytest.mark.parametrize("name", [name for name in DECODER if ".layers.1." in name])
@pytest.mark.parametrize("fused", [False, True])
def test_they_do_among_8_bit_layers(pipe, monkeypatch, name, fused):
    quantize_experts(pipe.model, und=True)
    if fused:
        own = KERNELS | {"matrix_times_vector": one_row}
        choose(monkeypatch, lambda name, x, *, narrow=False: own.get(name))
    check(pipe, name, exact=False)  # rounding to 8 bits makes much of the least difference


@pytest.mark.parametrize("part", ["input_norm", "attention.qkv_proj", "attention.k_norm"])
def test_a_replacement_in_the_last_layer_changes_what_a_context_keeps(pipe, part):
    wanted = pipe.session(seed=0).read("a riddle").contexts.full.held()
    parent, last = parent_of(pipe, f"model.decoder.layers.2.und.{part}")
    setattr(parent, last, Wrapped(getattr(parent, last)))
    found = pipe.session(seed=0).read("a riddle").contexts.full.held()
    assert not torch.equal(found[0][2], wanted[0][2])
    assert torch.equal(found[0][:2], wanted[0][:2])


def test_every_module_that_is_not_called_is_listed():
    listed = [m for m in (*PIPE.model.modules(), *PIPE.vae.modules()) if type(m).__name__ in NOT_CALLED]
    assert {type(module).__name__ for module in listed} == {"Expert", "Projections"}
    assert len(modules_of(PIPE)) > 130
