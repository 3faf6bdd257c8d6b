from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from bagel.evaluation.edits import CHANGES
from bagel.evaluation.language import WORDINGS, WORDS, caption, full_caption, parse_caption, plain, relation_words
from bagel.evaluation.motion import CELL, DIRECTIONS, FRAMES, SPEEDS, random_motion
from bagel.evaluation.plans import CLEAR
from bagel.evaluation.questions import TOPICS, ask, refer
from bagel.evaluation.render import OUTLINES, coverage, render, unit_area
from bagel.evaluation.samples import TASKS, all_texts_sample, sample
from bagel.evaluation.scene import (
    BACKGROUNDS,
    COLORS,
    GRID,
    HELD_OUT_PAIRS,
    KINDS,
    PLACES,
    SIZES,
    SPLITS,
    Scene,
    Shape,
    random_scene,
    split_of,
)

RED = Shape("circle", "red", "small", "top left")
BLUE = Shape("square", "blue", "large", "center")
RED_BELOW = Shape("circle", "red", "medium", "bottom left")


def texts_of(example) -> list[str]:
    return [part for part in (*example.inputs, *example.outputs) if isinstance(part, str)]


def draws(count: int, *, objects: int = 3, split: str = "train", seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, objects=objects, split=split) for _ in range(count)]


# Scenes and splits


def test_scene_equality_ignores_the_order_of_objects():
    assert Scene((BLUE, RED), "white") == Scene((RED, BLUE), "white")


def test_shape_of_an_unknown_color_names_the_known_ones():
    with pytest.raises(ValueError, match=r"color must be one of red, .*got 'magenta'"):
        Shape("circle", "magenta", "small", "top")


def test_random_scene_of_four_objects_is_refused():
    with pytest.raises(ValueError, match="1, 2 or 3 objects, got 4"):
        random_scene(random.Random(0), objects=4)


def test_random_scene_of_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of train, held_out, new_pairs, got 'test'"):
        random_scene(random.Random(0), objects=1, split="test")


def test_random_scene_keeps_places_distinct():
    assert all(len({shape.place for shape in scene.objects}) == 3 for scene in draws(300))


@pytest.mark.parametrize("split", SPLITS)
def test_random_scene_comes_from_the_split_asked_for(split):
    assert {split_of(scene) for scene in draws(60, objects=2, split=split)} == {split}


def test_split_of_a_scene_never_changes():
    scenes = [Scene((Shape("star", color, "small", place),), "gray") for color in COLORS for place in ("top", "left")]
    splits = [split_of(scene) for scene in scenes]
    assert [i for i, split in enumerate(splits) if split == "held_out"] == [8]
    assert [i for i, split in enumerate(splits) if split == "new_pairs"] == [2, 3]


def test_split_holds_out_a_tenth_of_the_scenes():
    shapes = [Shape(k, c, s, p) for k in KINDS for c in COLORS for s in SIZES for p in PLACES]
    counts = Counter(split_of(Scene((shape,), ground)) for shape in shapes for ground in BACKGROUNDS)
    assert counts["new_pairs"] == len(HELD_OUT_PAIRS) * len(SIZES) * len(PLACES) * len(BACKGROUNDS)
    assert 0.09 < counts["held_out"] / (counts["held_out"] + counts["train"]) < 0.11


def test_held_out_pairs_leave_every_color_and_kind_to_training():
    pairs = {(color, kind) for color in COLORS for kind in KINDS} - set(HELD_OUT_PAIRS)
    assert {color for color, _ in pairs} == set(COLORS)
    assert {kind for _, kind in pairs} == set(KINDS)


@pytest.mark.parametrize("task", TASKS)
def test_sample_of_training_shows_no_held_out_scene(task):
    rng = random.Random(3)
    for _ in range(150):
        example = sample(rng, task, "train", side=16)
        detail = example.motion.direction if example.motion else ""
        assert {split_of(scene, detail) for scene in example.scenes} == {"train"}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sample_texts_never_name_a_held_out_pair(split):
    pair = re.compile("|".join(f"{color} {kind}|{kind} {color}" for color, kind in HELD_OUT_PAIRS))
    rng = random.Random(1)
    for task in TASKS:
        for _ in range(400):
            assert not any(pair.search(text) for text in texts_of(sample(rng, task, split, side=16)))


@pytest.mark.parametrize("task", TASKS)
def test_sample_repeats_for_a_seed(task):
    first, second = (sample(random.Random(11), task, "held_out", side=32) for _ in range(2))
    assert first == second


