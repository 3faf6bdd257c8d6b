"""What a caller can ask of a generation: every option with its default, the presets, and their checks."""

from __future__ import annotations

import difflib
import inspect
import operator
import re
import reprlib
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from inspect import Parameter
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bagel.sampling import FlowStep, Guidance, TextSampling, flow_timesteps

Output = Literal["text", "image"]
F = TypeVar("F", bound=Callable[..., Any])

THINK_UNDERSTAND = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
THINK_GENERATE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
"""The system prompts the released model was trained with."""

TEXT_TO_IMAGE: Mapping[str, Any] = dict(
    cfg_text_scale=4.0, cfg_img_scale=1.0, cfg_interval=(0.4, 1.0), cfg_renorm_type="global", cfg_renorm_min=0.0
)
EDIT: Mapping[str, Any] = dict(
    cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel", cfg_renorm_min=0.0
)

PRESETS: dict[str, dict[str, Mapping[str, Any]]] = {
    "notebook": {
        "text_to_image": dict(TEXT_TO_IMAGE, num_timesteps=50, timestep_shift=3.0, max_think_tokens=1000),
        "edit": dict(EDIT, num_timesteps=50, timestep_shift=3.0, max_think_tokens=1000),
        "understand": dict(max_new_tokens=1000, do_sample=False),
    },
    "app": {
        "text_to_image": dict(TEXT_TO_IMAGE, num_timesteps=50, timestep_shift=3.0, max_think_tokens=1024),
        "edit": dict(EDIT, num_timesteps=50, timestep_shift=3.0, max_think_tokens=1024),
        "understand": dict(max_new_tokens=512, do_sample=False, temperature=0.3),
    },
    "gedit": {
        "edit": dict(EDIT, num_timesteps=50, timestep_shift=3.0, cfg_renorm_type="text_channel"),
    },
    "draft": {
        "text_to_image": dict(TEXT_TO_IMAGE, num_timesteps=16, timestep_shift=3.0, cfg_interval=(0.6, 1.0)),
        "edit": dict(EDIT, num_timesteps=16, timestep_shift=3.0, cfg_interval=(0.6, 1.0)),
        "understand": dict(max_new_tokens=128),
    },
}
"""Sets of options people use, by name and task: those of the official notebook and app, of the GEdit benchmark
(editing only), and a fast draft with fewer evaluations."""


