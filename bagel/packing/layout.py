"""Where tokens stand and which of them see which: the one rule of visibility, for every kind of attention."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import KeyEntry, SequenceKey, register_pytree_node

Rule = Literal["causal", "full", "noise"]
"""Rule of a split: a token sees its split up to itself; or all of it; or all of it, and no later split sees it."""
RULES: tuple[Rule, ...] = ("causal", "full", "noise")
TEXT, VIT, LATENT = range(3)
"""Kinds of runs: ids, patches and latents. The last two stand between two tokens of their own."""

Run = tuple[int, int, int, int, int]
"""Kind, tokens without the two around an image, sample, split within the sample, index into RULES."""


class Tokens(NamedTuple):
    """What decides which tokens see one another: tensors with an entry per token, or of shapes that broadcast.

    `sample` and `split` (int32) number the sample, and the split within it; `causal` and `noise` (bool) are the rule of
    the split; `index` (int32) is the place in the sequence, `rows` (long) the row in [und stream | gen stream].
    """

    sample: Tensor
    split: Tensor
    causal: Tensor
    noise: Tensor
    index: Tensor
    rows: Tensor

    def at(self, index: Any) -> Tokens:
        """Return the tokens that an index picks or arranges, as `x[index]` does."""
        return Tokens(*(values[index] for values in self))

    def by_row(self) -> Tokens:
        """Return tokens given in sequence order in the order of their rows."""
        return self.at(self.rows.argsort())


def sees(query: Tokens, key: Tokens) -> Tensor:
    """Return whether each query sees each key, bool of the shape that both broadcast to.

    A token sees those of its own sample that stand in an earlier split, unless that is noise, and those of its own
    split, up to itself where that is causal.
    """
    earlier = (query.split > key.split) & ~key.noise
    within = (query.split == key.split) & (~query.causal | (query.index >= key.index))
    return (query.sample == key.sample) & (earlier | within)


def mask_of(tokens: Tokens) -> Tensor:
    """Return who sees whom among the tokens of the last axis (..., n), bool (..., n, n): queries, then keys."""
    return sees(tokens.at((..., None)), tokens.at((..., None, slice(None))))


@dataclass(frozen=True)
class Split:
    """Tokens of a sample that share an attention rule, counted in sequence order."""

    length: int
    attention: Rule


@dataclass(frozen=True)
class SampleRows:
    """Where the tokens of one sample are: a slice of each stream; its splits and runs in sequence order."""

    und: slice
    gen: slice
    splits: tuple[Split, ...]
    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return self.und.stop - self.und.start + self.gen.stop - self.gen.start

    @property
    def tokens(self) -> Tokens:
        """The tokens of the sample in sequence order, with their rows in [und slice | gen slice]."""
        return tokens_of(self.runs)

    @property
    def order(self) -> Tensor:
        """Row in [und slice | gen slice] of each token in sequence order, (n,)."""
        return self.tokens.rows

    def mask(self) -> Tensor:
        """Return who sees whom, bool (n, n) in sequence order; see `sees`."""
        return mask_of(self.tokens)

    def stream_mask(self) -> Tensor:
        """Return the same mask for tokens laid out as [und slice | gen slice]."""
        return mask_of(self.tokens.by_row())


@dataclass(frozen=True)
class Layout:
    """Where the tokens of several samples are, as host integers, and for masks as tensors.

    Args:
        runs: of all samples, in sequence order.
        next_positions: the rotary position that follows each sample.
        computed: what `tokens` gives once it was asked for: the only part that lives on a device.

    Attributes:
        samples: where each sample is.
        lengths: tokens of each sample.
    """

    runs: tuple[Run, ...]
    next_positions: tuple[int, ...]
    computed: Tokens | None = None
    samples: tuple[SampleRows, ...] = field(init=False, repr=False, compare=False)
    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    @classmethod
    @functools.cache
    def of_tokens(cls, count: int) -> Layout:
        """Return the layout of one new text token for each of `count` samples."""
        return cls(tuple((TEXT, 1, sample, 0, 0) for sample in range(count)), (1,) * count)

    def __post_init__(self) -> None:
        samples, lengths, und, gen, start = [], [], 0, 0, 0
        for sample in range(len(self.next_positions)):
            first, stop, splits = (und, gen), start, []
            while stop < len(self.runs) and self.runs[stop][2] == sample:
                kind, tokens, _, split, rule = self.runs[stop]
                und += 2 if kind == LATENT else tokens + 2 * (kind == VIT)
                gen += tokens if kind == LATENT else 0
                length = tokens if kind == TEXT else tokens + 2
                if split < len(splits):  # another frame
                    length += splits.pop().length
                splits.append(Split(length, RULES[rule]))
                stop += 1
            rows = SampleRows(slice(first[0], und), slice(first[1], gen), tuple(splits), self.runs[start:stop])
            samples.append(rows)
            lengths.append(sum(split.length for split in splits))
            start = stop
        object.__setattr__(self, "samples", tuple(samples))
        object.__setattr__(self, "lengths", tuple(lengths))

    @property
    def tokens(self) -> Tokens:
        """All tokens in sequence order, samples one after the other; computed when it is first asked for."""
        if self.computed is None:
            object.__setattr__(self, "computed", tokens_of(self.runs))
        assert self.computed is not None
        return self.computed

    def mask(self, sample: int) -> Tensor:
        """Return who sees whom in a sample, bool (n, n) over [und rows | gen rows]."""
        return self.samples[sample].stream_mask()

    def to(self, device: torch.device | str) -> Layout:
        """Return a copy whose tokens, if they were computed, are on `device`; a GPU is not waited for."""
        if self.computed is None:
            return self
        return replace(self, computed=Tokens(*(moved(values, device) for values in self.computed)))


def tokens_of(runs: tuple[Run, ...]) -> Tokens:
    """Return the tokens of runs, one after the other."""
    kind, count, sample, split, attention = np.array(runs, dtype=np.int32).reshape(-1, 5).T
    length = np.where(kind == TEXT, count, count + 2)
    total, latent = int(length.sum()), kind == LATENT
    und = np.repeat(~latent, length)
    ends = length.cumsum()[latent]
    und[ends - 1] = und[ends - length[latent]] = True  # the tokens around latents
    before = und.cumsum()
    rows = np.where(und, before - 1, before[-1:] + np.arange(total) - before)
    return Tokens(
        sample=torch.from_numpy(np.repeat(sample, length)),
        split=torch.from_numpy(np.repeat(split, length)),
        causal=torch.from_numpy(np.repeat(attention == RULES.index("causal"), length)),
        noise=torch.from_numpy(np.repeat(attention == RULES.index("noise"), length)),
        index=torch.arange(total, dtype=torch.int32),
        rows=torch.from_numpy(rows),
    )


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; a GPU is not waited for."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # copies from page-locked memory wait for nothing


# For torch.export, host integers are the structure of a layout and not values.


def _flatten(layout: Layout) -> tuple[list[Tensor], tuple[Any, ...]]:
    return list(layout.computed or ()), (layout.runs, layout.next_positions)


def _flatten_with_keys(layout: Layout) -> tuple[list[tuple[KeyEntry, Tensor]], tuple[Any, ...]]:
    tensors, integers = _flatten(layout)
    keys: list[Any] = [SequenceKey(index) for index in range(len(tensors))]
    return list(zip(keys, tensors, strict=True)), integers


def _unflatten(tensors: Iterable[Tensor], integers: tuple[Any, ...]) -> Layout:
    (runs, next_positions), values = integers, list(tensors)
    return Layout(runs, next_positions, Tokens(*values) if values else None)


def _from_json(integers: list[Any]) -> tuple[Any, ...]:
    runs, next_positions = integers
    return tuple(map(tuple, runs)), tuple(next_positions)


register_pytree_node(
    Layout,
    _flatten,
    _unflatten,
    serialized_type_name="bagel.packing.Layout",
    to_dumpable_context=list,
    from_dumpable_context=_from_json,
    flatten_with_keys_fn=_flatten_with_keys,
)
