"""Decode text from contexts: several at once, stopped by eos, a limit or a stop string, or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from bagel.inputs import Job, Parts
from bagel.modeling import Context
from bagel.modeling.decoding import DecodeStep
from bagel.sampling import TextSampling, discard_draw, next_tokens
from bagel.tokenizer import TextStream


@dataclass
class Answer:
    """A text as it grows: its ids without bos and eos, and why it ended ("stop", "length", or "" while it grows)."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


LOOK_EVERY = 8
"""Tokens decoded before any is looked at, on a device that computes by itself; what follows the end of a text is lost
work."""


@torch.inference_mode()
def decode(
    parts: Parts,
    contexts: Sequence[Context],
    generators: Sequence[torch.Generator],
    *,
    sampling: TextSampling,
    max_new_tokens: int,
    look_every: int | None = None,
) -> Iterator[list[Answer]]:
    """Decode one text from each context, which stay as they are; some tokens of every unfinished text at a time.

    Generators end up as if nothing had been decoded after eos or the limit.

    Args:
        parts: model and tokenizer.
        contexts: what to go on from.
        generators: one a text.
        sampling: how tokens are chosen.
        max_new_tokens: limit of each text.
        look_every: tokens at a time; by default one on a CPU, elsewhere `LOOK_EVERY`.

    Yields:
        All answers after each round, the same objects; the caller may end one by setting its `finish_reason`.
    """
    graph = None
    # A graph is worth its capture for more than a few tokens, and it has an attention of its own.
    if contexts and max_new_tokens > LOOK_EVERY and parts.attention != "reference":
        longest = max(context.length for context in contexts)
        graph = parts.decode_steps.take(parts.model, len(contexts), longest + max_new_tokens)
    try:
        yield from _rounds(parts, contexts, generators, sampling, max_new_tokens, look_every, graph)
    finally:
        if graph is not None:
            parts.decode_steps.give_back(graph)


def _rounds(
    parts: Parts,
    contexts: Sequence[Context],
    generators: Sequence[torch.Generator],
    sampling: TextSampling,
    max_new_tokens: int,
    look_every: int | None,
    graph: DecodeStep | None,
) -> Iterator[list[Answer]]:
    """Yield what `decode` does, by a graph, or by forwards of the texts that are not finished."""
    model, eos = parts.model, parts.tokenizer.eos_id
    at_a_time = look_every or (1 if model.device.type == "cpu" else LOOK_EVERY)
    answers = [Answer() for _ in contexts]
    forks = [context.fork() for context in contexts]
    if graph is not None:
        graph.begin(contexts)
    else:
        for fork in forks:
            fork.cache.reserve(tokens=fork.length + max_new_tokens)
    ids = torch.full((len(answers),), parts.tokenizer.bos_id, device=model.device)
    active = list(range(len(answers)))
    left = max_new_tokens
    while not all(answer.finish_reason for answer in answers):
        count = min(at_a_time, left)
        left -= count
        own = [torch.Generator(generators[i].device) if answers[i].finish_reason else generators[i] for i in active]
        rows, states, vocab_size = [], [], 0
        for _ in range(count):
            if graph is None:
                logits = model.decode(ids, [forks[i] for i in active], attention=parts.attention)
            else:
                logits = graph(ids)
            ids, vocab_size = next_tokens(logits, sampling, own), logits.shape[-1]
            rows.append(ids)
            states.append([generator.get_state() for generator in own] if not sampling.greedy else [])
        columns = zip(*torch.stack(rows).tolist(), strict=True)  # here the device is waited for
        for place, (i, tokens) in enumerate(zip(active, columns, strict=True)):
            if answers[i].finish_reason:  # a graph goes on with every text until all are finished
                continue
            taken = _take(answers[i], tokens, eos=eos, limit=max_new_tokens)
            if answers[i].finish_reason and not sampling.greedy:
                generators[i].set_state(states[taken - 1][place])
            if answers[i].finish_reason == "length":
                discard_draw(vocab_size, sampling, generators[i])
        yield answers
        places = [place for place, i in enumerate(active) if not answers[i].finish_reason]
        if graph is None and len(places) < len(active):
            ids, active = ids[places], [active[place] for place in places]


def _take(answer: Answer, tokens: Sequence[int], *, eos: int, limit: int) -> int:
    """Append tokens up to the answer's end, and return how many were looked at."""
    for count, token in enumerate(tokens, 1):
        if token == eos:
            answer.finish_reason = "stop"
            return count
        answer.ids.append(token)
        if len(answer.ids) == limit:
            answer.finish_reason = "length"
    return len(tokens)


class TextWriter:
    """The text of one growing answer: whole characters only, and nothing from the first stop string on.

    Args:
        stream: turns ids into text piece by piece.
        stop: strings that end the text; what might be the beginning of one is held back.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self.stream, self.stop = stream, tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return what a further token makes certain."""
        return self._release(self.stream.push(token), final=False)

    def flush(self) -> str:
        """Return the rest, after the last token."""
        return self._release(self.stream.flush(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - keep
        self.held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    return max((n for n in range(1, min(len(text), len(stop) - 1) + 1) if stop.startswith(text[-n:])), default=0)


def write_texts(parts: Parts, jobs: Sequence[Job], *, limit: int, stop: Sequence[str] = ()) -> list[tuple[str, Answer]]:
    """Return text and answer of each job, all decoded together from their full contexts."""
    writers = [TextWriter(TextStream(parts.tokenizer), stop) for _ in jobs]
    texts = [""] * len(jobs)
    taken = [0] * len(jobs)
    answers: list[Answer] = []
    for answers in decode_jobs(parts, jobs, limit=limit):
        for i, (answer, writer) in enumerate(zip(answers, writers, strict=True)):
            for token in answer.ids[taken[i] :]:
                texts[i] += writer.push(token)
                taken[i] += 1
                if writer.stopped:  # what was decoded after the stop string is not part of the answer
                    answer.finish_reason = "stop"
                    del answer.ids[taken[i] :]
                    break
    for i, (answer, writer) in enumerate(zip(answers, writers, strict=True)):
        texts[i] += writer.flush()
        if writer.stopped:
            answer.finish_reason = "stop"
    return list(zip(texts, answers, strict=True))


def stream_text(parts: Parts, job: Job, *, limit: int, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text that `write_texts` returns of one job as it is decoded, in whole characters."""
    writer, taken = TextWriter(TextStream(parts.tokenizer), stop), 0
    rounds = decode_jobs(parts, [job], limit=limit)
    while not writer.stopped:
        with current_gpu(parts.model.device):  # but not while the caller works
            found = next(rounds, None)
        if found is None:
            break
        (answer,) = found
        for token in answer.ids[taken:]:
            if piece := writer.push(token):
                yield piece
        taken = len(answer.ids)
    if piece := writer.flush():
        yield piece


def current_gpu(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for a while, as its kernels and graphs need; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def decode_jobs(parts: Parts, jobs: Sequence[Job], *, limit: int) -> Iterator[list[Answer]]:
    """Decode from the full contexts of jobs that share their text sampling."""
    contexts = [job.contexts.full for job in jobs if job.contexts is not None]
    generators, options = [job.generator for job in jobs], jobs[0].options
    # A text that its reader ends at a stop string must not draw on meanwhile.
    look_every = 1 if options.stop_strings and not options.sampling.greedy else None
    return decode(parts, contexts, generators, sampling=options.sampling, max_new_tokens=limit, look_every=look_every)