def described(value: object) -> str:
    """Return a value's type and, shortened, the value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _pair(value: Any) -> tuple[float, ...]:
    return tuple(_real(number) for number in _several(value, Real))


def _several(value: Any, kind: type) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, kind) for one in value):
        raise TypeError
    return value


def _one(kind: type) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return take


KINDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("a whole number", _whole),
    "float": ("a number", _real),
    "bool": ("True or False", _one(bool)),
    "str": ("a text", _one(str)),
    "str | Sequence[str]": ("a text or a list of texts", lambda v: v if isinstance(v, str) else _several(v, str)),
    "tuple[float, float]": ("a pair of numbers", _pair),
    "Tensor": ("a tensor", _one(Tensor)),
    "Sequence[Tensor]": ("a list of tensors", lambda v: _several(v, Tensor)),
    "Callable[[FlowStep], object]": ("a function", _one(Callable)),  # pyright: ignore[reportArgumentType]
    "torch.Generator": ("a torch.Generator", _one(torch.Generator)),
}
"""What an option takes, by its annotation: in words, and as a function that returns it or raises TypeError."""


@dataclass(frozen=True)
class Options:
    """Options of one call. Text and picture outputs each use their part of them; the others are refused.

    Args:
        height: of the picture in pixels, a multiple of 16; None: the last picture's, else 1024 or all that fits.
        width: as height.
        num_timesteps: times of the flow, at least 2: one more than evaluations.
        timestep_shift: above 0; the larger, the more of the steps go to the noisy end.
        cfg_text_scale: guidance by the text, from 0; 1 or less is no guidance at all.
        cfg_img_scale: guidance by the input pictures, from 0; 1 or less leaves it out.
        cfg_interval: guidance acts at times low < t <= high, t from 1 to 0.
        cfg_renorm_type: global keeps the norm of a whole picture, channel that of each token, text_channel that of
            each token after the text step only.
        cfg_renorm_min: least factor of that renormalisation, 0 to 1; 1 switches it off.
        think: write down a plan or the reasoning first.
        max_think_tokens: limit of the plan, at least 1.
        negative_prompt: what to keep away from; takes the place of the dropped text.
        taylorseer: predict most evaluations instead of computing them: faster, lossy.
        noise: start noise (height / 16 * width / 16, 64), instead of drawing it.
        posterior_noise: for each input picture (16, h / 8, w / 8), instead of drawing it.
        posterior: sample draws the encoding of each input picture, mean takes its mean.
        on_step: called with every `FlowStep`, whose tensors it must not change; what it raises ends the call.
        max_new_tokens: limit of the answer, at least 1; None: 512, or 1000 with think.
        stop: the answer ends before the first of these texts.
        do_sample: draw tokens of text instead of taking the likeliest.
        temperature: of do_sample, from 0; 0 takes the likeliest.
        top_p: of do_sample: draw among the likeliest tokens of this sum, above 0 to 1.
        system_prompt: comes first; None: nothing, or with think the trained one.
        seed: of all random draws, -2**63 to 2**64 - 1; None: a random one.
        generator: on the CPU, instead of a seed; it moves on.
        exif: turn input pictures upright.
        resize_once: the ViT sees the picture itself, not that resized by the autoencoder's rule.
        allow_special: texts may spell special tokens; with False these are ordinary text.
        progress: show a bar while drawing, on a terminal or in a notebook.

    Raises:
        TypeError: a value of another type than its option takes.
        ValueError: a value out of its range, or two that exclude each other.
    """

    height: int | None = None
    width: int | None = None
    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: str = "global"
    cfg_renorm_min: float = 0.0
    think: bool = False
    max_think_tokens: int = 1000
    negative_prompt: str | None = None
    taylorseer: bool = False
    noise: Tensor | None = None
    posterior_noise: Sequence[Tensor] | None = None
    posterior: Literal["sample", "mean"] = "sample"
    on_step: Callable[[FlowStep], object] | None = None
    max_new_tokens: int | None = None
    stop: str | Sequence[str] = ()
    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0
    system_prompt: str | None = None
    seed: int | None = None
    generator: torch.Generator | None = None
    exif: bool = True
    resize_once: bool = False
    allow_special: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        _ = self.guidance, self.sampling, self.timesteps  # their own checks
        for name in ("max_think_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.posterior not in ("sample", "mean"):
            raise ValueError(f'posterior must be "sample" or "mean", got {self.posterior!r}')
        if any(not text for text in self.stop_strings):
            raise ValueError("stop must not hold an empty string: it would stop before the first token")
        self._check_random()
        self._check_noise()
        if self.negative_prompt is not None and not self.guidance.uses_text:
            raise ValueError(
                f"negative_prompt has no effect without guidance: use a cfg_text_scale above 1, got "
                f"{self.cfg_text_scale}, or leave it out"
            )

    def _check_random(self) -> None:
        if self.seed is not None and self.generator is not None:
            raise ValueError("give a seed or a generator, not both")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must lie between -2**63 and 2**64 - 1, got {self.seed}")
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"generator must be on the CPU, where all noise is drawn so that a seed gives the same picture "
                f"everywhere; got one on {self.generator.device}"
            )

    def _check_noise(self) -> None:
        if self.posterior == "mean" and self.posterior_noise is not None:
            raise ValueError('posterior_noise has no effect with posterior="mean": give one of them')
        given = {f"posterior_noise[{i}]": noise for i, noise in enumerate(self.posterior_noise or ())}
        for name, noise in (given if self.noise is None else given | {"noise": self.noise}).items():
            if not noise.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {noise.dtype}")
            if not noise.isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or infinity in it")

    @property
    def guidance(self) -> Guidance:
        """The guidance part."""
        return Guidance(
            cfg_text_scale=self.cfg_text_scale,
            cfg_img_scale=self.cfg_img_scale,
            cfg_interval=self.cfg_interval,
            cfg_renorm_type=self.cfg_renorm_type,
            cfg_renorm_min=self.cfg_renorm_min,
        )

    @property
    def timesteps(self) -> Tensor:
        """The times of the flow; see `bagel.sampling.flow_timesteps`."""
        return flow_timesteps(self.num_timesteps, shift=self.timestep_shift)

    @property
    def sampling(self) -> TextSampling:
        """How text is chosen."""
        return TextSampling(do_sample=self.do_sample, temperature=self.temperature, top_p=self.top_p)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def new_generator(self) -> torch.Generator:
        """Return the generator of one request: the one given, or a fresh one with the seed."""
        if self.generator is not None:
            return self.generator
        return torch.Generator().manual_seed(secrets.randbits(32) if self.seed is None else self.seed)

    @property
    def text_limit(self) -> int:
        """New tokens of a text output."""
        return self.max_new_tokens or (1000 if self.think else 512)


def _checked(option: Field[Any], value: Any) -> Any:
    """Return a value as its option keeps it: numbers as Python's own, whatever library they come from."""
    annotation = str(option.type)
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    wanted, take = KINDS["str" if kind.startswith("Literal") else kind]
    try:
        return take(value)
    except (TypeError, OverflowError):
        none = " or None" if kind != annotation else ""
        raise TypeError(f"{option.name} must be {wanted}{none}, got {described(value)}") from None