def test_sample_of_an_unknown_task_names_the_tasks():
    with pytest.raises(ValueError, match=r"task must be one of t2i1, .*got 'draw'"):
        sample(random.Random(0), "draw")


def test_sample_of_an_unknown_detail_names_the_known_ones():
    with pytest.raises(ValueError, match=r"detail of task qa must be one of color, .*got 'texture'"):
        sample(random.Random(0), "qa", detail="texture")


# Pictures


def test_render_paints_the_background_and_the_center_of_each_shape():
    pixels = np.asarray(render(Scene((RED, BLUE), "beige"), side=96))
    x = round(GRID[0] * 96)
    assert tuple(pixels[95, 95]) == BACKGROUNDS["beige"]
    assert tuple(pixels[x, x]) == COLORS["red"]
    assert tuple(pixels[48, 48]) == COLORS["blue"]


def test_render_moves_shapes_to_given_centers_continuously():
    scene = Scene((RED,), "black")
    mass = []
    for x in (0.3, 0.3 + 0.25 / 64):
        red = np.asarray(render(scene, side=64, centers=[(x, 0.7)]))[..., 0] / COLORS["red"][0]
        mass.append(
            ((np.arange(64) + 0.5) @ red.sum(axis=0) / red.sum(), (np.arange(64) + 0.5) @ red.sum(axis=1) / red.sum())
        )
    assert mass[0] == pytest.approx((0.3 * 64, 0.7 * 64), abs=0.02)
    assert mass[1][0] - mass[0][0] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("side", [0, 72])
def test_render_refuses_a_side_that_is_no_multiple_of_16(side):
    with pytest.raises(ValueError, match=f"multiple of 16, got {side}"):
        render(Scene((RED,), "white"), side=side)


def test_render_refuses_centers_that_do_not_pair_with_objects():
    with pytest.raises(ValueError, match="got 1 for 2 objects"):
        render(Scene((RED, BLUE), "white"), centers=[(0.5, 0.5)])


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_sums_to_the_area_of_the_outline(kind):
    alpha = coverage(kind, (21.3, 18.9), 11.7, 48)
    assert alpha.sum() == pytest.approx(unit_area(kind) * 11.7**2, rel=2e-3)
    assert alpha.min() >= -1e-12
    assert alpha.max() <= 1 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_has_its_center_of_mass_at_the_center(kind):
    alpha = coverage(kind, (21.3, 18.9), 11.7, 48)
    middles = np.arange(48) + 0.5
    center = alpha.sum(axis=0) @ middles / alpha.sum(), alpha.sum(axis=1) @ middles / alpha.sum()
    assert center == pytest.approx((21.3, 18.9), abs=0.02)


def test_coverage_of_a_square_is_exact_in_edge_pixels():
    half = OUTLINES["square"].max() * 2  # 1.76, around 4.5: from 2.74 to 6.26
    alpha = coverage("square", (4.5, 4.5), 2.0, 9)
    row = np.array([0, 0, 3 - (4.5 - half), 1, 1, 1, 4.5 + half - 6, 0, 0])
    np.testing.assert_allclose(alpha[4], row, atol=1e-12)


def test_coverage_cut_by_the_border_equals_the_part_inside():
    whole = coverage("star", (20.4, 16.2), 9.0, 40)
    np.testing.assert_allclose(coverage("star", (4.4, 0.2), 9.0, 24), whole[16:, 16:], atol=1e-12)


def test_largest_shapes_leave_a_gap_to_their_neighbours():
    for kind in KINDS:
        full = Scene(tuple(Shape(kind, "red", "large", place) for place in PLACES), "white")
        empty = (np.asarray(render(full, side=64)) == 255).all(axis=-1)
        assert empty[:, 20:23].all(axis=0).any()
        assert empty[20:23].all(axis=1).any()


# Words


def test_texts_use_only_the_closed_list_of_words():
    texts = all_texts_sample(random.Random(0), 6000)
    used = set(re.findall(r"[^\s.,?]+", " ".join(texts).replace("<think>", " ").replace("</think>", " ")))
    assert used == WORDS


def test_full_caption_is_in_reading_order():
    text = "a small red circle at the top left, a large blue square in the center and a medium red circle"
    scene = Scene((BLUE, RED_BELOW, RED), "light blue")
    assert full_caption(scene) == f"{text} at the bottom left on a light blue background"


def test_full_caption_uses_an_before_a_vowel():
    shape = Shape("star", "orange", "large", "top")
    assert "an orange star" in caption(random.Random(4), Scene((shape, RED), "white"), wording="count").text


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_parse_caption_reads_every_full_form_back(objects):
    rng = random.Random(0)
    for scene in draws(100, objects=objects):
        assert parse_caption(full_caption(scene)) == scene
        assert parse_caption(caption(rng, scene, wording="full").text) == scene


