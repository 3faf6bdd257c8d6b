"""The options of every task: their checks, what has no effect, presets, lists, signatures and schemas."""

from __future__ import annotations

import inspect
import json
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bagel import Session, signatures
from bagel.options import (
    DEFAULTS,
    EDIT,
    PER_ITEM,
    PRESETS,
    TASKS,
    DrawOptions,
    EditOptions,
    ImageOptions,
    SessionOptions,
    TextOptions,
    make_options,
    one_by_one,
)
from bagel.parameters import json_schema, options_of
from bagel.sampling import BRANCHES, Euler, Guidance, TaylorSeer, TextSampling, flow_timesteps
from bagel.signatures import takes


def names(kind: Any) -> list[str]:
    return [one.name for one in options_of(kind)]


def task_of(options: dict[str, Any]) -> str:
    return next(
        task for task in ("text_to_image", "edit", "understand") if options.keys() <= set(names(TASKS[task][0]))
    )


# Checks ---------------------------------------------------------------------------------------------------------------

WHOLE = "a whole number"
TYPES = [
    *[("seed", value, f"{WHOLE} or None, got ") for value in ([1], "abc", True, 1.5)],
    ("height", 32.0, f"{WHOLE} or None, got float 32.0"),
    ("height", "32", f"{WHOLE} or None, got str '32'"),
    ("cfg_text_scale", "4", "a number, got str '4'"),
    ("cfg_text_scale", None, "a number, got None"),
    ("temperature", "a", "a number, got str 'a'"),
    ("num_timesteps", 3.0, f"{WHOLE}, got float 3.0"),
    ("cfg_interval", 0.4, "a pair of numbers, got float 0.4"),
    ("cfg_interval", ("a", "b"), "a pair of numbers, got tuple"),
    ("noise", "x", "a tensor or None, got str 'x'"),
    ("posterior_noise", torch.zeros(2), "a list of tensors or None, got Tensor"),
    ("generator", 3, "a torch.Generator or None, got int 3"),
    ("negative_prompt", 3, "a text or None, got int 3"),
    ("system_prompt", 3, "a text or None, got int 3"),
    ("stop", 3, "a text or a list of texts, got int 3"),
    ("stop", [3], "a text or a list of texts, got list"),
    ("on_step", 3, "a function or None, got int 3"),
    ("max_new_tokens", True, f"{WHOLE} or None, got bool True"),
    ("think", "yes", "True or False, got str 'yes'"),
    ("cfg_renorm_type", None, "a text, got None"),
    ("solver", 3, "a Solver or None, got int 3"),
    ("guidance", 4.0, "a GuidanceRule or None, got float 4.0"),
    ("caching", True, "a Caching or None, got bool True"),
    ("sampling", "greedy", "a Chooser or None, got str 'greedy'"),
]


@pytest.mark.parametrize(("name", "value", "said"), TYPES, ids=str)
def test_an_option_of_a_wrong_type_is_named_with_what_it_got_and_wants(name, value, said):
    with pytest.raises(TypeError) as caught:
        make_options(task_of({name: value}), {name: value})
    assert str(caught.value).startswith(f"{name} must be {said}")
    assert "\n" not in str(caught.value)


