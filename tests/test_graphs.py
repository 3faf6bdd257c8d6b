"""Evaluations of small images as a GPU's graphs do them: the same numbers, on memory that stays where it is."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import REFERENCE
from small_model import new_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bagel import BagelPipeline
from bagel.modeling import denoise, graphs
from bagel.modeling.graphs import GraphMemory, Graphs, Replayed
from bagel.modeling.linear import Linear


class Recorded:
    """Stands in for a graph: does again what a computation did to the memory it used, whatever Python would do now."""

    def __init__(self, compute) -> None:
        self.launch = make_fx(compute)()
        self.out = self.launch()

    def replay(self) -> None:
        self.out.copy_(self.launch())


@pytest.fixture
def captured(monkeypatch) -> list[Recorded]:
    """The graphs that were made, on a CPU."""
    made = []

    def capture(memory, compute):
        made.append(Recorded(compute))
        return made[-1], made[-1].out

    monkeypatch.setattr(GraphMemory, "capture", capture)
    monkeypatch.setattr(graphs, "can_capture", lambda decoder: True)
    monkeypatch.setattr(denoise, "REPLAYS", ("cuda", "cpu"))
    return made


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    return BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", dtype=torch.float32)


def drawn(pipe: BagelPipeline, **options) -> torch.Tensor:
    prompts = ["a red circle", "two blue squares on a gray background"]
    results = pipe.text_to_image(prompts, height=64, width=64, num_timesteps=20, seed=[3, 4], progress=False, **options)
    return torch.stack([result.latents for result in results])


@pytest.mark.parametrize("options", [{}, {"taylorseer": True}, {"cfg_interval": (0.4, 0.9)}])
def test_drawing_with_graphs_gives_the_same_numbers(pipe, captured, monkeypatch, options):
    found = drawn(pipe, **options)
    assert captured
    monkeypatch.setattr(graphs, "can_capture", lambda decoder: False)
    assert torch.equal(found, drawn(pipe, **options))


def test_only_evaluations_that_are_small_and_repeated_are_captured(pipe, captured, monkeypatch):
    draw = lambda steps: pipe.text_to_image("a star", height=64, width=64, num_timesteps=steps, progress=False)  # noqa: E731
    draw(2)
    assert not captured
    tokens = pipe.processor.grid(64, 64).shape[0]
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", tokens)
    draw(20)
    assert not captured
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", tokens + 1)
    draw(20)
    assert len(captured) == 1, "the evaluations without guidance"


def test_what_a_replay_returned_is_not_overwritten_by_the_next(pipe, captured):
    replayed = Replayed(lambda x: 2 * x, pipe.model.decoder, GraphMemory())
    results = [replayed(torch.full((3,), float(value))) for value in range(4)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6]
    assert len(captured) == 1


def test_without_room_for_a_graph_each_evaluation_is_computed(pipe, captured, monkeypatch):
    tried = []

    def capture(memory, compute):
        tried.append(compute)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GraphMemory, "capture", capture)
    replayed = Replayed(lambda x: 2 * x, pipe.model.decoder, GraphMemory())
    replayed.memory.own.of_gpu = {0: ("stream", "graph")}
    assert [replayed(torch.full((3,), float(value)))[0].item() for value in range(4)] == [0, 2, 4, 6]
    assert len(tried) == 1
    assert not vars(replayed.memory.own), "what it had is free for others"


def test_other_weights_make_another_graph(captured, monkeypatch):
    monkeypatch.setattr(Recorded, "replay", lambda graph: None)  # a graph reads the weights that were there
    decoder = new_model().decoder
    replayed = Replayed(lambda x: torch.ones_like(x) * decoder.norm.weight, decoder, GraphMemory())
    x = torch.ones(48)
    with torch.no_grad():
        for weight in (1.0, 3.0):
            decoder.norm.weight.data = torch.full((48,), weight)
            assert [replayed(x)[0].item() for _ in range(3)] == 3 * [weight]
    assert len(captured) == 2


def test_another_module_with_the_same_weights_makes_another_graph(captured):
    decoder = new_model().decoder
    replayed = Replayed(lambda x: 2 * x, decoder, GraphMemory())
    for _ in range(3):
        replayed(torch.ones(48))
    assert len(captured) == 1
    old = decoder.layers[1].und.mlp.down_proj
    decoder.layers[1].und.mlp.down_proj = Linear(old.in_features, old.out_features, bias=False)
    decoder.layers[1].und.mlp.down_proj.weight = old.weight
    for _ in range(3):
        replayed(torch.ones(48))
    assert len(captured) == 2


def test_a_large_image_has_the_memory_of_graphs(pipe, captured, monkeypatch):
    cleared = []
    monkeypatch.setattr(GraphMemory, "clear", lambda memory: cleared.append(memory))
    drawn(pipe)
    assert not cleared
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", 0)
    drawn(pipe)
    assert cleared


def test_a_cpu_repeats_nothing(pipe, monkeypatch):
    used = []
    monkeypatch.setattr(GraphMemory, "capture", lambda *_: used.append("a graph was made"))
    monkeypatch.setattr(GraphMemory, "clear", lambda *_: used.append("memory was given up"))
    drawn(pipe)
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", 0)
    drawn(pipe)
    assert not used


class Foreign(nn.Module):
    """A layer whose results may depend on more than its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Inherited(Linear):
    """A layer that somebody may have changed by inheritance."""


