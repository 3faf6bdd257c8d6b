"""Decode text from contexts: several at once, stopped by eos, a limit or a stop string, or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bagel.inputs import Job, Parts
from bagel.modeling import Context
from bagel.sampling import TextSampling, discard_draw, next_token
from bagel.tokenizer import TextStream


@dataclass
class Answer:
    """A text as it grows: its ids without bos and eos, and why it ended ("stop", "length", or "" while it grows)."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@torch.inference_mode()
def decode(
    parts: Parts,
    contexts: Sequence[Context],
    generators: Sequence[torch.Generator],
    *,
    sampling: TextSampling,
    max_new_tokens: int,
) -> Iterator[list[Answer]]:
    """Decode one text from each context, which stay as they are; a token of every unfinished text at a time.

    Yields:
        All answers after each step, the same objects; the caller may end one by setting its `finish_reason`.
    """
    model, eos = parts.model, parts.tokenizer.eos_id
    answers = [Answer() for _ in contexts]
    forks = [context.fork() for context in contexts]
    for fork in forks:
        fork.cache.reserve(tokens=fork.length + max_new_tokens)
    last = [parts.tokenizer.bos_id] * len(answers)
    while active := [i for i, answer in enumerate(answers) if not answer.finish_reason]:
        ids = torch.tensor([last[i] for i in active], device=model.device)
        logits = model.decode(ids, [forks[i] for i in active], attention=parts.attention)
        drawn = [next_token(row, sampling, generators[i]) for row, i in zip(logits, active, strict=True)]
        for i, token in zip(active, torch.stack(drawn).tolist(), strict=True):
            _take(answers[i], token, eos=eos, limit=max_new_tokens)
            last[i] = token
            if answers[i].finish_reason == "length":
                discard_draw(logits.shape[-1], sampling, generators[i])
        yield answers


def _take(answer: Answer, token: int, *, eos: int, limit: int) -> None:
    if token == eos:
        answer.finish_reason = "stop"
        return
    answer.ids.append(token)
    if len(answer.ids) == limit:
        answer.finish_reason = "length"


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
            taken[i] = len(answer.ids)
            if writer.stopped:
                answer.finish_reason = "stop"
    for i, (answer, writer) in enumerate(zip(answers, writers, strict=True)):
        texts[i] += writer.flush()
        if writer.stopped:
            answer.finish_reason = "stop"
    return list(zip(texts, answers, strict=True))


def decode_jobs(parts: Parts, jobs: Sequence[Job], *, limit: int) -> Iterator[list[Answer]]:
    """Decode from the full contexts of jobs that share their text sampling."""
    contexts = [job.contexts.full for job in jobs if job.contexts is not None]
    generators = [job.generator for job in jobs]
    return decode(parts, contexts, generators, sampling=jobs[0].options.sampling, max_new_tokens=limit)
