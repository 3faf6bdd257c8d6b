"""Answering: stop strings over token borders, batches against singles, why a text ended, draws and their generators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import IMAGE_TOKENS, latents, small_model, text, vit

from bagel.answering import Answer, TextWriter, decode, write_texts
from bagel.contexts import Entry, GuidanceContexts, prefill_all
from bagel.inputs import Job, Parts
from bagel.modeling import Context
from bagel.options import Options
from bagel.sampling import TextSampling
from bagel.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(REFERENCE / "tiny" / "checkpoint")
PARTS = Parts(small_model(), None, TOKENIZER)
GREEDY, SAMPLED = TextSampling(), TextSampling(do_sample=True, temperature=1.5)


# Stop strings ---------------------------------------------------------------------------------------------------------


class Letters:
    """A text stream in which token i is the i-th piece."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.rest


def written(pieces: list[str], *stop: str, rest: str = "") -> tuple[list[str], TextWriter]:
    """What comes out at each token and at the end."""
    writer = TextWriter(Letters(pieces, rest), stop)  # pyright: ignore[reportArgumentType]
    return [writer.push(i) for i in range(len(pieces))] + [writer.flush()], writer


def test_a_stop_string_is_found_across_tokens_and_cut():
    out, writer = written(["one <", "/an", "s> two"], "</ans>")
    assert out == ["one ", "", "", ""]
    assert writer.stopped


def test_what_might_begin_a_stop_string_is_held_back_and_released():
    out, writer = written(["a<", "/x", "b</"], "</ans>")
    assert out == ["a", "</x", "b", "</"]
    assert not writer.stopped


def test_a_held_beginning_may_start_anew_inside_itself():
    assert written(["xa", "a", "b"], "aab")[0] == ["x", "", "", ""]
    assert written(["a", "a", "ab"], "aab")[0] == ["", "", "a", ""]


def test_the_first_of_several_stop_strings_ends_the_text():
    assert written(["1b2", "a3"], "a", "b")[0] == ["1", "", ""]
    assert written(["1b2a3"], "a", "b")[0] == ["1", ""]


def test_nothing_follows_a_stop_string():
    out, _ = written(["a.b", "c.", "d"], ".", rest="e")
    assert out == ["a", "", "", ""]


def test_without_stop_strings_nothing_is_held_back():
    assert written(["a", "", "b"], rest="c")[0] == ["a", "", "b", "c"]


def test_a_stop_string_that_the_last_bytes_complete_is_cut():
    out, writer = written(["x."], ".!", rest="!")
    assert out == ["x", ""]
    assert writer.stopped


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=8), st.text("ab", min_size=1, max_size=4))
def test_any_split_into_tokens_gives_the_text_up_to_the_stop_string(pieces, stop):
    whole = "".join(pieces)
    out, writer = written(pieces, stop)
    assert "".join(out) == whole.split(stop)[0]
    assert writer.stopped == (stop in whole)


# Decoding -------------------------------------------------------------------------------------------------------------

PROMPTS = [[text(4, seed=1)], [latents(3), vit(5), text(2, seed=2)], [text(9, seed=3), vit(2)]]


def context_of(segments) -> Context:
    contexts = GuidanceContexts(small_model(), capacity=1)
    entries = [Entry(segment, "text") for segment in segments]
    prefill_all(small_model(), [contexts], [entries], image_tokens=IMAGE_TOKENS)
    return contexts.full


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last_of(parts: Parts, contexts, generators, sampling: TextSampling, limit: int, every: int = 1) -> list[Answer]:
    rounds = decode(parts, contexts, generators, sampling=sampling, max_new_tokens=limit, look_every=every)
    return list(rounds)[-1]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_decodes_to_the_same_tokens_as_one_by_one(sampling):
    singles = [last_of(PARTS, [context_of(p)], [generator(i)], sampling, 12)[0] for i, p in enumerate(PROMPTS)]
    batch = last_of(PARTS, [context_of(p) for p in PROMPTS], [generator(i) for i in range(3)], sampling, 12)
    assert batch == singles
    assert len({tuple(answer.ids) for answer in singles}) == 3


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("every", [3, 8, 100])
def test_looking_seldom_changes_neither_tokens_nor_generators(sampling, every):
    seldom, often = ([generator(i) for i in range(3)] for _ in range(2))
    found = last_of(PARTS, [context_of(p) for p in PROMPTS], seldom, sampling, 12, every)
    assert found == last_of(PARTS, [context_of(p) for p in PROMPTS], often, sampling, 12)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(seldom, often, strict=True))


def test_texts_that_end_within_a_round_end_there_and_the_others_go_on():
    parts, contexts = scripted([5, EOS, 1, 1], [6, 7, 8, 9, 9], [7, 7, 7, 7, EOS])
    answers = last_of(parts, contexts, [generator(0)] * 3, GREEDY, 5, 4)
    assert [(a.ids, a.finish_reason) for a in answers] == [
        ([5], "stop"),
        ([6, 7, 8, 9, 9], "length"),
        ([7, 7, 7, 7], "stop"),
    ]
    assert parts.model.fed == [[BOS, BOS, BOS], [5, 6, 7], [EOS, 7, 7], [1, 8, 7], [9, 7]]


def test_decoding_starts_from_bos_and_leaves_the_context_as_it_is():
    context = context_of(PROMPTS[1])
    cache = context.cache
    before = cache.keys[:, : context.length].clone(), context.length, context.position
    first = last_of(PARTS, [context], [generator(0)], GREEDY, 5)[0]
    assert torch.equal(cache.keys[:, : context.length], before[0])
    assert (context.length, context.position) == before[1:]
    logits = small_model().decode(torch.tensor([TOKENIZER.bos_id]), [context.fork()])
    assert first.ids[0] == int(logits.argmax())
    assert last_of(PARTS, [context], [generator(0)], GREEDY, 5)[0] == first  # neither call influences the other


