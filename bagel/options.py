"""What a caller can ask for: every option with its default, composed by what it belongs to; the presets."""

# ruff: noqa: RUF009 - option() makes fields

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bagel.parameters import Parameters, build, described, option, options_of
from bagel.sampling import (
    BRANCHES,
    SHIFTS,
    Caching,
    Chooser,
    Choosing,
    Guidance,
    GuidanceRule,
    Guiding,
    OnStep,
    Solver,
    TextSampling,
    branch_names,
    flow_timesteps,
)

MOST_TOKENS, MOST_TIMES = 1_000_000, 100_000
"""Limits beyond what any memory holds: a larger number is a slip."""
SAMPLING, GUIDANCE = ([one.name for one in options_of(kind)] for kind in (Choosing, Guiding))

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


def check_noise(name: str, noise: Tensor) -> Tensor:
    """Return a given noise; raise TypeError or ValueError where it is no finite floating-point tensor."""
    if not noise.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {noise.dtype}")
    if not noise.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return noise


def _each_noise(name: str, noises: Sequence[Tensor]) -> Sequence[Tensor]:
    return tuple(check_noise(f"{name}[{i}]", noise) for i, noise in enumerate(noises))


def _on_cpu(name: str, generator: torch.Generator) -> torch.Generator:
    if generator.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the CPU, where all noise is drawn so that a seed gives the same image everywhere; "
            f"got one on {generator.device}"
        )
    return generator


def _with_branches(name: str, rule: GuidanceRule) -> GuidanceRule:
    names = branch_names(rule)
    if not isinstance(names, Collection) or isinstance(names, str) or not set(BRANCHES).issuperset(names):
        raise TypeError(f"the names of {name} must be branches among {', '.join(BRANCHES)}, got {described(names)}")
    return rule


@dataclass(frozen=True, kw_only=True)
class Seeded(Parameters):
    """Where random draws come from."""

    seed: int | None = option(
        None,
        "of all random draws; by default a random one",
        at_least=-(2**63),
        at_most=2**64 - 1,
        per_item="each",
        metavar="N",
    )
    generator: torch.Generator | None = option(
        None, "draws instead of a seed; on the CPU; it moves on", instead_of=["seed"], per_item="each", check=_on_cpu
    )

    def new_generator(self) -> torch.Generator:
        """Return the generator of one request: the one given, or a fresh one with the seed."""
        if self.generator is not None:
            return self.generator
        return torch.Generator().manual_seed(secrets.randbits(32) if self.seed is None else self.seed)


@dataclass(frozen=True, kw_only=True)
class Reading(Parameters):
    """How texts are read."""

    system_prompt: str | None = option(
        None, "comes first; by default nothing, or with think the prompt it was trained with", metavar="TEXT"
    )
    allow_special: bool = option(True, "let texts spell special tokens, which otherwise are ordinary text")


@dataclass(frozen=True, kw_only=True)
class Seeing(Parameters):
    """How images are read."""

    exif: bool = option(True, "turn input images upright as their EXIF data say")
    resize_once: bool = option(False, "let the ViT see the image itself, not that resized by the autoencoder's rule")


@dataclass(frozen=True, kw_only=True)
class Encoding(Parameters):
    """How the autoencoder encodes input images."""

    posterior: Literal["sample", "mean"] = option(
        "sample", "sample draws the encoding of each input image, mean takes its mean", metavar="KIND"
    )


@dataclass(frozen=True, kw_only=True)
class Shown(Parameters):
    """What can be watched."""

    progress: bool = option(True, "show a bar while thinking, answering and drawing, on a terminal or in a notebook")


@dataclass(frozen=True, kw_only=True)
class Thinking(Parameters):
    """Whether something is written first."""

    think: bool = option(False, "write down a plan or the reasoning first")


@dataclass(frozen=True, kw_only=True)
class Chosen(Choosing):
    """How the tokens of a text are chosen."""

    sampling: Chooser | None = option(
        None, "chooses the tokens: a function of logits and generators", instead_of=SAMPLING
    )

    @property
    def chooser(self) -> Chooser:
        """What chooses the tokens."""
        return self.part(TextSampling) if self.sampling is None else self.sampling


