"""Scaled dot-product attention as objects that a model owns: `model.attention = Reference()` changes all of it.

An attention says two things: how queries gather values from keys (calling it), and how the tokens of a batch find each
other (`plan`, once per forward). What it plans is called once per layer and is where both experts meet.

Shapes: B batch, Tq queries, Tk keys, Hq query heads, Hkv key/value heads (Hq a multiple of it), D channels per head.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel.kernels import HOPPER
from bagel.modeling.cache import Claim
from bagel.modeling.sdpa import attended, lower_right_causal
from bagel.packing import Layout

IMAGE_SIZED = 2**20
"""Queries times keys from which cuDNN's kernel is worth the planning that it needs for each new shape."""
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (T, Hq, D), keys (T, Hkv, D) and values (T, Hkv, D)."""


class Seen(NamedTuple):
    """What the und tokens (Tu, Hq, D) and the gen tokens (Tg, Hq, D) gather."""

    und: Tensor
    gen: Tensor


class Attend(Protocol):
    """The attention of one forward: (layer, heads of the und tokens, heads of the gen tokens) -> what they gather.

    None says that nobody asks for what this layer gathers, because only keys and values were wanted of it.
    """

    def __call__(self, layer: int, und: Heads, gen: Heads) -> Seen | None:
        """Return what both experts' tokens gather in a layer."""
        ...


class Attention(ABC):
    """What all attentions share: the plan of a packed batch, sample by sample. Any object with both calls will do."""

    has_step = False
    """Whether one new token per text may be attended to by `bagel.kernels.attend_appended` instead."""
    aligns_right = True
    """Whether `causal` costs nothing where there are more keys than queries; else a mask is made, once per forward."""

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """Attend from every query to the keys it may see.

        Args:
            q: queries (Tq, Hq, D), or (B, Tq, Hq, D).
            k: keys (Tk, Hkv, D), or with B.
            v: values as keys.
            causal: query i sees keys 0 to Tk - Tq + i: the last query sees all (aligned at the lower right).
            mask: instead of `causal`, bool (Tq, Tk), true where the query may look.
            layer: which layer asks; for who watches.

        Returns:
            Of the shape and type of `q`.

        Raises:
            ValueError: both rules at once, or one that this attention does not know.
        """

    def plan(
        self, layout: Layout, claims: Sequence[Claim | None] | None = None, *, only_keys_from: int | None = None
    ) -> Attend:
        """Plan a forward: which rows of the two streams belong together, what they see, where their keys are kept.

        Args:
            layout: of the batch, see `bagel.packing.pack`.
            claims: for each sample the place that its keys and values are written to, and the context that it sees;
                nothing by default, and tokens see one another alone.
            only_keys_from: a layer from which on only keys and values are kept, and nothing is gathered.
        """
        return SampleBySample(self, layout, claims or [None] * len(layout.samples), only_keys_from)


@dataclass(frozen=True)
class SampleBySample:
    """Attention of both experts' tokens, one sample of a packed batch after the other; see `Attention.plan`."""

    attention: Any
    layout: Layout
    claims: Sequence[Claim | None]
    only_keys_from: int | None = None
    rules: dict[int, tuple[bool, Tensor | None]] = field(default_factory=dict)
    """How each sample's tokens see the context and one another, as `causal` and `mask`; found in the first layer."""

    def __call__(self, layer: int, und: Heads, gen: Heads) -> Seen | None:
        """See `Attend`."""
        und_seen, gen_seen = [], []
        for index, (sample, claim) in enumerate(zip(self.layout.samples, self.claims, strict=True)):
            parts = [(heads, own) for heads, own in ((und, sample.und), (gen, sample.gen)) if own.start < own.stop]
            q, k, v = ([heads[i][own] for heads, own in parts or [(und, sample.und)]] for i in range(3))
            keys, values = (_joined(k), _joined(v)) if claim is None else claim.write(layer, k, v)
            if self.only_keys_from is not None and layer >= self.only_keys_from:
                continue
            queries = _joined(q)
            causal, mask = self.rules.get(index) or self._rule(index, queries, keys)
            out = self.attention(queries, keys, values, causal=causal, mask=mask, layer=layer)
            count = sample.und.stop - sample.und.start
            und_seen.append(out[:count])
            gen_seen.append(out[count:])
        return Seen(_joined(und_seen), _joined(gen_seen)) if und_seen else None

    def _rule(self, index: int, queries: Tensor, keys: Tensor) -> tuple[bool, Tensor | None]:
        splits = self.layout.samples[index].splits
        rule: tuple[bool, Tensor | None] = any(split.attention == "causal" for split in splits), None
        aligned = getattr(self.attention, "aligns_right", True) or queries.shape[0] in (1, keys.shape[0])
        if len(splits) > 1 or (rule[0] and not aligned):
            count, context = queries.shape[0], keys.shape[0] - queries.shape[0]  # everything sees the whole context
            own = self.layout.mask(index).to(queries.device)
            rule = False, torch.cat([own.new_ones(count, context), own], dim=1) if context else own
        self.rules[index] = rule
        return rule


