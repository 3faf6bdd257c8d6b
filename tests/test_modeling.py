"""The model's laws on a small random one, in every variant, and the und path against transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from small_model import (
    DENSE,
    IMAGE_TOKENS,
    MOE,
    MOT,
    in_order,
    latents,
    new_model,
    packed_of,
    randomise,
    small_model,
    text,
    vit,
)
from torch import Tensor

from bagel.modeling import AttentionPlan, Bagel, Branch, Context, Denoiser, MissingHalfError, Sequence, Streams
from bagel.packing import Text

SEGMENTS = (text(5, seed=1), latents(3, seed=2), vit(4, seed=3), text(2, seed=4))


@pytest.fixture(params=[MOT, MOE, DENSE])
def model(request) -> Bagel:
    return small_model(request.param)


def filled(model: Bagel, *segments, **options) -> tuple[Context, Tensor]:
    """A context that read segments one at a time, and all hidden states in sequence order."""
    context, hidden = model.new_context(**options), [torch.empty(0, 48)]
    for segment in segments:
        packed = packed_of([segment], starts=[context.position])
        hidden.append(in_order(packed, model.prefill(packed, [context])))
    return context, torch.cat(hidden)


def held(context: Context) -> tuple[Tensor, Tensor, int, int]:
    """A copy of all that a context holds."""
    own = slice(context.cache.headroom, context.cache.headroom + context.length)
    cache = context.cache
    return cache.keys[:, own].clone(), cache.values[:, own].clone(), context.length, context.position


def assert_same(one: tuple, other: tuple) -> None:
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_reading_leaves_what_prefill_leaves(model):
    wanted, _ = filled(model, *SEGMENTS)
    context = model.new_context()
    for segment in SEGMENTS:
        model.read(packed_of([segment], starts=[context.position]), [context])
    assert_same(held(context), held(wanted))


# One forward serves all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), SEGMENTS], ids=["alone", "after_pictures"])
def test_prefill_then_decode_is_one_pass(model, before):
    ids = text(9, seed=5).ids
    context, _ = filled(model, *before)
    packed = packed_of([Text(ids)], starts=[context.position])
    whole = model.decoder.logits(model(packed, [context.fork()]).und)  # (9, vocab)
    length, position = context.length, context.position
    first = packed_of([Text(ids[:4])], starts=[position])
    assert_close(model.decoder.logits(model.prefill(first, [context]).und), whole[:4])
    for i in range(4, 9):
        assert_close(model.decode(ids[i : i + 1], [context])[0], whole[i])
    assert (context.length, context.position) == (length + 9, position + 9)


def test_one_packed_pass_is_segment_by_segment_prefill(model):
    packed = packed_of(SEGMENTS)
    context, one_by_one = filled(model, *SEGMENTS)
    assert_close(in_order(packed, model(packed)), one_by_one)
    assert (context.length, context.position) == (len(packed.samples[0]), packed.next_positions[0])


def test_several_segments_on_top_of_a_context_are_segment_by_segment_prefill(model):
    context, _ = filled(model, *SEGMENTS[:2])
    _, one_by_one = filled(model, *SEGMENTS, text(3, seed=6))
    packed = packed_of([*SEGMENTS[2:], text(3, seed=6)], starts=[context.position])
    length = context.length
    assert_close(in_order(packed, model.prefill(packed, [context])), one_by_one[length:])
    assert context.length == one_by_one.shape[0]


def test_a_batch_of_samples_is_one_by_one(model):
    samples = [SEGMENTS, [text(3, seed=7)], [vit(2, seed=8), latents(4, seed=9), text(1)], [latents(2, seed=10)]]
    batch = packed_of(*samples)
    singles = [in_order(p, model(p)) for p in (packed_of(sample) for sample in samples)]
    assert_close(in_order(batch, model(batch)), torch.cat(singles))


def test_a_batch_on_contexts_of_different_lengths_is_one_by_one(model):
    befores = [(SEGMENTS[0],), (), SEGMENTS]
    segments = [vit(4, seed=11), text(6, seed=12), latents(2, seed=13)]
    singles = [filled(model, *before, segment) for before, segment in zip(befores, segments, strict=True)]
    contexts = [filled(model, *before)[0] for before in befores]
    packed = packed_of(*([segment] for segment in segments), starts=[context.position for context in contexts])
    hidden = in_order(packed, model.prefill(packed, contexts)).split([len(sample) for sample in packed.samples])
    for context, own, (single, states) in zip(contexts, hidden, singles, strict=True):
        assert_close(own, states[-own.shape[0] :])
        assert (context.length, context.position) == (single.length, single.position)
    ids = torch.tensor([3, 5, 7])
    logits = [model.decode(ids[i : i + 1], [single])[0] for i, (single, _) in enumerate(singles)]
    assert_close(model.decode(ids, contexts), torch.stack(logits))


def test_a_noisy_image_changes_nothing_that_follows_it(model):
    with_noise = packed_of([SEGMENTS[0], latents(3, seed=14, noisy=True, timestep=0.5), *SEGMENTS[1:]])
    without = packed_of(SEGMENTS)
    hidden = in_order(with_noise, model(with_noise))
    assert_close(torch.cat([hidden[:5], hidden[10:]]), in_order(without, model(without)))


# Routing --------------------------------------------------------------------------------------------------------------


def run(model: Bagel, x: Tensor, num_und: int) -> Tensor:
    """The decoder on x (T, H), fully attending, the first `num_und` tokens by und and the rest by gen."""
    positions = torch.arange(x.shape[0])
    rotary = model.decoder.rotary(positions[:num_und]), model.decoder.rotary(positions[num_und:])
    plan = AttentionPlan([Sequence(slice(0, num_und), slice(0, x.shape[0] - num_und))])
    hidden = model.decoder(Streams(x[:num_und], x[num_und:]), rotary, plan)
    return torch.cat([model.decoder.norm(hidden.und), model.decoder.norm_of_gen(hidden.gen)])


@pytest.mark.parametrize("module", [MOT, MOE])
def test_with_gen_weights_copied_from_und_routing_changes_no_bit(module):
    model = new_model(module)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
    assert (run(model, x, 7) - run(model, x, 0)).abs().max() > 0.1  # the experts do differ
    for layer in model.decoder.layers:
        own = layer.gen.state_dict()
        layer.gen.load_state_dict({name: layer.und.state_dict()[name] for name in own})
    assert model.decoder.norm_gen is not None
    model.decoder.norm_gen.load_state_dict(model.decoder.norm.state_dict())
    assert torch.equal(run(model, x, 7), run(model, x, 0))
    for num_und in (1, 4):
        assert_close(run(model, x, num_und), run(model, x, 7), relative=1e-6)


def test_the_dense_variant_has_one_expert_for_both_streams():
    model = small_model(DENSE)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(model, x, 7), run(model, x, 0))
    assert not [name for name in model.decoder.state_dict() if "gen" in name]


@pytest.mark.parametrize("module", [MOT, MOE])
def test_gen_weights_change_no_bit_of_text_and_vit(module):
    model, other = small_model(module), new_model(module)
    for layer in other.decoder.layers:
        randomise(layer.gen, seed=1)
    randomise(other.decoder.norm_gen, seed=1)
    seen = packed_of([text(4), vit(3), text(2)])
    assert torch.equal(model(seen).und, other(seen).und)
    ids = torch.tensor([7])
    assert torch.equal(model.decode(ids, [filled(model, text(4))[0]]), other.decode(ids, [filled(other, text(4))[0]]))
    drawn = packed_of([text(4), latents(3)])
    assert (model(drawn).gen - other(drawn).gen).abs().max() > 0.1
    assert torch.equal(model(drawn).und[:4], other(drawn).und[:4])  # the text before the latents


def test_und_weights_change_no_bit_of_latents_alone():
    model, other = small_model(MOT), new_model(MOT)
    for layer in other.decoder.layers:
        randomise(layer.und, seed=1)
    randomise(other.decoder.norm, seed=1)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(4))
    assert torch.equal(run(model, x, 0), run(other, x, 0))


# Contexts and the cache -----------------------------------------------------------------------------------------------

TIMES = torch.tensor([1.0, 0.75, 0.3])


def denoiser(model: Bagel, *branches: Branch) -> Denoiser:
    cells = [latents(3, seed=20).position_ids, latents(5, seed=21).position_ids]
    return Denoiser(model, branches, position_ids=cells, timesteps=TIMES, image_tokens=IMAGE_TOKENS)


NOISE = [latents(3, seed=20).latents, latents(5, seed=21).latents]


def test_denoising_is_a_packed_pass_of_a_noisy_image(model):
    context, _ = filled(model, *SEGMENTS)
    packed = packed_of([latents(5, seed=21, timestep=0.75, noisy=True)], starts=[context.position])
    wanted = model(packed, [context.fork()]).gen
    (found,) = denoiser(model, Branch(1, context)).hidden(NOISE, 1, (0,))
    assert_close(found, wanted)
    assert_close(model.velocity(found), model.llm2vae(model.decoder.norm_of_gen(wanted)))


def test_denoising_leaves_the_contexts_unchanged(model):
    full, _ = filled(model, *SEGMENTS, capacity=1)
    prefix = Context(full.cache, length=5, position=5)
    other, _ = filled(model, text(3))
    work = denoiser(model, Branch(1, full), Branch(1, prefix, "headroom"), Branch(0, other))
    before = [held(context) for context in (full, prefix, other)]
    for step in range(3):
        work.hidden(NOISE, step, (0, 1, 2) if step else (0, 2))
    for context, old in zip((full, prefix, other), before, strict=True):
        assert_same(held(context), old)


def test_a_branch_on_a_prefix_is_the_branch_on_a_context_of_that_prefix_alone(model):
    full, _ = filled(model, *SEGMENTS)
    fresh, _ = filled(model, *SEGMENTS[:2])
    prefix = Context(full.cache, fresh.length, fresh.position)
    together = denoiser(model, Branch(1, full), Branch(1, prefix, "headroom")).hidden(NOISE, 1, (0, 1))
    assert_close(together[1], denoiser(model, Branch(1, fresh)).hidden(NOISE, 1, (0,))[0])
    assert_close(together[0], denoiser(model, Branch(1, filled(model, *SEGMENTS)[0])).hidden(NOISE, 1, (0,))[0])


def test_branches_of_several_pictures_are_one_by_one_whichever_are_active(model):
    contexts = [filled(model, *SEGMENTS)[0], filled(model, text(3))[0], filled(model)[0]]
    branches = [Branch(0, contexts[0]), Branch(1, contexts[1]), Branch(1, contexts[2])]
    work = denoiser(model, *branches)
    alone = [denoiser(model, branch).hidden(NOISE, 2, (0,))[0] for branch in branches]
    for active in ((0, 1, 2), (2, 0), (1,)):
        for index, state in zip(active, work.hidden(NOISE, 2, active), strict=True):
            assert_close(state, alone[index])


def test_cache_growth_changes_no_bit_and_nothing_unwritten_is_read(model):
    results = []
    for capacity in (1, 64):
        context = model.new_context(capacity=capacity)
        context.cache.keys.fill_(float("nan"))
        context.cache.values.fill_(float("nan"))
        for segment in SEGMENTS:
            model.prefill(packed_of([segment], starts=[context.position]), [context])
        logits = model.decode(torch.tensor([7]), [context])
        results.append((*held(context), logits, *denoiser(model, Branch(0, context)).hidden(NOISE, 0, (0,))))
    assert torch.isfinite(results[0][4]).all()
    assert_same(*results)


def test_extending_a_fork_leaves_the_context_as_it_is(model):
    context, _ = filled(model, *SEGMENTS)
    old, wanted = held(context), model.decode(torch.tensor([9]), [filled(model, *SEGMENTS)[0]])
    fork = context.fork()
    for token in (1, 2, 3):
        model.decode(torch.tensor([token]), [fork])
    assert_same(held(context), old)
    assert torch.equal(model.decode(torch.tensor([9]), [context]), wanted)


def test_a_model_without_a_half_says_what_it_cannot_do():
    blind = new_model(visual_und=False)
    with pytest.raises(MissingHalfError, match="cannot see"):
        blind(packed_of([vit(2)]))
    reader = new_model(visual_gen=False)
    with pytest.raises(MissingHalfError, match="cannot draw"):
        reader(packed_of([latents(2)]))
    assert not [name for name in reader.state_dict() if "gen" in name or "latent" in name or "vae" in name]
    assert reader(packed_of([text(3), vit(2)])).und.shape == (7, 48)
