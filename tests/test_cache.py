"""Contexts and their caches: where tokens stand, and that no view of a cache ever overwrites another's."""

from __future__ import annotations

import random

import pytest
import torch
from small_model import (
    DENSE,
    MOE,
    MOT,
    NOISE,
    assert_same,
    denoiser,
    filled,
    held,
    latents,
    packed_of,
    small_config,
    small_model,
    text,
    vit,
)
from torch import Tensor

from bagel.modeling import Bagel, Branch, Claim, Context, KVCache
from bagel.modeling.cache import MOST_SPARE, SMALLEST, claim_all

SEGMENTS = (text(5, seed=1), latents(3, seed=2), vit(4, seed=3), text(2, seed=4))


@pytest.fixture(params=[MOT, MOE, DENSE])
def model(request) -> Bagel:
    return small_model(request.param)


# Where tokens stand ---------------------------------------------------------------------------------------------------


def new_context() -> Context:
    config = small_config().llm_config
    return Context(KVCache(*torch.empty(2, config.num_hidden_layers, 0, config.num_key_value_heads, config.head_dim)))


def numbered(*numbers: int) -> Tensor:
    """Keys (n, 2, 8) of small_config's decoder, all of a token the same number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 2, 8)


def write(claim: Claim, *pieces: tuple[int, ...], layer: int = 1) -> tuple[list[float], list[float]]:
    """Write numbered keys in pieces, and values with the sign changed; the numbers of all that is seen."""
    keys = [numbered(*piece) for piece in pieces]
    seen = claim.write(layer, keys, [-key for key in keys])
    return seen[0][:, 0, 0].tolist(), seen[1][:, 1, 7].tolist()


def append(context: Context, *numbers: int, layer: int = 1) -> None:
    """Extend a context by numbered tokens."""
    write(context.claim(len(numbers), keeps=True), numbers, layer=layer)
    context.advance(len(numbers), context.position + len(numbers))


def numbers(context: Context, layer: int = 1) -> list[float]:
    """The numbers of a context's tokens."""
    keys, values = (x[layer, :, 0, 0] for x in context.held())
    assert torch.equal(keys, -values)
    return keys.tolist()


def test_cache_lays_out_headroom_context_and_tail():
    context = new_context()
    assert write(context.claim(2, keeps=True), (1,), (2,)) == ([1, 2], [-1, -2])
    context.advance(2, 2)
    assert write(context.claim(1, keeps=False), (3,)) == ([1, 2, 3], [-1, -2, -3])
    prefix = Context(context.cache, length=1)
    assert write(prefix.claim(2, keeps=False), (8, 9)) == ([8, 9, 1], [-8, -9, -1])
    assert context.cache.headroom == 2
    assert context.cache.keys[1, :5, 0, 0].tolist() == [8, 9, 1, 2, 3]
    assert (numbers(context), numbers(prefix)) == ([1, 2], [1])


@pytest.mark.parametrize(
    ("reserve", "capacity", "headroom"),
    [
        ({"tokens": SMALLEST}, SMALLEST, 1),
        ({"tokens": SMALLEST + 1}, 2 * SMALLEST, 1),
        ({"tokens": 3 * SMALLEST}, 3 * SMALLEST, 1),
        ({"headroom": 5}, SMALLEST, 5),
        ({"headroom": 1}, SMALLEST, 1),
        ({"tokens": SMALLEST + 1, "headroom": 5}, 2 * SMALLEST, 5),
    ],
    ids=str,
)
def test_reserving_keeps_what_is_held_and_at_least_doubles(reserve, capacity, headroom):
    context = new_context()
    append(context, 1, 2, 3, layer=2)
    cache = context.cache
    cache.reserve(headroom=1)
    assert (cache.capacity, cache.headroom) == (SMALLEST, 1)
    cache.reserve(**reserve)
    assert (cache.capacity, cache.headroom) == (capacity, headroom)
    assert numbers(context, layer=2) == [1, 2, 3]


def test_a_large_cache_grows_by_no_more_than_some_spare():
    context = new_context()
    context.reserve(3 * MOST_SPARE)
    context.reserve(3 * MOST_SPARE + 1)
    assert context.cache.capacity == 4 * MOST_SPARE


def test_reserving_for_a_context_counts_from_its_end():
    context = new_context()
    append(context, 1, 2, 3)
    context.reserve(SMALLEST, headroom=7)
    assert (context.cache.capacity, context.cache.headroom) == (2 * SMALLEST, 7)
    assert numbers(context) == [1, 2, 3]


def test_a_place_is_its_contexts_for_as_long_as_the_claim_is_kept():
    context = new_context()
    append(context, 1)
    fork = context.fork()
    claims = claim_all([context, fork], [2, 2], keeps=False)
    assert [claim.block for claim in claims] == [slice(3, 5), slice(0, 2)], "behind the context, then before it"
    assert claims[0].keys is claims[1].keys, "nothing is held twice"
    later = context.fork()
    append(later, 7)
    assert later.cache is not context.cache, "the tail is taken"
    assert write(claims[0], (2, 3)) == ([1, 2, 3], [-1, -2, -3])
    assert write(claims[1], (4, 5)) == ([4, 5, 1], [-4, -5, -1])
    assert numbers(later) == [1, 7]
    del claims, later
    append(fork, 8)
    assert fork.cache is context.cache, "it is free again"


