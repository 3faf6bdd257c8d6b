"""Decoding over caches of a fixed size, as a GPU's graph does it: the logits and texts of the plain way, no leaks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import REFERENCE, assert_close, load_model
from small_model import DENSE, IMAGE_TOKENS, small_model, text

from bagel.answering import decode
from bagel.attention import attend_appended, attention
from bagel.contexts import Entry, GuidanceContexts, prefill_all
from bagel.inputs import Parts
from bagel.modeling import Bagel
from bagel.modeling.decoding import DecodeStep, DecodeSteps
from bagel.sampling import TextSampling
from bagel.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(REFERENCE / "tiny" / "checkpoint")
SAMPLED = TextSampling(do_sample=True, temperature=1.5)
LENGTHS = (2, 9, 5)


def contexts_of(model: Bagel, lengths=LENGTHS):
    """Contexts that hold a text of each length."""
    contexts = [GuidanceContexts(model) for _ in lengths]
    with torch.no_grad():
        entries = [[Entry(text(length, seed=length), "text")] for length in lengths]
        prefill_all(model, contexts, entries, image_tokens=IMAGE_TOKENS)
    return [context.full for context in contexts]


@pytest.fixture
def parts(monkeypatch):
    """A model whose texts are decoded over fixed caches on a CPU too, without a graph."""
    monkeypatch.setattr("bagel.modeling.decoding.can_capture", lambda model: True)
    monkeypatch.setattr("bagel.modeling.decoding.has_room", lambda *_: True)
    monkeypatch.setattr(DecodeStep, "_captured", lambda step: None)
    return Parts(small_model(), None, TOKENIZER)


def generators(count: int = len(LENGTHS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def plainly(model: Bagel, contexts, limit: int):
    """What is decoded one token at a time, without fixed caches."""
    parts = Parts(model, None, TOKENIZER, "reference")
    return list(decode(parts, contexts, generators(len(contexts)), sampling=SAMPLED, max_new_tokens=limit))[-1]


def over_caches(parts: Parts, contexts, limit: int):
    return decode(parts, contexts, generators(len(contexts)), sampling=SAMPLED, max_new_tokens=limit)


@pytest.mark.parametrize("name", ["tiny", "variant_moe", "dense"])
def test_a_step_has_the_logits_of_the_plain_decoder(name):
    model = small_model(DENSE) if name == "dense" else load_model(name).model
    contexts = contexts_of(model)
    with torch.inference_mode():
        step = DecodeStep(model, len(contexts), 32)
        step.begin(contexts)
        forks, ids = [context.fork() for context in contexts], torch.tensor([3, 4, 5])
        for _ in range(5):
            wanted = model.decode(ids, forks)
            assert_close(step(ids), wanted)
            ids = wanted.argmax(-1)


def test_texts_are_those_of_the_plain_way(parts):
    contexts = contexts_of(parts.model)
    found = list(over_caches(parts, contexts, 20))[-1]
    assert parts.decode_steps.kept is not None
    assert found == plainly(parts.model, contexts, 20)


def test_a_few_tokens_and_the_exact_attention_need_no_step(parts):
    contexts = contexts_of(parts.model)
    list(over_caches(parts, contexts, 8))
    assert parts.decode_steps.kept is None
    list(over_caches(Parts(parts.model, None, TOKENIZER, "reference"), contexts, 20))
    assert parts.decode_steps.kept is None


def test_texts_that_are_decoded_by_turns_do_not_meet(parts):
    one, other = contexts_of(parts.model, (9,)), contexts_of(parts.model, (4,))
    wanted = plainly(parts.model, one, 20), plainly(parts.model, other, 20)
    first = over_caches(parts, one, 20)
    next(first)
    between = list(over_caches(parts, other, 20))[-1]
    assert (list(first)[-1], between) == wanted


def test_nothing_of_an_abandoned_text_reaches_the_next(parts):
    contexts = contexts_of(parts.model)
    abandoned = over_caches(parts, contexts, 20)
    next(abandoned)
    abandoned.close()
    step = parts.decode_steps.kept
    assert step is not None
    with torch.inference_mode():
        step.caches.values.fill_(float("nan"))  # as if it had overflowed
        step.caches.keys.fill_(float("nan"))
    assert list(over_caches(parts, contexts, 20))[-1] == plainly(parts.model, contexts, 20)
    assert parts.decode_steps.kept is step


def test_a_step_is_used_again_for_what_fits_and_the_same_weights_only(parts):
    steps, model = DecodeSteps(), small_model()
    with torch.inference_mode():
        step = steps.take(model, 2, 100)
        assert step is not None
        assert step.capacity == 1024
        assert steps.take(model, 2, 100) is not step  # the first is in use
        steps.give_back(step)
        assert steps.take(model, 2, 1024) is step
        for texts, tokens in ((3, 100), (2, 1025)):
            steps.give_back(step)
            assert steps.take(model, texts, tokens) is not step
        steps.give_back(step)
        weight = model.decoder.norm.weight
        old, weight.data = weight.data, weight.data.clone()
        assert steps.take(model, 2, 100) is not step
        weight.data = old
    assert steps.take(model, 1, 40000) is None


def test_copies_of_what_keeps_a_step_are_empty(parts):
    list(over_caches(parts, contexts_of(parts.model), 20))
    assert copy.deepcopy(parts.decode_steps).kept is None
    assert pickle.loads(pickle.dumps(parts.decode_steps)).kept is None


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
        assert_close(out[row, None], attention(q[row, None], *seen, backend="reference"))
        assert torch.equal(keys[row, : length + 1], seen[0])
        assert torch.equal(values[row, : length + 1], seen[1])
        assert torch.equal(keys[row, length + 1 :], before[0][row, length + 1 :])
