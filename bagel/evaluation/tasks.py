"""What is measured: each task runs its examples and yields rows of the table."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from bagel.evaluation.edits import CHANGES
from bagel.evaluation.judge import judge, shape_center, unchanged_psnr
from bagel.evaluation.language import full_caption, parse_caption
from bagel.evaluation.measurement import ANSWER_TOKENS, Batch, Measurement, images_of, text_of, verdict_of
from bagel.evaluation.questions import TOPICS
from bagel.evaluation.render import render
from bagel.evaluation.samples import Example
from bagel.evaluation.scene import Scene
from bagel.evaluation.table import Row, Trial, paired_gap, rate_row, sum_row
from bagel.modeling import MissingHalfError

NEXT_FRAME = "the next frame"
SHOWN_FRAMES = 3
FRAME_TOLERANCE = 2.0  # pixels
KEPT_PSNR = 28.0  # dB
GUIDANCE_SCALES = (1.0, 4.0)
PLAN_TOKENS = 64
TIMED_RUNS = 3

# What is stated is judged: everything, the relation, or how many there are of each look.
HEADLINES = {
    "one object, everything stated": ("t2i1", "full"),
    "two objects and their relation": ("t2i2", "relation"),
    "three objects, counted": ("t2i3", "count"),
}
WORDINGS = {
    "one object, a few attributes": ("t2i1", "brief"),
    "two objects, everything stated": ("t2i2", "full"),
    "two objects, counted": ("t2i2", "count"),
    "three objects, everything stated": ("t2i3", "full"),
}


def text_to_image(of: Measurement) -> Iterator[Row]:
    """Draw one, two and three objects."""
    for name, kind in HEADLINES.items():
        yield of.drawn_row(f"draw: {name}", of.batches(name, kind))


def wordings(of: Measurement) -> Iterator[Row]:
    """Draw from the other ways to say what there is."""
    for name, kind in WORDINGS.items():
        yield of.drawn_row(f"draw: {name}", of.batches(name, kind))


def new_pairs(of: Measurement) -> Iterator[Row]:
    """Draw a color and a kind that training never shows together."""
    name = "draw: color-shape pairs never trained on"
    yield of.drawn_row(
        name, of.batches(name, ("t2i1", "full"), split="new_pairs"), note="one object, everything stated"
    )


def guidance(of: Measurement) -> Iterator[Row]:
    """Draw with and without guidance by the text: one, two and three objects in turn."""
    for scale in GUIDANCE_SCALES:
        name = f"draw: cfg_text_scale {scale:g}"
        batches = of.batches(name, *HEADLINES.values())
        yield of.drawn_row(name, batches, note="one, two and three objects in turn", cfg_text_scale=scale)


def captions(of: Measurement) -> Iterator[Row]:
    """Describe images; right is an answer that states every attribute of every object, and the background."""
    name, trials = "caption: all attributes", []
    for batch in of.batches(name, ("caption", None)):
        for example, seed, answer in zip(batch.examples, batch.seeds, of.answer(batch), strict=True):
            trials.append(_answered(of, example, seed, answer, parse_caption(answer) == example.scenes[0]))
    yield rate_row(name, trials)


def questions(of: Measurement) -> Iterator[Row]:
    """Answer questions, topic by topic; as many of those with yes or no have one answer as the other."""
    rows = []
    for topic in TOPICS:
        name, trials = f"question: {topic.replace('_', ' or ')}", []
        for batch in of.batches(name, ("qa", topic), balanced=topic == "yes_no"):
            for example, seed, answer in zip(batch.examples, batch.seeds, of.answer(batch), strict=True):
                right = answer.strip().rstrip(".").lower() == example.outputs[0]
                trials.append(_answered(of, example, seed, answer, right))
        shares = [(word, [t.right for t in trials if t.wanted == word]) for word in ("yes", "no")]
        note = ", ".join(f"{word} {sum(right)}/{len(right)}" for word, right in shares if right)
        rows.append(rate_row(name, trials, note))
        yield rows[-1]
    yield sum_row("question: all", rows)


def _answered(of: Measurement, example: Example, seed: int, answer: str, right: bool) -> Trial:
    images = of.kept(*images_of(example), right=right)
    return Trial(text_of(example), seed, right, str(example.outputs[0]), answer, images)


def edits(of: Measurement) -> Iterator[Row]:
    """Edit, change by change; right is the scene asked for with all other pixels kept."""
    rows = []
    for change in CHANGES:
        name, trials, done, kept = f"edit: {change}", [], 0, 0
        for batch in of.batches(name, ("edit", change)):
            edited = of.edit(batch, [images_of(example) for example in batch.examples], batch.texts)
            for example, seed, image in zip(batch.examples, batch.seeds, edited, strict=True):
                is_done, seen = verdict_of(example, image)
                psnr = _kept_psnr(example, image)
                done, kept = done + is_done, kept + (psnr >= KEPT_PSNR)
                right = is_done and psnr >= KEPT_PSNR
                images = of.kept(*images_of(example), image, right=right)
                seen = f"{seen}, the rest kept at {psnr:.1f} dB"
                trials.append(Trial(text_of(example), seed, right, full_caption(example.scenes[-1]), seen, images))
        rows.append(rate_row(name, trials, f"done {done}, the rest kept at {KEPT_PSNR:g} dB {kept}"))
        yield rows[-1]
    yield sum_row("edit: all", rows)


def _kept_psnr(example: Example, image: Image.Image) -> float:
    """Measure what an edit left alone, at the size it was drawn in."""
    before, after = example.scenes
    return unchanged_psnr(render(before, side=image.width), image, before, after)


def think(of: Measurement) -> Iterator[Row]:
    """Draw from indirect prompts ("of the color of grass") with a plan, and the same without."""
    name, plans, drawn = "think", [], []
    for batch in of.batches(name, ("think", "indirect")):
        results = of.draw(batch, think=True, max_think_tokens=PLAN_TOKENS)
        for example, seed, result in zip(batch.examples, batch.seeds, results, strict=True):
            plans.append(_planned(of, example, seed, result.text or "", result.image))
            drawn.append(of.judged(example, seed, result.image))
    yield rate_row("think: plan right, facts and caption", plans, "indirect prompts")
    without = of.drawn_row("think: indirect prompts drawn without", of.batches(name, ("think", "indirect")))
    gap, low, high = (100 * value for value in paired_gap(drawn, without.trials))
    note = f"{gap:+.1f} points over without [{low:+.1f}, {high:+.1f}]"
    yield rate_row("think: indirect prompts drawn with", drawn, note)
    yield without


def _planned(of: Measurement, example: Example, seed: int, plan: str, image: Image.Image) -> Trial:
    """Compare a plan with the right one, of which each prompt has one; spaces apart, word for word."""
    wanted = str(example.outputs[0])
    right = "".join(plan.split()) == "".join(wanted.split())
    return Trial(text_of(example), seed, right, wanted, plan, of.kept(image, right=right))


def next_frames(of: Measurement) -> Iterator[Row]:
    """Continue motions frame by frame, each predicted frame an input of the next."""
    places, looks, motions = [], [], []
    for batch in of.batches("next frames", ("video", None)):
        predicted = _continued(of, batch)
        for example, seed, images in zip(batch.examples, batch.seeds, predicted, strict=True):
            steps = _frame_trials(example, seed, images)
            places += steps
            looks += [_looks(example, step, image) for step, image in zip(steps, images, strict=True)]
            right = all(step.right for step in steps)
            wanted, seen = ("; ".join(getattr(step, name) for step in steps) for name in ("wanted", "seen"))
            shown = _frames(example)[:SHOWN_FRAMES]
            motions.append(Trial(text_of(example), seed, right, wanted, seen, of.kept(*shown, *images, right=right)))
    note = f"within {FRAME_TOLERANCE:g} pixels, {len(places) // len(motions)} frames predicted from {SHOWN_FRAMES}"
    yield rate_row("next frames: place, frame by frame", places, note)
    yield rate_row("next frames: place, all frames of a motion", motions)
    yield rate_row("next frames: look kept, frame by frame", looks, "shape, color, size and background")


def _frames(example: Example) -> list[Image.Image]:
    return [frame for frame in example.outputs if isinstance(frame, Image.Image)]


def _continued(of: Measurement, batch: Batch) -> list[list[Image.Image]]:
    """Predict the frames after the first `SHOWN_FRAMES` of each motion."""
    films = [_frames(example)[:SHOWN_FRAMES] for example in batch.examples]
    for _ in range(len(batch.examples[0].outputs) - SHOWN_FRAMES):
        frames = of.edit(batch, [film[-SHOWN_FRAMES:] for film in films], [NEXT_FRAME] * len(films))
        for film, frame in zip(films, frames, strict=True):
            film.append(frame)
    return [film[SHOWN_FRAMES:] for film in films]


def _frame_trials(example: Example, seed: int, images: Sequence[Image.Image]) -> list[Trial]:
    """Compare the place of the shape with where its motion takes it, frame by frame."""
    assert example.motion is not None
    trials = []
    for number, image in enumerate(images, SHOWN_FRAMES):
        x, y = (image.width * value for value in example.motion.centers()[number])
        found = shape_center(image)
        right = found is not None and math.dist(found, (x, y)) <= FRAME_TOLERANCE
        seen = f"{found[0]:.1f}, {found[1]:.1f}" if found else "no shape"
        trials.append(Trial(f"{text_of(example)}, frame {number + 1}", seed, right, f"{x:.1f}, {y:.1f}", seen))
    return trials


def _looks(example: Example, step: Trial, image: Image.Image) -> Trial:
    """Judge the shape of a frame and its background, wherever it is."""
    (scene,) = example.scenes
    verdict = judge(image, scene, attributes=("count", "kind", "color", "size", "background"))
    seen = _without_place(verdict.reading.scene)
    return Trial(step.prompt, step.seed, verdict.all_right, _without_place(scene), seen)


def _without_place(scene: Scene) -> str:
    shapes = [f"{shape.size} {shape.color} {shape.kind}" for shape in scene.objects]
    return f"{', '.join(shapes) or 'no shape'} on {scene.background}"


def timing(of: Measurement) -> Iterator[Row]:
    """Time one image and one answer by themselves, and read how much memory the process has needed."""
    pipe, steps = of.pipe, of.settings.drawing["num_timesteps"]
    (batch,) = of.batches("timing", ("t2i1", "full"), count=1)
    (caption,) = batch.texts
    image = render(batch.examples[0].scenes[0], side=of.side)
    options = {"height": of.side, "width": of.side, "seed": of.settings.seed, **of.settings.drawing}
    note = f"{of.side} x {of.side} pixels, {_machine(of)}"
    yield _timed(f"time: an image at {steps} timesteps", lambda: pipe.text_to_image(caption, **options), note)
    asked = {"max_new_tokens": ANSWER_TOKENS, "progress": False}
    yield _timed("time: an answer", lambda: pipe.understand(image, "what color is the background?", **asked))
    if (peak := peak_memory()) is not None:
        yield Row("memory: the whole process so far", note="largest resident size", value=peak, unit="GiB")


def _machine(of: Measurement) -> str:
    device = str(of.pipe.device)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device}{threads}, {str(of.pipe.dtype).removeprefix('torch.')}"


def _timed(name: str, call: Callable[[], object], note: str = "") -> Row:
    """Time a call: the median of some, after a first one."""
    seconds = []
    try:
        for _ in range(1 + TIMED_RUNS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    except MissingHalfError as error:
        return Row(name, note=f"not possible: {error}")
    first = f"the first took {seconds[0]:.2f} s"
    note = f"{first}; {note}" if note else first
    return Row(name, note=note, value=statistics.median(seconds[1:]), unit="s")


def peak_memory() -> float | None:
    """Return the largest resident memory of this process so far in GiB; None on a system that does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
