"""From sources of samples to packed batches: mixed by weight, packed first-fit to a token budget, resumable.

Data come in a fixed number of independent *streams*; batch m of the run is the next one of stream m mod streams,
whichever process or worker makes it. So the same data are seen on one GPU or several, with workers or without, and
after a restart.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from bagel.packing import Segment
from bagel.training.batch import Batch, FlatBatch, collate
from bagel.training.samples import Item, Rules, build


class BrokenRowError(ValueError):
    """A sample that cannot be used; the message names its file, its row and what is wrong."""


class Source(Protocol):
    """Samples by number, without end; the same number always gives the same sample."""

    def sample(self, index: int, rng: random.Random) -> Sequence[Item]:
        """Return sample `index`, counted from 0; choices within it are drawn from `rng`.

        Raises:
            BrokenRowError: it cannot be used.
        """
        ...


@dataclass(frozen=True)
class Generated:
    """Samples made up by a function of a random generator."""

    make: Callable[[random.Random], Sequence[Item]]

    def sample(self, index: int, rng: random.Random) -> Sequence[Item]:
        """Make a sample; see `Source`."""
        return self.make(rng)


@dataclass(frozen=True)
class Data:
    """What to train on, and how it is packed.

    Args:
        sources: by name.
        weights: how often each is drawn, relative to the others; all alike by default.
        rules: see `bagel.training.samples.Rules`.
        image_tokens: ids of `<|vision_start|>` and `<|vision_end|>`.
        token_budget: most tokens of a batch.
        patience: samples that may wait for a batch with room for them before a batch is closed.
        seed: of the order, of choices within samples, dropout and times.
        streams: independent streams; processes times workers must divide it.
    """

    sources: Mapping[str, Source]
    rules: Rules
    image_tokens: tuple[int, int]
    token_budget: int
    weights: Mapping[str, float] = field(default_factory=dict)
    patience: int = 8
    seed: int = 0
    streams: int = 16

    def __post_init__(self) -> None:
        unknown = [name for name in self.weights if name not in self.sources]
        if not self.sources or unknown:
            raise ValueError(
                f"weights must name sources ({', '.join(self.sources) or 'there are none'}), got {unknown}"
            )
        if self.token_budget < 1 or self.streams < 1:
            raise ValueError(f"token_budget and streams must be positive, got {self.token_budget} and {self.streams}")

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed, as JSON values."""
        names = list(self.sources)
        return {
            "seed": self.seed,
            "streams": self.streams,
            "token_budget": self.token_budget,
            "patience": self.patience,
            "weights": {name: self.weights.get(name, 1.0) for name in names},
        }


Ticket = tuple[int, str, int]
"""A draw's number, its source, and the number of the sample there: enough to make the sample again."""


