from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from bagel.evaluation.judge import judge, read, read_scene, shape_center, unchanged_psnr
from bagel.evaluation.language import ATTRIBUTES
from bagel.evaluation.motion import random_motion
from bagel.evaluation.render import render
from bagel.evaluation.samples import sample
from bagel.evaluation.scene import SPLITS, Scene, Shape, random_scene

RED = Shape("circle", "red", "large", "top left")
BLUE = Shape("square", "blue", "small", "right")
SCENE = Scene((RED, BLUE), "white")


def worn(image: Image.Image, noise: np.random.Generator, *, sigma: float = 6.0, blur: float = 0.6) -> Image.Image:
    """What an autoencoder of about 32 dB may leave of an image."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    return Image.fromarray(np.clip(pixels + noise.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8))


def share_right(count: int, side: int, *, is_worn: bool) -> float:
    rng, noise = random.Random(side), np.random.default_rng(side)
    right = 0
    for i in range(count):
        scene = random_scene(rng, objects=1 + i % 3, split=SPLITS[i // 3 % 3])
        image = render(scene, side=side)
        right += judge(worn(image, noise) if is_worn else image, scene).all_right
    return right / count


@pytest.mark.parametrize("side", [64, 96])
def test_judge_reads_clean_images_without_a_mistake(side):
    assert share_right(240, side, is_worn=False) == 1


@pytest.mark.parametrize("side", [64, 96])
def test_judge_reads_worn_images_almost_always_right(side):
    assert share_right(500, side, is_worn=True) >= 0.995


def test_read_scene_finds_what_was_drawn():
    assert read_scene(render(SCENE)) == SCENE


def test_read_scene_of_a_bare_background_is_empty():
    assert read_scene(render(Scene((), "gray"))) == Scene((), "gray")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"color": "pink"}, {"color"}),
        ({"kind": "cross"}, {"kind"}),
        ({"size": "small"}, {"size"}),
        ({"place": "left"}, {"place", "relation"}),
        ({"place": "top"}, {"place"}),
    ],
)
def test_judge_names_the_one_attribute_that_is_wrong(change, wrong):
    looks = {"kind": "circle", "color": "red", "size": "large", "place": "top left"}
    drawn = Scene((Shape(**{**looks, **change}), BLUE), "white")
    right = judge(render(drawn), SCENE).right
    assert {name for name in ATTRIBUTES if not right[name]} == wrong


def test_judge_names_a_wrong_background():
    right = judge(render(Scene((RED, BLUE), "light blue")), SCENE).right
    assert {name for name in ATTRIBUTES if not right[name]} == {"background"}


def test_judge_of_a_missing_shape_grants_only_the_background():
    right = judge(render(Scene((RED,), "white")), SCENE).right
    assert {name for name in ATTRIBUTES if right[name]} == {"background"}


def test_judge_of_a_shape_too_many_denies_only_the_count():
    extra = Shape("star", "green", "medium", "bottom")
    right = judge(render(Scene((RED, BLUE, extra), "white")), SCENE).right
    assert {name for name in ATTRIBUTES if not right[name]} == {"count"}


def test_judge_of_two_swapped_colors_denies_the_color():
    swapped = Scene((Shape("circle", "blue", "large", "top left"), Shape("square", "red", "small", "right")), "white")
    assert judge(render(swapped), SCENE, attributes=("kind", "color")).all_right is False


def test_judge_matches_shapes_by_the_judged_attributes_alone():
    elsewhere = Scene((Shape("square", "blue", "large", "top left"), Shape("circle", "red", "small", "right")), "black")
    assert judge(render(elsewhere), SCENE, attributes=("count", "kind", "color")).all_right


def test_judge_of_the_relation_leaves_an_unstated_axis_free():
    above = Scene((Shape("circle", "red", "small", "top"), Shape("square", "blue", "small", "center")), "white")
    slanted = Scene((Shape("circle", "red", "small", "top left"), Shape("square", "blue", "small", "right")), "white")
    assert judge(render(slanted), above, attributes=("kind", "relation")).all_right
    assert not judge(render(above), slanted, attributes=("kind", "relation")).all_right


def test_judge_refuses_an_unknown_attribute():
    with pytest.raises(ValueError, match="got texture"):
        judge(render(SCENE), SCENE, attributes=("texture",))


def test_judge_refuses_an_image_that_is_not_square():
    with pytest.raises(ValueError, match="square images, got 64x48"):
        judge(Image.new("RGB", (64, 48)), SCENE)


@pytest.mark.parametrize("drawing", ["ring", "bar", "half"])
def test_judge_counts_no_figure_that_is_no_shape_of_the_world(drawing):
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if drawing == "ring":
        draw.ellipse((24, 24, 40, 40), outline=(220, 30, 40), width=3)
    elif drawing == "bar":
        draw.rectangle((20, 29, 44, 34), fill=(220, 30, 40))
    else:
        draw.pieslice((24, 24, 40, 40), 0, 180, fill=(220, 30, 40))
    (blob,) = read(image).blobs
    assert not blob.clear
    assert not judge(image, Scene((blob.shape,), "white"), attributes=("count",)).all_right


def test_judge_denies_a_color_outside_the_palette():
    image = Image.fromarray(np.where(np.asarray(render(SCENE)) == (220, 30, 40), (90, 90, 90), 255).astype(np.uint8))
    assert not judge(image, Scene((RED,), "white"), attributes=("color",)).all_right


@pytest.mark.parametrize("task", ["t2i1", "t2i2", "t2i3", "edit", "think"])
def test_judge_agrees_with_the_images_of_samples(task):
    rng = random.Random(0)
    for _ in range(30):
        example = sample(rng, task, "held_out")
        assert judge(example.outputs[-1], example.scenes[-1], attributes=example.stated).all_right


def test_shape_center_follows_a_motion_within_a_quarter_of_a_pixel():
    rng, noise = random.Random(0), np.random.default_rng(0)
    for _ in range(12):
        motion = random_motion(rng)
        found = [shape_center(worn(frame, noise)) for frame in motion.frames(side=96)]
        np.testing.assert_allclose(found, 96 * np.array(motion.centers()), atol=0.25)


def test_shape_center_of_an_empty_image_is_none():
    assert shape_center(render(Scene((), "white"))) is None


def test_unchanged_psnr_ignores_the_edited_region():
    after = Scene((Shape("star", "green", "large", "top left"), BLUE), "white")
    assert unchanged_psnr(render(SCENE), render(after), SCENE, after) == np.inf


def test_unchanged_psnr_measures_the_untouched_pixels():
    after = Scene((RED,), "white")
    brighter = Image.fromarray(np.clip(np.asarray(render(after)).astype(int) - 10, 0, 255).astype(np.uint8))
    expected = 20 * np.log10(255 / 10)
    assert unchanged_psnr(render(SCENE), brighter, SCENE, after) == pytest.approx(expected, abs=0.1)


def test_unchanged_psnr_of_a_new_background_looks_at_the_objects():
    after = Scene((RED, BLUE), "black")
    faded = Image.fromarray(np.where(np.asarray(render(after)) == (220, 30, 40), (200, 30, 40), 0).astype(np.uint8))
    assert unchanged_psnr(render(SCENE), render(after), SCENE, after) == np.inf
    assert unchanged_psnr(render(SCENE), faded, SCENE, after) < 30
