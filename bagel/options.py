"""What a caller can ask of a generation: every option with its default, the presets, and their checks."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from bagel.sampling import FlowStep, Guidance, TextSampling, flow_timesteps

Output = Literal["text", "image"]

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


@dataclass(frozen=True)
class Options:
    """Options of one call. Text and picture outputs each use their part; the others are refused.

    Pictures: `height` and `width` in pixels; `num_timesteps` (one more than evaluations), `timestep_shift`; `cfg_*`
    see `bagel.sampling.Guidance`; `think` writes a plan first, of at most `max_think_tokens`; `negative_prompt` takes
    the place of the dropped text; `noise` (tokens, 64) float32 is used instead of drawing it; `taylorseer` predicts
    most evaluations (lossy); `on_step` sees every `FlowStep`.

    Text: at most `max_new_tokens` (512, or 1000 with `think`), cut at the first of the strings `stop`.

    Both: `do_sample`, `temperature`, `top_p` see `bagel.sampling.TextSampling`; `system_prompt` comes first (with
    `think` instead of the usual one); `seed` or a CPU `generator`; `posterior_noise` for each input picture
    (16, h/8, w/8), or `posterior="mean"`; `exif` turns pictures upright; `resize_once` applies the ViT's resize rule
    to the picture itself, as the official benchmarks do; `allow_special=False` takes strings that spell special tokens
    as ordinary text; `progress` shows a bar on a terminal or in a notebook.
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
        _ = self.guidance, self.sampling, self.timesteps  # their own checks
        for name in ("max_think_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.posterior not in ("sample", "mean"):
            raise ValueError(f'posterior must be "sample" or "mean", got {self.posterior!r}')
        if self.seed is not None and self.generator is not None:
            raise ValueError("give a seed or a generator, not both")
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"generator must be on the CPU, where all noise is drawn so that a seed gives the same picture "
                f"everywhere; got one on {self.generator.device}"
            )
        if any(not text for text in self.stop_strings):
            raise ValueError("stop must not hold an empty string: it would stop before the first token")

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


IMAGE_ONLY = frozenset(
    (
        *("height", "width", "num_timesteps", "timestep_shift", "taylorseer", "noise", "on_step"),
        *("cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min"),
        *("max_think_tokens", "negative_prompt", "posterior_noise", "posterior"),
    )
)
TEXT_ONLY = frozenset(("max_new_tokens", "stop"))


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
    values = dict(EDIT) if task == "edit" else {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        if task not in PRESETS[preset]:
            raise ValueError(f"the preset {preset!r} is for {', '.join(PRESETS[preset])}, not for {task}")
        values.update(PRESETS[preset][task])
    return Options(**(values | dict(given)))
