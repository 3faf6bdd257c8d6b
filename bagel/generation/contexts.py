"""The contexts a generation is guided by, and the rules by which texts and images enter them.

*full* holds everything; *text-dropped* everything before the last text of the user, a prefix of full; *image-dropped*
all texts and no images. A prefix is a view of full's cache; what differs is read into a copy, when it is first asked
for.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor

from bagel.memory import explain_out_of_memory
from bagel.modeling import Bagel, Branch, Context
from bagel.options import VelocityOptions
from bagel.packing import LatentImage, Text, ViTImage
from bagel.processor import Processor
from bagel.sampling import branch_names

if TYPE_CHECKING:
    from bagel.generation.session import Session

Segment = Text | ViTImage | LatentImage
Role = Literal["system", "text", "image", "plan", "answer"]
"""What a segment is in a conversation: `text` is the user's; images, whoever made them, are alike."""
Size = tuple[int, int]
"""Height and width in pixels."""


LESS = "use fewer at a time, smaller images, fewer images among the inputs, a shorter text, or dtype=torch.bfloat16"


@dataclass(frozen=True)
class Utterance:
    """A segment of a conversation and whose it is; in full it comes after `length` tokens, at `position`.

    `size` is that of an image that was encoded.
    """

    segment: Segment
    role: Role
    size: Size | None = None
    length: int = 0
    position: int = 0


class Contexts:
    """The contexts of one conversation, empty at first, and where the conversation stands.

    Attributes:
        full: everything that was read.
        text_dropped: everything before the last text of the user; or everything, if an image came after that text.
        image_dropped: the texts without the images, but for those that are `behind`; None while nothing tells them from
            full.
        behind: texts that image_dropped has still to read, in order; among them the plan of this turn, which it gets
            when the turn is over.
        turn: what has come since the model last answered or drew.
        has_images: whether an image is among what was read.
        size: of the last image that was read or drawn.
        unread: what is to be read before anything else: the system prompt, or what was written last.
        drawn: the last image, if it is still to be read: latents (Z, h, w) and the image.
        plan: the text of this turn's plan.
        answered: the model spoke last, so that a turn begins with what is read next.

    Args:
        model: who reads.
        processor: its rules.
        eager: texts enter image_dropped in the pass in which full reads them, instead of when it is asked for.
    """

    def __init__(self, model: Bagel, processor: Processor, *, eager: bool = True) -> None:
        self.model, self.processor, self.eager = model, processor, eager
        self.full = model.new_context()
        self.text_dropped = self.full.fork()
        self.image_dropped: Context | None = None
        self.behind: tuple[Utterance, ...] = ()
        self.turn: tuple[Utterance, ...] = ()
        self.has_images = False
        self.size: Size | None = None
        self.unread: tuple[Utterance, ...] = ()
        self.drawn: tuple[Tensor, Image.Image] | None = None
        self.plan: str | None = None
        self.answered = False

    def fork(self) -> Contexts:
        """Return contexts of the same tokens that go their own way from here."""
        other = copy.copy(self)
        other.full, other.text_dropped = self.full.fork(), self.text_dropped.fork()
        other.image_dropped = self.image_dropped and self.image_dropped.fork()
        return other

    def begin_turn(self) -> None:
        """Begin a turn if the model spoke last: the plan of the last one is from now on a text like any other."""
        if self.answered:
            self.behind = tuple(replace(entry, role="answer") for entry in self.behind)
            self.turn, self.plan, self.answered = (), None, False

    def add(self, entry: Utterance) -> list[Context]:
        """Note an utterance, and return the contexts that are to read it."""
        full, role = self.full, entry.role
        self.turn += (replace(entry, length=full.length, position=full.position),)
        if role == "text":
            self.text_dropped = full.fork()
        if self.image_dropped is None:
            self.image_dropped = full.fork() if role in ("image", "plan") else None
        if self.image_dropped is None or role == "image":
            return [full]
        if role != "plan" and self.eager and not self.behind:
            return [full, self.image_dropped]
        self.behind += (entry,)
        return [full]

    def extend(self, reading: Sequence[tuple[Context, Segment]]) -> None:
        """Append a segment to each of several contexts of this model, all in one pass."""
        contexts = [context for context, _ in reading]
        packed = self.processor.pack([[segment] for _, segment in reading], starts=[own.position for own in contexts])
        self.model.prefill(packed.to(self.model.device), contexts, only_keys=True)

    def read_ahead(self, reading: Sequence[tuple[Context, Sequence[Segment]]]) -> list[Context]:
        """Return contexts that have read segments in order; those given, which need not read any, stay as they are."""
        ahead = [context.fork() if segments else context for context, segments in reading]
        for entries in itertools.zip_longest(*(segments for _, segments in reading)):
            self.extend([(own, entry) for own, entry in zip(ahead, entries, strict=True) if entry is not None])
        return ahead

    def without_text(self, drop: str, negative: Text | None) -> tuple[Context, list[Segment]]:
        """Return the context of the text-dropped branch, and what it has still to read.

        Args:
            drop: "text" drops the last text of the user and what followed it, unless an image did; "turn" every text of
                this turn.
            negative: stands where the dropped text began, before the images of the turn that came after it.
        """
        texts = [index for index, entry in enumerate(self.turn) if entry.role == "text"]
        if not texts or (drop == "text" and negative is None):
            return self.text_dropped, [] if negative is None else [negative]
        first = texts[0] if drop == "turn" else texts[-1]
        images = [entry.segment for entry in self.turn[first:] if entry.role == "image"]
        start = self.turn[first]
        before = Context(self.full.cache, length=start.length, position=start.position)
        return before, images if negative is None else [negative, *images]

    def without_images(self, *, with_plan: bool) -> tuple[Context, list[Segment]]:
        """Return the context of the image-dropped branch, and what it has still to read, once it has caught up.

        Args:
            with_plan: read the plan of this turn too, as the benchmarks do; officially the app leaves it out.
        """
        if self.image_dropped is None or (with_plan and not self.has_images):
            return self.full, []
        return self.image_dropped, [e.segment for e in self.behind if with_plan or e.role != "plan"]


