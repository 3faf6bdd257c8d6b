"""Sampling: the flow's schedule and steps, guidance, TaylorSeer, guided velocities, and the choice of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bagel.sampling import (
    BRANCHES,
    Euler,
    FlowStep,
    Guidance,
    GuidedVelocity,
    Velocity,
    branch_names,
    flow_timesteps,
    integrate,
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
        (5, 0.0, "lie in"),
        (5, 1e300, "lie in"),
        (5, 1e-9, "lie in"),
        (5, -1.0, "lie in"),
        (5, math.inf, "lie in"),
        (5, math.nan, "nan"),
    ],
)
def test_flow_timesteps_out_of_range_are_refused(count, shift, message):
    with pytest.raises(ValueError, match=message):
        flow_timesteps(count, shift=shift)


def test_euler_steps_through_a_linear_equation():
    noise, t = randn(8, 2), flow_timesteps(7, shift=3.0)
    found = integrate(Euler(), lambda x, now: torch.cat([x[:3] * 0.5, x[3:] * now]), noise, t)
    first, second = 1.0, 1.0
    for now, then in zip(t[:-1].double(), t[1:].double(), strict=True):
        first, second = first * (1 - 0.5 * (now - then)), second * (1 - now * (now - then))
    assert_close(found[:3], noise[:3].double() * first, relative=1e-6)
    assert_close(found[3:], noise[3:].double() * second, relative=1e-6)


def test_euler_reaches_the_data_of_a_straight_path_exactly_and_keeps_the_noise():
    noise, data = randn(4, 3), randn(4, 3, seed=1)
    kept = noise.clone()
    found = integrate(Euler(), lambda x, _: noise - data, noise, flow_timesteps(9, shift=3.0))
    assert_close(found, data, relative=1e-6)
    assert torch.equal(noise, kept)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.floats(0.1, 20), st.integers(0, 9))
def test_a_step_of_euler_is_that_of_float32_times_to_the_last_bit(count, shift, seed):
    times, x, v = flow_timesteps(count, shift=shift), randn(5, 3, seed=seed), randn(5, 3, seed=seed + 10)
    steps, floats = times[:-1] - times[1:], times.tolist()
    for index, dt in enumerate(steps.tolist()):
        found = Euler()(lambda *_: v, x, floats[index], floats[index + 1])
        assert torch.equal(found, x - v * dt)
        assert torch.equal(found, x - v * steps[index])


def heun(velocity: Velocity, x: Tensor, t: float, next_t: float) -> Tensor:
    first = velocity(x, t)
    return x - (first + velocity(x - first * (t - next_t), next_t)) * ((t - next_t) / 2)


def test_any_function_of_a_step_is_a_solver_and_may_ask_for_any_time():
    times, asked = flow_timesteps(11, shift=2.0), []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x * t

    noise = randn(3, 2).double()
    exact = noise * math.exp(-0.5)
    errors = [(integrate(solver, velocity, noise, times) - exact).norm() for solver in (Euler(), heun)]
    assert errors[1] < errors[0] / 10
    assert asked[10:] == [t for pair in zip(times[:-1].tolist(), times[1:].tolist(), strict=True) for t in pair]


def test_a_solver_with_a_memory_starts_anew_for_each_generation():
    class Midpoint:
        """Adams and Bashforth's second rule, for even steps."""

        def start(self):
            kept: list[Tensor] = []

            def step(velocity: Velocity, x: Tensor, t: float, next_t: float) -> Tensor:
                kept.append(velocity(x, t))
                v = kept[-1] if len(kept) == 1 else 1.5 * kept[-1] - 0.5 * kept[-2]
                return x - v * (t - next_t)

            return step

        def __call__(self, velocity: Velocity, x: Tensor, t: float, next_t: float) -> Tensor:
            raise AssertionError("the steps are those of start()")

    solver, noise, times = Midpoint(), randn(3, 2).double(), flow_timesteps(21)
    first = integrate(solver, lambda x, t: x * t, noise, times)
    assert torch.equal(integrate(solver, lambda x, t: x * t, noise, times), first)
    assert_close(first, noise * math.exp(-0.5), relative=5e-3)


def test_a_flow_may_begin_in_the_middle():
    times = flow_timesteps(9)
    half = integrate(Euler(), lambda x, _: x, randn(2, 2), times[:5])
    assert torch.equal(
        integrate(Euler(), lambda x, _: x, half, times[4:]), integrate(Euler(), lambda x, _: x, randn(2, 2), times)
    )