class Stream:
    """One stream of batches.

    Args:
        data: see `Data`.
        index: which stream it is.
    """

    def __init__(self, data: Data, index: int) -> None:
        self.data, self.index = data, index
        self.drawn = 0
        self.used: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.waiting: list[tuple[Ticket, list[Segment]]] = []
        self.names = list(data.sources)
        self.weights = [data.weights.get(name, 1.0) for name in self.names]

    def next_batch(self) -> Batch:
        """Pack the next batch: each sample goes in if it fits, in order, those that waited first.

        Raises:
            BrokenRowError: a thousand samples in a row could not be used.
        """
        room = self.data.token_budget
        chosen: list[list[Segment]] = []
        waiting, self.waiting = self.waiting, []
        for entry in waiting:
            room = self._place(entry, chosen, room)
        while room > 0 and len(self.waiting) < self.data.patience:
            room = self._place(self._draw(), chosen, room)
        return collate(chosen, image_tokens=self.data.image_tokens)

    def _place(self, entry: tuple[Ticket, list[Segment]], chosen: list[list[Segment]], room: int) -> int:
        tokens = sum(segment.length for segment in entry[1])
        if tokens > room:
            self.waiting.append(entry)
            return room
        chosen.append(entry[1])
        return room - tokens

    def _draw(self) -> tuple[Ticket, list[Segment]]:
        for _ in range(1000):
            rng = self._rng(self.drawn, "source")
            name = rng.choices(self.names, self.weights)[0]
            ticket = self.drawn, name, self.used[name] * self.data.streams + self.index
            self.drawn += 1
            self.used[name] += 1
            try:
                return ticket, self._sample(ticket)
            except BrokenRowError as error:
                self.broken[name] += 1
                self.examples.setdefault(name, str(error))
        raise BrokenRowError(
            f"a thousand samples in a row cannot be used, the first: {next(iter(self.examples.values()))}"
        )

    def _sample(self, ticket: Ticket) -> list[Segment]:
        number, name, index = ticket
        rng = self._rng(number, "sample")
        segments = build(self.data.sources[name].sample(index, rng), self.data.rules, rng)
        tokens = sum(segment.length for segment in segments)
        if tokens > self.data.token_budget or tokens == 0:
            raise BrokenRowError(
                f"{name} sample {index} has {tokens} tokens; a batch takes 1 to {self.data.token_budget} (token_budget)"
            )
        return segments

    def _rng(self, number: int, purpose: str) -> random.Random:
        return random.Random(f"{self.data.seed}/{self.index}/{number}/{purpose}")

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON values."""
        return {
            "drawn": self.drawn,
            "used": dict(self.used),
            "waiting": [list(ticket) for ticket, _ in self.waiting],
            "broken": dict(self.broken),
            "examples": self.examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.drawn, self.used = state["drawn"], Counter(state["used"])
        self.broken, self.examples = Counter(state["broken"]), dict(state["examples"])
        tickets: list[Ticket] = [(number, name, index) for number, name, index in state["waiting"]]
        self.waiting = [(ticket, self._sample(ticket)) for ticket in tickets]


@dataclass(frozen=True)
class Delivery:
    """A batch, the sum of its labels' weights, the stream it came from, and where that stream stands after it."""

    batch: FlatBatch
    labels: float
    stream: int
    state: dict[str, Any]

    def pin_memory(self) -> Delivery:
        """Return a copy in page-locked memory."""
        return replace(self, batch=self.batch.pin_memory())


class _Deliveries(IterableDataset):
    """The batches of one process, from batch `first` of its own count on; in a worker, those that it has to make."""

    def __init__(self, data: Data, states: Mapping[int, Mapping[str, Any]], first: int, own: Sequence[int]) -> None:
        self.data, self.states, self.first, self.own = data, states, first, own

    def __iter__(self) -> Iterator[Delivery]:
        worker = torch.utils.data.get_worker_info()
        number, step = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        streams: dict[int, Stream] = {}
        while True:
            index = self.own[number % len(self.own)]
            if index not in streams:
                streams[index] = Stream(self.data, index)
                if index in self.states:
                    streams[index].load_state_dict(self.states[index])
            batch = streams[index].next_batch()
            labels = float(batch.packed.label_weights.sum())
            yield Delivery(batch.flat(), labels, index, streams[index].state_dict())
            number += step


def deliveries(
    data: Data,
    *,
    states: Mapping[int, Mapping[str, Any]],
    done: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Delivery]:
    """Return the batches of one process without end, in an order that does not depend on workers.

    Args:
        data: see `Data`.
        states: where streams stand, by index; those that are missing stand at their beginning.
        done: batches that this process has had before.
        rank: number of this process.
        world_size: number of processes.
        workers: processes that make batches ahead; 0 makes each when it is asked for.
        pin: deliver in page-locked memory.

    Raises:
        ValueError: processes times workers do not divide the streams.
    """
    shares = world_size * max(workers, 1)
    if data.streams % shares:
        raise ValueError(
            f"{world_size} processes with {max(workers, 1)} workers need a number of streams that is a multiple of "
            f"{shares}, got {data.streams}; set streams or workers"
        )
    if workers:
        # Handing over file descriptors, one a tensor, waits for the busy worker each time.
        torch.multiprocessing.set_sharing_strategy("file_system")
    own = range(rank, data.streams, world_size)
    dataset = _Deliveries(data, states, done, own)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
    )
    return iter(loader)
