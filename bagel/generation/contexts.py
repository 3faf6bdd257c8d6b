"""The contexts a generation is guided by, and the rules by which texts and images enter them.

*full* holds everything; *text-dropped* everything before the last text of the user, a prefix of full; *image-dropped*
all texts and no images. A prefix is a view of full's cache; what differs is read into a copy, when it is first asked
for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bagel.modeling import Bagel, Context
from bagel.packing import LatentImage, Packed, Text, ViTImage

Segment = Text | ViTImage | LatentImage
Role = Literal["system", "text", "image", "plan", "answer"]
"""What a segment is in a conversation: `text` is the user's; images, whoever made them, are alike."""
Pack = Callable[..., Packed]


@dataclass(frozen=True)
class Utterance:
    """A segment of a conversation and whose it is; in full it comes after `length` tokens, at `position`.

    `size` is that of an image that was encoded, (height, width) in pixels.
    """

    segment: Segment
    role: Role
    size: tuple[int, int] | None = None
    length: int = 0
    position: int = 0


@dataclass
class Contexts:
    """The contexts of one conversation.

    Args:
        full: everything.
        text_dropped: everything before the last text of the user; or everything, if an image came after that text.
        image_dropped: the texts without the images, but for those that are `behind`; None while nothing tells them from
            full.
        behind: texts that image_dropped has still to read, in order; among them the plan of this turn, which it gets
            when the turn is over.
        turn: what has come since the model last answered or drew.
        has_images: whether an image is among them.
        eager: texts enter image_dropped in the pass in which full reads them, instead of when it is asked for.
    """

    full: Context
    text_dropped: Context
    image_dropped: Context | None = None
    behind: list[Utterance] = field(default_factory=list)
    turn: list[Utterance] = field(default_factory=list)
    has_images: bool = False
    eager: bool = True

    @classmethod
    def empty(cls, model: Bagel, *, eager: bool = True) -> Contexts:
        """Return contexts that hold nothing yet."""
        full = model.new_context()
        return cls(full, full.fork(), eager=eager)

    def fork(self) -> Contexts:
        """Return contexts of the same tokens that go their own way from here."""
        dropped = self.image_dropped and self.image_dropped.fork()
        return replace(
            self,
            full=self.full.fork(),
            text_dropped=self.text_dropped.fork(),
            image_dropped=dropped,
            behind=[*self.behind],
            turn=[*self.turn],
        )

    def begin_turn(self) -> None:
        """Begin a turn: the plan of the last one is from now on a text like any other."""
        self.behind = [replace(entry, role="answer") for entry in self.behind]
        self.turn = []

    def add(self, entry: Utterance) -> list[Context]:
        """Note an utterance, and return the contexts that are to read it."""
        full, role = self.full, entry.role
        self.turn.append(replace(entry, length=full.length, position=full.position))
        if role == "text":
            self.text_dropped = full.fork()
        if self.image_dropped is None:
            self.image_dropped = full.fork() if role in ("image", "plan") else None
        if self.image_dropped is None or role == "image":
            return [full]
        if role != "plan" and self.eager and not self.behind:
            return [full, self.image_dropped]
        self.behind.append(entry)
        return [full]

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


def extend(model: Bagel, pack: Pack, contexts: Sequence[Context], segments: Sequence[Segment]) -> None:
    """Append a segment to each of several contexts, all in one pass."""
    packed = pack([[segment] for segment in segments], starts=[context.position for context in contexts])
    model.prefill(packed.to(model.device), contexts, only_keys=True)


def append_all(model: Bagel, pack: Pack, reading: Sequence[tuple[Contexts, Sequence[Utterance]]]) -> None:
    """Append to each conversation's contexts its utterances in order, the k-th of all conversations in one pass."""
    for index in range(max((len(entries) for _, entries in reading), default=0)):
        present = [(contexts, entries[index]) for contexts, entries in reading if index < len(entries)]
        targets = [(target, entry.segment) for contexts, entry in present for target in contexts.add(entry)]
        extend(model, pack, [target for target, _ in targets], [segment for _, segment in targets])
        for contexts, entry in present:
            if entry.role == "image":  # nothing of a text before it is dropped any more
                contexts.has_images, contexts.text_dropped = True, contexts.full.fork()


def read_ahead(model: Bagel, pack: Pack, reading: Sequence[tuple[Context, Sequence[Segment]]]) -> list[Context]:
    """Return contexts that have read segments in order; those given, which need not read any, stay as they are."""
    ahead = [context.fork() if segments else context for context, segments in reading]
    for index in range(max((len(segments) for _, segments in reading), default=0)):
        present = [
            (own, segments[index]) for own, (_, segments) in zip(ahead, reading, strict=True) if segments[index:]
        ]
        extend(model, pack, [context for context, _ in present], [segment for _, segment in present])
    return ahead


def read_behind(model: Bagel, pack: Pack, conversations: Sequence[Contexts]) -> None:
    """Let the image-dropped contexts of several conversations read what they have still to read, up to a plan."""
    late = []
    for own in conversations:
        due = list(itertools.takewhile(lambda entry: entry.role != "plan", own.behind))
        late += [(own, due)] if due else []
    ahead = read_ahead(model, pack, [(own.image_dropped or own.full, [e.segment for e in due]) for own, due in late])
    for (own, due), context in zip(late, ahead, strict=True):
        own.image_dropped, own.behind = context, own.behind[len(due) :]
