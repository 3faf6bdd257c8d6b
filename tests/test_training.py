"""The trainer on a toy world: it learns, resumes bit for bit, freezes, and its checkpoints load like any other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training_world import CONFIG, SOURCES, Generated, run_two_processes, toy_data, toy_model, toy_trainer, writing

from bagel.checkpoint import CheckpointError
from bagel.loading import load_parts
from bagel.training import TrainConfig, freeze, optimiser, part_of, state
from bagel.training.batch import on_device
from bagel.training.masks import DenseAttention
from bagel.training.optimiser import Muon
from bagel.training.stream import Stream
from bagel.training.trainer import SummedLosses


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.root.model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def trained(out: Path, **settings):
    trainer = toy_trainer(out, **settings)
    trainer.fit()
    return trainer


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Learning -------------------------------------------------------------------------------------------------------------


def test_two_hundred_steps_from_scratch_lower_both_losses(tmp_path):
    trained(tmp_path, steps=200, lr=3e-3, warmup=20, log_every=10, data=toy_data(token_budget=300))
    log = lines(tmp_path)
    assert log[0]["ce"] > 3
    assert log[0]["mse"] > 1.2
    assert log[-1]["ce"] < 0.1
    assert log[-1]["mse"] < 0.4


@pytest.mark.parametrize(
    ("sources", "losses"),
    [
        ({"write": Generated(writing)}, ("ce",)),
        ({"name": SOURCES["name"]}, ("ce",)),
        ({"draw": SOURCES["draw"]}, ("mse",)),
        (SOURCES, ("ce", "mse")),
    ],
    ids=["text", "understanding", "drawing", "mixed"],
)
def test_any_mixture_trains(tmp_path, sources, losses):
    trained(tmp_path, data=toy_data(sources), steps=30)
    log = lines(tmp_path)
    for name in ("ce", "mse"):
        if name in losses:
            assert log[-1][name] < 0.8 * log[0][name]
        else:
            assert log[-1][name] == 0


@pytest.mark.parametrize("source", ["write", "name", "draw"])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(source):
    model = toy_model()
    freeze(model, ())
    data = toy_data({source: {**SOURCES, "write": Generated(writing)}[source]})
    batch = Stream(data, 0).next_batch()
    packed = on_device(batch, vae=None, patch=2, generator=torch.Generator())
    model.attention = DenseAttention()
    ce, mse = SummedLosses(model)(packed)
    (ce + mse).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", ["und", "gen", "vit", "connector"])
def test_a_frozen_part_stands_still_and_the_others_move(tmp_path, part):
    model = toy_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # The first update moves only what the flow loss reaches through a velocity that starts at zero: take two.
    trained(tmp_path, model=model, freeze=(part,), steps=2, batches=2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {part_of(name) for name in moved} == {"und", "gen", "vit", "connector"} - {part}


def test_muon_steps_along_orthogonal_matrices_as_far_as_adamw(tmp_path):
    trainer = toy_trainer(tmp_path, steps=1, optimizer="muon", lr=1e-3, warmup=0)
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    name = "decoder.layers.0.und.mlp.down_proj.weight"
    step = (after[name] - before[name]) / (1e-3 * 0.2 * max(before[name].shape) ** 0.5)
    scales = torch.linalg.svdvals(step)
    assert scales.max() < 1.4  # the iteration brings all directions near one, not to it; the first gradient has few
    assert scales[9] > 0.7
    embedding = after["decoder.embed_tokens.weight"] - before["decoder.embed_tokens.weight"]
    assert embedding.abs().max() == pytest.approx(1e-3, rel=1e-2)  # AdamW's first step


@pytest.mark.parametrize("most", [optimiser.TOGETHER, 96, 1])
def test_muon_moves_matrices_together_as_torch_moves_each(monkeypatch, most):
    monkeypatch.setattr(optimiser, "TOGETHER", most)

    def matrices() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(12, 8), (8, 12), (12, 8), (6, 6)]
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    together, each = matrices(), matrices()
    ours = Muon(together, lr=0.01, weight_decay=0.05)
    wanted = torch.optim.Muon(each, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for number, (a, b) in enumerate(zip(together, each, strict=True)):
            a.grad = b.grad = None if step == number == 2 else torch.randn(a.shape, generator=generator)
        ours.step()
        wanted.step()
    for a, b in zip(together, each, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ours.state[a]["momentum_buffer"], wanted.state[b]["momentum_buffer"])


def test_muon_without_matrices_of_layers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none are trained here; use 'adamw'"):
        toy_trainer(tmp_path, optimizer="muon", freeze=("und", "gen", "vit"))


def test_freezing_everything_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="leaves nothing to train"):
        toy_trainer(tmp_path, freeze=("und", "gen", "vit", "connector"))


def test_flex_attention_of_small_heads_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="flex attention needs heads of at least 16 channels, got 12"):
        toy_trainer(tmp_path, attention="flex")


def test_gen_starts_as_a_copy_of_und():
    model = toy_model()
    for layer in model.decoder.layers:
        assert_same(layer.gen.state_dict(), layer.und.state_dict())
    assert torch.equal(model.decoder.norm_gen.weight, model.decoder.norm.weight)


def test_an_infinite_loss_stops_without_saving(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite by step"):
        trained(tmp_path, lr=1e30, clip_norm=0.0, steps=20, log_every=4)
    assert state.newest(tmp_path) is None


# One step computed in other ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"workers": 2}])
def test_switches_that_only_cost_or_save_change_no_bit(tmp_path, settings):
    plain = trained(tmp_path / "plain", steps=3)
    assert_same(weights(trained(tmp_path / "other", steps=3, **settings)), weights(plain))


def test_bfloat16_autocast_keeps_float32_weights_and_nearly_the_loss(tmp_path):
    plain, narrow = (trained(tmp_path / p, steps=3, precision=p) for p in ("float32", "bfloat16"))
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters.values())
    for a, b in zip(lines(plain.out), lines(narrow.out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_accumulated_batches_weigh_every_label_and_every_target_alike(tmp_path):
    trainer = toy_trainer(tmp_path, batches=3, clip_norm=0.0)
    batches = [Stream(trainer.data, index).next_batch() for index in range(3)]
    labels = sum(batch.packed.labels.shape[0] for batch in batches)
    targets = sum(batch.packed.target_rows.shape[0] for batch in batches)
    losses, _ = trainer.step(trainer._feed())
    ce = mse = 0.0
    for index, batch in enumerate(batches):
        fresh = toy_trainer(tmp_path, batches=3)
        delivery = next(feed for number, feed in enumerate(fresh._feed()) if number == index)
        with torch.no_grad():
            own_ce, own_mse = fresh._forward(delivery, index)
        assert torch.equal(delivery.batch.to("cpu").packed.labels, batch.packed.labels)
        ce, mse = ce + own_ce.item(), mse + own_mse.item()
    assert losses[0].item() == pytest.approx(ce / labels, rel=1e-5)
    assert losses[1].item() == pytest.approx(mse / (targets * CONFIG.patch_latent_dim), rel=1e-5)


def test_two_processes_have_the_losses_of_one(tmp_path):
    trained(tmp_path / "one", steps=4, batches=2)
    for steps in (2, 4):  # the second run resumes the first
        run_two_processes(tmp_path / "two", steps=steps, device="cpu")
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("ce", "mse", "grad_norm"):  # weights of no effect, as key biases, follow rounding
            assert two[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])
    one, two = (json.loads((tmp_path / name / "0000004" / state.STATE).read_text()) for name in ("one", "two"))
    assert two["streams"] == one["streams"]


# Resuming -------------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def kill_at(step: int):
    def on_step(done, values):
        if done == step:
            raise KilledError

    return on_step


@pytest.mark.parametrize(
    "settings",
    [{}, {"batches": 2, "workers": 2, "schedule": "cosine", "freeze": ("vit",)}, {"optimizer": "muon"}],
)
def test_a_killed_run_resumes_to_equal_weights(tmp_path, settings):
    straight = trained(tmp_path / "straight", **settings)
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", save_every=3, on_step=kill_at(5), **settings)
    again = toy_trainer(tmp_path / "killed", model=toy_model(seed=9), **settings)
    assert again.done == 3
    again.fit()
    assert_same(weights(again), weights(straight))
    assert_same(again.optimiser.average, straight.optimiser.average)
    assert lines(again.out)[-1]["loss"] == lines(straight.out)[-1]["loss"]
    assert [line["step"] for line in lines(again.out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(tmp_path, monkeypatch):
    straight = trained(tmp_path / "straight")
    trained(tmp_path / "killed", steps=3)

    def fail(*arguments, **options):
        raise KilledError

    monkeypatch.setattr(state, "save_file", fail)
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", steps=5)
    monkeypatch.undo()
    assert any(path.name.endswith(".tmp") for path in (tmp_path / "killed").iterdir())
    again = toy_trainer(tmp_path / "killed")
    assert again.done == 3
    again.fit()
    assert_same(weights(again), weights(straight))
    assert not any(path.name.endswith(".tmp") for path in (tmp_path / "killed").iterdir())


def test_a_time_limit_stops_and_saves(tmp_path):
    trainer = toy_trainer(tmp_path, steps=10**6, log_every=10**6)
    done = trainer.fit(time_limit=0.3)
    assert 0 < done < 10**6
    assert state.newest(tmp_path).name == f"{done:07d}"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trained(tmp_path, save_every=2, keep=2)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "tensorboard")
    assert folders == ["0000004", "0000006"]


def test_going_on_with_other_data_is_an_error(tmp_path):
    trained(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match="would not be the same run"):
        toy_trainer(tmp_path, data=toy_data(seed=1))


def test_a_checkpoint_of_a_run_is_an_ordinary_checkpoint(tmp_path):
    trainer = trained(tmp_path, steps=2, ema_decay=0.5, ema_warmup=False)
    folder = state.newest(tmp_path)
    model, _, _ = load_parts(folder, device="cpu", dtype="float32", progress=False)
    assert model.config == CONFIG
    loaded = model.state_dict()
    assert_same({name: loaded[name] for name in trainer.optimiser.average}, trainer.optimiser.average)
    assert_same(state.read_weights(folder, "model.safetensors"), weights(trainer))


# Settings -------------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_rule(tmp_path):
    model = toy_model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trained(tmp_path, model=model, steps=1, ema_decay=0.9, ema_warmup=False)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(trainer.optimiser.average[name], 0.9 * start[name] + 0.1 * parameter.detach())


def test_the_averages_decay_warms_up():
    config = TrainConfig(steps=1, ema_decay=0.99)
    assert [config.ema_decay_at(step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.99]


def test_rates_warm_up_and_fall_as_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=2.0, schedule="cosine", min_lr=0.1)
    assert config.lr_at(0) == pytest.approx(0.2)
    assert config.lr_at(9) == 2.0
    assert config.lr_at(35) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert config.lr_at(60) == pytest.approx(1.1)
    assert config.lr_at(110) == pytest.approx(0.2)
    assert TrainConfig(steps=110, warmup=10, lr=2.0).lr_at(100) == 2.0


def test_settings_survive_json():
    config = TrainConfig(steps=5, freeze=("vit",), betas=(0.8, 0.9))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "schedule": "linear"}, "schedule must be one of constant, cosine"),
        ({"steps": 1, "freeze": ["vae"]}, "freeze takes und, gen, vit, connector, got 'vae'"),
        ({"steps": 1, "optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"steps": 1, "learning_rate": 1}, r"need steps and take .*got \['learning_rate', 'steps'\]"),
    ],
)
def test_a_wrong_setting_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)
