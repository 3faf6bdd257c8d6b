"""Contexts: which tokens are in which one, written out, and which of them share a cache."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from small_model import assert_same, held, latents, new_contexts, small_model, text, vit

from bagel.generation.contexts import Contexts, Utterance, append_all, branches_of
from bagel.modeling import Branch, Context
from bagel.modeling.cache import claim_all
from bagel.options import make_options

UTTERANCES = {  # every segment of a length of its own, so that lengths tell which ones are in a context
    "text": lambda: [Utterance(text(3), "text")],
    "other": lambda: [Utterance(text(5, seed=1), "text")],
    "system": lambda: [Utterance(text(7, seed=2), "system")],
    "plan": lambda: [Utterance(text(11, seed=3), "plan")],
    "answer": lambda: [Utterance(text(23, seed=4), "answer")],
    "image": lambda: [Utterance(latents(4), "image"), Utterance(vit(6), "image")],  # 6 and 8 tokens
}
NEGATIVE = text(101, seed=5)


def read_into(contexts: Contexts, *names: str) -> Contexts:
    for name in names:
        if name == "turn":
            contexts.answered = True
            contexts.begin_turn()
        else:
            append_all([contexts], [UTTERANCES[name]()])
    return contexts


def read(*names: str, eager: bool = True) -> Contexts:
    return read_into(new_contexts(eager=eager), *names)


def branches(*conversations: Contexts, negatives=None, **options) -> tuple[list[Branch], list[dict[str, int]]]:
    """The branches that guidance gets, and which they are by name for each conversation."""
    chosen = make_options("draw", {"cfg_img_scale": 2.0} | options)
    return branches_of(conversations, chosen, negatives or [None] * len(conversations))


def asked(*conversations: Contexts, **options) -> list[dict[str, Context]]:
    """The contexts that guidance gets, by name, for each conversation."""
    found, names = branches(*conversations, **options)
    return [{name: found[index].context for name, index in own.items()} for own in names]


def size(context: Context) -> tuple[int, int]:
    return context.length, context.position


def sizes(contexts: Contexts, **options) -> list[tuple[int, int]]:
    return [size(context) for context in asked(contexts, **options)[0].values()]


# (tokens, rotary position): a text of n tokens counts n and n, the image 14 and 2.
RULES = [
    # inputs,                      full,      text-dropped, image-dropped
    (("text",), (3, 3), (0, 0), (3, 3)),
    (("text", "other"), (8, 8), (3, 3), (8, 8)),
    (("image", "text"), (17, 5), (14, 2), (3, 3)),
    (("text", "image"), (17, 5), (17, 5), (3, 3)),
    (("system", "text"), (10, 10), (7, 7), (10, 10)),
    (("system", "text", "plan"), (21, 21), (7, 7), (10, 10)),
    (("system", "image", "text", "plan"), (35, 23), (21, 9), (10, 10)),
    (("text", "image", "other"), (22, 10), (17, 5), (8, 8)),
    (("image",), (14, 2), (14, 2), (0, 0)),
    (("image", "image", "text"), (31, 7), (28, 4), (3, 3)),
    (("image", "text", "image", "other"), (36, 12), (31, 7), (8, 8)),
]
LATER_TURNS = [
    (("text", "answer", "turn", "other"), (31, 31), (26, 26), (31, 31)),
    (("image", "text", "answer", "turn", "other"), (45, 33), (40, 28), (31, 31)),
    (("text", "image", "turn", "other"), (22, 10), (17, 5), (8, 8)),
    (("system", "text", "plan", "image", "turn", "other"), (40, 28), (35, 23), (26, 26)),
    (("text", "plan", "image", "turn", "other", "plan"), (44, 32), (28, 16), (19, 19)),
    (("image", "text", "answer", "turn"), (40, 28), (14, 2), (26, 26)),
]


@pytest.mark.parametrize(("names", "full", "text_dropped", "image_dropped"), RULES + LATER_TURNS, ids=str)
def test_which_tokens_are_in_which_context(names, full, text_dropped, image_dropped):
    assert sizes(read(*names)) == [full, text_dropped, image_dropped]
    assert sizes(read(*names, eager=False)) == [full, text_dropped, image_dropped]
    assert sizes(read(*names), cfg_img_scale=1.0) == [full, text_dropped]
    assert sizes(read(*names), cfg_text_scale=1.0) == [full]


@pytest.mark.parametrize("names", [rule[0] for rule in RULES + LATER_TURNS], ids="-".join)
def test_without_guidance_by_images_no_text_is_read_twice(names):
    contexts = read(*names, eager=False)
    (found,) = asked(contexts, cfg_img_scale=1.0)
    assert found["full"].cache is found["text_dropped"].cache
    assert contexts.image_dropped is None or contexts.image_dropped.cache is contexts.full.cache


@pytest.mark.parametrize("names", [rule[0] for rule in RULES], ids="-".join)
def test_text_dropped_is_a_view_and_never_a_copy(names):
    contexts = read(*names)
    (found,) = asked(contexts)
    assert found["text_dropped"].cache is contexts.full.cache
    assert found["text_dropped"].length <= contexts.full.length
    storages = [context.held()[0].untyped_storage().data_ptr() for context in (contexts.full, found["text_dropped"])]
    assert storages[0] == storages[1]


@pytest.mark.parametrize(
    ("names", "same", "view"),
    [
        (("text", "other"), True, True),
        (("system", "text"), True, True),
        (("text", "image"), False, True),  # a prefix of full: nothing was read after the image
        (("system", "text", "plan"), False, True),
        (("image",), False, True),
        (("image", "text"), False, False),
        (("text", "image", "other"), False, False),
    ],
    ids=str,
)
def test_image_dropped_gets_a_cache_of_its_own_only_when_it_has_to(names, same, view):
    contexts = read(*names)
    found = asked(contexts)[0]["image_dropped"]
    assert found.same_as(contexts.full) is same
    assert (found.cache is contexts.full.cache) is view


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("names", "dropped"),
    [
        (("text", "image", "other"), ("text", "other")),
        (("image", "text"), ("text",)),
        (("system", "text", "image", "other", "plan"), ("system", "text", "other")),
        (("text", "image"), ("text",)),
        (("image", "text", "answer", "turn", "other"), ("text", "answer", "other")),
        (("text", "plan", "image", "turn", "other"), ("text", "plan", "other")),
    ],
    ids=str,
)
def test_image_dropped_holds_what_reading_the_texts_alone_gives(names, dropped, eager):
    found, wanted = asked(read(*names, eager=eager))[0]["image_dropped"], read(*dropped).full
    assert size(found) == size(wanted)
    for one, other in zip(found.held(), wanted.held(), strict=True):
        assert_close(one, other)


# What else a drawing may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text_dropped"),
    [
        (("text",), (101, 101)),
        (("text", "other"), (104, 104)),
        (("system", "text", "plan"), (108, 108)),
        (("image", "text"), (115, 103)),
        (("text", "image"), (115, 103)),  # the negative prompt stands where the text began, before the image
        (("image",), (115, 103)),
        (("text", "image", "turn", "other", "image"), (132, 108)),
    ],
    ids=str,
)
def test_a_negative_prompt_stands_where_the_dropped_text_began(names, text_dropped):
    contexts = read(*names)
    (found,) = asked(contexts, negatives=[NEGATIVE])
    assert size(found["text_dropped"]) == text_dropped
    assert size(contexts.text_dropped) == sizes(contexts)[1], "it leaves the conversation as it was"


def test_a_negative_prompt_before_an_image_is_reading_it_before_the_image():
    found = asked(read("system", "text", "image"), negatives=[NEGATIVE])[0]["text_dropped"]
    wanted = read("system")
    append_all([wanted], [[Utterance(NEGATIVE, "text")]])
    read_into(wanted, "image")
    assert_same(held(found), held(wanted.full))


@pytest.mark.parametrize(
    ("names", "negative", "text_dropped"),
    [
        (("text", "other"), None, (0, 0)),
        (("text", "image", "other"), None, (14, 2)),
        (("text", "image", "other"), NEGATIVE, (115, 103)),
        (("text", "answer", "turn", "other", "image", "text"), None, (40, 28)),
        (("image",), None, (14, 2)),
    ],
    ids=lambda value: "negative" if value is NEGATIVE else str(value),
)
def test_every_text_of_a_turn_may_be_dropped(names, negative, text_dropped):
    assert size(asked(read(*names), drop="turn", negatives=[negative])[0]["text_dropped"]) == text_dropped


@pytest.mark.parametrize(
    ("names", "image_dropped"),
    [
        (("system", "image", "text", "plan"), (21, 21)),
        (("system", "text", "plan"), (21, 21)),  # that is full: there is no image
        (("text", "plan", "image", "turn", "other", "plan"), (30, 30)),
        (("image", "text"), (3, 3)),
    ],
    ids=str,
)
def test_the_plan_may_stay_where_images_are_dropped(names, image_dropped):
    contexts = read(*names)
    before = sizes(contexts)
    found = asked(contexts, plan_in_image_dropped=True)[0]["image_dropped"]
    assert size(found) == image_dropped
    if "image" not in names:
        assert found is contexts.full
    assert sizes(contexts) == before


# Places and copies ----------------------------------------------------------------------------------------------------


def places(contexts: Contexts) -> list[tuple[str, str]]:
    """Which branch stands where: behind its context or before it; names with the same tokens share one."""
    found, (names,) = branches(contexts)
    claims = claim_all([branch.context for branch in found], [2] * len(found), keeps=False)
    behind = [claim.block.start > 0 and claim.seen.stop == claim.block.stop for claim in claims]
    return [(name, "tail" if behind[index] else "headroom") for name, index in names.items()]


def test_place_is_the_headroom_for_prefixes_of_full_alone():
    contexts = read("text", "image", "other")
    assert places(contexts) == [("full", "tail"), ("text_dropped", "headroom"), ("image_dropped", "tail")]
    later = read("text", "image")
    assert places(later) == [("full", "tail"), ("text_dropped", "tail"), ("image_dropped", "headroom")]


def test_branches_with_the_same_tokens_are_one():
    found, names = branches(read("text"), read("text", "image"), read("image"))
    assert [(branch.image, size(branch.context)) for branch in found] == [
        (0, (3, 3)),
        (0, (0, 0)),
        (1, (17, 5)),
        (1, (3, 3)),
        (2, (14, 2)),
        (2, (0, 0)),
    ]
    assert names == [
        {"full": 0, "text_dropped": 1, "image_dropped": 0},
        {"full": 2, "text_dropped": 2, "image_dropped": 3},
        {"full": 4, "text_dropped": 4, "image_dropped": 5},
    ]


def test_several_generations_at_once_are_one_by_one():
    names = [("text", "image", "other"), ("text",), ("image", "text")]
    together = [new_contexts() for _ in names]
    entries = [[entry for name in own for entry in UTTERANCES[name]()] for own in names]
    append_all(together, entries)
    for found, own in zip(asked(*together), names, strict=True):
        alone = asked(read(*own))[0]
        for name in ("full", "text_dropped", "image_dropped"):
            assert size(found[name]) == size(alone[name])
            for mine, theirs in zip(found[name].held(), alone[name].held(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_fork_that_is_extended_holds_the_same_tokens_and_extends_alone():
    full = read("text", "image").full
    full.cache.reserve(headroom=9)
    other, before = full.fork(), held(full)
    wanted = small_model().decode(torch.tensor([3]), [full.fork()])
    small_model().decode(torch.tensor([5]), [full])  # now the fork has to move
    assert_close(small_model().decode(torch.tensor([3]), [other]), wanted)
    assert other.cache is not full.cache
    for own, old in zip((*other.held(), *full.held()), 2 * before[:2], strict=True):
        assert torch.equal(own[:, :17], old)
    assert other.length == full.length == 18


def test_forked_contexts_go_their_own_ways():
    ways = (("other",), ("image", "other"), ("plan", "turn", "text"))
    start = ("system", "image", "text")
    contexts = read(*start)
    before = [held(context) for context in asked(contexts)[0].values()]
    forks = [contexts.fork() for _ in ways]
    for fork, way in zip(forks, ways, strict=True):
        read_into(fork, *way)
    for fork, way in zip(forks, ways, strict=True):
        for one, other in zip(asked(fork)[0].values(), asked(read(*start, *way))[0].values(), strict=True):
            assert_same(held(one), held(other))
    for context, old in zip(asked(contexts)[0].values(), before, strict=True):
        assert_same(held(context), old)
    assert (contexts.has_images, len(contexts.turn)) == (True, 4)


def test_utterances_count_the_tokens_around_images():
    assert [entry.segment.length for entry in UTTERANCES["image"]()] == [6, 8]
    assert UTTERANCES["text"]()[0].segment.length == 3
