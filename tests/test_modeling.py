"""The model's laws on a small random one, in every variant, and the und path against transformers."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from small_model import (
    DENSE,
    MOE,
    MOT,
    NOISE,
    assert_same,
    denoiser,
    filled,
    held,
    in_order,
    latents,
    new_model,
    packed_of,
    packs,
    randomise,
    small_model,
    text,
    vit,
)
from torch import Tensor, nn

from bagel.modeling import Bagel, Branch, Context, Denoiser, MissingHalfError, Streams
from bagel.modeling.attention import Seen
from bagel.modeling.cache import claim_all
from bagel.packing import Frames, Text

SEGMENTS = (text(5, seed=1), latents(3, seed=2), vit(4, seed=3), text(2, seed=4))


@pytest.fixture(params=[MOT, MOE, DENSE])
def model(request) -> Bagel:
    return small_model(request.param)


def test_reading_leaves_what_prefill_leaves(model):
    wanted, _ = filled(model, *SEGMENTS)
    context = model.new_context()
    for segment in SEGMENTS:
        model.prefill(packed_of([segment], starts=[context.position]), [context], only_keys=True)
    assert_same(held(context), held(wanted))


def test_reading_calls_every_layer_and_nothing_that_only_the_last_states_need(model):
    called, last = [], model.decoder.layers[-1]
    handles = [layer.register_forward_hook(lambda *_: called.append("layer")) for layer in model.decoder.layers]
    for part in (last.und.attention.o_proj, last.und.mlp):
        handles.append(part.register_forward_hook(lambda *_: called.append("unneeded")))
    try:
        model.prefill(packed_of([text(3)]), [model.new_context()], only_keys=True)
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["layer"] * len(model.decoder.layers)


# One forward serves all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), SEGMENTS], ids=["alone", "after_images"])
def test_prefill_then_decode_is_one_pass(model, before):
    ids = text(9, seed=5).ids
    context, _ = filled(model, *before)
    packed = packed_of([Text(ids)], starts=[context.position])
    whole = model.decoder.logits(model.prefill(packed, [context.fork()]).und)  # (9, vocab)
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

    def attend(layer, und, gen):
        gathered = model.attention(*(torch.cat(both) for both in zip(und, gen, strict=True)), layer=layer)
        return Seen(gathered[:num_und], gathered[num_und:])

    positions = torch.arange(x.shape[0])
    rotary = model.decoder.rotary(positions[:num_und], positions[num_und:])
    hidden = model.decoder(Streams(x[:num_und], x[num_und:]), rotary, attend)
    return torch.cat([model.decoder.norm(hidden.und), norm_of_gen(model)(hidden.gen)])


def norm_of_gen(model: Bagel) -> nn.Module:
    return model.decoder.norm_gen or model.decoder.norm


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


# Evaluations of noisy images ------------------------------------------------------------------------------------------


def test_denoising_is_a_packed_pass_of_a_noisy_image(model):
    context, _ = filled(model, *SEGMENTS)
    packed = packed_of([latents(5, seed=21, timestep=0.75, noisy=True)], starts=[context.position])
    wanted = model(packed, claim_all([context], [7], keeps=False)).gen
    (found,) = denoiser(model, Branch(1, context)).states(NOISE, 0.75, (0,))
    assert_close(found, wanted)
    assert_close(model.velocity(found), model.llm2vae(norm_of_gen(model)(wanted)))


def test_a_time_that_was_not_announced_gives_the_same(model):
    found = []
    for times in ((0.75,), ()):
        work = denoiser(model, Branch(1, filled(model, *SEGMENTS)[0]), times=times)
        found.append(work.states(NOISE, 0.75, (0,)))
    assert_same(*found)


def test_frames_are_denoised_as_a_group_that_sees_itself(model):
    noisy = [latents(count, seed=count, timestep=0.4, noisy=True) for count in (3, 4)]
    frames = Frames(tuple(noisy), (2,))
    context, _ = filled(model, text(5))
    packed = packed_of([frames], starts=[context.position])
    wanted = model(packed, claim_all([context], [frames.length], keeps=False)).gen
    x = torch.cat([image.latents for image in noisy])
    work = Denoiser(model, [frames], [Branch(0, context)], pack=packs)
    (found,) = work.states(x, 0.4, (0,))
    assert_close(found, wanted)
    (alone,) = Denoiser(model, noisy[:1], [Branch(0, context)], pack=packs).states(x[:3], 0.4, (0,))
    assert (found[:3] - alone).abs().max() > 0.01, "the first frame sees the second"


def test_branches_of_several_images_are_one_by_one_whichever_are_active(model):
    contexts = [filled(model, *SEGMENTS)[0], filled(model, text(3))[0], filled(model)[0]]
    branches = [Branch(0, contexts[0]), Branch(1, contexts[1]), Branch(1, contexts[2])]
    work = denoiser(model, *branches)
    alone = [denoiser(model, branch).states(NOISE, 0.3, (0,))[0] for branch in branches]
    for active in ((0, 1, 2), (2, 0), (1,)):
        for index, state in zip(active, work.states(NOISE, 0.3, active), strict=True):
            assert_close(state, alone[index])


def test_a_branch_on_a_prefix_is_the_branch_on_a_context_of_that_prefix_alone(model):
    full, _ = filled(model, *SEGMENTS)
    fresh, _ = filled(model, *SEGMENTS[:2])
    prefix = Context(full.cache, length=fresh.length, position=fresh.position)
    together = denoiser(model, Branch(1, full), Branch(1, prefix)).states(NOISE, 0.75, (0, 1))
    assert_close(together[1], denoiser(model, Branch(1, fresh)).states(NOISE, 0.75, (0,))[0])
    assert_close(together[0], denoiser(model, Branch(1, filled(model, *SEGMENTS)[0])).states(NOISE, 0.75, (0,))[0])


# Halves ---------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_half_says_what_it_cannot_do():
    blind = new_model(visual_und=False)
    with pytest.raises(MissingHalfError, match="cannot see"):
        blind(packed_of([vit(2)]))
    reader = new_model(visual_gen=False)
    with pytest.raises(MissingHalfError, match="cannot draw"):
        reader(packed_of([latents(2)]))
    assert not [name for name in reader.state_dict() if "gen" in name or "latent" in name or "vae" in name]
    assert reader(packed_of([text(3), vit(2)])).und.shape == (7, 48)
