"""The signatures of the pipeline's methods, made of the declared options: for type checkers, editors and `help()`.

The dataclasses here are only read, never made: a checker takes the parameters of their constructors for those of a
method. A class whose name ends in Many is that of a batch.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from inspect import Parameter
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor

from bagel.options import DEFAULTS, TASKS, EditOptions, ImageOptions, TextOptions
from bagel.parameters import options_of

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R", covariant=True)
S = TypeVar("S", covariant=True)

Input = str | Image.Image
"""One piece of what is read: a text, or an image."""
Images = Image.Image | Sequence[Image.Image]
Texts = list[str] | tuple[str, ...]
"""Several texts: no sequence, of which a text itself is one."""


class Method(Protocol[P, R]):
    """A method with the parameters of one constructor."""

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """Do what the method does."""
        ...


class TwoWays(Protocol[P, R, Q, S]):
    """A method with the parameters of one constructor or of another, and a result for each."""

    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> R: ...
    @overload
    def __call__(self, *args: Q.args, **options: Q.kwargs) -> S: ...


@overload
def takes(tasks: str, one: Callable[P, object], gives: type[R], /) -> Callable[[Callable[..., Any]], Method[P, R]]: ...
@overload
def takes(
    tasks: str, one: Callable[P, object], gives: type[R], other: Callable[Q, object], gives_other: type[S], /
) -> Callable[[Callable[..., Any]], TwoWays[P, R, Q, S]]: ...
def takes(tasks: str, /, *_: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator for a method with `**options`: its signature and docstring then spell out every option.

    Args:
        tasks: keys of `bagel.options.TASKS`, with a space between them, whose options are shown; defaults are those of
            the first that has the option.
        one, gives: for type checkers: a constructor with the method's parameters, and its result.
        other, gives_other: the same for a second way to call it.
    """
    defaults: dict[str, Any] = {}
    shown = {}
    for task in tasks.split():
        own = {one.name: one for one in options_of(TASKS[task][0])}
        defaults = {name: one.default for name, one in own.items()} | dict(DEFAULTS.get(task, {})) | defaults
        shown |= own
    listed = [(one, defaults[name]) for name, one in shown.items()]

    def decorate(function: Callable[..., Any]) -> Any:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        further = [Parameter(o.name, Parameter.KEYWORD_ONLY, default=value, annotation=o.kind) for o, value in listed]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *further])
        lines = [f"    {one.name} = {value!r}: {one.explained}." for one, value in listed]
        wrapped = [textwrap.fill(line, 112, subsequent_indent=8 * " ") for line in lines]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *wrapped])
        return function

    return decorate


@dataclass(frozen=True, kw_only=True)
class ToImage(ImageOptions):
    """What every method takes that draws one image."""

    preset: str | None = None


@dataclass(frozen=True, kw_only=True)
class ToEdit(ToImage, EditOptions):
    """What every method takes that draws one image and reads images."""


@dataclass(frozen=True, kw_only=True)
class ToText(TextOptions):
    """What every method takes that writes one text."""

    preset: str | None = None


@dataclass(frozen=True, kw_only=True)
class Each:
    """What each request of a batch needs for itself."""

    seed: Sequence[int] | None = None
    generator: Sequence[torch.Generator] | None = None


@dataclass(frozen=True, kw_only=True)
class ToImages(Each, ToImage):
    """What every method takes that draws a batch."""

    height: int | Sequence[int] | None = None
    width: int | Sequence[int] | None = None
    negative_prompt: str | Sequence[str] | None = None
    noise: Sequence[Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class ToEdits(ToImages, ToEdit):
    """What every method takes that draws a batch and reads images."""

    posterior_noise: Sequence[Sequence[Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class ToTexts(Each, ToText):
    """What every method takes that writes a batch."""


@dataclass(frozen=True)
class Draw(ToImage):
    """`text_to_image` of one text."""

    prompt: str


@dataclass(frozen=True)
class DrawMany(ToImages):
    """`text_to_image` of several texts."""

    prompt: Texts


@dataclass(frozen=True)
class Edit(ToEdit):
    """`edit` by one instruction."""

    images: Images
    instruction: str


@dataclass(frozen=True)
class EditMany(ToEdits):
    """`edit` by several instructions."""

    images: Sequence[Images]
    instruction: Texts


@dataclass(frozen=True)
class Ask(ToText):
    """`understand` with one question."""

    images: Images
    question: str


@dataclass(frozen=True)
class AskMany(ToTexts):
    """`understand` with several questions."""

    images: Sequence[Images]
    question: Texts


@dataclass(frozen=True)
class Stream(ToText):
    """`stream`."""

    inputs: Sequence[Input]


@dataclass(frozen=True)
class GenerateImage(ToEdit):
    """`generate` with an image as output."""

    inputs: Sequence[Input]
    _: KW_ONLY
    output: Literal["image"] = "image"


@dataclass(frozen=True)
class GenerateText(ToText):
    """`generate` with a text as output."""

    inputs: Sequence[Input]
    _: KW_ONLY
    output: Literal["text"]


@dataclass(frozen=True)
class GenerateImages(ToEdits):
    """`generate_batch` with images as output."""

    batch: Sequence[Sequence[Input]]
    _: KW_ONLY
    output: Literal["image"] = "image"


@dataclass(frozen=True)
class GenerateTexts(ToTexts):
    """`generate_batch` with texts as output."""

    batch: Sequence[Sequence[Input]]
    _: KW_ONLY
    output: Literal["text"]
