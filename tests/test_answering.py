"""Writing: stop strings over token borders, batches against singles, why a text ended, draws and their generators."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import assert_same, held, latents, new_contexts, small_model, text, vit

from bagel.generation.contexts import Contexts, Utterance, append_all
from bagel.generation.writing import Answer, Decoding, TextWriter, score, texts_of
from bagel.generation.writing import _decoding as decoding_of
from bagel.modeling import Context
from bagel.options import make_options
from bagel.packing import Text
from bagel.sampling import TextSampling
from bagel.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(REFERENCE / "tiny" / "checkpoint")
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


def contexts_of(segments) -> Contexts:
    contexts = new_contexts()
    append_all([contexts], [[Utterance(segment, "text") for segment in segments]])
    return contexts


def context_of(segments) -> Context:
    return contexts_of(segments).full


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last_of(contexts, generators, sampling, limit: int, every: int = 1, *, model=None, **options) -> list[Answer]:
    decoding = Decoding(
        model or small_model(),
        TOKENIZER,
        contexts,
        generators,
        chooser=sampling,
        limit=limit,
        look_every=every,
        **options,
    )
    return list(decoding.rounds())[-1]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_decodes_to_the_same_tokens_as_one_by_one(sampling):
    singles = [last_of([context_of(p)], [generator(i)], sampling, 12)[0] for i, p in enumerate(PROMPTS)]
    batch = last_of([context_of(p) for p in PROMPTS], [generator(i) for i in range(3)], sampling, 12)
    assert batch == singles
    assert len({tuple(answer.ids) for answer in singles}) == 3


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("every", [3, 8, 100])
def test_looking_seldom_changes_neither_tokens_nor_generators(sampling, every):
    seldom, often = ([generator(i) for i in range(3)] for _ in range(2))
    found = last_of([context_of(p) for p in PROMPTS], seldom, sampling, 12, every)
    assert found == last_of([context_of(p) for p in PROMPTS], often, sampling, 12)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(seldom, often, strict=True))


def test_texts_that_end_within_a_round_end_there_and_the_others_go_on():
    model, contexts = scripted([5, EOS, 1, 1], [6, 7, 8, 9, 9], [7, 7, 7, 7, EOS])
    answers = last_of(contexts, [generator(0)] * 3, GREEDY, 5, 4, model=model)
    assert [(a.ids, a.finish_reason) for a in answers] == [
        ([5], "stop"),
        ([6, 7, 8, 9, 9], "length"),
        ([7, 7, 7, 7], "stop"),
    ]
    assert model.fed == [[BOS, BOS, BOS], [5, 6, 7], [EOS, 7, 7], [1, 8, 7], [9, 7]]


def test_decoding_starts_from_bos_and_leaves_the_context_as_it_is():
    context = context_of(PROMPTS[1])
    before = held(context)
    first = last_of([context], [generator(0)], GREEDY, 5)[0]
    assert_same(held(context), before)
    logits = small_model().decode(torch.tensor([TOKENIZER.bos_id]), [context.fork()])
    assert first.ids[0] == int(logits.argmax())
    assert last_of([context], [generator(0)], GREEDY, 5)[0] == first  # neither call influences the other


class Script:
    """A model that says given tokens after each context, and remembers what it was fed."""

    device = torch.device("cpu")
    attention = SimpleNamespace(has_step=False)

    def __init__(self, *lines: list[int]) -> None:
        self.lines, self.fed = {id_: iter(line) for id_, line in enumerate(lines)}, []
        self.graphs = SimpleNamespace(decode_step=None)

    def decode(self, ids: torch.Tensor, contexts) -> torch.Tensor:
        self.fed.append(ids.tolist())
        spoken = torch.tensor([next(self.lines[context.number]) for context in contexts])
        return 50.0 * torch.nn.functional.one_hot(spoken, 448).float()


def scripted(*lines: list[int]) -> tuple[Script, list]:
    contexts = []
    for number in range(len(lines)):
        context = SimpleNamespace(number=number, length=0, reserve=lambda tokens: None)
        context.fork = lambda context=context: context
        contexts.append(context)
    return Script(*lines), contexts


EOS, BOS = TOKENIZER.eos_id, TOKENIZER.bos_id


def test_eos_stops_and_is_not_kept_and_the_others_go_on():
    model, contexts = scripted([5, EOS], [6, 7, 8, 9], [EOS])
    answers = last_of(contexts, [generator(0)] * 3, GREEDY, 3, model=model)
    assert [(answer.ids, answer.finish_reason) for answer in answers] == [
        ([5], "stop"),
        ([6, 7, 8], "length"),
        ([], "stop"),
    ]
    assert model.fed == [[BOS, BOS, BOS], [5, 6], [7]]


def test_the_limit_counts_new_tokens_and_eos_right_after_it_is_never_asked_for():
    model, contexts = scripted([5, 6, EOS])
    (answer,) = last_of(contexts, [generator(0)], GREEDY, 2, model=model)
    assert (answer.ids, answer.finish_reason) == ([5, 6], "length")


@pytest.mark.parametrize("every", [1, 2, 8])
@pytest.mark.parametrize(("line", "draws"), [([5, 6, 7], 4), ([5, EOS, 9], 2)], ids=["length", "stop"])
def test_one_draw_more_than_is_kept_at_the_limit_and_none_after_eos(line, draws, every):
    model, contexts = scripted(line)
    found, twin = generator(4), generator(4)
    last_of(contexts, [found], SAMPLED, 3, every, model=model)
    for _ in range(draws):
        torch.multinomial(torch.ones(448), 1, generator=twin)
    assert torch.equal(found.get_state(), twin.get_state())


def write_texts(model: Script, contexts, *, sampling=GREEDY, limit: int, stop=(), **options) -> list[tuple]:
    """Text and answer of each context, all decoded together."""
    given = [generator(i) for i in range(len(contexts))]
    decoding = Decoding(model, TOKENIZER, contexts, given, chooser=sampling, limit=limit, **options)
    texts = [""] * len(contexts)
    for pieces in texts_of(decoding, stop):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return list(zip(texts, decoding.answers, given, strict=True))


def test_written_texts_end_at_a_stop_string_each_on_its_own():
    lines = [TOKENIZER.encode(words) for words in ("a cat. a dog", "a cat, a dog", "no")]
    written_texts = write_texts(*scripted(*[[*line, EOS] for line in lines]), limit=100, stop=["."])
    assert [(words, answer.finish_reason) for words, answer, _ in written_texts] == [
        ("a cat", "stop"),
        ("a cat, a dog", "stop"),
        ("no", "stop"),
    ]
    assert len(written_texts[0][1].ids) < len(lines[0])  # it did not decode on


def test_a_written_text_keeps_no_token_from_after_its_stop_string():
    lines = [TOKENIZER.encode(words) for words in ("a cat. a dog", "no")]
    often, seldom = (
        [
            (words, answer)
            for words, answer, _ in write_texts(
                *scripted(*[[*line, EOS, *[1] * 64] for line in lines]),
                limit=64,
                stop=["."],
                look_every=every,
                logprobs=True,
            )
        ]
        for every in (1, 64)
    )
    assert seldom == often
    assert [len(answer.logprobs) for _, answer in often] == [len(answer.ids) for _, answer in often]


def test_a_drawn_text_draws_nothing_after_its_stop_string(monkeypatch):
    line, drawn = TOKENIZER.encode("a cat. a dog"), generator(0)
    monkeypatch.setattr(Script, "device", torch.device("meta"))  # anything but a CPU
    monkeypatch.setattr(
        "bagel.generation.writing.torch.full", lambda size, value, device: torch.tensor([value] * size[0])
    )
    model, (context,) = scripted([*line, EOS])
    session = SimpleNamespace(
        model=model,
        processor=SimpleNamespace(tokenizer=TOKENIZER),
        contexts=SimpleNamespace(full=context),
        generator=drawn,
    )
    options = make_options("write", {"do_sample": True, "temperature": 0.01, "stop": ["."]})
    decoding = decoding_of([session], options)
    words = "".join(piece for (piece,) in texts_of(decoding, options.stop_strings))
    twin = generator(0)
    for _ in decoding.answers[0].ids:
        torch.multinomial(torch.ones(448), 1, generator=twin)
    assert words == "a cat"
    assert torch.equal(drawn.get_state(), twin.get_state())


def test_written_text_of_a_broken_character_and_an_unknown_id():
    first_byte = TOKENIZER.encode("中")[0]
    assert TOKENIZER.decode([first_byte]) == "\ufffd"
    ((words, answer, _),) = write_texts(*scripted([447, first_byte]), limit=2)
    assert (words, answer.ids, answer.finish_reason) == ("\ufffd", [447, first_byte], "length")


# How likely a text is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_are_those_of_the_model_before_it_is_sampled_from(sampling, every):
    contexts = [context_of(prompt) for prompt in PROMPTS]
    answers = last_of(contexts, [generator(i) for i in range(3)], sampling, 6, every, logprobs=True)
    for context, answer in zip(contexts, answers, strict=True):
        fork, ids = context.fork(), [BOS, *answer.ids]
        wanted = [
            small_model().decode(torch.tensor([token]), [fork])[0].log_softmax(-1)[following].item()
            for token, following in itertools.pairwise(ids)
        ]
        assert answer.logprobs == pytest.approx(wanted, abs=1e-4)


def test_a_given_text_is_scored_as_it_would_be_written():
    contexts = contexts_of(PROMPTS[1])
    context, before = contexts.full, held(contexts.full)
    (answer,) = last_of([context], [generator(3)], SAMPLED, 8, logprobs=True)
    found = score(contexts, Text(torch.tensor([BOS, *answer.ids, EOS])))
    assert found[:-1] == pytest.approx(answer.logprobs, abs=1e-4)
    assert len(found) == len(answer.ids) + 1
    assert_same(held(context), before)


def test_any_function_may_choose_the_tokens():
    def second_likeliest(logits, generators):
        assert len(generators) == logits.shape[0]
        return logits.topk(2).indices[:, 1]

    context = context_of(PROMPTS[0])
    (answer,) = last_of([context], [generator(0)], second_likeliest, 4)
    fork, ids = context.fork(), [BOS]
    for token in answer.ids:
        logits = small_model().decode(torch.tensor(ids[-1:]), [fork])[0]
        assert token == logits.topk(2).indices[1]
        ids.append(token)
