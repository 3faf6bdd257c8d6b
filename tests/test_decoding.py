"""Decoding over caches of a fixed size, as a GPU's graph does it: the logits and texts of the plain way, no leaks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import REFERENCE, assert_close, load_model
from small_model import DENSE, assert_same, held, new_contexts, new_model, small_model, text

from bagel.generation.contexts import Utterance, append_all
from bagel.generation.writing import Decoding
from bagel.kernels import attend_appended
from bagel.modeling import Bagel, Reference
from bagel.modeling.decoding import DecodeStep, give_back, take_step
from bagel.sampling import TextSampling
from bagel.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(REFERENCE / "tiny" / "checkpoint")
SAMPLED = TextSampling(do_sample=True, temperature=1.5)
LENGTHS = (2, 9, 5)


def contexts_of(model: Bagel, lengths=LENGTHS):
    """Contexts that hold a text of each length."""
    conversations = [new_contexts(model) for _ in lengths]
    with torch.no_grad():
        utterances = [[Utterance(text(length, seed=length), "text")] for length in lengths]
        append_all(conversations, utterances)
    return [contexts.full for contexts in conversations]


@pytest.fixture
def model(monkeypatch) -> Bagel:
    """A model whose texts are decoded over fixed caches on a CPU too, without a graph."""
    monkeypatch.setattr("bagel.modeling.decoding.can_capture", lambda decoder: True)
    monkeypatch.setattr("bagel.modeling.decoding.has_room", lambda *_: True)
    monkeypatch.setattr(DecodeStep, "_captured", lambda step: None)
    return new_model()


def generators(count: int = len(LENGTHS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def decoding(model: Bagel, contexts, limit: int, **options):
    """Rounds of texts drawn from contexts: over fixed caches, if the model's attention does that."""
    texts = generators(len(contexts))
    return Decoding(model, TOKENIZER, contexts, texts, chooser=SAMPLED, limit=limit, **options).rounds()


def plainly(model: Bagel, contexts, limit: int, **options):
    """What is decoded one token at a time, without fixed caches."""
    attention, model.attention = model.attention, Reference()
    try:
        return list(decoding(model, contexts, limit, **options))[-1]
    finally:
        model.attention = attention


@pytest.mark.parametrize("name", ["tiny", "variant_moe", "dense"])
def test_a_step_has_the_logits_of_the_plain_decoder(name):
    model = small_model(DENSE) if name == "dense" else load_model(name)
    contexts = contexts_of(model)
    before = [held(context) for context in contexts]
    with torch.inference_mode():
        step = DecodeStep(model, len(contexts), 32)
        step.begin(contexts)
        forks, ids = [context.fork() for context in contexts], torch.tensor([3, 4, 5])
        for _ in range(5):
            wanted = model.decode(ids, forks)
            assert_close(step(ids), wanted)
            ids = wanted.argmax(-1)
    for context, old in zip(contexts, before, strict=True):
        assert_same(held(context), old)


@pytest.mark.parametrize("options", [{}, {"look_every": 7}, {"logprobs": True}])
def test_texts_are_those_of_the_plain_way(model, options):
    contexts = contexts_of(model)
    found = list(decoding(model, contexts, 20, **options))[-1]
    assert model.graphs.decode_step is not None
    wanted = plainly(model, contexts, 20, **options)
    assert [answer.ids for answer in found] == [answer.ids for answer in wanted]
    assert [answer.finish_reason for answer in found] == [answer.finish_reason for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert len(one.logprobs) == (len(one.ids) if "logprobs" in options else 0)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_few_tokens_and_the_exact_attention_need_no_step(model):
    contexts = contexts_of(model)
    list(decoding(model, contexts, 8))
    assert model.graphs.decode_step is None
    plainly(model, contexts, 20)
    assert model.graphs.decode_step is None


def test_texts_that_are_decoded_by_turns_do_not_meet(model):
    one, other = contexts_of(model, (9,)), contexts_of(model, (4,))
    wanted = plainly(model, one, 20), plainly(model, other, 20)
    first = decoding(model, one, 20)
    next(first)
    between = list(decoding(model, other, 20))[-1]
    assert (list(first)[-1], between) == wanted


def test_nothing_of_an_abandoned_text_reaches_the_next(model):
    contexts = contexts_of(model)
    wanted = plainly(model, contexts, 20)
    abandoned = decoding(model, contexts, 20)
    next(abandoned)
    abandoned.close()
    step = model.graphs.decode_step
    assert step is not None
    with torch.inference_mode():
        step.caches.values.fill_(float("nan"))  # as if it had overflowed
        step.caches.keys.fill_(float("nan"))
    assert list(decoding(model, contexts, 20))[-1] == wanted
    assert model.graphs.decode_step is step


def test_a_step_is_used_again_for_what_fits_and_the_same_weights_only(model):
    with torch.inference_mode():
        step = take_step(model, 2, 100)
        assert step is not None
        assert step.capacity == 1024
        assert take_step(model, 2, 100) is not step  # the first is in use
        give_back(model, step)
        assert take_step(model, 2, 1024) is step
        for texts, tokens in ((3, 100), (2, 1025)):
            give_back(model, step)
            assert take_step(model, texts, tokens) is not step
        give_back(model, step)
        weight = model.decoder.norm.weight
        old, weight.data = weight.data, weight.data.clone()
        assert take_step(model, 2, 100) is not step
        weight.data = old
        give_back(model, step)
        model.decoder.norm = copy.deepcopy(model.decoder.norm)
        assert take_step(model, 2, 100) is not step
    assert take_step(model, 1, 40000) is None


def test_copies_of_what_keeps_a_step_are_empty(model):
    list(decoding(model, contexts_of(model), 20))
    assert model.graphs.decode_step is not None
    assert copy.deepcopy(model).graphs.decode_step is None
    assert pickle.loads(pickle.dumps(model.graphs)).decode_step is None


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_an_appended_token_sees_its_text_and_itself(heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 11, 4], dtype=torch.int32)
    q, k, v = (torch.randn(3, count, 8, generator=generator) for count in (heads, kv_heads, kv_heads))
    keys, values = (torch.randn(3, 12, kv_heads, 8, generator=generator) for _ in range(2))
    before = keys.clone(), values.clone()
    out = attend_appended(q, k, v, keys, values, lengths)
    for row, length in enumerate(lengths.tolist()):
        seen = (
            torch.cat([before[0][row, :length], k[row : row + 1]]),
            torch.cat([before[1][row, :length], v[row, None]]),
        )
        assert_close(out[row, None], Reference()(q[row, None], *seen))
        assert torch.equal(keys[row, : length + 1], seen[0])
        assert torch.equal(values[row, : length + 1], seen[1])
        assert torch.equal(keys[row, length + 1 :], before[0][row, length + 1 :])
