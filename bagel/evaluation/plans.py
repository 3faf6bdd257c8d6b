"""Indirect prompts ("a circle of the color of grass") and the plans that resolve them."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from bagel.evaluation.language import NUMBERS, WORDINGS, background_phrase, caption, noun_phrase, plural, with_article
from bagel.evaluation.scene import Scene, Shape

COLOR_SIGNS = {
    "red": ("a tomato", "a strawberry"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a lemon", "a banana"),
    "green": ("grass", "a frog"),
    "blue": ("the sky", "the sea"),
    "purple": ("a grape", "an eggplant"),
    "pink": ("a pig", "a flamingo"),
    "brown": ("chocolate", "a bear"),
}
KIND_SIGNS = {
    "circle": ("of a wheel", "of a coin"),
    "square": ("of a box", "of a tile"),
    "triangle": ("of a pyramid", "with three sides"),
    "diamond": ("of a kite", "of a gem"),
    "star": ("of a starfish", "with five points"),
    "cross": ("of a plus sign", "of a crossroads"),
}
BACKGROUND_SIGNS = {
    "white": ("snow", "milk"),
    "black": ("the night", "coal"),
    "gray": ("a stone", "an elephant"),
    "beige": ("sand",),
}
NUMBER_SIGNS = {
    2: ("a cat has eyes", "a bicycle has wheels"),
    3: ("a triangle has sides", "a tricycle has wheels"),
}

CLEAR = "the prompt is clear."
HINT_CHANCE = 0.6


@dataclass(frozen=True)
class Plan:
    """Hold a prompt, the plan `<think>...</think> caption` that answers it, and the attributes both state."""

    prompt: str
    text: str
    stated: frozenset[str]
    indirect: bool


@dataclass
class _Riddles:
    """Names that hide what `hidden` holds behind a sign, and the facts that undo it, in the order of the text."""

    hidden: dict[str, str]
    target: Shape | None
    facts: list[str] = field(default_factory=list)

    def noun(self, shape: Shape, stated: Collection[str]) -> str:
        hints = [name for name in ("color", "kind") if shape == self.target and name in stated and name in self.hidden]
        named = noun_phrase(shape, [name for name in stated if name not in hints])
        if "kind" in hints:
            named = named.removesuffix("shape") + "thing"
        phrases = []
        for name in hints:
            phrases.append(f"the {'color' if name == 'color' else 'shape'} {self.hidden[name]}")
            value = shape.color if name == "color" else with_article(shape.kind)
            self.facts.append(f"{phrases[-1]} is {value}.")
        return f"{named} of {' and '.join(phrases)}" if phrases else named

    def background(self, name: str) -> str:
        if "background" not in self.hidden:
            return background_phrase(name)
        self.facts.append(f"the color {self.hidden['background']} is {name}.")
        return f"a background of the color {self.hidden['background']}"


def _hide(rng: random.Random, scene: Scene) -> _Riddles:
    """Choose what the prompt leaves to be worked out."""
    target = rng.choice(scene.objects)
    signs = {
        "color": [f"of {owner}" for owner in COLOR_SIGNS[target.color]],
        "kind": KIND_SIGNS[target.kind],
        "background": [f"of {owner}" for owner in BACKGROUND_SIGNS.get(scene.background, ())],
    }
    hidden = {name: rng.choice(choices) for name, choices in signs.items() if choices and rng.random() < HINT_CHANCE}
    return _Riddles(hidden=hidden, target=target)


def _number_plan(rng: random.Random, scene: Scene) -> Plan:
    """Hide the number of equal shapes: "as many red circles as a cat has eyes"."""
    number = len(scene.objects)
    owner, parts = rng.choice(NUMBER_SIGNS[number]).split(" has ")
    names = plural(noun_phrase(scene.objects[0], ("color", "kind")))
    return Plan(
        prompt=f"as many {names} as {owner} has {parts}",
        text=f"<think>{owner} has {NUMBERS[number]} {parts}.</think> {NUMBERS[number]} {names}",
        stated=frozenset(("count", "color", "kind")),
        indirect=True,
    )


def plan(rng: random.Random, scene: Scene) -> Plan:
    """Write a prompt for a scene, mostly an indirect one, and the plan to draw it.

    The plan names each fact that the prompt rests on, in its order, then says the prompt again in plain words; it
    adds nothing that the prompt leaves open.
    """
    count = len(scene.objects)
    if count > 1 and len({shape.pair for shape in scene.objects}) == 1:
        return _number_plan(rng, scene)
    wording = rng.choice([wording for wording in WORDINGS[count] if wording != "count"])
    riddles = _hide(rng, scene)
    # The same draws twice: once in riddles, once in plain words.
    seed = rng.getrandbits(32)
    prompt = caption(random.Random(seed), scene, wording=wording, noun=riddles.noun, background=riddles.background)
    plain = caption(random.Random(seed), scene, wording=wording)
    facts = list(dict.fromkeys(riddles.facts))
    return Plan(
        prompt=prompt.text,
        text=f"<think>{' '.join(facts) or CLEAR}</think> {plain.text}",
        stated=plain.stated,
        indirect=bool(facts),
    )
