"""Contexts: which tokens are in which one, written out, and which of them share a cache."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from small_model import IMAGE_TOKENS, latents, small_model, text, vit

from bagel.contexts import Entry, GuidanceContexts, copied, prefill_all
from bagel.modeling import Context

ENTRIES = {  # every segment of a length of its own, so that lengths tell which ones are in a context
    "text": lambda: [Entry(text(3), "text")],
    "other": lambda: [Entry(text(5, seed=1), "text")],
    "system": lambda: [Entry(text(7, seed=2), "system")],
    "plan": lambda: [Entry(text(11, seed=3), "plan")],
    "image": lambda: [Entry(latents(4), "image"), Entry(vit(6), "image")],  # 6 and 8 tokens
}


def read(*names: str, image_dropped: bool = True) -> GuidanceContexts:
    contexts = GuidanceContexts(small_model(), capacity=4, image_dropped=image_dropped)
    for name in names:
        prefill_all(small_model(), [contexts], [ENTRIES[name]()], image_tokens=IMAGE_TOKENS)
    return contexts


def size(context: Context) -> tuple[int, int]:
    return context.length, context.position


# (tokens, rotary position): a text of n tokens counts n and n, the picture 14 and 2.
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


@pytest.mark.parametrize(("names", "full", "text_dropped", "image_dropped"), RULES, ids=str)
def test_which_tokens_are_in_which_context(names, full, text_dropped, image_dropped):
    contexts = read(*names)
    assert size(contexts.full) == full
    assert size(contexts.text_dropped) == text_dropped
    assert size(contexts.image_dropped) == image_dropped
    without = read(*names, image_dropped=False)
    assert (size(without.full), size(without.text_dropped)) == (full, text_dropped)
    assert without.image_dropped is without.full


@pytest.mark.parametrize("names", [rule[0] for rule in RULES], ids="-".join)
def test_text_dropped_is_a_view_and_never_a_copy(names):
    contexts = read(*names)
    assert contexts.text_dropped.cache is contexts.full.cache
    assert contexts.text_dropped.length <= contexts.full.length
    x = torch.zeros(1, 2, 8)
    views = [c.extended(0, [x], [x], "tail")[0].data_ptr() for c in (contexts.full.fork(), contexts.text_dropped)]
    assert views[0] == views[1]


@pytest.mark.parametrize(
    ("names", "same", "view"),
    [
        (("text", "other"), True, True),
        (("system", "text"), True, True),
        (("text", "image"), False, True),  # a prefix of full: nothing was read after the picture
        (("system", "text", "plan"), False, True),
        (("image",), False, True),
        (("image", "text"), False, False),
        (("text", "image", "other"), False, False),
    ],
    ids=str,
)
def test_image_dropped_gets_a_cache_of_its_own_only_when_it_has_to(names, same, view):
    contexts = read(*names)
    assert contexts.image_dropped.same_as(contexts.full) is same
    assert (contexts.image_dropped.cache is contexts.full.cache) is view


@pytest.mark.parametrize(
    ("names", "dropped"),
    [
        (("text", "image", "other"), ("text", "other")),
        (("image", "text"), ("text",)),
        (("system", "text", "image", "other", "plan"), ("system", "text", "other")),
        (("text", "image"), ("text",)),
    ],
    ids=str,
)
def test_image_dropped_holds_what_reading_the_texts_alone_gives(names, dropped):
    found, wanted = read(*names).image_dropped, read(*dropped).full
    assert size(found) == size(wanted)
    for name in ("keys", "values"):
        one, other = (getattr(c.cache, name)[:, c.cache.headroom :][:, : c.length] for c in (found, wanted))
        assert_close(one, other)


def test_place_is_the_headroom_for_prefixes_of_full_alone():
    contexts = read("text", "image", "other")
    places = [contexts.place(c) for c in (contexts.full, contexts.text_dropped, contexts.image_dropped)]
    assert places == ["tail", "headroom", "tail"]
    later = read("text", "image")
    places = [later.place(c) for c in (later.full, later.text_dropped, later.image_dropped)]
    assert places == ["tail", "tail", "headroom"]


def test_several_generations_at_once_are_one_by_one():
    names = [("text", "image", "other"), ("text",), ("image", "text")]
    together = [GuidanceContexts(small_model(), image_dropped=True) for _ in names]
    entries = [[entry for name in own for entry in ENTRIES[name]()] for own in names]
    prefill_all(small_model(), together, entries, image_tokens=IMAGE_TOKENS)
    for found, own in zip(together, names, strict=True):
        alone = read(*own)
        for name in ("full", "text_dropped", "image_dropped"):
            one, other = getattr(found, name), getattr(alone, name)
            assert size(one) == size(other)
            for kept in ("keys", "values"):
                mine, theirs = (getattr(context.cache, kept)[:, : one.length] for context in (one, other))
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_copy_holds_the_same_tokens_and_extends_alone():
    full = read("text", "image").full
    full.cache.reserve(headroom=9)
    other = copied(small_model(), full)
    assert size(other) == size(full)
    assert torch.equal(other.cache.keys[:, :17], full.cache.keys[:, 9:26])
    assert torch.equal(other.cache.values[:, :17], full.cache.values[:, 9:26])
    old = full.cache.keys.clone()
    wanted = small_model().decode(torch.tensor([3]), [full.fork()])
    full.cache.keys.copy_(old)
    assert_close(small_model().decode(torch.tensor([3]), [other]), wanted)
    assert torch.equal(full.cache.keys[:, :26], old[:, :26])
    assert other.length == full.length + 1


def test_entries_count_the_tokens_around_pictures():
    assert [len(entry) for entry in ENTRIES["image"]()] == [6, 8]
    assert len(ENTRIES["text"]()[0]) == 3