IMAGE_ONLY = frozenset(
    (
        *("height", "width", "num_timesteps", "timestep_shift", "taylorseer", "noise", "on_step"),
        *("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min"),
        *("max_think_tokens", "negative_prompt", "posterior_noise", "posterior"),
    )
)
TEXT_ONLY = frozenset(("max_new_tokens", "stop"))
PER_ITEM = ("seed", "generator", "height", "width", "negative_prompt", "noise", "posterior_noise")
"""Options that a batch may give one by one, as lists; the others are shared."""


def _task_defaults(task: str) -> Mapping[str, Any]:
    """Return the defaults of a task that are not those of `Options`."""
    return EDIT if task == "edit" else {}


def with_options(task: str, output: Output | None) -> Callable[[F], F]:
    """Return a decorator for a method with `**options`: its signature and docstring spell out every option.

    Args:
        task: whose defaults are shown.
        output: leaves out the options without effect on it; None shows all.
    """
    left_out = {"text": IMAGE_ONLY, "image": TEXT_ONLY, None: frozenset()}[output]
    shown = [option for option in fields(Options) if option.name not in left_out]
    defaults = {option.name: option.default for option in shown} | dict(_task_defaults(task))
    meanings = _meanings()
    lines = [
        textwrap.fill(
            f"{option.name} = {defaults[option.name]!r}: {meanings.get(option.name)}",
            112,
            initial_indent=4 * " ",
            subsequent_indent=8 * " ",
        )
        for option in shown
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        options = [
            Parameter(option.name, Parameter.KEYWORD_ONLY, default=defaults[option.name], annotation=option.type)
            for option in shown
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *options])
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return function

    return decorate


def _meanings() -> dict[str, str]:
    """Return what the docstring of `Options` says of each of them, on one line."""
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.cleandoc(Options.__doc__ or ""), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def make_options(task: str, output: Output, given: Mapping[str, Any], *, preset: str | None = None) -> Options:
    """Return the options of a task: its defaults, over them a preset, over both what was given.

    Raises:
        TypeError: an option that does not exist, or that has no effect on this output.
        ValueError: an unknown preset, or a value out of range.
    """
    known = {f.name for f in fields(Options)}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise TypeError(f"there is no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if name in (IMAGE_ONLY if output == "text" else TEXT_ONLY):
            raise TypeError(f"the option {name!r} has no effect on {output} output; leave it out")
    values = dict(_task_defaults(task))
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if task not in PRESETS[preset]:
            raise ValueError(f"the preset {preset!r} is for {', '.join(PRESETS[preset])}, not for {task}")
        values.update(PRESETS[preset][task])
    return Options(**(values | dict(given)))


def one_by_one(given: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the options of each of `count` requests; lists are dealt out, single values shared.

    Raises:
        ValueError: a single value where each request needs its own, or another number of them.
    """
    each = [dict(given) for _ in range(count)]
    for name in PER_ITEM:
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, list | tuple):
            if name in ("height", "width", "negative_prompt"):
                continue
            raise ValueError(f"a batch of {count} needs {count} values of {name!r} in a list, got a single one")
        if len(value) != count:
            raise ValueError(f"a batch of {count} needs {count} values of {name!r}, got {len(value)}")
        for options, own in zip(each, value, strict=True):
            options[name] = own
    return each
