"""Options that are declared once: what is checked, said, typed and sent of them."""

# ruff: noqa: RUF009 - option() makes fields
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pytest
import torch
from torch import Tensor

from bagel.parameters import Parameters, add_flags, build, described, json_schema, option, options_of


@runtime_checkable
class Painter(Protocol):
    def paint(self, color: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Paint(Parameters):
    color: Literal["red", "green", "blue"] = option("red", "what it is painted in", metavar="COLOR")
    coats: int = option(2, "how often", at_least=1, flags=["--times"], metavar="N")
    share: float = option(0.5, "of the wall", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class Wall(Paint):
    painted: bool = option(False, "whether it is painted")
    coats: int = option(3, "how often, on a wall", at_least=1, needs="painted")
    dry: bool = option(True, "wait until it is dry")
    gloss: float | None = option(None, "how much it shines", at_least=0)
    number: int | None = option(None, "of the house", at_least=-5, at_most=2**64 - 1)
    corners: tuple[float, float] = option((0.0, 1.0), "where it begins and ends", metavar=("FROM", "TO"))
    words: str | Sequence[str] = option((), "written on it", metavar="TEXT")
    image: Tensor | None = option(None, "hangs on it", instead_of=["words"])
    images: Sequence[Tensor] | None = option(None, "hang on it")
    painter: Painter | None = option(None, "paints it")
    then: Callable[[int], object] | None = option(None, "called at the end")
    secret: int = option(7, "not for the command line", typed=False)


def test_options_are_inherited_in_order_and_declared_anew_in_their_place():
    names = ["color", "coats", "share", "painted", "dry", "gloss", "number", "corners", "words", "image", "images"]
    assert [one.name for one in options_of(Wall)] == [*names, "painter", "then", "secret"]
    assert Wall().coats == 3
    assert Wall().part(Paint) == Paint(coats=3)
    with pytest.raises(FrozenInstanceError):
        Wall().coats = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("color", None, "a text, got None"),
        ("color", 3, "a text, got int 3"),
        ("coats", 3.0, "a whole number, got float 3.0"),
        ("coats", True, "a whole number, got bool True"),
        ("coats", "3", "a whole number, got str '3'"),
        ("share", "a", "a number, got str 'a'"),
        ("share", True, "a number, got bool True"),
        ("gloss", "a", "a number or None, got str 'a'"),
        ("gloss", 10**400, "a number or None, got int 1"),
        ("painted", 1, "True or False, got int 1"),
        ("corners", 0.4, "a pair of numbers, got float 0.4"),
        ("corners", ("a", "b"), "a pair of numbers, got tuple ('a', 'b')"),
        ("words", 3, "a text or a list of texts, got int 3"),
        ("words", [3], "a text or a list of texts, got list [3]"),
        ("words", b"ab", "a text or a list of texts, got bytes b'ab'"),
        ("image", "x", "a tensor or None, got str 'x'"),
        ("images", torch.zeros(2), "a list of tensors or None, got Tensor tensor("),
        ("painter", 3, "a Painter or None, got int 3"),
        ("then", 3, "a function or None, got int 3"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_named_with_what_it_got_and_wants(name, value, said):
    with pytest.raises(TypeError) as caught:
        Wall(**{name: value})
    assert str(caught.value).startswith(f"{name} must be {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("color", "pink", "color must be one of red, green or blue, got 'pink'"),
        ("coats", 0, "coats must be at least 1, got 0"),
        ("share", 0, "share must lie in (0, 1], got 0.0"),
        ("share", float("nan"), "share must lie in (0, 1], got nan"),
        ("gloss", -1, "gloss must be a finite number of at least 0, got -1.0"),
        ("gloss", float("inf"), "gloss must be a finite number of at least 0, got inf"),
        ("number", -6, "number must lie between -5 and 18446744073709551615, got -6"),
        ("number", 2**64, "number must lie between -5 and 18446744073709551615, got 18446744073709551616"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named_with_the_range(name, value, said):
    with pytest.raises(ValueError) as caught:
        Wall(**{name: value})
    assert str(caught.value) == said


def test_numbers_of_other_libraries_become_pythons_own_and_lists_tuples():
    words = ["a", "b"]
    wall = Wall(coats=np.int32(9), share=np.float32(0.25), corners=[np.float64(0), 1], words=words)  # pyright: ignore[reportArgumentType]
    assert (wall.coats, wall.share, wall.corners) == (9, 0.25, (0.0, 1.0))
    assert [type(x) for x in (wall.coats, wall.share, *wall.corners)] == [int, float, float, float]
    words.append("c")
    assert wall.words == ("a", "b")


def test_objects_are_taken_by_what_they_can_do():
    class Own:
        def paint(self, color: str) -> None: ...

    assert isinstance(Wall(painter=Own()).painter, Own)
    assert Wall(then=print).then is print


# What has no effect --------------------------------------------------------------------------------------------------


def test_what_was_given_goes_over_defaults_and_these_over_the_class():
    assert build(Wall, {"gloss": 1}, {"gloss": 2, "share": 0.75}) == Wall(gloss=1.0, share=0.75)


def test_an_option_that_needs_another_is_refused_only_when_it_is_given():
    with pytest.raises(TypeError, match="'coats' has no effect without painted=True; leave it out"):
        build(Wall, {"coats": 4})
    with pytest.raises(TypeError, match="'coats' has no effect without painted=True"):
        build(Wall, {"coats": 4, "painted": False})
    assert build(Wall, {"coats": 4, "painted": True}).coats == 4
    assert build(Wall, {"coats": 4}, {"painted": True}).coats == 4
    assert build(Wall, {}, {"coats": 4}).coats == 4


def test_options_that_replace_each_other_are_not_given_together():
    with pytest.raises(ValueError, match="give words or image, not both"):
        build(Wall, {"words": "a", "image": torch.zeros(2)})
    assert build(Wall, {"words": "a", "image": None}).words == "a"
    assert build(Wall, {"image": torch.zeros(2)}, {"words": "a"}).words == "a"


def test_an_unknown_option_is_told_from_one_of_another_call():
    with pytest.raises(TypeError, match="there is no option 'colour'; did you mean 'color'"):
        build(Wall, {"colour": "red"})
    with pytest.raises(TypeError, match=r"there is no option 'zzz'$"):
        build(Wall, {"zzz": 1})
    with pytest.raises(TypeError, match="the option 'roof' has no effect on a wall; leave it out"):
        build(Wall, {"roof": 1}, elsewhere=["roof"], here="a wall")
    with pytest.raises(TypeError, match="there is no option 'rooof'; did you mean 'roof'"):
        build(Wall, {"rooof": 1}, elsewhere=["roof"])


def test_described_is_one_short_line():
    assert described(None) == "None"
    assert described(torch.zeros(100, 100)).count("\n") == 0
    assert len(described("x" * 1000)) < 60


# What is generated ---------------------------------------------------------------------------------------------------


def test_json_schema_literal():
    null = {"type": "null"}
    assert json_schema(Wall, {"gloss": 0.5}) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "color": {
                "description": "what it is painted in",
                "type": "string",
                "enum": ["red", "green", "blue"],
                "default": "red",
            },
            "coats": {
                "description": "how often, on a wall; only with painted",
                "type": "integer",
                "minimum": 1,
                "default": 3,
            },
            "share": {
                "description": "of the wall",
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": 1,
                "default": 0.5,
            },
            "painted": {"description": "whether it is painted", "type": "boolean", "default": False},
            "dry": {"description": "wait until it is dry", "type": "boolean", "default": True},
            "gloss": {
                "description": "how much it shines",
                "anyOf": [{"type": "number"}, null],
                "minimum": 0,
                "default": 0.5,
            },
            "number": {
                "description": "of the house",
                "anyOf": [{"type": "integer"}, null],
                "minimum": -5,
                "maximum": 2**64 - 1,
                "default": None,
            },
            "corners": {
                "description": "where it begins and ends",
                "type": "array",
                "items": {"type": "number"},
                "minItems": 2,
                "maxItems": 2,
                "default": (0.0, 1.0),
            },
            "words": {
                "description": "written on it",
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
                "default": (),
            },
            "secret": {"description": "not for the command line", "type": "integer", "default": 7},
        },
    }
    json.dumps(json_schema(Wall))


def parse(*typed: str, **settings) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Wall, **settings)
    return vars(parser.parse_args(typed))


def test_flags_give_what_was_typed_and_nothing_else():
    assert parse() == {}
    typed = "--color blue --coats 4 --painted --no-dry --corners 0 0.5 --words a --words b --gloss 0.25 --number -3"
    found = parse(*typed.split())
    lists = {"corners": [0.0, 0.5], "words": ["a", "b"]}
    assert found == {"color": "blue", "coats": 4, "painted": True, "dry": False, "gloss": 0.25, "number": -3} | lists
    assert build(Wall, found).corners == (0.0, 0.5)
    assert parse("--coats", "5", dest="wall.{}") == {"wall.coats": 5}


@pytest.mark.parametrize("flag", ["--secret", "--image", "--painter", "--then", "--dry", "--no-painted", "--share"])
def test_flags_leave_out_what_cannot_be_typed_or_was_excluded(flag, capsys):
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse(flag, "1", leave_out=("share",))


def test_help_tells_meaning_need_and_default():
    parser = argparse.ArgumentParser()
    add_flags(parser, Wall, defaults={"share": 0.25})
    told = " ".join(parser.format_help().split())
    assert "--times N, --coats" not in told  # declared anew without the spelling
    assert "--color COLOR what it is painted in (default: red)" in told
    assert "how often, on a wall; only with --painted (default: 3)" in told
    assert "of the wall (default: 0.25)" in told
    assert "--corners FROM TO where it begins and ends (default: 0.0 1.0)" in told
    assert "--no-dry do not wait until it is dry" in told
    assert "--gloss GLOSS how much it shines --number" in told  # None is no default to tell


def test_what_an_option_needs_counts_where_it_can_be_given():
    @dataclass(frozen=True, kw_only=True)
    class Coated(Parameters):
        layers: int = option(1, "how many", needs="coated")

    @dataclass(frozen=True, kw_only=True)
    class Fence(Coated):
        coated: bool = option(False, "whether there is a coat")

    assert build(Coated, {"layers": 2}).layers == 2
    assert [one.explained for one in options_of(Coated)] == ["how many"]
    with pytest.raises(TypeError, match="'layers' has no effect without coated=True"):
        build(Fence, {"layers": 2})