@pytest.mark.parametrize("value", [None, 3, torch.zeros(2, 3)], ids=["None", "int", "shape"])
def test_a_solver_or_observer_that_returns_something_else_is_named(value):
    def broken(*_):
        return value

    with pytest.raises(TypeError, match=r"the solver must return a tensor of shape \(2, 2\), got"):
        integrate(broken, lambda x, t: x, randn(2, 2), flow_timesteps(3))
    if value is not None:
        with pytest.raises(TypeError, match=r"on_step must return a tensor of shape \(2, 2\), got"):
            integrate(Euler(), lambda x, t: x, randn(2, 2), flow_timesteps(3), on_step=broken)


# Observers ------------------------------------------------------------------------------------------------------------


def test_on_step_sees_each_step_before_it_is_taken():
    t, seen = flow_timesteps(4, shift=2.0), []
    noise, times = randn(5, 2), flow_timesteps(4, shift=2.0).tolist()
    last = integrate(Euler(), lambda x, now: x + now, noise, t, sizes=[2, 3], on_step=seen.append)
    assert [(s.index, s.num_steps, s.picture) for s in seen] == [(i, 3, p) for i in range(3) for p in range(2)]
    assert [step.image for step in seen] == [step.picture for step in seen]
    assert [s.t for s in seen[::2]] == times[:-1]
    assert [s.next_t for s in seen[::2]] == times[1:]
    assert torch.equal(seen[1].latents, noise[2:])
    for step, following in zip(seen[:-2], seen[2:], strict=True):
        assert torch.equal(step.velocity, step.latents + step.t)
        assert_close(following.latents, step.latents - step.velocity * (step.t - following.t), relative=1e-6)
        assert torch.equal(following.latents, step.next_latents)
    assert torch.equal(torch.cat([step.next_latents for step in seen[-2:]]), last)
    assert torch.equal(last, integrate(Euler(), lambda x, now: x + now, noise, t))


@pytest.mark.parametrize("sizes", [None, [2, 3]])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_an_observer_may_keep_and_change_what_it_sees(sizes, mode):
    kept, noise, times = [], randn(5, 2), flow_timesteps(6, shift=2.0)

    def spoil(step: FlowStep) -> None:
        kept.append(step)
        for tensor in (step.latents, step.velocity, step.next_latents):
            tensor.fill_(9.0)

    with mode():
        wanted = integrate(Euler(), lambda x, t: x * t, noise, times)
        found = integrate(Euler(), lambda x, t: x * t, noise, times, sizes=sizes, on_step=spoil)
    assert torch.equal(found, wanted)
    assert torch.equal(noise, randn(5, 2))
    for step in kept:  # after the generation too, and in gradient computations
        step.latents.add_(1.0)
        (step.latents * torch.ones((), requires_grad=True)).sum().backward()


@pytest.mark.parametrize("sizes", [None, [2, 3]])
def test_what_on_step_returns_takes_the_place_of_the_next_latents(sizes):
    times, seen = flow_timesteps(5, shift=2.0), []

    def steer(step: FlowStep) -> Tensor | None:
        seen.append(step)
        return torch.full_like(step.latents, 7.0).double() if (step.index, step.image) == (1, 0) else None

    def plain(x: Tensor, t: float) -> Tensor:
        return x * t

    found = integrate(Euler(), plain, randn(5, 2), times, sizes=sizes, on_step=steer)
    changed = slice(0, 2) if sizes else slice(0, 5)
    wanted = integrate(Euler(), plain, randn(5, 2), times[:3])
    wanted[changed] = 7.0
    assert torch.equal(found, integrate(Euler(), plain, wanted, times[2:]))
    assert found.dtype == torch.float32
    assert (next(step for step in seen if step.index == 2).latents == 7.0).all()


def test_a_returned_tensor_stays_its_owners():
    returned = torch.ones(2, 2)

    def steer(step: FlowStep) -> Tensor:
        return returned.mul_(2.0)

    found = integrate(Euler(), lambda x, _: torch.zeros_like(x), randn(2, 2), flow_timesteps(4), on_step=steer)
    returned.zero_()
    assert (found == 8.0).all()


def test_on_step_sees_the_first_velocity_of_a_step_or_the_mean_where_none_is_evaluated():
    seen: list[FlowStep] = []
    noise, times = randn(3, 2), flow_timesteps(3, shift=2.0)
    integrate(heun, lambda x, t: x * t, noise, times, on_step=seen.append)
    assert torch.equal(seen[1].velocity, seen[1].latents * seen[1].t)
    seen.clear()
    integrate(lambda v, x, t, next_t: x - 2 * (t - next_t), lambda x, t: x, noise, times, on_step=seen.append)
    assert_close(seen[1].velocity, torch.full((3, 2), 2.0), relative=1e-5)


