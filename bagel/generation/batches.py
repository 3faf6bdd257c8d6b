"""What several sessions read, write and draw together, each in one pass for all; a single one is a batch of one."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bagel.generation.contexts import Utterance, append_all
from bagel.generation.drawing import decoded, start_noise, velocity_of
from bagel.generation.reading import check_inputs
from bagel.generation.writing import Answer, Decoding, texts_of
from bagel.memory import explain_out_of_memory
from bagel.options import DrawOptions, PlanOptions, Writing
from bagel.parameters import options_of
from bagel.results import ImageResult, TextResult
from bagel.sampling import Euler, integrate
from bagel.signatures import Input

if TYPE_CHECKING:
    from bagel.generation.session import Session

LESS = "use fewer at a time, smaller images, fewer images among the inputs, a shorter text, or dtype=torch.bfloat16"


@contextmanager
def working(sessions: Sequence[Session], doing: str = "") -> Iterator[None]:
    """Work without gradients on the sessions' device; whatever is raised meanwhile, the sessions stay as they were."""
    doing = doing or f"working on {len(sessions)} request(s)"
    before = [(session.contexts.fork(), session.generator.get_state()) for session in sessions]
    device = sessions[0].model.device  # a GPU is made the current one, as its kernels and graphs need
    gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with explain_out_of_memory(doing, way_out=LESS), gpu, torch.inference_mode():
            yield
    except BaseException:
        for session, (contexts, generator) in zip(sessions, before, strict=True):
            session.contexts = contexts
            session.generator.set_state(generator)
        raise


# Reading --------------------------------------------------------------------------------------------------------------


def read_all(
    sessions: Sequence[Session],
    pieces: Sequence[Sequence[Input]],
    *,
    posterior_noise: Sequence[Sequence[Tensor] | None] | None = None,
) -> None:
    """Let each session read its pieces; arguments and errors as for `Session.read`, one for each."""
    for own in pieces:
        check_inputs(own)
    with working(sessions):
        catch_up(sessions)
        new = []
        for session, own, noise in zip(sessions, pieces, posterior_noise or [None] * len(sessions), strict=True):
            session.contexts.begin_turn()
            new.append(session.reader.utterances(own, session.generator, noise))
        append_all([session.contexts for session in sessions], new)


def catch_up(sessions: Sequence[Session]) -> None:
    """Let each session read what it has still to read: its system prompt, what it wrote or drew last."""
    for session in sessions:
        if session.open_stream is not None:
            session.end_stream()
    late = [session for session in sessions if session.contexts.unread or session.contexts.drawn]
    if late:
        append_all([session.contexts for session in late], [session.take_unread() for session in late])


# Writing --------------------------------------------------------------------------------------------------------------


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


# Drawing --------------------------------------------------------------------------------------------------------------


def check_shared(sessions: Sequence[Session], options: Sequence[DrawOptions]) -> None:
    """Check that sessions can share their evaluations.

    Raises:
        ValueError: a session that is named twice, sessions of several models, options that differ.
    """
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("a session can draw one image at a time: fork it to draw several")
    if any(session.model is not sessions[0].model for session in sessions):
        raise ValueError("sessions that draw together must be of one model")
    for one in options_of(type(options[0])):
        values = [getattr(own, one.name) for own in options]
        if one.per_item is None and any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(f"sessions that draw together share {one.name}, got {values[0]!r} and others")


def draw_all(sessions: Sequence[Session], options: Sequence[DrawOptions]) -> list[ImageResult]:
    """Let each session draw an image; see `Session.draw`.

    Raises:
        ValueError: options that differ, but for those that each session may have of its own.
    """
    if len(sessions) > 1:
        check_shared(sessions, options)
    shared, model, processor = options[0], sessions[0].model, sessions[0].processor
    vae = sessions[0].reader.drawing_vae()
    with working(sessions):
        catch_up(sessions)
        if shared.think:
            plan_all(sessions, shared)
        else:
            model.graphs.decode_step = None  # drawing may need the memory
        sizes = [session.size_of(own) for session, own in zip(sessions, options, strict=True)]
        noise = [start_noise(*each) for each in zip(sessions, sizes, [own.noise for own in options], strict=True)]
        velocity = velocity_of(sessions, options, sizes)
        x = integrate(
            Euler() if shared.solver is None else shared.solver,
            velocity,
            torch.cat(noise),
            shared.timesteps,
            sizes=velocity.sizes,
            on_step=shared.on_step,
            watch=functools.partial(tqdm, desc="drawing", unit="step", disable=not sessions[0].shows_progress),
        )
        latents = [processor.image(z, *size) for z, size in zip(x.split(velocity.sizes), sizes, strict=True)]
        drawn = [(z, decoded(vae, z)) for z in latents]
    for session, image in zip(sessions, drawn, strict=True):
        session.contexts.drawn, session.contexts.answered = image, True
    with torch.inference_mode(False):  # so that the latents may take part in a gradient computation
        results = [
            ImageResult(image, session.contexts.plan, z.cpu().clone(), session.generator.initial_seed())
            for session, (z, image) in zip(sessions, drawn, strict=True)
        ]
    for session in sessions:
        session.contexts.plan = None  # it was that of this image
    return results