def test_parse_caption_without_a_background_is_none():
    assert parse_caption("a small red circle at the top") is None


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (RED, BLUE, "above and left of"),
        (BLUE, RED, "below and right of"),
        (RED, RED_BELOW, "above"),
        (Shape("star", "pink", "small", "top right"), RED, "right of"),
    ],
)
def test_relation_words_tell_both_axes(a, b, words):
    assert relation_words(a, b) == words


@pytest.mark.parametrize(("objects", "wording"), [(n, w) for n, ws in WORDINGS.items() for w in ws])
def test_caption_states_exactly_the_attributes_it_names(objects, wording):
    rng = random.Random(objects)
    for scene in draws(60, objects=objects, seed=5):
        words = caption(rng, scene, wording=wording)
        said = set(words.text.replace(f"{scene.background} background", "background").split())
        named = {name for name, values in (("color", COLORS), ("size", SIZES)) if set(values) & said}
        named |= {"count"} | ({"kind"} if any(kind in words.text for kind in KINDS) else set())
        named |= {"background"} if "background" in words.text else set()
        named |= {"place"} if re.search(r"\b(at|in) the\b", words.text) else set()
        named |= {"relation"} if wording == "relation" else set()
        assert words.stated == named


def test_caption_counts_shapes_that_look_the_same():
    scene = Scene((RED, RED_BELOW, BLUE), "white")
    texts = {caption(random.Random(seed), scene, wording="count").text for seed in range(60)}
    assert {"two red circles and a blue square", "a picture of two red circles and a blue square"} <= texts
    assert not any("blue square and" in text for text in texts)


def places(scene):
    return [(shape.size, shape.kind, shape.place) for shape in scene.objects]


def test_what_a_caption_leaves_open_is_drawn_plainly():
    looks = {"color", "kind"}
    scene = Scene((RED, BLUE, RED_BELOW), "white")
    row = [("medium", "circle", "left"), ("medium", "circle", "center"), ("medium", "square", "right")]
    assert places(plain(scene, looks | {"count"})) == row
    assert places(plain(Scene((RED, BLUE), "white"), looks | {"size", "relation"})) == [
        ("small", "circle", "top left"),
        ("large", "square", "bottom right"),
    ]
    assert places(plain(Scene((RED, RED_BELOW), "white"), looks | {"relation"})) == [
        ("medium", "circle", "top"),
        ("medium", "circle", "bottom"),
    ]
    alike = plain(Scene((RED, dataclasses.replace(BLUE, color="red")), "white"), {"color", "count"})
    assert [shape.kind for shape in alike.objects] == ["circle", "circle"]
    assert places(plain(Scene((RED,), "white"), {"kind"})) == [("medium", "circle", "center")]
    assert plain(scene, {*looks, "size", "place", "count", "background"}) == scene


@pytest.mark.parametrize("task", ["t2i1", "t2i2", "t2i3", "think"])
def test_pictures_are_what_their_captions_call_for(task):
    rng = random.Random(7)
    for split in ("train", "held_out"):
        for _ in range(40):
            example = sample(rng, task, split, side=16)
            (scene,) = example.scenes
            assert plain(scene, example.stated) == scene
            assert split_of(scene) == split


def test_caption_of_a_wording_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"wording for 1 objects must be one of .*got 'relation'"):
        caption(random.Random(0), Scene((RED,), "white"), wording="relation")


# Questions, edits, plans, motions


def test_refer_singles_out_the_shape():
    scene = Scene((RED, RED_BELOW, BLUE), "white")
    names = {refer(random.Random(seed), scene, RED) for seed in range(60)}
    assert names == {"small circle", "small red circle", "shape at the top left"}


def test_refer_gives_nothing_away_that_is_asked_for():
    twin = Shape("circle", "red", "small", "bottom")
    assert refer(random.Random(0), Scene((RED, twin), "white"), RED, without={"place"}) is None


def test_questions_have_the_answers_of_the_scene():
    scene = Scene((RED, BLUE), "light green")
    answers = defaultdict(set)
    rng = random.Random(0)
    for _ in range(12000):
        question = ask(rng, scene)
        if question:
            answers[question.text].add(question.answer)
    assert all(len(found) == 1 for found in answers.values())
    expected = {
        "what color is the circle?": "red",
        "what shape is the red shape?": "circle",
        "where is the square?": "center",
        "how big is the blue shape?": "large",
        "how many shapes are there?": "two",
        "how many circles are there?": "one",
        "what color is the background?": "light green",
        "is the circle left of the square?": "yes",
        "is the circle below the square?": "no",
        "is there a blue square?": "yes",
        "is there a red square?": "no",
        "are there three shapes?": "no",
    }
    assert {text: answers[text] for text in expected} == {text: {answer} for text, answer in expected.items()}


