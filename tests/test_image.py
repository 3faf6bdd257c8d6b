"""Images: the reference numbers, laws of sizes, patches and positions, and images that are odd."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE, golden, golden_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bagel.config import ImageTransform
from bagel.image import (
    ImageError,
    in_unit,
    open_image,
    patch_positions,
    patchify,
    prepare_input,
    resize,
    resized_size,
    to_image,
    to_levels,
    to_pixels,
    to_rgb,
    unpatchify,
)

NAMES = ("landscape", "portrait", "rgba", "palette", "grey", "wide")
VAE_RULE = ImageTransform(1024, 512, 16)
VIT_RULE = ImageTransform(980, 224, 14)


def rules(variant: str) -> dict[str, ImageTransform]:
    config = json.loads((REFERENCE / variant / "checkpoint" / "config.json").read_text())
    return {
        "vae_rule": ImageTransform(**config["vae_image_transform"]),
        "vit_rule": ImageTransform(**config["vit_image_transform"]),
    }


def golden_image(variant: str, name: str) -> Image.Image:
    return open_image(REFERENCE / variant / "golden" / f"input_{name}.png")


def levels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def colours(width: int = 7, height: int = 5) -> Image.Image:
    """An image in which every pixel differs."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([10 * x, 20 * y, 100 + x * y], axis=-1).astype(np.uint8))


# The reference ------------------------------------------------------------------------------------------------------


def test_resized_size_gives_the_reference_sizes(variant):
    for table in golden_json(variant, "image_sizes"):
        fields = ("max_image_size", "min_image_size", "image_stride", "max_pixels")
        rule = ImageTransform(**{name: table[name] for name in fields})
        for case in table["cases"]:
            size = resized_size(case["width"], case["height"], rule)
            assert size == (case["out_width"], case["out_height"]), (table["transform"], case)


@pytest.mark.parametrize("name", NAMES)
def test_open_image_gives_the_reference_rgb(variant, name):
    assert torch.equal(levels(golden_image(variant, name)), golden(variant, "preprocess")[f"{name}.rgb_uint8"])


@pytest.mark.parametrize("name", NAMES)
def test_resize_gives_the_reference_levels(variant, name):
    resized = resize(golden_image(variant, name), rules(variant)["vae_rule"])
    assert torch.equal(levels(resized), golden(variant, "preprocess")[f"{name}.vae_resized_uint8"])


