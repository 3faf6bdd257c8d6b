"""Images that cannot be used: missing, broken, cut short, empty, too large."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from bagel.image import ImageError, open_image


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def png() -> bytes:
    file = io.BytesIO()
    noise().save(file, "PNG")
    return file.getvalue()


def refusal(path) -> str:
    """The one line that refuses a file; it names the file."""
    with pytest.raises(ImageError) as error:
        open_image(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file_and_folder_are_no_images(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.png")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_no_images(tmp_path, content):
    (tmp_path / "note.png").write_bytes(content)
    assert "not an image in a format that PIL knows" in refusal(tmp_path / "note.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_image_is_an_error(tmp_path, suffix):
    noise().save(path := tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(path)
    assert "cannot be read, it may be broken or cut short" in message or "not an image" in message


def test_broken_image_is_an_error(tmp_path):
    content = bytearray(png())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / "flipped.png")


def test_given_image_that_breaks_on_loading_is_an_error():
    content = png()
    complaint = r"the given image \(RGB, 50x40\): the image cannot be read"
    with Image.open(io.BytesIO(content[: len(content) // 2])) as lazy, pytest.raises(ImageError, match=complaint):
        open_image(lazy)


@pytest.mark.parametrize("limit", [990, 1500])  # PIL raises above twice its limit, and only warns below
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_decompression_bomb_is_an_error(tmp_path, monkeypatch, limit, action):
    (tmp_path / "bomb.png").write_bytes(png())  # 2000 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        assert f"more than {limit} pixels" in refusal(tmp_path / "bomb.png")


def test_image_at_the_pixel_limit_opens(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert open_image(tmp_path / "large.png").size == (50, 40)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_empty_image_is_an_error(size):
    with pytest.raises(ImageError, match="the image is empty"):
        open_image(Image.new("RGB", size))


def test_other_types_are_no_images():
    with pytest.raises(ImageError, match="must be a path or a PIL image, got ndarray"):
        open_image(np.zeros((4, 4, 3)))  # pyright: ignore[reportArgumentType]