def test_what_on_step_raises_ends_the_integration():
    evaluated, times = [], flow_timesteps(9)

    def stop(step: FlowStep) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        integrate(Euler(), lambda x, t: evaluated.append(t) or x, randn(2, 2), times, on_step=stop)
    assert evaluated == times[:2].tolist()


# Guidance -------------------------------------------------------------------------------------------------------------

V, V_TEXT, V_IMG = (randn(6, 4, seed=seed) for seed in range(3))
SCALES = st.floats(1, 10, exclude_min=True)
RENORMS = st.sampled_from(["global", "channel", "text_channel"])


def guide(v, v_text, v_img, guidance: Guidance) -> torch.Tensor:
    """The guided velocity of those of the branches; None leaves one out."""
    given = {"full": v, "text_dropped": v_text} | ({} if v_img is None else {"image_dropped": v_img})
    return guidance(given, 0.9)


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

    def run(renorm: Any, scale: float) -> Tensor:
        return guide(v, v_text, v_img, Guidance(cfg_text_scale=a, cfg_img_scale=scale, cfg_renorm_type=renorm))

    assert run("global", b).norm() <= v.norm() * (1 + 1e-6)
    assert (run("channel", b).norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-6)).all()
    assert (run("text_channel", 1.0).norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-6)).all()


def test_local_is_an_alias_of_channel():
    assert Guidance(cfg_renorm_type="local") == Guidance(cfg_renorm_type="channel")


def active(guidance: Guidance, times: Tensor) -> list[bool]:
    return [guidance.branches(t) != ("full",) for t in times.tolist()]


def test_the_interval_excludes_its_low_edge_and_includes_its_high_one_in_float32():
    guidance = Guidance(cfg_interval=(0.4, 0.9))  # 0.4 and 0.9 are no float32 numbers
    low, high = torch.tensor([0.4, 0.9])
    up, down = torch.tensor(1.0), torch.tensor(0.0)
    times = torch.stack([up, torch.nextafter(high, up), high, torch.nextafter(low, up), low, down])
    assert active(guidance, times) == [False, False, True, True, False, False]
    assert active(Guidance(cfg_interval=(0.0, 1.0)), torch.tensor([1.0, 1e-6, 0.0])) == [True, True, False]
    assert guidance.branches(0.9) == guidance.branches(float(high)) == BRANCHES[:2]  # as float32 they are the same
    assert guidance.branches(0.4) == BRANCHES[:1]


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_a_text_scale_of_one_or_less_is_no_guidance_even_with_an_image_scale(scale):
    guidance = Guidance(cfg_text_scale=scale, cfg_img_scale=3.0, cfg_interval=(0.0, 1.0))
    assert guidance.names == branch_names(guidance) == ("full",)
    assert active(guidance, torch.tensor([1.0, 0.5])) == [False, False]


def test_guidance_asks_for_what_its_scales_need_and_a_rule_without_names_for_all():
    assert Guidance().names == ("full", "text_dropped")
    assert Guidance(cfg_img_scale=2.0).names == Guidance(cfg_img_scale=2.0).branches(0.5) == BRANCHES
    assert branch_names(OwnRule()) == BRANCHES


def test_guidance_called_with_the_full_branch_alone_returns_it():
    assert Guidance()({"full": V}, 0.1) is V
    assert torch.equal(Guidance()({"full": V, "text_dropped": V_TEXT}, 0.9), guide(V, V_TEXT, None, Guidance()))


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
    """A model whose branch k gives x * (k + 1) + t, and which remembers what was asked of it."""

    def __init__(self, owner: dict[int, int], sizes: list[int]) -> None:
        self.owner, self.sizes, self.asked = owner, sizes, []

    def __call__(self, x: Tensor, t: float, branches: tuple[int, ...]) -> list[Tensor]:
        self.asked.append(branches)
        own = x.split(self.sizes)
        return [own[self.owner[branch]] * (branch + 1) + t for branch in branches]


class OwnRule:
    """Guidance by hand: the difference of the two, at early times only."""

    def branches(self, t: float) -> tuple[str, ...]:
        return ("full", "image_dropped") if t > 0.5 else ("full",)

    def __call__(self, velocities: Mapping[str, Tensor], t: float) -> Tensor:
        assert tuple(velocities) == self.branches(t)
        return sum(velocities.values(), torch.zeros(()))


