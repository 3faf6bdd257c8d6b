"""Options, declared once as fields of frozen dataclasses: what each takes is checked, explained, typed and sent so."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import reprlib
import types
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")
P = TypeVar("P", bound="Parameters")

WORDS: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", ""),
    str: ("a text", "texts"),
    Tensor: ("a tensor", "tensors"),
    torch.Generator: ("a torch.Generator", "generators"),
    Callable: ("a function", "functions"),
    type(None): ("None", ""),
}
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One declared option. What values it takes is said by the annotation of its field; a Literal lists them.

    Args:
        name, kind: of the field and its type.
        default: what holds where nothing is given.
        meaning: one clause in plain words; help texts and schemas show it.
        at_least, at_most, above: bounds of a number, which must then be finite.
        needs: an option that must be on for this one to have an effect, in the classes that have it.
        instead_of: options that this one replaces, so that they cannot be given together.
        per_item: "each" request of a batch needs its own, in a list; "shared": or one may stand for all.
        flags: further spellings on the command line.
        metavar: how the command line's help calls the value.
        typed: False keeps it from the command line.
        check: of its name and a value that is not None: returns the value to keep, or raises what `checked` does.
    """

    name: str = ""
    kind: Any = None
    default: Any
    meaning: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    needs: str | None = None
    instead_of: Sequence[str] = ()
    per_item: Literal["each", "shared"] | None = None
    flags: Sequence[str] = ()
    metavar: str | tuple[str, ...] | None = None
    typed: bool = True
    check: Callable[[str, Any], Any] | None = None

    @property
    def explained(self) -> str:
        """What it means and needs."""
        return f"{self.meaning}; only with {self.needs}" if self.needs else self.meaning

    def checked(self, value: Any) -> Any:
        """Return a value as its option keeps it: numbers as Python's own, whatever library they come from.

        Raises:
            TypeError: a value of another type.
            ValueError: a value out of range.
        """
        try:
            value = taken(self.kind, value)
        except (TypeError, OverflowError):
            raise TypeError(f"{self.name} must be {in_words(self.kind)}, got {described(value)}") from None
        if (choices := choices_of(self.kind)) and value is not None and value not in choices:
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ValueError(f"{self.name} must be one of {listed}, got {value!r}")
        if isinstance(value, int | float) and (self.at_least, self.at_most, self.above) != (None, None, None):
            low = -math.inf if self.at_least is None else self.at_least
            high = math.inf if self.at_most is None else self.at_most
            finite = isinstance(value, int) or math.isfinite(value)
            if not (finite and low <= value <= high and (self.above is None or value > self.above)):
                raise ValueError(f"{self.name} must {self._range(whole=isinstance(value, int))}, got {value}")
        return value if self.check is None or value is None else self.check(self.name, value)

    def _range(self, *, whole: bool) -> str:
        least = self.at_least if self.above is None else self.above
        if self.at_most is not None and whole:
            return f"lie between {least} and {self.at_most}"
        if self.at_most is not None:
            return f"lie in {'[' if self.above is None else '('}{least}, {self.at_most}]"
        if self.above is not None:
            return "be positive and finite" if self.above == 0 else f"be a finite number above {self.above}"
        return f"be at least {least}" if whole else f"be a finite number of at least {least}"


def option(default: T, meaning: str, **declared: Any) -> T:
    """Return a field of `Parameters` with what `Option` declares."""
    return field(default=default, metadata={"option": Option(default=default, meaning=meaning, **declared)})


class Parameters:
    """Base of frozen dataclasses whose fields are made by `option`: an object holds checked values only.

    Raises:
        TypeError: a value of another type than its option takes.
        ValueError: a value out of its range.
    """

    def __post_init__(self) -> None:
        for one in options_of(type(self)):
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))

    def part(self, kind: type[P], **given: Any) -> P:
        """Return the options that another class declares too, as an object of that class; over them what is given."""
        shared = {one.name: getattr(self, one.name) for one in options_of(kind) if hasattr(self, one.name)}
        return kind(**shared | given)