def test_a_claim_goes_on_where_it_was_when_its_cache_grows():
    context = new_context()
    append(context, 1, 2)
    claim = context.claim(1, keeps=False)
    context.cache.reserve(tokens=10 * SMALLEST, headroom=9)
    append(context.fork(), 5)
    assert write(claim, (3,)) == ([1, 2, 3], [-1, -2, -3])
    assert numbers(context) == [1, 2]


def test_forks_that_are_both_extended_keep_their_own_tokens():
    context = new_context()
    append(context, 1, 2)
    one, other = context.fork(), context.fork()
    for number in (3, 4):
        append(one, number)
        append(other, 10 * number)
    assert [numbers(view) for view in (context, one, other)] == [[1, 2], [1, 2, 3, 4], [1, 2, 30, 40]]
    assert not one.same_as(other)


def test_a_prefix_that_is_extended_overwrites_nothing():
    context = new_context()
    append(context, 1, 2, 3)
    prefix = Context(context.cache, length=1, position=1)
    assert not prefix.same_as(context)
    append(prefix, 7, 8)
    assert (numbers(prefix), numbers(context)) == ([1, 7, 8], [1, 2, 3])


def test_an_only_view_is_extended_without_a_copy():
    context = new_context()
    append(context, 1)
    cache = context.cache
    fork = context.fork()
    del context
    append(fork, 2)
    fork.fork()
    append(fork, 3)
    assert fork.cache is cache
    assert numbers(fork) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_forks_prefixes_and_blocks_leaves_everyone_their_own(seed):
    rng = random.Random(seed)
    views, wanted, kept = [new_context()], [[]], []
    for step in range(60):
        at = rng.randrange(len(views))
        view, own = views[at], wanted[at]
        new = [100 * step + i for i in range(rng.choice([1, 1, 2, 5, 40]))]
        what = rng.choice(["fork", "prefix", "append", "append", "evaluate", "keep", "batch", "forget"])
        if what == "fork":
            views, wanted = [*views, view.fork()], [*wanted, own]
        elif what == "prefix":
            length = rng.randint(0, len(own))
            views = [*views, Context(view.cache, length=length, position=length)]
            wanted = [*wanted, own[:length]]
        elif what == "append":
            append(view, *new)
            wanted[at] = own + new
        elif what == "evaluate":
            seen, _ = write(view.claim(len(new), keeps=False), tuple(new))
            assert sorted(seen) == sorted(own + new)
        elif what == "keep":
            kept.append((view.claim(len(new), keeps=False), own, new))
        elif what == "batch":
            claims = claim_all(views, [1] * len(views), keeps=True)
            for number, (one, claim) in enumerate(zip(views, claims, strict=True)):
                write(claim, (step * 1000 + number,))
                one.advance(1, one.position + 1)
                wanted[number] = [*wanted[number], step * 1000 + number]
        elif len(views) > 1:
            views, wanted = ([x for i, x in enumerate(xs) if i != at] for xs in (views, wanted))
        for claim, before, block in kept[-3:]:
            assert sorted(write(claim, tuple(block))[0]) == sorted(before + block)
        assert [numbers(one) for one in views] == wanted
        kept = kept[-3:]


# What a model does with them ------------------------------------------------------------------------------------------


def test_denoising_leaves_the_contexts_unchanged(model):
    full, _ = filled(model, *SEGMENTS)
    prefix = Context(full.cache, length=5, position=5)
    other, _ = filled(model, text(3))
    work = denoiser(model, Branch(1, full), Branch(1, prefix), Branch(0, other))
    before = [held(context) for context in (full, prefix, other)]
    for t in (1.0, 0.75, 0.3):
        work.states(NOISE, t, (0, 1, 2) if t < 1 else (0, 2))
    for context, old in zip((full, prefix, other), before, strict=True):
        assert_same(held(context), old)