VALUES = [
    (ValueError, "seed must lie between", {"seed": 2**70}),
    (ValueError, "seed must lie between", {"seed": -(2**63) - 1}),
    (ValueError, "max_new_tokens must lie between 1 and 1000000, got 0", {"max_new_tokens": 0}),
    (ValueError, "max_new_tokens must lie between 1 and 1000000, got 1000", {"max_new_tokens": 10**30}),
    (ValueError, "max_think_tokens must lie between 1 and 1000000, got 0", {"think": True, "max_think_tokens": 0}),
    (ValueError, "num_timesteps must lie between 2 and 100000, got 1", {"num_timesteps": 1}),
    (ValueError, "num_timesteps must lie between 2 and 100000, got 1000", {"num_timesteps": 10**30}),
    (ValueError, r"timestep_shift must lie in \[0.001, 1000.0\], got 0.0", {"timestep_shift": 0.0}),
    (ValueError, r"timestep_shift must lie in .*, got 1e\+300", {"timestep_shift": 1e300}),
    (ValueError, r"cfg_text_scale must lie in \[0, 1000000.0\], got 1e\+30", {"cfg_text_scale": 1e30}),
    (ValueError, "cfg_img_scale must lie in", {"cfg_img_scale": 1e30}),
    (ValueError, "temperature must be a finite number of at least 0, got -1.0", {"temperature": -1.0}),
    (ValueError, "posterior must be one of sample or mean, got 'max'", {"posterior": "max"}),
    (ValueError, "cfg_renorm_type must be one of global, channel", {"cfg_renorm_type": "total"}),
    (TypeError, "noise must be a floating-point tensor, got torch.int64", {"noise": torch.zeros(2, 64).long()}),
    (ValueError, "noise must be finite", {"noise": torch.full((2, 64), float("nan"))}),
    (ValueError, r"posterior_noise\[1\] must be finite", {"posterior_noise": [torch.zeros(1), torch.ones(1) / 0]}),
    (ValueError, 'no effect with posterior="mean"', {"posterior": "mean", "posterior_noise": [torch.zeros(1)]}),
    (ValueError, "negative_prompt has no effect .* above 1, got 1.0", {"negative_prompt": "a", "cfg_text_scale": 1.0}),
    (ValueError, "negative_prompt has", {"negative_prompt": "a", "guidance": Guidance(cfg_text_scale=1.0)}),
    (ValueError, "cfg_interval must be a pair", {"cfg_interval": (0.1, 0.2, 0.3)}),
    (ValueError, "stop must not hold an empty string", {"stop": ["a", ""]}),
    (ValueError, "give seed or generator, not both", {"seed": 1, "generator": torch.Generator()}),
    (ValueError, "give cfg_img_scale or guidance, not both", {"guidance": Guidance(), "cfg_img_scale": 2.0}),
    (ValueError, "give taylorseer or caching, not both", {"taylorseer": True, "caching": TaylorSeer()}),
    (ValueError, "give do_sample or sampling, not both", {"think": True, "do_sample": True, "sampling": print}),
]


@pytest.mark.parametrize(("error", "message", "options"), VALUES, ids=[message for _, message, _ in VALUES])
def test_a_value_out_of_range_or_without_effect_is_refused(error, message, options):
    with pytest.raises(error, match=message):
        make_options(task_of(options), options)


class NamesOthers(Guidance):
    names = ("full", "style")  # pyright: ignore


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("guidance must be a GuidanceRule or None, got type", {"guidance": Guidance}),
        (
            "guidance must be a GuidanceRule or None, got function",
            {"guidance": lambda velocities, t: velocities["full"]},
        ),
        ("the names of guidance must be branches among full, text_dropped, image_dropped", {"guidance": NamesOthers()}),
        ("caching must be a Caching or None, got type", {"caching": TaylorSeer}),
        ("solver must be a Solver or None, got type", {"solver": Euler}),
        ("solver must be a Solver or None, got int 5", {"solver": 5}),
    ],
)
def test_a_part_of_a_wrong_form_is_refused(message, given):
    with pytest.raises(TypeError, match=message):
        make_options("text_to_image", given)


def test_a_generator_must_be_on_the_cpu():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 0)  # pyright: ignore[reportAssignmentType]

    with pytest.raises(ValueError, match=r"generator must be on the CPU, .* got one on cuda:0"):
        ImageOptions(generator=Elsewhere())


def test_numbers_of_other_libraries_become_pythons_own():
    given = {"cfg_text_scale": np.float32(3.5), "num_timesteps": np.int32(9), "cfg_interval": [np.float64(0), 1]}
    options = make_options("text_to_image", given | {"seed": np.uint8(3)})
    assert (options.cfg_text_scale, options.num_timesteps, options.cfg_interval) == (3.5, 9, (0.0, 1.0))
    assert type(options.cfg_text_scale) is type(options.cfg_interval[1]) is float
    assert type(options.seed) is int


# What has no effect ---------------------------------------------------------------------------------------------------

NEEDS = [
    ("understand", {"temperature": 0.7}, "do_sample"),
    ("understand", {"temperature": 0.7, "do_sample": False}, "do_sample"),
    ("understand", {"top_p": 0.9}, "do_sample"),
    ("text_to_image", {"temperature": 0.7}, "do_sample"),
    ("text_to_image", {"do_sample": True}, "think"),
    ("text_to_image", {"do_sample": True, "temperature": 0.7}, "think"),
    ("edit", {"max_think_tokens": 10}, "think"),
    ("edit", {"sampling": TextSampling()}, "think"),
    ("think", {"top_p": 0.5}, "do_sample"),
]


@pytest.mark.parametrize(("task", "given", "needed"), NEEDS, ids=str)
def test_an_option_without_what_it_needs_is_refused_by_name(task, given, needed):
    with pytest.raises(TypeError, match=rf"the option '\w+' has no effect without {needed}=True; leave it out"):
        make_options(task, given)


