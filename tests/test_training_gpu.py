"""Training on a GPU: both attentions agree there with their gradients, and a killed run resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import assert_close
from training_world import CONFIG, fresh_model, run_two_processes, toy_data, toy_trainer

from bagel.training.batch import on_device
from bagel.training.masks import attention_of
from bagel.training.stream import Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]


def losses_and_gradients(kind: str):
    wide = dataclasses.replace(CONFIG, llm_config=dataclasses.replace(CONFIG.llm_config, hidden_size=64))
    model = fresh_model(wide).cuda()
    batch = Stream(toy_data(token_budget=3000), 0).next_batch().to("cuda")
    packed = on_device(batch, vae=None, patch=2, generator=torch.Generator("cuda").manual_seed(0))
    model.attention = attention_of(kind, device=model.device, dtype=torch.float32)
    loss = model.losses(packed).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_flex_attention_has_the_losses_and_gradients_of_dense_attention():
    dense, flex = losses_and_gradients("dense"), losses_and_gradients("flex")
    assert_close(flex[0], dense[0], relative=1e-4)
    for name, gradient in dense[1].items():
        if not name.endswith("qkv_proj.bias"):  # key biases have no gradient but rounding
            assert_close(flex[1][name], gradient, relative=1e-2)


def trained(out, **settings) -> dict[str, torch.Tensor]:
    trainer = toy_trainer(out, device="cuda", **settings)
    trainer.fit()
    return dict(trainer.root.model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "workers": 2}, {"compile": True}])
def test_a_run_in_two_pieces_has_equal_weights(tmp_path, settings):
    want = trained(tmp_path / "straight", steps=6, **settings)
    trained(tmp_path / "pieces", steps=3, **settings)
    found = trained(tmp_path / "pieces", steps=6, **settings)
    assert [name for name in want if not torch.equal(found[name], want[name])] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_losses_of_one(tmp_path):
    trained(tmp_path / "one", steps=4, batches=2)
    run_two_processes(tmp_path / "two", steps=4, device="cuda")
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        assert json.loads(two)["loss"] == pytest.approx(json.loads(one)["loss"], rel=1e-3)
