"""Sampling: the flow's schedule and steps, guidance, TaylorSeer, guided velocities, and the choice of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bagel.sampling import (
    FlowStep,
    Guidance,
    GuidedVelocity,
    PictureBranches,
    euler,
    flow_timesteps,
    guide,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The flow -------------------------------------------------------------------------------------------------------------


def test_flow_timesteps_literals():
    assert flow_timesteps(2).tolist() == [1, 0]
    assert flow_timesteps(5, shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-7)
    assert flow_timesteps(5, shift=0.5).tolist() == pytest.approx([1, 0.6, 1 / 3, 1 / 7, 0], abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.floats(0.1, 20))
def test_flow_timesteps_fall_from_one_to_zero(count, shift):
    t = flow_timesteps(count, shift=shift)
    assert (t.shape, t.dtype) == ((count,), torch.float32)
    assert t[0].item() == pytest.approx(1, abs=1e-6)
    assert t[-1] == 0
    assert (t[:-1] > t[1:]).all()


@pytest.mark.parametrize("count", [2, 17, 50])
def test_a_shift_of_one_is_even_spacing(count):
    assert torch.equal(flow_timesteps(count, shift=1.0), torch.linspace(1, 0, count))


@pytest.mark.parametrize(
    ("count", "shift", "message"),
    [
        (1, 1.0, "at least 2"),
        (5, 0.0, "positive"),
        (5, -1.0, "positive"),
        (5, math.inf, "finite"),
        (5, math.nan, "nan"),
    ],
)
def test_flow_timesteps_out_of_range_are_refused(count, shift, message):
    with pytest.raises(ValueError, match=message):
        flow_timesteps(count, shift=shift)


def test_euler_steps_through_a_linear_equation():
    noise, t = [randn(3, 2), randn(5, 2, seed=1)], flow_timesteps(7, shift=3.0)
    found = euler(lambda x, index: [x[0] * 0.5, x[1] * t[index]], noise, t)
    first, second = 1.0, 1.0
    for now, then in zip(t[:-1].double(), t[1:].double(), strict=True):
        first, second = first * (1 - 0.5 * (now - then)), second * (1 - now * (now - then))
    assert_close(found[0], noise[0].double() * first, relative=1e-6)
    assert_close(found[1], noise[1].double() * second, relative=1e-6)


def test_euler_reaches_the_data_of_a_straight_path_exactly_and_keeps_the_noise():
    noise, data = randn(4, 3), randn(4, 3, seed=1)
    kept = noise.clone()
    (found,) = euler(lambda x, _: [noise - data], [noise], flow_timesteps(9, shift=3.0))
    assert_close(found, data, relative=1e-6)
    assert torch.equal(noise, kept)


def test_on_step_sees_each_evaluation_before_its_step():
    t, seen = flow_timesteps(4, shift=2.0), []
    noise = [randn(2, 2), randn(3, 2, seed=1)]
    euler(lambda x, index: [a + index for a in x], noise, t, on_step=seen.append)
    assert [(s.index, s.num_steps, s.picture) for s in seen] == [(i, 3, p) for i in range(3) for p in range(2)]
    assert [s.t for s in seen[::2]] == t[:-1].tolist()
    assert torch.equal(seen[1].latents, noise[1])
    for step, following in zip(seen[:-2], seen[2:], strict=True):
        assert torch.equal(step.velocity, step.latents + step.index)
        assert_close(following.latents, step.latents - step.velocity * (step.t - following.t), relative=1e-6)


def test_what_on_step_raises_ends_the_integration():
    evaluated = []

    def stop(step: FlowStep) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        euler(lambda x, index: evaluated.append(index) or x, [randn(2, 2)], flow_timesteps(9), on_step=stop)
    assert evaluated == [0, 1]


# Guidance -------------------------------------------------------------------------------------------------------------

V, V_TEXT, V_IMG = (randn(6, 4, seed=seed) for seed in range(3))
SCALES = st.floats(1, 10, exclude_min=True)
RENORMS = st.sampled_from(["global", "channel", "text_channel"])


def guided_twin(v: Tensor, v_text: Tensor, v_img: Tensor, a: float, b: float, renorm: str, least: float) -> Tensor:
    """The formulas, token by token, in float64."""
    v, v_text, v_img = (x.double() for x in (v, v_text, v_img))

    def norm(x: Tensor) -> float:
        return math.sqrt(sum(value**2 for value in x.flatten().tolist()))

    def renormed(w: Tensor) -> Tensor:
        return torch.stack([w[i] * min(max(norm(v[i]) / (norm(w[i]) + 1e-8), least), 1.0) for i in range(len(w))])

    v_a = v_text + a * (v - v_text)
    if renorm == "text_channel":
        v_a = renormed(v_a)
    w = v_img + b * (v_a - v_img) if b > 1 else v_a
    if renorm == "global":
        return w * min(max(norm(v) / (norm(w) + 1e-8), least), 1.0)
    return renormed(w) if renorm == "channel" else w


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
@pytest.mark.parametrize(("a", "b", "least"), [(4, 1, 0), (4, 2, 0), (2.5, 1.5, 0.6), (1.2, 3, 1), (7, 0, 0.3)])
def test_guide_agrees_with_a_float64_twin(renorm, a, b, least):
    guidance = Guidance(cfg_text_scale=a, cfg_img_scale=b, cfg_renorm_type=renorm, cfg_renorm_min=least)
    assert_close(guide(V, V_TEXT, V_IMG, guidance), guided_twin(V, V_TEXT, V_IMG, a, b, renorm, least), relative=1e-6)
    if b <= 1:
        assert torch.equal(guide(V, V_TEXT, None, guidance), guide(V, V_TEXT, V_IMG, guidance))


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_scales_of_one_are_the_identity(renorm):
    guidance = Guidance(cfg_text_scale=1.0, cfg_img_scale=1.0, cfg_renorm_type=renorm)
    assert_close(guide(V, V_TEXT, V_IMG, guidance), V, relative=1e-6)


@settings(max_examples=50, deadline=None)
@given(SCALES, SCALES, RENORMS, st.integers(0, 9))
def test_a_branch_equal_to_the_full_one_guides_nothing(a, b, renorm, seed):
    v = randn(5, 3, seed=seed)
    guidance = Guidance(cfg_text_scale=a, cfg_img_scale=b, cfg_renorm_type=renorm)
    assert_close(guide(v, v, v, guidance), v, relative=1e-6)


@settings(max_examples=50, deadline=None)
@given(SCALES, SCALES, RENORMS)
def test_renorm_min_of_one_switches_renormalisation_off(a, b, renorm):
    guidance = Guidance(cfg_text_scale=a, cfg_img_scale=b, cfg_renorm_type=renorm, cfg_renorm_min=1.0)
    v_a = V_TEXT + a * (V - V_TEXT)
    assert torch.equal(guide(V, V_TEXT, V_IMG, guidance), V_IMG + b * (v_a - V_IMG))


@settings(max_examples=50, deadline=None)
@given(SCALES, SCALES, st.integers(0, 9))
def test_the_norm_never_grows(a, b, seed):
    v, v_text, v_img = (randn(5, 3, seed=3 * seed + i) for i in range(3))

    def run(renorm: str, scale: float) -> Tensor:
        return guide(v, v_text, v_img, Guidance(cfg_text_scale=a, cfg_img_scale=scale, cfg_renorm_type=renorm))

    assert run("global", b).norm() <= v.norm() * (1 + 1e-6)
    assert (run("channel", b).norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-6)).all()
    assert (run("text_channel", 1.0).norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-6)).all()


def test_local_is_an_alias_of_channel():
    assert Guidance(cfg_renorm_type="local") == Guidance(cfg_renorm_type="channel")


def test_the_interval_excludes_its_low_edge_and_includes_its_high_one_in_float32():
    guidance = Guidance(cfg_interval=(0.4, 0.9))  # 0.4 and 0.9 are no float32 numbers
    low, high = torch.tensor([0.4, 0.9])
    up, down = torch.tensor(1.0), torch.tensor(0.0)
    times = torch.stack([up, torch.nextafter(high, up), high, torch.nextafter(low, up), low, down])
    assert guidance.active(times) == [False, False, True, True, False, False]
    assert Guidance(cfg_interval=(0.0, 1.0)).active(torch.tensor([1.0, 1e-6, 0.0])) == [True, True, False]


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_a_text_scale_of_one_or_less_is_no_guidance_even_with_an_image_scale(scale):
    guidance = Guidance(cfg_text_scale=scale, cfg_img_scale=3.0, cfg_interval=(0.0, 1.0))
    assert not guidance.uses_text
    assert not guidance.uses_image
    assert guidance.active(torch.tensor([1.0, 0.5])) == [False, False]


@pytest.mark.parametrize(
    "bad",
    [
        {"cfg_renorm_type": "none"},
        {"cfg_renorm_min": 1.5},
        {"cfg_renorm_min": -0.1},
        {"cfg_text_scale": -1.0},
        {"cfg_text_scale": math.nan},
        {"cfg_img_scale": math.inf},
        {"cfg_interval": (0.5, 0.4)},
        {"cfg_interval": (0.5,)},
    ],
    ids=str,
)
def test_guidance_out_of_range_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Guidance(**bad)


# Guided velocities ----------------------------------------------------------------------------------------------------


class Recorder:
    """A model whose branch k gives x * (k + 1) + index, and which remembers what was asked of it."""

    def __init__(self, owner: dict[int, int]) -> None:
        self.owner, self.asked = owner, []

    def __call__(self, x: list[Tensor], index: int, branches: tuple[int, ...]) -> list[Tensor]:
        self.asked.append(branches)
        return [x[self.owner[branch]] * (branch + 1) + index for branch in branches]


def head(state: Tensor) -> Tensor:
    return 2 * state


def test_only_the_needed_branches_are_computed_each_once():
    states = Recorder({0: 0, 1: 0, 2: 1, 3: 1, 4: 1})
    pictures = [PictureBranches(0, 1, 0), PictureBranches(2, 3, 4)]  # the first one's image branch is its full one
    guidance = Guidance(cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.4, 0.8))
    run = GuidedVelocity(states, head, pictures, guidance=guidance, timesteps=torch.tensor([1.0, 0.6, 0.3]))
    x = [randn(3, 2), randn(4, 2, seed=1)]
    results = [run(x, index) for index in range(3)]
    assert states.asked == [(0, 2), (0, 1, 2, 3, 4), (0, 2)]
    assert torch.equal(results[2][1], head(3 * x[1] + 2))
    for picture, (full, text, image) in enumerate(((1, 2, 1), (3, 4, 5))):
        v, v_text, v_img = (head(x[picture] * factor + 1) for factor in (full, text, image))
        assert torch.equal(results[1][picture], guide(v, v_text, v_img, guidance))


def test_pictures_of_one_batch_do_not_couple():
    guidance = Guidance(cfg_text_scale=4.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="global")
    times, x = torch.tensor([0.5]), [randn(3, 2), 100 * randn(4, 2, seed=1)]
    both = [PictureBranches(0, 1), PictureBranches(2, 3)]
    together = GuidedVelocity(Recorder({0: 0, 1: 0, 2: 1, 3: 1}), head, both, guidance=guidance, timesteps=times)(x, 0)
    for picture in range(2):
        alone = GuidedVelocity(
            Recorder({0: 0, 1: 0, 2: 1, 3: 1}), head, both[picture : picture + 1], guidance=guidance, timesteps=times
        )
        assert torch.equal(alone(x, 0)[0], together[picture])


def test_without_guidance_the_full_branch_alone_is_computed():
    states = Recorder({0: 0})
    run = GuidedVelocity(
        states, head, [PictureBranches(0)], guidance=Guidance(cfg_text_scale=1.0), timesteps=torch.tensor([0.9])
    )
    x = [randn(3, 2)]
    assert torch.equal(run(x, 0)[0], head(x[0]))
    assert states.asked == [(0,)]
