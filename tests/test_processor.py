"""The processor: segments of texts and images by a model's rules, and latents back, without any weights."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from PIL import Image
from training_world import CONFIG, reference, tokenizer

from bagel.config import MissingHalfError
from bagel.image import PreparedImage, open_image, patch_positions, patchify, prepare_input, to_levels
from bagel.packing import LatentImage, Packed, Text, ViTImage, pack
from bagel.processor import Processor


@pytest.fixture
def processor() -> Processor:
    return Processor(CONFIG, tokenizer())


def gradient(width: int, height: int) -> Image.Image:
    """An image without symmetry."""
    image = Image.new("RGB", (width, height))
    image.putdata([(7 * x % 256, 11 * y % 256, (x + 3 * y) % 256) for y in range(height) for x in range(width)])
    return image


def assert_same(found, wanted) -> None:
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


# Texts ----------------------------------------------------------------------------------------------------------------


def test_a_text_stands_between_bos_and_eos(processor):
    ids = tokenizer().encode("a red circle")
    assert processor.text("a red circle").ids.tolist() == [tokenizer().bos_id, *ids, tokenizer().eos_id]
    assert_same(processor.written(ids), processor.text("a red circle"))
    assert isinstance(processor.written([]), Text)


def test_special_tokens_in_a_text_are_spelled_out_where_they_are_not_allowed(processor):
    assert processor.text("<|im_start|>").length == 3
    assert processor.text("<|im_start|>", allow_special=False).length > 3


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [False, True])
def test_preparing_an_image_follows_the_models_rules(processor, once):
    image = gradient(19, 30)
    wanted = prepare_input(
        image, vae_rule=CONFIG.vae_image_transform, vit_rule=CONFIG.vit_image_transform, patch_size=2, once=once
    )
    found = processor.prepare(image, once=once)
    assert (found.size, found.vit_grid) == (wanted.size, wanted.vit_grid)
    assert torch.equal(found.vit_patches, wanted.vit_patches)
    assert torch.equal(found.vae_levels, wanted.vae_levels)


def test_an_image_is_turned_upright_unless_told_otherwise(processor):
    image = gradient(16, 8)
    image.getexif()[0x0112] = 6
    assert processor.prepare(image).size == (8, 16)
    assert processor.prepare(image, exif=False).size == (16, 8)
    assert processor.pixels(image).shape == (3, 16, 8)


def test_an_image_prepared_or_not_is_seen_alike(processor):
    image = gradient(30, 19)
    prepared = processor.prepare(image)
    seen = processor.see(image)
    assert isinstance(prepared, PreparedImage)
    assert_same(processor.see(prepared), seen)
    assert seen.patches.dtype == torch.uint8
    assert torch.equal(seen.position_ids, patch_positions(*prepared.vit_grid, 4))
    assert torch.equal(processor.pixels(image), processor.pixels(prepared))


def test_pixels_of_an_image_of_the_right_size_are_its_own(processor):
    image = gradient(16, 8)
    assert torch.equal(processor.pixels(image), to_levels(open_image(image)))


def test_a_model_without_vision_prepares_no_image_but_has_its_pixels():
    blind = Processor(dataclasses.replace(CONFIG, visual_und=False), tokenizer())
    for call in (blind.prepare, blind.see):
        with pytest.raises(MissingHalfError, match="cannot see images"):
            call(gradient(8, 8))
    assert blind.pixels(gradient(16, 8)).shape == (3, 8, 16)


# Latents --------------------------------------------------------------------------------------------------------------


def test_latents_become_tokens_with_their_cells_and_come_back(processor):
    z = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    segment = processor.latents(z)
    assert isinstance(segment, LatentImage)
    assert torch.equal(segment.latents, patchify(z, 2))
    assert segment.position_ids.tolist() == [0, 1, 2, 4, 5, 6]
    assert torch.equal(processor.image(segment.latents, 8, 12), z)


def test_the_grid_counts_latent_tokens_of_pixels(processor):
    assert processor.grid(8, 12).tolist() == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="an image of 8x20 pixels does not fit"):
        processor.grid(8, 20)
    wide = Processor(dataclasses.replace(CONFIG, interpolate_pos=True), tokenizer())
    assert wide.grid(8, 20).shape == (10,)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 8), "height must be a positive multiple of 4, got 6; the nearest is 8"),
        ((8, 0), "width must be a positive multiple of 4, got 0; the nearest is 4"),
        ((8, 20), "does not fit"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(processor, size, message):
    processor.check_size(8, 16)
    with pytest.raises(ValueError, match=message):
        processor.check_size(*size)


def test_the_default_side_is_the_largest_that_was_trained(processor):
    assert processor.default_side == 16
    assert Processor(dataclasses.replace(CONFIG, max_latent_size=4096), tokenizer()).default_side == 1024


# Sequences ------------------------------------------------------------------------------------------------------------


def test_packing_puts_the_models_own_tokens_around_images(processor):
    samples = [[processor.text("a"), processor.see(gradient(8, 8))], [processor.text("b")]]
    packed = processor.pack(samples, starts=[2, 3])
    assert isinstance(packed, Packed)
    assert processor.image_tokens == (tokenizer().image_start_id, tokenizer().image_end_id)
    wanted = pack(samples, image_tokens=processor.image_tokens, starts=[2, 3])
    assert_same(packed, wanted)


def test_a_processor_survives_pickling(processor):
    again = pickle.loads(pickle.dumps(processor))
    assert again.config == CONFIG
    assert_same(again.text("a red circle, 圆"), processor.text("a red circle, 圆"))
    assert_same(again.see(gradient(8, 8)), processor.see(gradient(8, 8)))
    assert isinstance(again.see(gradient(8, 8)), ViTImage)


@pytest.mark.parametrize("name", ["tiny", "variant_moe"])
def test_the_released_sizes_draw_squares_of_the_table(name):
    _, _, processor = reference(name)
    assert processor.default_side == min(1024, processor.config.max_latent_size * 16)
