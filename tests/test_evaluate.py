"""The evaluation, on pipelines whose every answer is known, and on the small reference model."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REFERENCE, load_pipeline
from PIL import Image

from bagel import BagelPipeline
from bagel.cli import main
from bagel.evaluation import measurement
from bagel.evaluation.evaluate import TASKS, evaluate
from bagel.evaluation.failures import save_failures
from bagel.evaluation.render import render
from bagel.evaluation.samples import sample
from bagel.evaluation.scene import split_of
from bagel.evaluation.table import HEADING, Row, Trial, line, paired_gap, wilson
from bagel.evaluation.tasks import NEXT_FRAME
from bagel.png import read_info

TINY = REFERENCE / "tiny" / "checkpoint"
RATES = tuple(task for task in TASKS if task != "timing")
NOTHING = Image.new("RGB", (64, 64), (120, 60, 200))


class Oracle:
    """A pipeline that knows what is right for all that it is asked, for `spoil` to make of it what a test wants.

    `frame_shift`: how many pixels to the right of the truth it sees moving shapes.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *, spoil=lambda task, example, output, options: output, frame_shift: float = 0.0) -> None:
        self.spoil, self.frame_shift = spoil, frame_shift
        self.known: dict = {}
        self.calls: list[tuple] = []
        self.batches: list[int] = []

    def sample(self, rng, task, split, **options):
        """Make an example as the world does, and learn it."""
        example = sample(rng, task, split, **options)
        if task != "video":
            images = [part for part in example.inputs if not isinstance(part, str)]
            self.known[self._key(images, measurement.text_of(example))] = example, example.outputs
            return example
        centers = [(x + self.frame_shift / 64, y) for x, y in example.motion.centers()]
        seen = [render(example.scenes[0], side=64, centers=[center]) for center in centers]
        film = [*example.outputs[:3], *seen[3:]]
        for i in range(4):
            self.known[self._key(film[i : i + 3], NEXT_FRAME)] = example, (film[i + 3],)
        return example

    @staticmethod
    def _key(images, text):
        return hash((text, *(image.tobytes() for image in images)))

    def _do(self, task, images, texts, seeds, options):
        self.batches.append(len(texts))
        results = []
        for own, text, seed in zip(images, texts, seeds, strict=True):
            self.calls.append((task, text, seed, options.get("cfg_text_scale"), options.get("num_timesteps")))
            example, outputs = self.known.get(self._key(own, text), (None, (None,)))
            output = self.spoil(task, example, outputs[-1], options)
            plan = outputs[0] if options.get("think") else None
            results.append(SimpleNamespace(image=output, text=output if task == "understand" else plan))
        return results

    def text_to_image(self, prompt, *, seed, **options):
        if isinstance(prompt, str):
            return self._do("draw", [[]], [prompt], [seed], options)[0]
        return self._do("draw", [[]] * len(prompt), prompt, seed, options)

    def edit(self, images, instruction, *, seed, **options):
        return self._do("edit", images, instruction, seed, options)

    def understand(self, images, question, **options):
        if isinstance(question, str):
            return SimpleNamespace(text="white")
        return self._do("understand", images, question, [None] * len(question), options)


@pytest.fixture
def run(monkeypatch):
    def run(oracle: Oracle, **settings) -> dict[str, Row]:
        monkeypatch.setattr(measurement, "sample", oracle.sample)
        return {row.name: row for row in evaluate(oracle, **{"count": 4, "side": 64} | settings)}

    return run


def wrong(task, example, output, options):
    return "a cloud" if task == "understand" else NOTHING


# Figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (90, 100, 0.8256, 0.9448),
        (50, 100, 0.4038, 0.5962),
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (1, 3, 0.0615, 0.7923),
    ],
)
def test_wilson_interval_is_that_of_the_tables(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_rate(right, total):
    with pytest.raises(ValueError, match="a rate needs"):
        wilson(right, total)


def trials(*rights: bool) -> list[Trial]:
    return [Trial("", 0, right, "", "") for right in rights]


def test_paired_gap_is_positive_where_the_first_is_better():
    gap, low, high = paired_gap(trials(*[True] * 40), trials(*[True] * 10, *[False] * 30))
    assert gap == pytest.approx(0.75)
    assert 0.55 < low < gap < high < 0.9


def test_paired_gap_is_narrower_where_both_fail_together():
    first = trials(*[True] * 60, *[False] * 40)
    together = trials(*[True] * 55, *[False] * 45)
    apart = trials(*[False] * 45, *[True] * 55)
    (_, low, high), (_, other_low, other_high) = paired_gap(first, together), paired_gap(first, apart)
    assert high - low < 0.6 * (other_high - other_low)


def test_paired_gap_covers_the_truth_about_as_often_as_it_says():
    rng, covered = random.Random(0), 0
    for _ in range(400):
        pairs = [
            rng.choices(((True, True), (True, False), (False, True), (False, False)), (50, 30, 5, 15))[0]
            for _ in range(50)
        ]
        _, low, high = paired_gap(trials(*(a for a, _ in pairs)), trials(*(b for _, b in pairs)))
        covered += low <= 0.25 <= high
    assert 0.93 <= covered / 400 <= 0.985


def test_line_shows_count_rate_and_interval():
    text = line(Row("draw: one object", 90, 100, wilson(90, 100), "easy"))
    assert text.split() == ["draw:", "one", "object", "90/100", "90.0%", "[82.6,", "94.5]", "easy"]
    assert text.index("easy") == HEADING.index("note")


def test_line_of_what_is_not_possible_shows_no_rate():
    assert line(Row("edit", note="not possible: no VAE")).split() == ["edit", "-", "not", "possible:", "no", "VAE"]


# Rows ------------------------------------------------------------------------------------------------------------


def test_pipeline_that_is_always_right_gets_every_row_whole(run):
    rows = run(Oracle(), tasks=RATES)
    assert len(rows) == 31
    assert {row.rate for row in rows.values()} == {1.0}


def test_pipeline_that_is_always_wrong_gets_no_row(run):
    rows = run(Oracle(spoil=wrong), tasks=[task for task in RATES if task != "think"])
    assert {row.rate for row in rows.values()} == {0.0}


def test_rows_count_what_they_say(run):
    rows = run(Oracle(), tasks=("qa", "edit", "frames"), count=3)
    totals = {name: row.total for name, row in rows.items()}
    assert (
        totals["question: color"] == totals["edit: move"] == totals["next frames: place, all frames of a motion"] == 3
    )
    assert (totals["question: all"], totals["edit: all"], totals["next frames: place, frame by frame"]) == (21, 15, 12)


def test_yes_and_no_are_asked_for_equally_often(run):
    always_yes = Oracle(spoil=lambda task, example, output, options: "yes")
    row = run(always_yes, tasks=("qa",), count=6)["question: yes or no"]
    assert (row.right, row.note) == (3, "yes 3/3, no 0/3")


def test_edit_that_changes_the_rest_is_done_but_not_right(run):
    def brighter(task, example, output, options):
        return output.point(lambda value: abs(value - 14))

    row = run(Oracle(spoil=brighter), tasks=("edit",))["edit: recolor"]
    assert (row.right, row.note) == (0, "done 4, the rest kept at 28 dB 0")


def test_edit_that_does_nothing_keeps_the_rest_but_is_not_right(run):
    row = run(Oracle(spoil=lambda task, example, *_: example.inputs[0]), tasks=("edit",))["edit: move"]
    assert (row.right, row.note) == (0, "done 0, the rest kept at 28 dB 4")


def test_think_is_compared_with_drawing_the_same_prompts_without(run):
    def needs_a_plan(task, example, output, options):
        return output if options.get("think") else NOTHING

    oracle = Oracle(spoil=needs_a_plan)
    rows = run(oracle, tasks=("think",))
    assert rows["think: indirect prompts drawn with"].note.startswith("+100.0 points over without [")
    assert (rows["think: indirect prompts drawn with"].right, rows["think: indirect prompts drawn without"].right) == (
        4,
        0,
    )
    half = len(oracle.calls) // 2
    assert [call[1:3] for call in oracle.calls[:half]] == [call[1:3] for call in oracle.calls[half:]]


def test_plan_with_another_fact_is_not_right(run):
    oracle = Oracle()
    known = oracle.sample

    def misled(*args, **options):
        example = known(*args, **options)
        key = oracle._key([], example.inputs[0])
        oracle.known[key] = (
            example,
            (example.outputs[0].replace(" is ", " is not ").replace(" has ", " has not "), example.outputs[1]),
        )
        return example

    oracle.sample = misled
    rows = run(oracle, tasks=("think",))
    assert rows["think: plan right, facts and caption"].right == 0
    assert rows["think: indirect prompts drawn with"].right == 4


@pytest.mark.parametrize(("shift", "rate"), [(1.6, 1.0), (-1.6, 1.0), (2.4, 0.0)])
def test_frames_may_be_two_pixels_off(run, shift, rate):
    rows = run(Oracle(frame_shift=shift), tasks=("frames",))
    assert rows["next frames: place, frame by frame"].rate == rate
    assert rows["next frames: place, all frames of a motion"].rate == rate
    assert rows["next frames: look kept, frame by frame"].rate == 1


def test_predicted_frames_are_the_inputs_of_the_next(run):
    seen = []

    class Watched(Oracle):
        def edit(self, images, instruction, **options):
            seen.append([len(own) for own in images])
            self.last = super().edit(images, instruction, **options)
            return self.last

    run(Watched(frame_shift=1.0), tasks=("frames",), count=2)  # shifted frames are known in their film alone
    assert seen == [[3, 3]] * 4


def test_guidance_is_measured_with_and_without_on_the_same_examples(run):
    oracle = Oracle()
    run(oracle, tasks=("guidance",), cfg_text_scale=2.0, num_timesteps=7)
    assert {(scale, steps) for *_, scale, steps in oracle.calls} == {(1.0, 7), (4.0, 7)}
    assert [call[1:3] for call in oracle.calls[:4]] == [call[1:3] for call in oracle.calls[4:]]


def test_new_pairs_are_drawn_whatever_the_split(run):
    oracle = Oracle()
    run(oracle, tasks=("new_pairs",), split="train")
    assert {split_of(example.scenes[0]) for example, _ in oracle.known.values()} == {"new_pairs"}


def test_batches_do_not_change_what_is_asked_or_found(run):
    one, three = Oracle(), Oracle()
    rows = run(one, tasks=RATES, batch_size=1), run(three, tasks=RATES, batch_size=3)
    assert rows[0] == rows[1]
    assert sorted(map(str, one.calls)) == sorted(map(str, three.calls))
    assert max(one.batches) == 1
    assert set(three.batches) == {3, 1}


def test_fewer_examples_are_the_first_of_more(run):
    few, many = Oracle(), Oracle()
    run(few, tasks=("t2i",), count=2)
    run(many, tasks=("t2i",), count=4)
    assert few.calls == [call for i, call in enumerate(many.calls) if i % 4 < 2]


def test_another_seed_asks_for_something_else(run):
    first, second = Oracle(), Oracle()
    run(first, tasks=("t2i",), seed=0)
    run(second, tasks=("t2i",), seed=50)
    assert not {call[1] for call in first.calls} & {call[1] for call in second.calls}
    assert {call[2] for call in second.calls} == {50, 51, 52, 53}


def test_timing_tells_seconds_and_memory(run):
    rows = run(Oracle(), tasks=("timing",), num_timesteps=5)
    assert set(rows) == {"time: an image at 5 timesteps", "time: an answer", "memory: the whole process so far"}
    assert all(row.value > 0 for row in rows.values())
    assert rows["memory: the whole process so far"].value < 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("t2i", "poem")}, "got 'poem'"),
        ({"tasks": ()}, "got none"),
        ({"split": "test"}, "split must be one of train, held_out, new_pairs, got 'test'"),
        ({"count": 0}, "count must be at least 1"),
        ({"side": 40}, "multiple of 16, got 40"),
    ],
)
def test_evaluate_refuses_what_does_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Oracle(), **settings)