@pytest.mark.parametrize("preset", [None, "app"])
def test_what_a_preset_or_a_default_sets_or_what_is_off_needs_nothing(preset):
    assert make_options("understand", {"do_sample": False}, preset).temperature == 0.3
    assert make_options("text_to_image", {"do_sample": False, "negative_prompt": None}, preset).think is False
    assert make_options("edit", {"guidance": Guidance()}, preset).guide == Guidance()


@pytest.mark.parametrize(
    ("task", "name", "makes"),
    [
        ("text_to_image", "stop", "image output from texts alone"),
        *[
            ("text_to_image", name, "image output from texts alone")
            for name in ("exif", "resize_once", "posterior", "posterior_noise")
        ],
        ("edit", "max_new_tokens", "image output"),
        ("edit", "logprobs", "image output"),
        ("understand", "height", "text output"),
        ("understand", "max_think_tokens", "text output"),
        ("understand", "posterior", "text output"),
        ("session", "height", "a session"),
        ("write", "seed", "what a session writes"),
        ("draw", "exif", "what a session draws"),
        *[("think", name, "the plan of a session") for name in ("think", "max_new_tokens", "stop", "height", "seed")],
        *[
            ("velocity", name, "the velocity of an image")
            for name in ("solver", "noise", "on_step", "think", "max_think_tokens", "do_sample", "seed")
        ],
        ("edit", "reread", "image output"),
    ],
)
def test_an_option_of_another_task_is_refused(task, name, makes):
    with pytest.raises(TypeError, match=f"the option '{name}' has no effect on {makes}; leave it out"):
        make_options(task, {name: 1})


def test_a_misspelt_option_is_told_its_name():
    with pytest.raises(TypeError, match="there is no option 'cfg_txt_scale'; did you mean 'cfg_text_scale'"):
        make_options("edit", {"cfg_txt_scale": 2.0})