class Script:
    """A model that says given tokens after each context, and remembers what it was fed."""

    device = torch.device("cpu")

    def __init__(self, *lines: list[int]) -> None:
        self.lines, self.fed = {id_: iter(line) for id_, line in enumerate(lines)}, []

    def decode(self, ids: torch.Tensor, contexts, *, attention: str) -> torch.Tensor:
        self.fed.append(ids.tolist())
        spoken = torch.tensor([next(self.lines[context.number]) for context in contexts])
        return 50.0 * torch.nn.functional.one_hot(spoken, 448).float()


def scripted(*lines: list[int]) -> tuple[Parts, list]:
    contexts = []
    for number in range(len(lines)):
        context = SimpleNamespace(number=number, length=0, cache=SimpleNamespace(reserve=lambda tokens: None))
        context.fork = lambda context=context: context
        contexts.append(context)
    return Parts(Script(*lines), None, TOKENIZER), contexts  # pyright: ignore[reportArgumentType]


EOS, BOS = TOKENIZER.eos_id, TOKENIZER.bos_id


def test_eos_stops_and_is_not_kept_and_the_others_go_on():
    parts, contexts = scripted([5, EOS], [6, 7, 8, 9], [EOS])
    answers = last_of(parts, contexts, [generator(0)] * 3, GREEDY, 3)
    assert [(answer.ids, answer.finish_reason) for answer in answers] == [
        ([5], "stop"),
        ([6, 7, 8], "length"),
        ([], "stop"),
    ]
    assert parts.model.fed == [[BOS, BOS, BOS], [5, 6], [7]]


def test_the_limit_counts_new_tokens_and_eos_right_after_it_is_never_asked_for():
    parts, contexts = scripted([5, 6, EOS])
    (answer,) = last_of(parts, contexts, [generator(0)], GREEDY, 2)
    assert (answer.ids, answer.finish_reason) == ([5, 6], "length")


@pytest.mark.parametrize("every", [1, 2, 8])
@pytest.mark.parametrize(("line", "draws"), [([5, 6, 7], 4), ([5, EOS, 9], 2)], ids=["length", "stop"])
def test_one_draw_more_than_is_kept_at_the_limit_and_none_after_eos(line, draws, every):
    parts, contexts = scripted(line)
    found, twin = generator(4), generator(4)
    last_of(parts, contexts, [found], SAMPLED, 3, every)
    for _ in range(draws):
        torch.multinomial(torch.ones(448), 1, generator=twin)
    assert torch.equal(found.get_state(), twin.get_state())


def jobs_of(contexts: list, **options) -> list[Job]:
    return [
        Job(Options(**options), generator(i), contexts=SimpleNamespace(full=context))  # pyright: ignore[reportArgumentType]
        for i, context in enumerate(contexts)
    ]


def test_written_texts_end_at_a_stop_string_each_on_its_own():
    lines = [TOKENIZER.encode(words) for words in ("a cat. a dog", "a cat, a dog", "no")]
    parts, contexts = scripted(*[[*line, EOS] for line in lines])
    written_texts = write_texts(parts, jobs_of(contexts), limit=100, stop=["."])
    assert [(words, answer.finish_reason) for words, answer in written_texts] == [
        ("a cat", "stop"),
        ("a cat, a dog", "stop"),
        ("no", "stop"),
    ]
    assert len(written_texts[0][1].ids) < len(lines[0])  # it did not decode on


def test_a_written_text_keeps_no_token_from_after_its_stop_string(monkeypatch):
    lines = [TOKENIZER.encode(words) for words in ("a cat. a dog", "no")]
    often, seldom = [], []
    for found, every in ((often, 1), (seldom, 64)):
        parts, contexts = scripted(*[[*line, EOS, *[1] * 64] for line in lines])
        seen = decode(parts, contexts, [generator(0)] * 2, sampling=GREEDY, max_new_tokens=64, look_every=every)
        monkeypatch.setattr("bagel.answering.decode", lambda *_, seen=seen, **__: seen)
        found += write_texts(parts, jobs_of(contexts), limit=64, stop=["."])
    assert seldom == often


def test_a_drawn_text_draws_nothing_after_its_stop_string(monkeypatch):
    line = TOKENIZER.encode("a cat. a dog")
    monkeypatch.setattr(Script, "device", torch.device("meta"))  # anything but a CPU
    monkeypatch.setattr("bagel.answering.torch.full", lambda size, value, device: torch.tensor([value] * size[0]))
    parts, contexts = scripted([*line, EOS])
    jobs = jobs_of(contexts, do_sample=True, temperature=0.01, stop=["."])
    ((words, answer),) = write_texts(parts, jobs, limit=100, stop=["."])
    twin = generator(0)
    for _ in answer.ids:
        torch.multinomial(torch.ones(448), 1, generator=twin)
    assert words == "a cat"
    assert torch.equal(jobs[0].generator.get_state(), twin.get_state())


def test_written_text_of_a_broken_character_and_an_unknown_id():
    first_byte = TOKENIZER.encode("中")[0]
    assert TOKENIZER.decode([first_byte]) == "\ufffd"
    parts, contexts = scripted([447, first_byte])
    ((words, answer),) = write_texts(parts, jobs_of(contexts), limit=2)
    assert (words, answer.ids, answer.finish_reason) == ("\ufffd", [447, first_byte], "length")