@functools.cache
def options_of(kind: type[Parameters]) -> tuple[Option, ...]:
    """Return the options that a class of `Parameters` declares and inherits, in order."""
    hints = get_type_hints(kind)
    declared = {f.name: f.metadata["option"] for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    return tuple(
        replace(one, name=name, kind=hints[name], needs=one.needs if one.needs in declared else None)
        for name, one in declared.items()
    )


def build(
    kind: type[P],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    *,
    elsewhere: Collection[str] = (),
    here: str = "this",
) -> P:
    """Return options of a class: what was given, over defaults that stand in for the class's own.

    Args:
        kind: the class.
        given: what somebody asked for; None and False ask for nothing.
        defaults: of a task or a preset.
        elsewhere: options that exist for other calls.
        here: what this call makes, for the message that such an option has no effect on it.

    Raises:
        TypeError: an option that does not exist, has no effect, or has a value of another type.
        ValueError: a value out of its range, or options that exclude each other.
    """
    known = {one.name: one for one in options_of(kind)}
    for name in [name for name in given if name not in known]:
        if name in elsewhere:
            raise TypeError(f"the option {name!r} has no effect on {here}; leave it out")
        close = difflib.get_close_matches(name, sorted({*known, *elsewhere}), n=1)
        raise TypeError(f"there is no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    made = kind(**{**(defaults or {}), **given})
    asked = {name: one for name, one in known.items() if given.get(name) is not None and given[name] is not False}
    for name, one in asked.items():
        if one.needs is not None and not getattr(made, one.needs):
            value = "=True" if known[one.needs].kind is bool else ""
            raise TypeError(f"the option {name!r} has no effect without {one.needs}{value}; leave it out")
        for other in one.instead_of:
            if other in asked:
                raise ValueError(f"give {other} or {name}, not both")
    return made


# What an annotation takes ---------------------------------------------------------------------------------------------


def described(value: object) -> str:
    """Return a value's type and, shortened, the value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"


@functools.cache
def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


@functools.cache
def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the texts that a Literal allows, None aside; empty for other types."""
    return next((get_args(one) for one in alternatives(kind) if get_origin(one) is Literal), ())


def taken(kind: Any, value: Any) -> Any:
    """Return a value as a type takes it.

    Raises:
        TypeError: it is of another type.
    """
    origin = get_origin(kind) or kind
    if len(members := alternatives(kind)) > 1:
        for member in members:
            try:
                return taken(member, value)
            except TypeError:
                continue
        raise TypeError
    if origin in (int, float):
        if isinstance(value, bool) or (origin is float and not isinstance(value, Real)):
            raise TypeError
        return float(value) if origin is float else operator.index(value)  # pyright: ignore[reportArgumentType]
    if origin in (tuple, Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise TypeError
        return tuple(taken(get_args(kind)[0], one) for one in value)  # its own: a list could change later
    if not isinstance(value, str if origin is Literal else origin):
        raise TypeError
    if isinstance(value, type) and getattr(origin, "_is_protocol", False):
        raise TypeError  # a class where one of its objects is wanted
    return value


def in_words(kind: Any) -> str:
    """Return what a type takes, in words."""
    members = alternatives(kind)
    if len(members) > 1:
        return " or ".join(in_words(member) for member in members)
    origin = get_origin(kind) or kind
    if origin in (tuple, Sequence):
        return f"{'a pair' if origin is tuple else 'a list'} of {WORDS[get_args(kind)[0]][1]}"
    known = WORDS.get(str if origin is Literal else origin)
    return known[0] if known else f"a {kind.__name__}"


# What is generated from the declarations ------------------------------------------------------------------------------


def json_schema(kind: type[Parameters], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of an object with these options, without those that JSON cannot hold.

    Args:
        kind: the class.
        defaults: of a task or a preset, in place of the class's own.
    """
    properties = {}
    for one in options_of(kind):
        shapes = [_json_shape(member) for member in alternatives(one.kind)]
        if None in shapes:
            continue
        shape = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
        bounds = {"minimum": one.at_least, "maximum": one.at_most, "exclusiveMinimum": one.above}
        properties[one.name] = {
            "description": one.explained,
            **(shape or {}),
            **{word: bound for word, bound in bounds.items() if bound is not None},
            "default": (defaults or {}).get(one.name, one.default),
        }
    schema = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": schema, "type": "object", "properties": properties, "additionalProperties": False}


def _json_shape(kind: Any) -> dict[str, Any] | None:
    """Return the schema of one type, None for a type that JSON cannot hold."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin in (tuple, Sequence) and args[0] in JSON_TYPES:
        size = {"minItems": len(args), "maxItems": len(args)} if origin is tuple else {}
        return {"type": "array", "items": {"type": JSON_TYPES[args[0]]}, **size}
    return {"type": JSON_TYPES[origin]} if origin in JSON_TYPES else None


def add_flags(
    group: Any,
    kind: type[Parameters],
    *,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    dest: str = "{}",
) -> None:
    """Declare options on an argparse parser or group; what is not typed is not in the namespace.

    Args:
        group: where to.
        kind: the class; its options without a value that can be typed are left out.
        leave_out: names of further ones.
        defaults: of a task, told in place of the class's own.
        dest: the name in the namespace, with {} for that of the option.
    """
    for one in options_of(kind):
        kinds = [member for member in alternatives(one.kind) if member is not type(None)]
        if not one.typed or one.name in leave_out or any(_json_shape(member) is None for member in kinds):
            continue
        default = (defaults or {}).get(one.name, one.default)
        needs = f"; only with --{one.needs.replace('_', '-')}" if one.needs else ""
        settings: dict[str, Any] = {"help": one.meaning + needs}
        if kinds[-1] is bool:
            settings["action"] = "store_false" if default else "store_true"
            settings["help"] = ("do not " if default else "") + settings["help"]
        elif get_origin(kinds[-1]) is Sequence:
            settings |= {"action": "append", "metavar": one.metavar}
        else:
            several = get_args(kinds[-1]) if get_origin(kinds[-1]) is tuple else ()
            number = {"type": several[0], "nargs": len(several)} if several else {"type": kinds[-1]}
            settings |= {"metavar": one.metavar} | (number if kinds[-1] in (int, float) or several else {})
        if kinds[-1] is not bool and default not in (None, ()):
            settings["help"] += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        flag = f"--{'no-' if default is True else ''}{one.name.replace('_', '-')}"
        group.add_argument(*one.flags, flag, dest=dest.format(one.name), default=SUPPRESS, **settings)