@pytest.mark.parametrize("name", NAMES)
def test_prepare_input_gives_the_reference_numbers(variant, name):
    wanted = golden(variant, "preprocess")
    prepared = prepare_input(golden_image(variant, name), patch_size=14, **rules(variant))
    torch.testing.assert_close(in_unit(prepared.vae_levels), wanted[f"{name}.vae_pixels"], rtol=0, atol=0)
    patches = patchify(wanted[f"{name}.vit_pixels"], 14)
    torch.testing.assert_close(in_unit(prepared.vit_patches), patches, rtol=0, atol=0)
    if name in ("landscape", "portrait"):
        assert torch.equal(patches, wanted[f"{name}.vit_patches"])
    height, width, _ = wanted[f"{name}.vae_resized_uint8"].shape
    assert prepared.size == (width, height)
    _, vit_height, vit_width = wanted[f"{name}.vit_pixels"].shape
    assert prepared.vit_grid == (vit_height // 14, vit_width // 14)


def test_patch_positions_give_the_reference_ids(variant):
    config = json.loads((REFERENCE / variant / "checkpoint" / "config.json").read_text())
    wanted, interpolate = golden(variant, "components"), config["interpolate_pos"]
    latent = patch_positions(4, 6, config["max_latent_size"], interpolate=interpolate)
    assert torch.equal(latent, wanted["pos.latent_64x96"])
    grids = [(5, 7), (10, 4) if variant == "tiny" else (8, 3)]  # landscape and portrait, packed
    side = config["vit_max_num_patch_per_side"]
    vit = torch.cat([patch_positions(*grid, side, interpolate=interpolate) for grid in grids])
    assert torch.equal(vit, wanted["vit.position_ids"])


def test_prepare_input_once_applies_each_rule_to_the_image_itself():
    image = golden_image("tiny", "portrait")
    vae_rule, vit_rule = rules("tiny")["vae_rule"], rules("tiny")["vit_rule"]
    prepared = prepare_input(image, patch_size=14, once=True, vae_rule=vae_rule, vit_rule=vit_rule)
    assert torch.equal(prepared.vae_levels, to_levels(resize(image, vae_rule)))
    assert torch.equal(prepared.vit_patches, patchify(to_levels(resize(image, vit_rule)), 14))
    twice = prepare_input(image, patch_size=14, vae_rule=vae_rule, vit_rule=vit_rule)
    assert (prepared.vit_grid, twice.vit_grid) == ((9, 3), (10, 4))
    assert prepared.size == twice.size == (64, 176)


# The resize rule ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([VAE_RULE, VIT_RULE]))
def test_resized_size_is_a_multiple_of_the_stride_within_the_maximum(width, height, rule):
    assert resized_size(width, height, rule) == resized_size(height, width, rule)[::-1]
    for side in resized_size(width, height, rule):
        assert side % rule.image_stride == 0
        assert rule.image_stride <= side <= rule.max_image_size


@pytest.mark.parametrize(
    ("size", "wanted"), [((1, 1), (512, 512)), ((2500, 100), (1024, 48)), ((100, 2500), (48, 1024))]
)
def test_resized_size_of_tiny_and_long_images(size, wanted):
    assert resized_size(*size, VAE_RULE) == wanted


def test_resized_size_limits_the_area_linearly():
    assert resized_size(640, 320, ImageTransform(1024, 64, 16, max_pixels=102_400)) == (320, 160)


def test_resized_size_refuses_empty_images():
    with pytest.raises(ValueError, match="at least 1x1 pixels, got 5x0"):
        resized_size(5, 0, VAE_RULE)


def test_resize_keeps_an_image_that_fits():
    image = colours(64, 32)
    assert resize(image, ImageTransform(64, 32, 16)) is image


# Pixels, patches, positions -------------------------------------------------------------------------------------------


def test_to_pixels_maps_levels_to_minus_one_and_one():
    pixels = to_pixels(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    torch.testing.assert_close(pixels, torch.tensor([-1.0, 1.0, -0.6]).reshape(3, 1, 1))


def test_to_image_undoes_to_pixels_up_to_truncation():
    grid = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([grid, grid[::-1], grid.T], axis=-1))
    assert torch.equal(levels(to_image(to_pixels(image) + 1e-6)), levels(image))


def test_to_image_truncates_and_clamps():
    pixels = torch.tensor([-3.0, 3.0, 2 * (100.999 / 255) - 1]).reshape(3, 1, 1)
    assert levels(to_image(pixels)).tolist() == [[[0, 255, 100]]]


def test_to_image_takes_half_precision_with_gradient():
    assert to_image(torch.zeros(3, 4, 6, dtype=torch.bfloat16, requires_grad=True)).size == (6, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_image_refuses_values_that_are_not_finite(value):
    with pytest.raises(ImageError, match="NaN or infinite"):
        to_image(torch.full((3, 2, 2), value))


def test_pixels_refuse_another_shape_or_mode():
    with pytest.raises(ImageError, match=r"shape \(3, H, W\), got \(1, 3, 4, 4\)"):
        to_image(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ImageError, match="got mode L"):
        to_pixels(Image.new("L", (2, 2)))


def test_patchify_orders_row_column_channel():
    x = torch.arange(2 * 2 * 4).reshape(2, 2, 4)  # channel c, row h, column w holds 8c + 4h + w
    assert patchify(x, 2).tolist() == [[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_unpatchify_undoes_patchify(channels, height, width, patch):
    x = torch.arange(channels * height * width * patch**2).reshape(channels, height * patch, width * patch)
    tokens = patchify(x, patch)  # (N, p * p * C)
    assert tokens.shape == (height * width, patch * patch * channels)
    assert torch.equal(unpatchify(tokens, height=height, width=width, patch=patch), x)


def test_patchify_refuses_sides_that_do_not_divide():
    for shape in ((3, 28, 30), (3, 30, 28)):
        with pytest.raises(ValueError, match=f"multiples of 14, got {shape[2]}x{shape[1]}"):
            patchify(torch.zeros(shape), 14)


@pytest.mark.parametrize(
    ("shape", "complaint"), [((5, 12), "3x2 patches are 6 tokens, got 5"), ((6, 13), "4 values a token, got 13")]
)
def test_unpatchify_refuses_tokens_that_do_not_fit(shape, complaint):
    with pytest.raises(ValueError, match=complaint):
        unpatchify(torch.zeros(shape), height=2, width=3, patch=2)


def test_patch_positions_index_the_square_table():
    positions = patch_positions(2, 3, 70)
    assert positions.tolist() == [0, 1, 2, 70, 71, 72]
    assert positions.dtype == torch.int64


def test_interpolated_positions_spread_over_the_table():
    assert patch_positions(2, 3, 6, interpolate=True).tolist() == [0, 2, 4, 18, 20, 22]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(20, 70))
def test_patch_positions_are_unique_and_in_range(rows, cols, side):
    positions = patch_positions(rows, cols, side)
    assert positions.unique().numel() == rows * cols
    assert positions.max() < side**2


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 70))
def test_interpolated_positions_rise_within_the_table(rows, cols, side):
    positions = patch_positions(rows, cols, side, interpolate=True).reshape(rows, cols)
    row, col = positions // side, positions % side
    assert row.min() == col.min() == 0
    assert row.max() < side
    assert (row.diff(dim=0) >= 0).all()
    assert (col.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(("rows", "cols"), [(71, 3), (3, 71)])
def test_positions_off_the_table_are_an_error(rows, cols):
    with pytest.raises(ValueError, match=rf"{rows} rows and {cols} columns .* 70x70: make its sides smaller"):
        patch_positions(rows, cols, 70)
    assert patch_positions(rows, cols, 70, interpolate=True).numel() == rows * cols


def test_positions_of_an_empty_grid_are_an_error():
    with pytest.raises(ValueError, match="at least one row and one column"):
        patch_positions(0, 3, 70, interpolate=True)


# Odd images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBX", "RGBa", "La"]
)
def test_any_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_open_image_leaves_the_given_image_alone():
    image = colours()
    image.info["comment"] = "kept"
    opened = open_image(image)
    opened.paste((0, 0, 0), (0, 0, 7, 5))
    assert image.tobytes() == colours().tobytes()
    assert image.info == {"comment": "kept"}
    assert opened.info == {}


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_alpha_is_pasted_on_white(mode):
    image = Image.new("RGBA", (3, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    image.putpixel((2, 0), (200, 200, 200, 51))
    grey = levels(to_rgb(image.convert(mode)))[0, :, 0].tolist()
    assert grey == [200, 255, 244]


@pytest.mark.parametrize(
    ("mode", "colour", "key"), [("L", 90, 90), ("RGB", (90, 90, 90), (90, 90, 90)), ("P", 90, 90), ("P", 90, bytes(91))]
)
def test_a_transparent_colour_becomes_white(tmp_path, mode, colour, key):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([level for level in range(256) for _ in range(3)])
    image.putpixel((0, 0), colour)
    image.putpixel((1, 0), 200 if mode != "RGB" else (200, 200, 200))
    image.save(tmp_path / "keyed.png", transparency=key)
    assert levels(open_image(tmp_path / "keyed.png"))[0, :, 1].tolist() == [255, 200]


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 128, 129, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert levels(open_image(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


def test_16_bit_grey_keeps_its_transparent_colour(tmp_path):
    Image.fromarray(np.array([[257, 258]], dtype=np.uint16)).save(tmp_path / "deep.png", transparency=257)
    assert levels(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [255, 1]


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 65535), (np.float32, 1)])
def test_deep_grey_is_scaled(dtype, top):
    image = Image.fromarray((np.array([[0, 0.2, 1]]) * top).astype(dtype))
    assert levels(to_rgb(image))[0, :, 2].tolist() == [0, 51, 255]


@pytest.mark.parametrize(
    ("value", "dtype"), [(-1, np.int32), (65536, np.int32), (-0.1, np.float32), (255, np.float32), (np.nan, np.float32)]
)
def test_deep_grey_out_of_range_is_an_error(value, dtype):
    with pytest.raises(ImageError, match=r"must hold values in 0\.\.(1|65535), got"):
        to_rgb(Image.fromarray(np.array([[0, value]], dtype=dtype)))


def test_cmyk_jpeg_opens(tmp_path):
    Image.new("CMYK", (9, 6), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = levels(open_image(tmp_path / "print.jpg"))[3, 4].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((2, 1)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_rotation_is_applied(tmp_path, orientation, suffix):
    stored = np.array(colours())
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}  # EXIF 2.3: the sides of row 0
    turned |= {5: stored, 6: stored[::-1], 7: stored[::-1, ::-1], 8: stored[:, ::-1]}  # and of column 0
    upright = turned[orientation] if orientation < 5 else turned[orientation].transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    colours().save(tmp_path / f"camera.{suffix}", exif=exif)
    opened = open_image(tmp_path / f"camera.{suffix}")
    assert np.array_equal(np.array(opened), upright)
    assert open_image(opened).tobytes() == opened.tobytes()


def test_exif_rotation_can_be_ignored():
    image = colours()
    image.getexif()[0x0112] = 6
    assert open_image(image, exif=False).tobytes() == colours().tobytes() != open_image(image).tobytes()


def test_broken_exif_means_no_rotation():
    image = colours()
    image.info["exif"] = b"Exif\0\0no tiff header"
    assert open_image(image).tobytes() == colours().tobytes()


@pytest.mark.parametrize("size", [(1, 1), (25, 1), (1, 25)])
def test_tiny_and_long_images_are_prepared(size):
    image = open_image(Image.new("RGB", size, (255, 0, 0)))
    prepared = prepare_input(image, patch_size=14, **rules("tiny"))
    rows, cols = prepared.vit_grid
    assert prepared.vit_patches.shape == (rows * cols, 588)
    assert in_unit(prepared.vae_levels)[0].eq(1).all()