def test_evaluate_refuses_an_unknown_option():
    with pytest.raises(TypeError, match="did you mean 'num_timesteps'"):
        evaluate(Oracle(), num_timestep=3)


def test_images_of_noise_are_wrong_and_no_trouble(run):
    def noise(task, example, output, options):
        rng = np.random.default_rng(len(noises))
        size = (1, 2, 4)[len(noises) % 3]
        pixels = rng.normal(128, 90, (64 // size, 64 // size, 3)).clip(0, 255).astype(np.uint8)
        noises.append(Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST))
        return noises[-1]

    noises: list[Image.Image] = []
    rows = run(Oracle(spoil=noise), tasks=("t2i", "edit"), count=12)
    assert {row.rate for row in rows.values()} == {0.0}


# Failures --------------------------------------------------------------------------------------------------------


def test_images_are_kept_of_failures_alone_and_only_if_wanted(run):
    assert all(
        not trial.images for trial in run(Oracle(spoil=wrong), tasks=("t2i",))["draw: three objects, counted"].trials
    )
    kept = run(Oracle(spoil=wrong), tasks=("t2i", "edit", "frames"), keep_images=True)
    sizes = {name: {len(trial.images) for trial in row.trials} for name, row in kept.items()}
    assert sizes["draw: three objects, counted"] == {1}
    assert sizes["edit: add"] == {2}
    assert sizes["next frames: place, all frames of a motion"] == {7}
    assert all(not t.images for r in run(Oracle(), tasks=("edit",), keep_images=True).values() for t in r.trials)


def test_saved_failures_say_what_was_asked_and_seen(run, tmp_path):
    rows = run(Oracle(spoil=wrong), tasks=("edit",), count=1, keep_images=True)
    sheet, *images = save_failures(tmp_path, list(rows.values()))
    assert sheet.name == "contact-sheet-0001.png"
    assert sorted(path.name for path in images)[0] == "edit-add-0001.png"
    info = read_info(tmp_path / "edit-add-0001.png")
    (trial,) = rows["edit: add"].trials
    assert (info["prompt"], info["seen"], info["seed"]) == (trial.prompt, trial.seen, "0")
    with Image.open(tmp_path / "edit-add-0001.png") as strip:
        assert strip.size == (64 + 2 + 64, 64)


def test_nothing_is_saved_where_nothing_failed(run, tmp_path):
    assert save_failures(tmp_path / "none", list(run(Oracle(), tasks=("t2i",), keep_images=True).values())) == []
    assert not (tmp_path / "none").exists()


# Real models -----------------------------------------------------------------------------------------------------


def test_batch_size_does_not_change_the_rows_of_a_real_model():
    settings = {"count": 3, "tasks": ("t2i", "caption", "edit"), "side": 32, "num_timesteps": 3, "seed": 5}
    one, three = (evaluate(load_pipeline("tiny"), batch_size=size, **settings) for size in (1, 3))
    assert one == three


def test_model_that_only_understands_says_what_it_cannot_do():
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu", visual_gen=False)
    rows = {row.name: row for row in evaluate(pipe, count=1, side=32, tasks=("t2i", "caption", "timing"))}
    assert rows["t2i"].note.startswith("not possible: this model was loaded without its generating half")
    assert rows["t2i"].rate is None
    assert rows["caption: all attributes"].total == 1
    assert rows["time: an image at 25 timesteps"].value is None
    assert rows["time: an answer"].value is not None


def test_command_prints_the_table_and_keeps_what_it_is_told(tmp_path, capsys):
    options = ["--count", "1", "--side", "32", "--steps", "2", "--tasks", "timing,t2i,caption", "--device", "cpu"]
    kept = ["--json", str(tmp_path / "out" / "rows.json"), "--save", str(tmp_path / "failed")]
    assert main(["evaluate", "--model", str(TINY), *options, *kept]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == HEADING
    assert [text.split(":")[0] for text in lines[1:]] == ["time"] * 3 + ["memory"] + ["draw"] * 3 + ["caption"]
    assert "an image at 2 timesteps" in lines[2]
    found = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert found["settings"]["drawing"]["num_timesteps"] == 2
    caption = found["rows"][-1]
    assert (caption["total"], len(caption["failures"])) == (1, 1)
    assert set(caption["failures"][0]) == {"prompt", "seed", "wanted", "seen"}
    assert (tmp_path / "failed" / "contact-sheet-0001.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--tasks", "t2i,poem"], "got 'poem'"), (["--steps", "1"], "num_timesteps"), (["--dtype", "int3"], "int3")],
)
def test_command_refuses_before_loading(options, message, capsys):
    assert main(["evaluate", "--model", "no-such-folder", *options]) == 2
    assert message in capsys.readouterr().err


def test_command_keeps_an_earlier_report(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("earlier")
    assert main(["evaluate", "--model", "no-such-folder", "--json", str(tmp_path / "rows.json")]) == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "rows.json").read_text() == "earlier"


def test_help_names_every_task_and_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = "".join(capsys.readouterr().out.split())  # a narrow terminal breaks lines anywhere
    assert ",".join(TASKS) in text
    assert "examples:" in text