def test_questions_are_balanced_between_yes_and_no():
    rng = random.Random(2)
    by_form = defaultdict(Counter)
    for _ in range(4000):
        example = sample(rng, "qa", side=16, detail="yes_no")
        form = re.match(r"(is there|are there|is the background|is the)", example.inputs[1])[0]
        by_form[form][example.outputs[0]] += 1
    assert set().union(*by_form.values()) == {"yes", "no"}
    assert all(0.42 < count["yes"] / count.total() < 0.58 for form, count in by_form.items() if form[:3] == "is ")


def test_questions_cover_every_topic():
    rng = random.Random(0)
    assert {sample(rng, "qa", side=16).detail for _ in range(200)} == set(TOPICS)


@pytest.mark.parametrize("change", CHANGES)
def test_edit_changes_what_its_instruction_says_and_nothing_else(change):
    rng = random.Random(7)
    for _ in range(60):
        example = sample(rng, "edit", side=16, detail=change)
        before, after = example.scenes
        gone, new = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
        counts = {"recolor": (1, 1), "move": (1, 1), "add": (0, 1), "remove": (1, 0), "background": (0, 0)}
        assert (len(gone), len(new)) == counts[change]
        assert (before.background != after.background) == (change == "background")
        target = {"recolor": "color", "move": "place"}.get(change)
        if target:
            assert example.inputs[1].endswith(getattr(*new, target))
            assert {(s.kind, s.size) for s in gone} == {(s.kind, s.size) for s in new}


def test_plan_says_facts_then_the_resolved_caption():
    rng = random.Random(0)
    pattern = re.compile(r"<think>(?P<facts>.+\.)</think> (?P<caption>[^<>]+)")
    for _ in range(300):
        example = sample(rng, "think", side=16)
        found = pattern.fullmatch(example.outputs[0])
        assert (found["facts"] == CLEAR) == (example.inputs[0] == found["caption"]) == (example.detail == "clear")
        if example.stated >= {"count", "kind", "color", "size", "place", "background"}:
            assert parse_caption(found["caption"]) == example.scenes[0]


def test_plan_of_an_indirect_prompt_hides_the_answer():
    rng = random.Random(0)
    for _ in range(300):
        example = sample(rng, "think", side=16, detail="indirect")
        answers = re.findall(r"the color (of [a-z ]+) is ([a-z]+)\.", example.outputs[0])
        assert all(sign in example.inputs[0] for sign, _ in answers)
        if len(example.scenes[0].objects) == 1:
            plain = example.inputs[0].replace("light green background", "").replace("light blue background", "")
            assert not any(color in plain.split() for _, color in answers)


def test_motions_keep_to_the_grid_at_both_speeds_in_their_direction():
    rng, speeds = random.Random(4), set()
    for _ in range(200):
        motion = random_motion(rng)
        cells = np.array(motion.centers()) / CELL
        np.testing.assert_allclose(cells, cells.round(), atol=1e-9)
        speed = np.abs(motion.velocity).max() / CELL
        np.testing.assert_allclose(np.array(motion.velocity) / CELL / speed, DIRECTIONS[motion.direction])
        speeds.add(speed)
    assert speeds == set(SPEEDS)


def test_motion_is_straight_even_and_inside_the_picture():
    rng = random.Random(0)
    for _ in range(40):
        motion = random_motion(rng)
        steps = np.diff(np.array(motion.centers()), axis=0)
        np.testing.assert_allclose(steps, np.tile(motion.velocity, (FRAMES - 1, 1)), atol=1e-12)
        for frame in motion.frames(side=128):
            border = np.ones((128, 128), dtype=bool)
            border[1:-1, 1:-1] = False
            assert (np.asarray(frame)[border] == BACKGROUNDS[motion.scene.background]).all()


def test_video_caption_tells_the_direction():
    rng = random.Random(0)
    for _ in range(50):
        example = sample(rng, "video", side=16)
        dx, dy = example.motion.velocity
        words = {"right": dx > 0, "left": dx < 0, "up": dy < 0, "down": dy > 0}
        said = example.inputs[0].split(" moves ")[1].split(" on a ")[0].split()
        assert {word for word, true in words.items() if true} == set(said) - {"and"}
        assert len(example.outputs) == FRAMES