@dataclass(frozen=True, kw_only=True)
class Writing(Chosen):
    """How a text is written."""

    max_new_tokens: int | None = option(
        None, "limit of the answer; by default 512, or 1000 with think", at_least=1, at_most=MOST_TOKENS, metavar="N"
    )
    stop: str | Sequence[str] = option((), "the answer ends before the first of these texts", metavar="TEXT")
    logprobs: bool = option(False, "also return the log-probability of each token", typed=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not text for text in self.stop_strings):
            raise ValueError("stop must not hold an empty string: it would stop before the first token")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def text_limit(self) -> int:
        """New tokens of the answer."""
        return self.max_new_tokens or (1000 if getattr(self, "think", False) else 512)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Chosen):
    """Everything that can be asked of a plan within a session. In a class with `think` that must be on."""

    max_think_tokens: int = option(
        1000, "limit of the plan", at_least=1, at_most=MOST_TOKENS, needs="think", metavar="N"
    )
    do_sample: bool = option(False, "draw the tokens of the plan instead of taking the likeliest", needs="think")
    sampling: Chooser | None = option(
        None, "chooses the tokens of the plan: a function of logits and generators", instead_of=SAMPLING, needs="think"
    )
    stop_strings: ClassVar[tuple[str, ...]] = ()
    logprobs: ClassVar[bool] = False

    @property
    def text_limit(self) -> int:
        """New tokens of the plan."""
        return self.max_think_tokens


@dataclass(frozen=True, kw_only=True)
class Planning(PlanOptions, Thinking):
    """Whether a plan is written before an image, and how."""


@dataclass(frozen=True, kw_only=True)
class Flow(Parameters):
    """The times of the flow from noise to an image, and which evaluations are predicted."""

    num_timesteps: int = option(
        50, "times of the flow: one more than steps", at_least=2, at_most=MOST_TIMES, flags=["--steps"], metavar="N"
    )
    timestep_shift: float = option(
        3.0,
        "the larger, the more of the steps go to the noisy end",
        at_least=SHIFTS[0],
        at_most=SHIFTS[1],
        flags=["--shift"],
        metavar="S",
    )
    taylorseer: bool = option(False, "predict most evaluations instead of computing them: faster, lossy")
    caching: Caching | None = option(None, "predicts evaluations in its own way", instead_of=["taylorseer"])

    @property
    def timesteps(self) -> Tensor:
        """The times of the flow; see `bagel.sampling.flow_timesteps`."""
        return flow_timesteps(self.num_timesteps, shift=self.timestep_shift)


@dataclass(frozen=True, kw_only=True)
class VelocityOptions(Guiding, Flow):
    """Everything that can be asked of the velocity of one image within a session."""

    height: int | None = option(
        None,
        "of the image in pixels, a multiple of 16; by default the last input image's, else 1024 or all that fits",
        per_item="shared",
        metavar="PIXELS",
    )
    width: int | None = option(None, "as height", per_item="shared", metavar="PIXELS")
    negative_prompt: str | None = option(
        None, "what to keep away from; takes the place of the dropped text", per_item="shared", metavar="TEXT"
    )
    guidance: GuidanceRule | None = option(
        None, "combines the velocities of the branches in its own way", instead_of=GUIDANCE, check=_with_branches
    )
    drop: Literal["text", "turn"] = option(
        "text", "what guidance by the text drops: the last text, or every text of the last turn", metavar="WHAT"
    )
    plan_in_image_dropped: bool = option(False, "keep the plan where guidance drops the images, as the benchmarks do")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negative_prompt is not None and "text_dropped" not in branch_names(self.guide):
            raise ValueError(
                f"negative_prompt has no effect without guidance: use a cfg_text_scale above 1, got "
                f"{self.cfg_text_scale}, or leave it out"
            )

    @property
    def guide(self) -> GuidanceRule:
        """What combines the velocities of the branches."""
        return self.part(Guidance) if self.guidance is None else self.guidance


