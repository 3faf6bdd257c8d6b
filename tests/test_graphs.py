"""Evaluations of small pictures as a GPU's graphs do them: the same numbers, on memory that stays where it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import REFERENCE
from small_model import small_model
from torch.fx.experimental.proxy_tensor import make_fx

from bagel import BagelPipeline
from bagel.modeling import denoise, graphs
from bagel.modeling.graphs import GraphMemory, Replayed


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
    monkeypatch.setattr(graphs, "can_capture", lambda model: True)
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
    monkeypatch.setattr(graphs, "can_capture", lambda model: False)
    assert torch.equal(found, drawn(pipe, **options))


def test_only_evaluations_that_are_small_and_repeated_are_captured(pipe, captured, monkeypatch):
    draw = lambda steps: pipe.text_to_image("a star", height=64, width=64, num_timesteps=steps, progress=False)  # noqa: E731
    draw(2)
    assert not captured
    tokens = pipe.parts.latent_cells(64, 64).shape[0]
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", tokens)
    draw(20)
    assert not captured
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", tokens + 1)
    draw(20)
    assert len(captured) == 1, "the evaluations without guidance"


def test_what_a_replay_returned_is_not_overwritten_by_the_next(pipe, captured):
    replayed = Replayed(lambda x: 2 * x, pipe.parts.model, GraphMemory())
    results = [replayed(torch.full((3,), float(value))) for value in range(4)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6]
    assert len(captured) == 1


def test_without_room_for_a_graph_each_evaluation_is_computed(pipe, captured, monkeypatch):
    tried = []

    def capture(memory, compute):
        tried.append(compute)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GraphMemory, "capture", capture)
    replayed = Replayed(lambda x: 2 * x, pipe.parts.model, GraphMemory())
    replayed.memory.own.of_gpu = {0: ("stream", "graph")}
    assert [replayed(torch.full((3,), float(value)))[0].item() for value in range(4)] == [0, 2, 4, 6]
    assert len(tried) == 1
    assert not vars(replayed.memory.own), "what it had is free for others"


def test_other_weights_make_another_graph(captured, monkeypatch):
    monkeypatch.setattr(Recorded, "replay", lambda graph: None)  # a graph reads the weights that were there
    model = small_model()
    replayed = Replayed(lambda x: torch.ones_like(x) * model.decoder.norm.weight, model, GraphMemory())
    x = torch.ones(48)
    with torch.no_grad():
        for weight in (1.0, 3.0):
            model.decoder.norm.weight.data = torch.full((48,), weight)
            assert [replayed(x)[0].item() for _ in range(3)] == 3 * [weight]
    assert len(captured) == 2


def test_a_large_picture_has_the_memory_of_graphs(pipe, captured, monkeypatch):
    cleared = []
    monkeypatch.setattr(GraphMemory, "clear", lambda memory: cleared.append(memory))
    drawn(pipe)
    assert not cleared
    monkeypatch.setattr(denoise, "LAUNCH_BOUND", 0)
    drawn(pipe)
    assert cleared


@pytest.mark.parametrize("change", ["hook", "global hook", "forward", "gradients", "nothing"])
def test_what_a_graph_would_leave_out_is_not_captured(monkeypatch, change):
    model = small_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layer, hook = model.decoder.layers[1], lambda *_: None
    with torch.set_grad_enabled(change == "gradients"):
        if change == "forward":
            monkeypatch.setattr(layer, "forward", layer.forward)
        handles = []
        if change == "hook":
            handles.append(layer.register_forward_pre_hook(hook))
        if change == "global hook":
            handles.append(torch.nn.modules.module.register_module_forward_hook(hook))
        try:
            assert graphs.can_capture(model) == (change == "nothing")
        finally:
            for handle in handles:
                handle.remove()


def test_a_copy_of_graph_memory_is_empty():
    memory = GraphMemory()
    memory.own.of_gpu = {0: ("stream", "graph")}
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert not vars(other.own)