# Tasks and presets ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_official_ones():
    drawn, edited, text = (make_options(task, {}) for task in ("text_to_image", "edit", "understand"))
    assert (type(drawn), type(edited), type(text)) == (ImageOptions, EditOptions, TextOptions)
    assert drawn.guide == Guidance(cfg_text_scale=4.0, cfg_img_scale=1.0, cfg_interval=(0.4, 1.0))
    assert edited.guide == Guidance(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
    assert (drawn.num_timesteps, drawn.timestep_shift, drawn.max_think_tokens) == (50, 3.0, 1000)
    assert text.chooser == TextSampling(do_sample=False, temperature=0.3, top_p=1.0)
    assert all(getattr(edited, name) == value for name, value in EDIT.items())


def test_limits_of_texts():
    assert [make_options("understand", {"think": think}).text_limit for think in (False, True)] == [512, 1000]
    assert make_options("understand", {"think": True, "max_new_tokens": 7}).text_limit == 7
    assert make_options("edit", {"think": True}).text_limit == 1000
    assert make_options("write", {}).text_limit == 512
    assert [make_options("think", given).text_limit for given in ({}, {"max_think_tokens": 7})] == [1000, 7]


def test_a_plan_of_a_session_needs_no_think():
    given = {"max_think_tokens": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert make_options("think", given).chooser == TextSampling(do_sample=True, temperature=0.5, top_p=0.9)
    assert sorted(names(TASKS["think"][0])) == sorted([*given, "sampling"])
    assert not any(one.explained.endswith("only with think") for one in options_of(TASKS["think"][0]))


def test_stop_strings_are_a_tuple():
    stops = [make_options("understand", {"stop": stop}).stop_strings for stop in ("a", ["a", "b"], ())]
    assert stops == [("a",), ("a", "b"), ()]
    assert make_options("edit", {}).stop_strings == ()


def test_parts_are_the_present_ones_unless_an_object_is_given():
    options = make_options("text_to_image", {"num_timesteps": 5, "timestep_shift": 2.0, "taylorseer": True})
    assert torch.equal(options.timesteps, flow_timesteps(5, shift=2.0))

    def solver(velocity, x, t, next_t):
        return x

    def chooser(logits, generators):
        return logits.argmax(-1)

    class Rule:
        def branches(self, t):
            return BRANCHES

        def __call__(self, velocities, t):
            return velocities["full"]

    caching, rule = TaylorSeer(first=2), Rule()
    given = {"solver": solver, "guidance": rule, "caching": caching, "think": True, "sampling": chooser}
    options = make_options("edit", given)
    assert (options.solver, options.guide, options.caching, options.chooser) == (solver, rule, caching, chooser)
    assert make_options("understand", {"sampling": chooser}).chooser is chooser
    assert make_options("text_to_image", {"guidance": rule, "negative_prompt": "blue"}).negative_prompt == "blue"


def test_a_seed_or_a_generator_or_chance_makes_the_generator():
    assert ImageOptions(seed=7).new_generator().initial_seed() == 7
    own = torch.Generator()
    assert SessionOptions(generator=own).new_generator() is own
    assert TextOptions().new_generator().initial_seed() != TextOptions().new_generator().initial_seed()


@pytest.mark.parametrize(("preset", "task"), [(preset, task) for preset, own in PRESETS.items() for task in own])
def test_presets_hold_over_defaults_and_under_what_is_given(preset, task):
    made = make_options(task, {}, preset)
    for name, value in PRESETS[preset][task].items():
        assert getattr(made, name) == value
    for name, value in DEFAULTS.get(task, {}).items():
        assert getattr(made, name) == PRESETS[preset][task].get(name, value)
    given = {"max_new_tokens": 3} if task == "understand" else {"num_timesteps": 3}
    (name,) = given
    assert getattr(make_options(task, given, preset), name) == 3


@pytest.mark.parametrize("preset", ["best", 3, ["draft"]])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ValueError, match="preset must be one of notebook, app, gedit, draft, got"):
        make_options("edit", {}, preset)


def test_a_preset_of_another_task_is_refused():
    with pytest.raises(ValueError, match="the preset 'gedit' is for edit, not for understand"):
        make_options("understand", {}, "gedit")


# Batches --------------------------------------------------------------------------------------------------------------


def test_per_item_options_are_the_declared_ones():
    each = {"seed", "generator", "noise", "posterior_noise"}
    assert {name for name, kind in PER_ITEM.items() if kind == "each"} == each
    assert {name for name, kind in PER_ITEM.items() if kind == "shared"} == {"height", "width", "negative_prompt"}


def test_lists_are_dealt_out_and_single_values_shared():
    given = {"seed": [1, 2], "height": (64, 80), "width": 48, "negative_prompt": None, "cfg_interval": [0.1, 0.9]}
    shared = {"width": 48, "negative_prompt": None, "cfg_interval": [0.1, 0.9]}
    assert one_by_one({"seed": range(5, 7)}, 2) == [{"seed": 5}, {"seed": 6}]
    assert one_by_one(given, 2) == [{"seed": 1, "height": 64, **shared}, {"seed": 2, "height": 80, **shared}]


def test_a_generator_for_two_requests_is_refused():
    own = torch.Generator()
    with pytest.raises(ValueError, match="each request of a batch needs a generator of its own"):
        one_by_one({"generator": [own, torch.Generator(), own]}, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1}, "a batch of 2 needs 2 values of 'seed' in a list, got a single one"),
        ({"seed": [1]}, "a batch of 2 needs 2 values of 'seed', got 1"),
        ({"height": [1, 2, 3]}, "a batch of 2 needs 2 values of 'height', got 3"),
        ({"noise": torch.zeros(2, 3)}, "a batch of 2 needs 2 values of 'noise' in a list, got a single one"),
    ],
)
def test_lists_of_another_length_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        one_by_one(given, 2)


# Signatures -----------------------------------------------------------------------------------------------------------

METHODS = [
    ("text_to_image", signatures.Draw, ["prompt"]),
    ("edit", signatures.Edit, ["images", "instruction"]),
    ("understand", signatures.Ask, ["images", "question"]),
    ("understand", signatures.Stream, ["inputs"]),
    ("edit", signatures.GenerateImage, ["inputs"]),
    ("understand", signatures.GenerateText, ["inputs"]),
    ("text_to_image", signatures.DrawMany, ["prompt"]),
    ("edit", signatures.EditMany, ["images", "instruction"]),
    ("understand", signatures.AskMany, ["images", "question"]),
    ("edit", signatures.GenerateImages, ["batch"]),
    ("understand", signatures.GenerateTexts, ["batch"]),
]


@pytest.mark.parametrize(("task", "typed", "first"), METHODS, ids=[typed.__name__ for _, typed, _ in METHODS])
def test_what_type_checkers_see_is_what_is_taken(task, typed, first):
    parameters = inspect.signature(typed).parameters
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == first
    further = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert further - {"output"} == {*names(TASKS[task][0]), "preset"}
    if typed.__name__.endswith(("Many", "s")):
        own = {f"{name}: {parameters[name].annotation}" for name in PER_ITEM if name in parameters}
        assert all("Sequence" in annotation for annotation in own)