def head(state: Tensor) -> Tensor:
    return 2 * state


FULL, TEXT, IMAGE = BRANCHES


def test_only_the_needed_branches_are_computed_each_once():
    states = Recorder({0: 0, 1: 0, 2: 1, 3: 1, 4: 1}, [3, 4])
    # the first image's image-dropped branch is its full one
    branches = [{FULL: 0, TEXT: 1, IMAGE: 0}, {FULL: 2, TEXT: 3, IMAGE: 4}]
    guidance = Guidance(cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.4, 0.8))
    run = GuidedVelocity(states, head, [3, 4], branches, guidance)
    x = randn(7, 2)
    results = [run(x, t) for t in (1.0, 0.75, 0.25)]
    assert states.asked == [(0, 2), (0, 1, 2, 3, 4), (0, 2)]
    assert torch.equal(results[2][3:], head(3 * x[3:] + 0.25))
    for own, factors in ((slice(0, 3), (1, 2, 1)), (slice(3, 7), (3, 4, 5))):
        v, v_text, v_img = (head(x[own] * factor + 0.75) for factor in factors)
        assert torch.equal(results[1][own], guide(v, v_text, v_img, guidance))


def test_images_of_one_batch_do_not_couple():
    guidance = Guidance(cfg_text_scale=4.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="global")
    x = [randn(3, 2), 100 * randn(4, 2, seed=1)]
    both, sizes = [{FULL: 0, TEXT: 1}, {FULL: 2, TEXT: 3}], [3, 4]
    states = Recorder({0: 0, 1: 0, 2: 1, 3: 1}, sizes)
    together = GuidedVelocity(states, head, sizes, both, guidance)(torch.cat(x), 0.5).split(sizes)
    for image in range(2):
        owner = dict.fromkeys(both[image].values(), 0)
        alone = GuidedVelocity(Recorder(owner, [sizes[image]]), head, [sizes[image]], [both[image]], guidance)
        assert torch.equal(alone(x[image], 0.5), together[image])


def test_without_guidance_the_full_branch_alone_is_computed():
    states = Recorder({0: 0}, [3])
    run = GuidedVelocity(states, head, [3], [{FULL: 0}], Guidance(cfg_text_scale=1.0))
    x = randn(3, 2)
    assert torch.equal(run(x, 0.5), head(x + 0.5))
    assert states.asked == [(0,)]


def test_guidance_of_ones_own_gets_the_branches_it_asks_for():
    states = Recorder({0: 0, 1: 0, 2: 0}, [3])
    run = GuidedVelocity(states, head, [3], [{FULL: 0, TEXT: 1, IMAGE: 2}], OwnRule())
    x = randn(3, 2)
    assert torch.equal(run(x, 0.75), head(x + 0.75) + head(3 * x + 0.75))
    assert torch.equal(run(x, 0.25), head(x + 0.25))
    assert states.asked == [(0, 2), (0,)]


def test_guidance_that_asks_for_a_missing_branch_or_returns_no_velocity_is_named():
    run = GuidedVelocity(Recorder({0: 0, 1: 0}, [3]), head, [3], [{FULL: 0, TEXT: 1}], OwnRule())
    with pytest.raises(ValueError, match="asks for the branch 'image_dropped'; there is full, text_dropped"):
        run(randn(3, 2), 0.75)

    class Broken(OwnRule):
        def __call__(self, velocities, t):
            return velocities["full"].sum()

    run = GuidedVelocity(Recorder({0: 0}, [3]), head, [3], [{FULL: 0}], Broken())
    with pytest.raises(TypeError, match=r"the guidance must return a tensor of shape \(3, 2\), got shape \(\)"):
        run(randn(3, 2), 0.25)


@pytest.mark.parametrize("asked", [None, (), "full", 3])
def test_guidance_whose_branches_are_no_names_is_refused(asked):
    class Odd(OwnRule):
        def branches(self, t):
            return asked

    run = GuidedVelocity(Recorder({0: 0}, [3]), head, [3], [{FULL: 0}], Odd())
    with pytest.raises(TypeError, match="the guidance must return names of branches, got"):
        run(randn(3, 2), 0.25)


def test_a_solver_that_starts_nothing_is_refused():
    class Still(Euler):
        def start(self):
            return None

    with pytest.raises(TypeError, match=r"the solver's start\(\) must return what takes its steps, got None"):
        integrate(Still(), lambda x, _: x, randn(2, 2), flow_timesteps(3))