def test_cache_growth_changes_no_bit_and_nothing_unwritten_is_read(model, monkeypatch):
    new_empty = Tensor.new_empty

    def nothing(self, *sizes, **options):  # what no one wrote would show
        new = new_empty(self, *sizes, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(Tensor, "new_empty", nothing)
    results = []
    for reserved in (0, 500):
        context = model.new_context()
        context.reserve(reserved, headroom=reserved // 10)
        for segment in (*SEGMENTS, text(70, seed=5)):  # beyond the smallest cache
            model.prefill(packed_of([segment], starts=[context.position]), [context])
        logits = model.decode(torch.tensor([7]), [context])
        results.append((*held(context), logits, *denoiser(model, Branch(0, context)).states(NOISE, 1.0, (0,))))
    assert all(torch.isfinite(x).all() for x in results[0] if isinstance(x, Tensor))
    assert_same(*results)


def test_extending_a_fork_leaves_the_context_as_it_is(model):
    context, _ = filled(model, *SEGMENTS)
    old, wanted = held(context), model.decode(torch.tensor([9]), [filled(model, *SEGMENTS)[0]])
    fork = context.fork()
    for token in (1, 2, 3):
        model.decode(torch.tensor([token]), [fork])
    assert_same(held(context), old)
    assert torch.equal(model.decode(torch.tensor([9]), [context]), wanted)


def decoded(model: Bagel, context: Context, ids: tuple[int, ...]) -> tuple:
    """The logits after each of some tokens, and what the context holds then."""
    logits = [model.decode(torch.tensor([token]), [context]) for token in ids]
    return *logits, *held(context)


def test_forks_decoded_by_turns_are_each_decoded_alone(model):
    context, _ = filled(model, *SEGMENTS)
    lines = (3, 5, 7), (4, 6, 8)
    wanted = [decoded(model, filled(model, *SEGMENTS)[0], line) for line in lines]
    forks = [context.fork(), context.fork()]
    logits = [[], []]
    for tokens in zip(*lines, strict=True):
        for number, token in enumerate(tokens):
            logits[number].append(model.decode(torch.tensor([token]), [forks[number]]))
    for number in (0, 1):
        assert_same((*logits[number], *held(forks[number])), wanted[number])
    assert_same(held(context), held(filled(model, *SEGMENTS)[0]))


def test_forks_decoded_in_one_batch_keep_their_own_tokens(model):
    lines = torch.tensor([[3, 5, 7], [4, 6, 8], [9, 9, 9]])

    def batch(*contexts):
        return *(model.decode(ids, contexts) for ids in lines.T), *(x for context in contexts for x in held(context))

    context, _ = filled(model, *SEGMENTS)
    apart = [filled(model, *SEGMENTS)[0] for _ in range(3)]
    assert_same(batch(context.fork(), context, context.fork()), batch(*apart))


def test_segments_read_onto_forks_of_one_context_are_read_alone(model):
    context, _ = filled(model, *SEGMENTS)
    forks = [context.fork(), Context(context.cache, length=5, position=5), context.fork()]
    befores = [SEGMENTS, SEGMENTS[:1], SEGMENTS]
    segments = [vit(3, seed=6), text(4, seed=7), latents(2, seed=8)]
    for fork, before, segment in zip(forks, befores, segments, strict=True):
        model.prefill(packed_of([segment], starts=[fork.position]), [fork], only_keys=True)
        assert_same(held(fork), held(filled(model, *before, segment)[0]))
    assert_same(held(context), held(filled(model, *SEGMENTS)[0]))


def test_a_prefix_is_extended_while_an_image_is_drawn_from_it(model):
    full, _ = filled(model, *SEGMENTS)
    length, position = full.length - 2, full.position - 2
    wanted = denoiser(model, Branch(1, Context(full.cache, length=length, position=position))).states(NOISE, 0.3, (0,))
    prefix, old = Context(full.cache, length=length, position=position), held(full)
    work = denoiser(model, Branch(1, prefix.fork()))
    work.states(NOISE, 1.0, (0,))
    found = decoded(model, prefix, (3, 5))
    assert_same(work.states(NOISE, 0.3, (0,)), wanted)
    assert_same(found, decoded(model, filled(model, *SEGMENTS[:3])[0], (3, 5)))
    assert_same(held(full), old)


def test_an_image_is_drawn_from_a_fork_while_others_are_extended(model):
    def drawn(*between):
        """States at three times, with something done in between, of two images on three branches."""
        context = filled(model, *SEGMENTS)[0]
        prefix = Context(context.cache, length=5, position=5)
        branches = Branch(0, context.fork()), Branch(1, context), Branch(1, prefix)
        work, states = denoiser(model, *branches), []
        for t, active in ((1.0, (0, 2)), (0.75, (0, 1, 2)), (0.3, (1, 2))):
            states += work.states(NOISE, t, active)
            states += [x for action in between for x in action(context, prefix)]
        return states

    def extended(context, prefix):
        fork, other = context.fork(), prefix.fork()
        for segment in (text(80, seed=9), vit(3, seed=10)):
            for one in (fork, other):
                model.prefill(packed_of([segment], starts=[one.position]), [one])
        model.decode(torch.tensor([3, 4]), [fork, other])
        return ()

    def evaluated(context, prefix):
        denoiser(model, Branch(0, prefix.fork()), Branch(1, context.fork())).states(-NOISE, 0.5, (0, 1))
        return ()

    wanted = drawn()
    assert_same(drawn(extended), wanted)
    assert_same(drawn(evaluated), wanted)
    assert_same(drawn(extended, evaluated), wanted)


def test_an_image_is_drawn_from_a_context_that_goes_on_meanwhile(model):
    def states(goes_on: bool) -> list[Tensor]:
        context = filled(model, *SEGMENTS)[0]
        work = denoiser(model, Branch(0, context), Branch(1, context))
        found = work.states(NOISE, 1.0, (0,))
        if goes_on:
            model.prefill(packed_of([text(4, seed=11)], starts=[context.position]), [context])
        return found + work.states(NOISE, 0.3, (0, 1))  # laid out only now, as where guidance begins late

    assert_same(tuple(states(goes_on=True)), tuple(states(goes_on=False)))
