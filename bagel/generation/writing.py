"""Decode text from contexts: several at once, ended by eos, a limit or a stop string, or streamed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bagel.generation.contexts import Contexts, Utterance, append_all, working
from bagel.generation.reading import catch_up
from bagel.modeling import Bagel, Context
from bagel.modeling.decoding import give_back, take_step
from bagel.options import PlanOptions, Writing
from bagel.packing import Text
from bagel.parameters import described
from bagel.results import TextResult
from bagel.sampling import Chooser, TextSampling
from bagel.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from bagel.generation.session import Session

LOOK_EVERY = 8
"""Tokens decoded before any is looked at, on a device that computes by itself; what follows the end of a text is lost
work."""


@dataclass
class Answer:
    """A text as it grows.

    `ids` without bos and eos; `logprobs` of each of them, where they are wanted; `finish_reason` says why it ended
    ("stop", "length", or "" while it grows).
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[float] = field(default_factory=list)


class Decoding:
    """Decodes one text from each of several contexts, which stay as they are.

    Generators end up as if nothing had been decoded after eos or the limit.

    Args:
        model: what decodes.
        tokenizer: knows bos and eos.
        contexts: what to go on from.
        generators: one per text.
        chooser: chooses the tokens, see `bagel.sampling.TextSampling`.
        limit: most new tokens of each text.
        look_every: tokens decoded at a time; by default one on a CPU, elsewhere `LOOK_EVERY`.
        logprobs: keep the log-probability of each token under the model.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: Tokenizer,
        contexts: Sequence[Context],
        generators: Sequence[torch.Generator],
        *,
        chooser: Chooser,
        limit: int,
        look_every: int | None = None,
        logprobs: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.contexts, self.generators = model, tokenizer, contexts, generators
        self.chooser, self.limit, self.logprobs = chooser, limit, logprobs
        self.draws = not getattr(chooser, "greedy", False)
        self.at_a_time = look_every or (1 if model.device.type == "cpu" else LOOK_EVERY)
        self.answers = [Answer() for _ in contexts]
        self.left, self.vocab_size = limit, 0

    @torch.inference_mode()
    def rounds(self) -> Iterator[list[Answer]]:
        """Yield all answers after each round of tokens, the same objects; the caller may set their `finish_reason`."""
        step, forks = None, []
        if self.contexts and self.limit > LOOK_EVERY:  # a graph is worth its capture for more than a few tokens
            longest = max(context.length for context in self.contexts)
            step = take_step(self.model, len(self.contexts), longest + self.limit)
        try:
            if step is not None:
                step.begin(self.contexts)
            else:
                forks = [context.fork() for context in self.contexts]
                for fork in forks:
                    fork.reserve(self.limit)
            active = list(range(len(self.answers)))
            ids = torch.full((len(active),), self.tokenizer.bos_id, device=self.model.device)
            while not all(answer.finish_reason for answer in self.answers):
                ids = self._round(step or partial(self.model.decode, contexts=[forks[i] for i in active]), ids, active)
                yield self.answers
                places = [place for place, i in enumerate(active) if not self.answers[i].finish_reason]
                if step is None and len(places) < len(active):  # a graph goes on with every text until all are finished
                    ids, active = ids[places], [active[place] for place in places]
        finally:
            if step is not None:
                give_back(self.model, step)

    def _round(self, logits_of: Any, ids: Tensor, active: Sequence[int]) -> Tensor:
        """Decode some tokens of the active texts, take what belongs to their answers, and return the last ids."""
        count = min(self.at_a_time, self.left)
        self.left -= count
        generators = [
            torch.Generator(self.generators[i].device) if self.answers[i].finish_reason else self.generators[i]
            for i in active
        ]
        rows, found, states = [], [], []
        for _ in range(count):
            logits = logits_of(ids)
            ids, self.vocab_size = self._chosen(logits, generators), logits.shape[-1]
            rows.append(ids)
            if self.logprobs:
                found.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
            states.append([generator.get_state() for generator in generators] if self.draws else [])
        tokens = torch.stack(rows).tolist()  # here the device is waited for
        logprobs = torch.stack(found).tolist() if found else []
        for place, i in enumerate(active):
            if not self.answers[i].finish_reason:
                self._take(i, [row[place] for row in tokens], [row[place] for row in logprobs], states, place)
        return ids

    def _chosen(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the next ids (B,); those of somebody's own chooser are looked at first."""
        ids = self.chooser(logits, generators)
        if isinstance(self.chooser, TextSampling):
            return ids
        whole = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64) and ids.shape == logits.shape[:1]
        if not whole:
            raise TypeError(f"sampling must return token ids {tuple(logits.shape[:1])}, got {described(ids)}")
        if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < logits.shape[-1])).all()):
            raise ValueError(f"sampling must return ids between 0 and {logits.shape[-1] - 1}, got {ids.tolist()}")
        return ids.long()

    def _take(self, i: int, tokens: list[int], logprobs: list[float], states: list[list[Tensor]], place: int) -> None:
        """Take one text's new tokens up to its end, and wind its generator back to where that was."""
        answer, generator = self.answers[i], self.generators[i]
        for at, token in enumerate(tokens):
            if token == self.tokenizer.eos_id:
                answer.finish_reason = "stop"
            else:
                answer.ids.append(token)
                answer.logprobs += logprobs[at : at + 1]
                if len(answer.ids) == self.limit:
                    answer.finish_reason = "length"
            if answer.finish_reason:
                if self.draws:
                    generator.set_state(states[at][place])
                break
        discard = getattr(self.chooser, "discard", None)
        if answer.finish_reason == "length" and discard is not None:
            discard(self.vocab_size, generator)