@dataclass(frozen=True, kw_only=True)
class Drawing(VelocityOptions):
    """How one image is drawn."""

    solver: Solver | None = option(None, "takes the steps; by default Euler's, which is the official one")
    noise: Tensor | None = option(
        None, "start noise (height / 16 * width / 16, 64) instead of drawing it", per_item="each", check=check_noise
    )
    on_step: OnStep | None = option(
        None, "called with every `FlowStep`; latents that it returns take the next ones' place"
    )


@dataclass(frozen=True, kw_only=True)
class DrawOptions(Planning, Drawing):
    """Everything that can be asked of an image within a session."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Shown, Seeded, Reading, DrawOptions):
    """Everything that can be asked of a drawing from a text."""


@dataclass(frozen=True, kw_only=True)
class EditOptions(Seeing, Encoding, ImageOptions):
    """Everything that can be asked of an edit."""

    posterior_noise: Sequence[Tensor] | None = option(
        None, "for each input image (16, h / 8, w / 8), instead of drawing it", per_item="each", check=_each_noise
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.posterior == "mean" and self.posterior_noise is not None:
            raise ValueError('posterior_noise has no effect with posterior="mean": give one of them')


@dataclass(frozen=True, kw_only=True)
class TextOptions(Shown, Seeded, Seeing, Reading, Thinking, Writing):
    """Everything that can be asked of an answer."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions(Shown, Seeded, Seeing, Reading, Encoding):
    """Everything that holds for a whole session."""

    draws: bool = option(True, "read images as latents too, so that images can be drawn from them")
    reread: Literal["latents", "pixels"] = option(
        "latents",
        "what a drawn image enters the session by: its own latents, or its pixels encoded again",
        metavar="WHAT",
    )


TASKS: Mapping[str, tuple[type[Parameters], str]] = {
    "text_to_image": (ImageOptions, "image output from texts alone"),
    "edit": (EditOptions, "image output"),
    "understand": (TextOptions, "text output"),
    "session": (SessionOptions, "a session"),
    "write": (Writing, "what a session writes"),
    "draw": (DrawOptions, "what a session draws"),
    "think": (PlanOptions, "the plan of a session"),
    "velocity": (VelocityOptions, "the velocity of an image"),
}
"""The options of each task, and what it makes."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"edit": EDIT}
"""The defaults of a task that are not those of its class."""

_EVERY = {one.name: one for kind, _ in TASKS.values() for one in options_of(kind)}
PER_ITEM = {name: one.per_item for name, one in _EVERY.items() if one.per_item}
"""Options that a batch may give one by one, as lists; "each" request needs its own, or one may be "shared"."""


def make_options(task: str, given: Mapping[str, Any], preset: str | None = None) -> Any:
    """Return the options of a task: its defaults, over them a preset, over both what was given.

    Raises:
        TypeError: an option that does not exist, or that has no effect on this task or beside the other options.
        ValueError: an unknown preset, a value out of range, or options that exclude each other.
    """
    kind, makes = TASKS[task]
    values = dict(DEFAULTS.get(task, {}))
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if task not in PRESETS[preset]:
            raise ValueError(f"the preset {preset!r} is for {', '.join(PRESETS[preset])}, not for {task}")
        values.update(PRESETS[preset][task])
    return build(kind, given, values, elsewhere=_EVERY, here=makes)


def one_by_one(given: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the options of each of `count` requests; lists are dealt out, single values shared.

    Raises:
        ValueError: a single value where each request needs its own, or another number of them.
    """
    each = [dict(given) for _ in range(count)]
    for name, per_item in PER_ITEM.items():
        value = given.get(name)
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if value is None or (per_item == "shared" and not several):
            continue
        if not several:
            raise ValueError(f"a batch of {count} needs {count} values of {name!r} in a list, got a single one")
        if len(value) != count:
            raise ValueError(f"a batch of {count} needs {count} values of {name!r}, got {len(value)}")
        if name == "generator" and len({id(own) for own in value}) < count:
            raise ValueError("each request of a batch needs a generator of its own: give another to each")
        for options, own in zip(each, value, strict=True):
            options[name] = own
    return each