@dataclass(frozen=True)
class SDPA(Attention):
    """torch's scaled dot-product attention, on any device; by cuDNN's kernel for images on a GPU.

    On no device are the scores of all queries and keys, gigabytes for large images, held at once: see `attended`.
    """

    has_step = True
    aligns_right = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """See `Attention`."""
        causal, queries, keys = _checked(q, causal, mask), q.shape[-3], k.shape[-3]
        if causal and queries != keys:  # torch's is_causal is aligned at the upper left
            causal, mask = False, lower_right_causal(queries, keys, q.device)
        large = q.is_cuda and mask is None and queries * keys >= IMAGE_SIZED
        single = q.ndim == 3
        q, k, v = ((x.unsqueeze(0) if single else x).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        with sdpa_kernel(KERNELS, set_priority=True) if large else nullcontext():
            out = attended(q, k, v, mask=mask, causal=causal).transpose(1, 2)
        return out.squeeze(0) if single else out


@dataclass(frozen=True)
class Flash3(SDPA):
    """FlashAttention 3 (package fa3-fwd): Hopper GPUs, bfloat16, no gradients; what it lacks is left to `SDPA`."""

    aligns_right = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """See `Attention`."""
        causal = _checked(q, causal, mask)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if mask is not None or learns or q.dtype != torch.bfloat16:
            return super().__call__(q, k, v, causal=causal, mask=mask, layer=layer)
        return _batched(_flash_function("fa3"), q, k, v, causal)


@dataclass(frozen=True)
class Flash(Attention):
    """FlashAttention 2 (package flash-attn): CUDA GPUs, bfloat16 or float16, no masks."""

    has_step = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """See `Attention`."""
        causal = _checked(q, causal, mask)
        if mask is not None:
            raise ValueError('attention="flash" takes no arbitrary mask; use "sdpa" for sequences of several segments')
        if q.dtype == torch.float32:
            raise ValueError('attention="flash" computes in bfloat16 or float16, got float32; use "sdpa"')
        return _batched(_flash_function("flash"), q, k, v, causal)


@dataclass(frozen=True)
class Reference(Attention):
    """The definition in float64 (float32 on Apple's GPUs): for tests, and for who wants to see the weights."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, layer: int = 0
    ) -> Tensor:
        """See `Attention`."""
        weights = self.weights(q, k, causal=causal, mask=mask)
        values = _wide(v).repeat_interleave(q.shape[-2] // v.shape[-2], dim=-2)  # (..., Tk, Hq, D)
        return torch.einsum("...hqk,...khd->...qhd", weights, values).to(q.dtype)

    def weights(self, q: Tensor, k: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return how much each query looks at each key, (..., Hq, Tq, Tk) as wide; rows sum to one."""
        if _checked(q, causal, mask):
            mask = lower_right_causal(q.shape[-3], k.shape[-3], q.device)
        keys = _wide(k).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)  # (..., Tk, Hq, D)
        scores = torch.einsum("...qhd,...khd->...hqk", _wide(q), keys) * q.shape[-1] ** -0.5
        return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


BACKENDS: dict[str, type[Attention]] = {"sdpa": SDPA, "fa3": Flash3, "flash": Flash, "reference": Reference}
"""Attentions by name; "auto" is the fastest here."""


def attention_of(choice: str | Attention, *, device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the attention that a name stands for, "auto" the fastest for a device and a type; or what was given.

    Raises:
        ValueError: an unknown name.
        ImportError: one whose package is not installed.
    """
    if not isinstance(choice, str):
        return choice
    if check_backend(choice) != "auto":
        return BACKENDS[choice]()
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    return Flash3() if hopper and dtype == torch.bfloat16 and _has_fa3() else SDPA()


def check_backend(name: str) -> str:
    """Return `name` if that attention can run here; raise ValueError (unknown) or ImportError (not installed)."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}, or an object, got {name!r}")
    if name in ("fa3", "flash"):
        _flash_function(name)
    return name


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _checked(q: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """Return whether the causal rule leaves anything out: a single query at the end sees everything."""
    if causal and mask is not None:
        raise ValueError("attention takes causal=True or a mask, not both")
    return causal and q.shape[-3] > 1


@functools.cache
def _has_fa3() -> bool:
    try:
        _flash_function("fa3")
    except (ImportError, OSError):  # not there, or built for another torch
        return False
    return True


def _flash_function(name: str) -> Callable[..., Tensor]:
    """Return the function of the package behind "fa3" or "flash"; raise ImportError where it is not installed."""
    module, package, gpu = {
        "fa3": ("fa3_fwd_interface", "fa3-fwd", "Hopper"),
        "flash": ("flash_attn", "flash-attn", "CUDA"),
    }[name]
    try:
        return importlib.import_module(module).flash_attn_func
    except ImportError as error:
        raise ImportError(
            f'attention="{name}" needs the package {package} and a {gpu} GPU: pip install {package}, or use the '
            'default attention="auto"'
        ) from error


def _batched(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if q.ndim == 4:
        return function(q, k, v, causal=causal)
    return function(q[None], k[None], v[None], causal=causal)[0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors (n, ...) one after the other; nothing is copied where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