def append_all(conversations: Sequence[Contexts], utterances: Sequence[Sequence[Utterance]]) -> None:
    """Append to each conversation's contexts its utterances in order, the k-th of all conversations in one pass."""
    for own, entries in zip(conversations, utterances, strict=True):  # at once, instead of growing with each
        own.full.reserve(sum(entry.segment.length for entry in entries))
    for entries in itertools.zip_longest(*utterances):
        present = [(own, entry) for own, entry in zip(conversations, entries, strict=True) if entry is not None]
        conversations[0].extend([(context, entry.segment) for own, entry in present for context in own.add(entry)])
        for own, entry in present:
            own.size = entry.size or own.size
            if entry.role == "image":  # nothing of a text before it is dropped any more
                own.has_images, own.text_dropped = True, own.full.fork()


def catch_up_without_images(conversations: Sequence[Contexts]) -> None:
    """Let the image-dropped contexts of several conversations read what they have still to read, up to a plan."""
    due = [list(itertools.takewhile(lambda entry: entry.role != "plan", own.behind)) for own in conversations]
    segments = [[entry.segment for entry in entries] for entries in due]
    contexts = [own.image_dropped or own.full for own in conversations]
    ahead = conversations[0].read_ahead(list(zip(contexts, segments, strict=True)))
    for own, entries, context in zip(conversations, due, ahead, strict=True):
        if entries:
            own.image_dropped, own.behind = context, own.behind[len(entries) :]


def branches_of(
    conversations: Sequence[Contexts], options: VelocityOptions, negatives: Sequence[Text | None]
) -> tuple[list[Branch], list[dict[str, int]]]:
    """Return all branches that guidance may ask for, and for each image which it is by name.

    Names whose contexts hold the same tokens share a branch.

    Args:
        conversations: what each image is drawn from.
        options: the guidance and what it drops.
        negatives: a text for each image that stands in the place of the dropped one, or None.
    """
    wanted, together = branch_names(options.guide), conversations[0]
    found = {"full": [own.full for own in conversations]}
    if "text_dropped" in wanted:
        dropped = [own.without_text(options.drop, text) for own, text in zip(conversations, negatives, strict=True)]
        found["text_dropped"] = together.read_ahead(dropped)
    if "image_dropped" in wanted:
        catch_up_without_images(conversations)
        dropped = [own.without_images(with_plan=options.plan_in_image_dropped) for own in conversations]
        found["image_dropped"] = together.read_ahead(dropped)
    branches: list[Branch] = []
    names: list[dict[str, int]] = [{} for _ in conversations]
    for image, known in enumerate(names):
        for name, contexts in found.items():
            alike = [index for index in known.values() if branches[index].context.same_as(contexts[image])]
            if not alike:
                branches.append(Branch(image, contexts[image]))
            known[name] = alike[0] if alike else len(branches) - 1
    return branches, names


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