class TextWriter:
    """The text of one growing answer: whole characters only, and nothing from the first stop string on.

    Args:
        stream: turns ids into text piece by piece.
        stop: strings that end the text; what might be the beginning of one is held back.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self.stream = stream
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False
        self.taken = 0

    def follow(self, answer: Answer) -> str:
        """Return the text of what an answer has gained; what was decoded after a stop string is no part of it."""
        text = ""
        while self.taken < len(answer.ids) and not self.stopped:
            text += self.push(answer.ids[self.taken])
            self.taken += 1
        if self.stopped:
            answer.finish_reason = "stop"
            del answer.ids[self.taken :], answer.logprobs[self.taken :]
        return text

    def push(self, token: int) -> str:
        """Return what can be said after one more token; nothing once the text has stopped."""
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


def texts_of(decoding: Decoding, stop: Sequence[str] = ()) -> Iterator[list[str]]:
    """Yield what each text of a decoding gains round by round; the answers lose what comes after a stop string."""
    writers = [TextWriter(TextStream(decoding.tokenizer), stop) for _ in decoding.answers]
    for answers in decoding.rounds():
        yield [writer.follow(answer) for writer, answer in zip(writers, answers, strict=True)]
    rest = [writer.flush() for writer in writers]
    for writer, answer in zip(writers, decoding.answers, strict=True):
        if writer.stopped:
            answer.finish_reason = "stop"
    yield rest


def write_all(sessions: Sequence[Session], options: Writing) -> list[TextResult]:
    """Let each session write an answer; see `Session.write`."""
    texts, answers = _written(sessions, options, desc="answering")
    for session, answer in zip(sessions, answers, strict=True):
        hear(session, answer)
    return [
        TextResult(
            text,
            tuple(answer.ids),
            answer.finish_reason,
            session.generator.initial_seed(),
            tuple(answer.logprobs) if options.logprobs else None,
        )
        for session, text, answer in zip(sessions, texts, answers, strict=True)
    ]


def plan_all(sessions: Sequence[Session], options: PlanOptions) -> None:
    """Let each session write a plan and read it again as an ordinary text; see `Session.think`."""
    with working(sessions):
        plans, _ = _written(sessions, options, desc="thinking")
        contexts = [session.contexts for session in sessions]
        append_all(contexts, [[Utterance(sessions[0].processor.text(plan), "plan")] for plan in plans])
        for own, plan in zip(contexts, plans, strict=True):
            own.plan = plan


def stream(session: Session, options: Writing) -> Generator[str]:
    """Yield an answer as it is decoded; see `Session.stream`."""
    answer = Answer()
    try:
        with working([session], "answering"):
            catch_up([session])
            decoding = _decoding([session], options)
        (answer,) = decoding.answers
        rounds = texts_of(decoding, options.stop_strings)
        while True:
            with working([session], "answering"):  # but not while the caller works
                pieces = next(rounds, None)
            if pieces is None:
                return
            if pieces[0]:
                yield pieces[0]
    finally:
        if answer.ids or answer.finish_reason:  # else nothing was said, or nothing could be
            hear(session, answer)


def hear(session: Session, answer: Answer) -> None:
    """Let a session remember an answer as something still to be read, by its own ids."""
    session.contexts.unread += (Utterance(session.processor.written(answer.ids), "answer"),)
    session.contexts.answered = True


def _written(
    sessions: Sequence[Session], options: Writing | PlanOptions, *, desc: str
) -> tuple[list[str], list[Answer]]:
    """Return a text and its answer for each session."""
    texts = [""] * len(sessions)
    with working(sessions):
        catch_up(sessions)
        decoding = _decoding(sessions, options)
        with tqdm(desc=desc, unit="token", leave=False, disable=not sessions[0].shows_progress) as bar:
            for pieces in texts_of(decoding, options.stop_strings):
                texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
                bar.update(max(len(answer.ids) for answer in decoding.answers) - bar.n)
    return texts, decoding.answers


def _decoding(sessions: Sequence[Session], options: Writing | PlanOptions) -> Decoding:
    chooser = options.chooser
    drawn = bool(options.stop_strings) and not getattr(chooser, "greedy", False)
    return Decoding(
        sessions[0].model,
        sessions[0].processor.tokenizer,
        [session.contexts.full for session in sessions],
        [session.generator for session in sessions],
        chooser=chooser,
        limit=options.text_limit,
        look_every=1 if drawn else None,  # a text that its reader ends at a stop string must not draw on meanwhile
        logprobs=options.logprobs,
    )


@torch.inference_mode()
def score(contexts: Contexts, segment: Text) -> list[float]:
    """Return the log-probability of each token of a text (n,) but the first, given what was read and the others."""
    model, context = contexts.model, contexts.full.fork()
    packed = contexts.processor.pack([[segment]], starts=[context.position]).to(model.device)
    hidden = model.prefill(packed, [context]).und
    found = []
    for rows, ids in zip(hidden[:-1].split(256), packed.text_ids[1:].split(256), strict=True):  # logits are large
        found += model.logits(rows).log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist()
    return found