@pytest.mark.parametrize("tasks", [*TASKS, "text_to_image edit understand"])
def test_signature_and_help_show_every_option_with_its_default(tasks):
    class Pipe:
        @takes(tasks, signatures.Draw, int)
        def method(self, prompt, *, preset=None, **options):
            """Do something.

            Returns:
                something
            """
            return prompt, preset, options

    kinds = [TASKS[task][0] for task in tasks.split()]
    function: Any = Pipe.method
    parameters = inspect.signature(function).parameters
    shown = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name != "preset"}
    assert list(shown) == list(dict.fromkeys(name for kind in kinds for name in names(kind)))
    lines = [line.strip() for line in (inspect.getdoc(function) or "").splitlines()]
    assert lines[:3] == ["Do something.", "", "Returns:"]
    declared = {one.name: one for kind in kinds for one in options_of(kind)}
    for name, parameter in shown.items():
        assert parameter.default == DEFAULTS.get(tasks, {}).get(name, declared[name].default)
        assert parameter.annotation == declared[name].kind
        (line,) = [line for line in lines if line.startswith(f"{name} = ")]
        assert line.startswith(f"{name} = {parameter.default!r}: ")
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    method: Any = Pipe().method
    assert list(inspect.signature(method).parameters) == list(parameters)[1:]
    assert method("a", seed=1) == ("a", None, {"seed": 1})


@pytest.mark.parametrize(
    ("method", "task"),
    [("write", "write"), ("stream", "write"), ("think", "think"), ("draw", "draw"), ("velocity", "velocity")],
)
def test_methods_of_a_session_show_the_options_of_their_tasks(method, task):
    assert list(inspect.signature(getattr(Session, method)).parameters) == ["self", *names(TASKS[task][0])]
    with pytest.raises(TypeError, match="there is no option 'sed'; did you mean 'seed'"):
        getattr(Session, method)(Mock(_guided=dict), sed=1)


# Schemas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_schema_tells_every_option_that_json_can_hold(task):
    kind = TASKS[task][0]
    schema = json.loads(json.dumps(json_schema(kind, DEFAULTS.get(task))))
    left_out = {"generator", "noise", "posterior_noise", "on_step", "solver", "guidance", "caching", "sampling"}
    assert list(schema["properties"]) == [name for name in names(kind) if name not in left_out]
    assert schema["additionalProperties"] is False
    made = make_options(task, {})
    for name, shape in schema["properties"].items():
        assert shape["description"]
        assert "type" in shape or all("type" in one for one in shape["anyOf"])
        value = getattr(made, name)
        assert shape["default"] == (list(value) if isinstance(value, tuple) else value)
        assert_holds(shape, shape["default"])


def assert_holds(shape: dict[str, Any], value: Any) -> None:
    """The part of JSON schema that is used here."""
    kinds = {"integer": int, "number": int | float, "boolean": bool, "string": str, "array": list, "null": type(None)}
    fitting = [one for one in shape.get("anyOf", [shape]) if isinstance(value, kinds[one["type"]])]
    assert fitting
    if isinstance(value, list):
        assert fitting[0].get("minItems", 0) <= len(value) <= fitting[0].get("maxItems", 99)
        for one in value:
            assert_holds(fitting[0]["items"], one)
    assert value in shape.get("enum", [value])
    if isinstance(value, int | float):
        assert shape.get("minimum", value) <= value <= shape.get("maximum", value)
        assert "exclusiveMinimum" not in shape or value > shape["exclusiveMinimum"]


REQUESTS = [
    {"height": 64, "width": None, "seed": 2**64 - 1, "cfg_interval": [0, 0.5], "cfg_renorm_type": "local"},
    {"think": True, "max_think_tokens": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.25, "posterior": "mean"},
]
REFUSED = [
    {"num_timesteps": 1},
    {"timestep_shift": 0},
    {"cfg_interval": [0.1]},
    {"cfg_interval": ["a", "b"]},
    {"cfg_renorm_type": "x"},
    {"cfg_renorm_min": 1.5},
    {"seed": -(2**64)},
    {"height": "64"},
    {"think": "yes"},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_request_that_the_schema_holds_is_taken(request_):
    properties = json_schema(DrawOptions)["properties"] | json_schema(EditOptions)["properties"]
    for name, value in request_.items():
        assert_holds(properties[name], value)
    assert make_options("edit", request_).seed == request_.get("seed")


@pytest.mark.parametrize("request_", REFUSED, ids=str)
def test_a_request_that_the_schema_refuses_is_refused(request_):
    ((name, value),) = request_.items()
    with pytest.raises(AssertionError):
        assert_holds(json_schema(ImageOptions)["properties"][name], value)
    with pytest.raises((TypeError, ValueError), match=name):
        make_options("text_to_image", request_)
