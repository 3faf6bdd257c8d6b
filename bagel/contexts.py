"""The contexts a generation is guided by, and the rules by which texts and pictures enter them.

*full* holds everything; *text-dropped* everything before the last text, always a prefix of full and therefore a view
of its cache; *image-dropped* all texts and no pictures, a cache of its own once it differs from full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bagel.modeling import Bagel, Context
from bagel.modeling.cache import Place
from bagel.packing import LatentImage, Text, ViTImage, pack

Role = Literal["text", "system", "plan", "image"]


@dataclass(frozen=True)
class Entry:
    """One segment on its way into the contexts, and what it is: a prompt, a system prompt, a plan, a picture."""

    segment: Text | ViTImage | LatentImage
    role: Role

    def __len__(self) -> int:
        if isinstance(self.segment, Text):
            return self.segment.ids.shape[0]
        rows = self.segment.patches if isinstance(self.segment, ViTImage) else self.segment.latents
        return rows.shape[0] + 2


class GuidanceContexts:
    """The contexts of one generation, or of one conversation.

    Args:
        model: whose cache they are.
        capacity: tokens to make room for at once.
        headroom: tokens of a picture to be drawn from a prefix; see `bagel.modeling.cache`.
        image_dropped: keep the image-dropped context too; it costs a second pass over every text after a picture.
    """

    def __init__(self, model: Bagel, *, capacity: int = 256, headroom: int = 0, image_dropped: bool = False) -> None:
        self.model = model
        self.full = model.new_context(capacity=capacity, headroom=headroom)
        self.text_dropped = self.full.fork()
        self.image_dropped = self.full  # the very same object for as long as nothing tells them apart
        self.keeps_image_dropped = image_dropped

    def targets(self, role: Role) -> list[Context]:
        """Return the contexts that a segment of this role extends, made ready for it."""
        if role == "text":
            self.text_dropped = self.full.fork()
        if not self.keeps_image_dropped:
            return [self.full]
        if role in ("image", "plan"):
            if self.image_dropped is self.full:
                self.image_dropped = self.full.fork()
            return [self.full]
        if self.image_dropped is self.full:
            return [self.full]
        if self.image_dropped.cache is self.full.cache:  # a view so far: from here on it needs a cache of its own
            self.image_dropped = copied(self.model, self.image_dropped)
        return [self.full, self.image_dropped]

    def settle(self, role: Role) -> None:
        """Finish the entry of a segment of this role: after a picture nothing of the text is dropped any more."""
        if role == "image":
            self.text_dropped = self.full.fork()

    def place(self, context: Context) -> Place:
        """Return where a block evaluated on `context` stands: a prefix of full must not overwrite what follows it."""
        prefix = context.cache is self.full.cache and context.length < self.full.length
        return "headroom" if prefix else "tail"


def copied(model: Bagel, context: Context) -> Context:
    """Return a context with the same tokens in a cache of its own."""
    new = model.new_context(capacity=max(context.length, 64))
    kept = slice(context.cache.headroom, context.cache.headroom + context.length)
    new.cache.keys[:, : context.length] = context.cache.keys[:, kept]
    new.cache.values[:, : context.length] = context.cache.values[:, kept]
    new.length, new.position = context.length, context.position
    return new


def prefill_all(
    model: Bagel,
    contexts: Sequence[GuidanceContexts],
    entries: Sequence[Sequence[Entry]],
    *,
    image_tokens: tuple[int, int],
    attention: str = "sdpa",
) -> None:
    """Append to each generation's contexts its entries in order, the k-th of all generations in one pass."""
    for index in range(max((len(own) for own in entries), default=0)):
        samples, targets = [], []
        present = [(c, own[index]) for c, own in zip(contexts, entries, strict=True) if index < len(own)]
        for own_contexts, entry in present:
            for target in own_contexts.targets(entry.role):
                samples.append([entry.segment])
                targets.append(target)
        extend(model, targets, samples, image_tokens=image_tokens, attention=attention)
        for own_contexts, entry in present:
            own_contexts.settle(entry.role)


def extend(
    model: Bagel,
    targets: list[Context],
    samples: list[list[Text | ViTImage | LatentImage]],
    *,
    image_tokens: tuple[int, int],
    attention: str = "sdpa",
) -> None:
    """Append each sample's segments to its context, all in one pass."""
    packed = pack(samples, image_tokens=image_tokens, starts=[context.position for context in targets])
    model.read(packed.to(model.device), targets, attention=attention)