@pytest.fixture
def decoder(monkeypatch) -> nn.Module:
    """A decoder of which graphs could be made: it says that it is on the current GPU."""
    decoder = new_model().decoder
    monkeypatch.setattr(decoder.norm, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.no_grad():
        yield decoder


def test_graphs_can_be_made_of_what_the_library_and_torch_bring(decoder):
    assert graphs.can_capture(decoder)
    old = decoder.layers[1].und.attention.o_proj
    decoder.layers[1].und.attention.o_proj = nn.Linear(old.in_features, old.out_features)
    assert graphs.can_capture(decoder)


def test_graphs_are_of_the_current_gpu(decoder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert not graphs.can_capture(decoder)
    assert not graphs.can_capture(new_model().decoder)


@pytest.mark.parametrize(
    "change", ["hook", "pre-hook", "global hook", "forward", "gradients", "autocast", "wrapped", "inherited", "lm_head"]
)
def test_what_a_graph_would_leave_out_is_not_captured(decoder, monkeypatch, change):
    layer, hook, handles = decoder.layers[1], lambda *_: None, []
    down = layer.und.mlp.down_proj
    if change == "hook":
        handles.append(down.register_forward_hook(hook))
    elif change == "pre-hook":
        handles.append(layer.register_forward_pre_hook(hook))
    elif change == "global hook":
        handles.append(nn.modules.module.register_module_forward_hook(hook))
    elif change == "forward":
        monkeypatch.setattr(layer, "forward", layer.forward)
    elif change == "autocast":
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    elif change == "wrapped":
        layer.und.mlp.down_proj = Foreign(down)
    elif change == "inherited":
        layer.und.mlp.down_proj = Inherited(down.in_features, down.out_features, bias=False)
    elif change == "lm_head":
        decoder.lm_head = Foreign(decoder.lm_head)
    try:
        with torch.set_grad_enabled(change == "gradients"):
            assert not graphs.can_capture(decoder)
    finally:
        for handle in handles:
            handle.remove()


def test_a_copy_of_what_is_kept_for_graphs_is_empty():
    kept = Graphs()
    kept.memory.own.of_gpu = {0: ("stream", "graph")}
    kept.decode_step = object()
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert not vars(other.memory.own)
        assert other.decode_step is None


def test_a_model_that_keeps_graphs_can_be_copied():
    model = new_model()
    model.graphs.memory.own.of_gpu = {0: ("stream", "graph")}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not vars(other.graphs.memory.own)
