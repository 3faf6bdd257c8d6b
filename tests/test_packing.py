"""Packing: small samples written out (positions, order, splits, masks), laws on random ones, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Packed, Text, ViTImage, pack

START, END = 91, 92
IMAGE_TOKENS = (START, END)
PATCH, LATENT = 6, 4


def text(*ids: int, **options) -> Text:
    return Text(torch.tensor(ids), **options)


def vit(count: int, *, value: float = 0.0) -> ViTImage:
    return ViTImage(torch.full((count, PATCH), value), torch.arange(count) * 10)


def latents(count: int, *, value: float = 0.0, **options) -> LatentImage:
    return LatentImage(torch.full((count, LATENT), value), torch.arange(count) * 20, **options)


def packed_of(*samples, **options) -> Packed:
    return pack(samples, image_tokens=IMAGE_TOKENS, **options)


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def positions(packed: Packed) -> list[int]:
    """Rotary positions in sequence order."""
    return torch.cat([packed.und_positions, packed.gen_positions])[packed.order].tolist()


def splits(packed: Packed, sample: int = 0) -> list[tuple[int, str]]:
    return [(split.length, split.attention) for split in packed.samples[sample].splits]


# Literals -------------------------------------------------------------------------------------------------------------


def test_text_is_causal_with_a_position_for_each_token():
    packed = packed_of([text(7, 8, 9)])
    assert packed.text_ids.tolist() == [7, 8, 9]
    assert packed.text_rows.tolist() == [0, 1, 2]
    assert positions(packed) == [0, 1, 2]
    assert splits(packed) == [(3, "causal")]
    assert drawn(packed.samples[0].mask()) == ["x..", "xx.", "xxx"]
    assert packed.next_positions == (3,)
    assert packed.gen_positions.shape == (0,)
    assert packed.latents.shape[0] == packed.vit_patches.shape[0] == 0


def test_patches_of_8_bits_stay_so_and_are_scaled_beside_others():
    levels = ViTImage(torch.tensor([[0, 51, 255, 204]], dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    floats = ViTImage(torch.tensor([[-0.6, 0.2, 0.0, 1.0]]), torch.zeros(1, dtype=torch.long))
    assert torch.equal(packed_of([levels]).vit_patches, levels.patches)
    both = packed_of([levels, floats]).vit_patches
    torch.testing.assert_close(both, torch.tensor([[-1.0, -0.6, 1.0, 0.6], [-0.6, 0.2, 0.0, 1.0]]))


def test_vit_image_has_one_position_and_full_attention():
    packed = packed_of([text(7, 8), vit(3), text(9)])
    assert packed.text_ids.tolist() == [7, 8, START, END, 9]
    assert packed.text_rows.tolist() == [0, 1, 2, 6, 7]
    assert packed.vit_rows.tolist() == [3, 4, 5]
    assert packed.vit_position_ids.tolist() == [0, 10, 20]
    assert packed.vit_lengths == (3,)
    assert positions(packed) == [0, 1, 2, 2, 2, 2, 2, 3]
    assert splits(packed) == [(2, "causal"), (5, "full"), (1, "causal")]
    assert packed.order.tolist() == list(range(8))
    assert packed.next_positions == (4,)
    # fmt: off
    assert drawn(packed.samples[0].mask()) == [
        "x.......",
        "xx......",
        "xxxxxxx.",
        "xxxxxxx.",
        "xxxxxxx.",
        "xxxxxxx.",
        "xxxxxxx.",
        "xxxxxxxx",
    ]
    # fmt: on


def test_clean_and_noisy_latents_go_to_the_gen_stream_and_their_tokens_to_the_und_stream():
    packed = packed_of([text(7, 8), latents(2, value=0.5), latents(3, value=-1.0, timestep=0.25, noisy=True), text(9)])
    assert packed.text_ids.tolist() == [7, 8, START, END, START, END, 9]
    assert packed.text_rows.tolist() == list(range(7))
    assert packed.latents[:, 0].tolist() == [0.5, 0.5, -1, -1, -1]
    assert packed.latent_position_ids.tolist() == [0, 20, 0, 20, 40]
    assert packed.timesteps.tolist() == [0, 0, 0.25, 0.25, 0.25]
    assert packed.und_positions.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert packed.gen_positions.tolist() == [2, 2, 3, 3, 3]
    assert packed.order.tolist() == [0, 1, 2, 7, 8, 3, 4, 9, 10, 11, 5, 6]
    assert splits(packed) == [(2, "causal"), (4, "full"), (5, "noise"), (1, "causal")]


def test_a_noisy_image_is_seen_by_no_later_segment_and_does_not_advance_the_position():
    packed = packed_of([text(7), latents(1, noisy=True), latents(1), text(8, 9)])
    assert positions(packed) == [0, 1, 1, 1, 1, 1, 1, 2, 3]
    assert packed.next_positions == (4,)
    assert drawn(packed.samples[0].mask()) == [
        "x........",
        "xxxx.....",
        "xxxx.....",
        "xxxx.....",
        "x...xxx..",
        "x...xxx..",
        "x...xxx..",
        "x...xxxx.",
        "x...xxxxx",
    ]


def test_stream_mask_is_drawn_over_und_then_gen_tokens():
    packed = packed_of([text(7), latents(1, noisy=True), text(8)])
    sample = packed.samples[0]
    assert sample.order.tolist() == [0, 1, 4, 2, 3]
    assert drawn(sample.mask()) == ["x....", "xxxx.", "xxxx.", "xxxx.", "x...x"]
    assert drawn(sample.stream_mask()) == ["x....", "xxx.x", "xxx.x", "x..x.", "xxx.x"]


def test_frames_are_one_full_split_with_positions_by_their_distances():
    frames = Frames((latents(1), latents(2), latents(1)), deltas=(3, 1))
    packed = packed_of([text(7), frames, text(8)])
    assert positions(packed) == [0, 1, 1, 1, 4, 4, 4, 4, 5, 5, 5, 6]
    assert splits(packed) == [(1, "causal"), (10, "full"), (1, "causal")]
    assert packed.text_ids.tolist() == [7, START, END, START, END, START, END, 8]
    mask = drawn(packed.samples[0].mask())
    assert mask[1] == mask[10] == "x" * 11 + "."
    assert mask[11] == "x" * 12


def test_noisy_frames_are_seen_by_later_segments():
    packed = packed_of([Frames((latents(1, noisy=True, timestep=0.5), latents(1, noisy=True)), deltas=(2,)), text(8)])
    assert drawn(packed.samples[0].mask())[6] == "x" * 7
    assert packed.timesteps.tolist() == [0.5, 0]


def test_a_dropped_image_has_no_tokens_but_advances_the_position():
    packed = packed_of([text(7), DroppedImage(), DroppedImage(), text(8)])
    assert positions(packed) == [0, 3]
    assert splits(packed) == [(1, "causal"), (1, "causal")]
    assert packed.next_positions == (4,)


def test_starts_shift_each_samples_own_positions():
    packed = packed_of([text(7, 8)], [vit(1), latents(1)], starts=[5, 30])
    assert packed.und_positions.tolist() == [5, 6, 30, 30, 30, 31, 31]
    assert packed.gen_positions.tolist() == [31]
    assert packed.next_positions == (7, 32)


def test_samples_are_contiguous_slices_of_both_streams():
    first, second = [latents(2, value=1.0), text(7)], [vit(2), latents(1, value=2.0)]
    packed = packed_of(first, second)
    assert [(s.und, s.gen) for s in packed.samples] == [(slice(0, 3), slice(0, 2)), (slice(3, 9), slice(2, 3))]
    assert packed.samples[1].order.tolist() == [0, 1, 2, 3, 4, 6, 5]
    assert packed.order.tolist() == [0, 9, 10, 1, 2, 3, 4, 5, 6, 7, 11, 8]
    assert packed.latents[:, 0].tolist() == [1, 1, 2]


def test_labels_keep_only_the_rows_with_a_loss_with_weights_of_one_by_default():
    labelled = text(7, 8, 9, labels=torch.tensor([8, IGNORE, 5]))
    weighted = text(4, 5, labels=torch.tensor([IGNORE, 6]), weights=torch.tensor([0.5, 0.25]))
    packed = packed_of([text(1, 2), labelled], [latents(1), weighted])
    assert packed.label_rows.tolist() == [2, 4, 8]
    assert packed.labels.tolist() == [8, 5, 6]
    assert packed.label_weights.tolist() == [1, 1, 0.25]


def test_a_closing_image_token_can_have_a_label():
    seen = ViTImage(torch.zeros(2, PATCH), torch.arange(2), end_label=7)
    packed = packed_of([text(1), seen, latents(3, end_label=8), latents(1)])
    assert packed.label_rows.tolist() == [4, 6]
    assert packed.text_ids[[2, 4]].tolist() == [END, END]
    assert packed.labels.tolist() == [7, 8]
    assert packed.label_weights.tolist() == [1, 1]


def test_targets_are_the_gen_rows_that_have_a_velocity():
    noisy = latents(2, noisy=True, timestep=0.5, velocity=torch.full((2, LATENT), 3.0))
    packed = packed_of([latents(3), noisy], [noisy])
    assert packed.target_rows.tolist() == [3, 4, 5, 6]
    assert packed.velocity.shape == (4, LATENT)


# Laws -----------------------------------------------------------------------------------------------------------------

COUNT = st.integers(1, 4)
LATENT_IMAGE = st.builds(lambda count, noisy: latents(count, noisy=noisy, timestep=0.5 * noisy), COUNT, st.booleans())
SEGMENT = st.one_of(
    COUNT.map(lambda count: text(*range(count))),
    COUNT.map(vit),
    LATENT_IMAGE,
    st.lists(LATENT_IMAGE, min_size=1, max_size=3).map(lambda images: Frames(tuple(images), (2,) * (len(images) - 1))),
    st.just(DroppedImage()),
)
SAMPLES = st.lists(st.lists(SEGMENT, min_size=1, max_size=5), min_size=1, max_size=3)


def pieces(segment) -> list[tuple[str, int]]:
    """The experts of a segment's tokens in order, as (name, count)."""
    if isinstance(segment, Text):
        return [("und", segment.ids.shape[0])]
    if isinstance(segment, ViTImage):
        return [("und", segment.patches.shape[0] + 2)]
    images = segment.images if isinstance(segment, Frames) else (segment,) if isinstance(segment, LatentImage) else ()
    return [piece for image in images for piece in (("und", 1), ("gen", image.latents.shape[0]), ("und", 1))]


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_every_token_appears_once_in_order_and_in_its_experts_stream(samples):
    packed = packed_of(*samples)
    experts = [[name for segment in sample for name, n in pieces(segment) for _ in range(n)] for sample in samples]
    every = [name for sample in experts for name in sample]
    num_und = every.count("und")
    assert packed.und_positions.shape[0] == num_und
    assert packed.gen_positions.shape[0] == packed.latents.shape[0] == packed.timesteps.shape[0] == every.count("gen")
    order = packed.order.tolist()
    assert sorted(order) == list(range(len(every)))
    assert ["und" if row < num_und else "gen" for row in order] == every
    for rows in ([r for r in order if r < num_und], [r for r in order if r >= num_und]):
        assert rows == sorted(rows)
    assert sorted(torch.cat([packed.text_rows, packed.vit_rows]).tolist()) == list(range(num_und))
    for sample, own in zip(packed.samples, experts, strict=True):
        assert len(sample) == len(own)
        assert sample.und.stop - sample.und.start == own.count("und")


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_stream_mask_is_a_permutation_of_the_mask(samples):
    for sample in packed_of(*samples).samples:
        if len(sample) == 0:
            continue
        mask, stream, order = sample.mask(), sample.stream_mask(), sample.order.tolist()
        assert mask.diagonal().all()
        assert all(stream[order[i], order[j]] == mask[i, j] for i in range(len(order)) for j in range(len(order)))


@settings(max_examples=60, deadline=None)
@given(SAMPLES)
def test_a_batch_is_its_samples_one_after_the_other(samples):
    packed = packed_of(*samples)
    single = [packed_of(sample) for sample in samples]
    for name in ("und_positions", "gen_positions", "text_ids", "latent_position_ids", "vit_position_ids", "timesteps"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(one, name) for one in single])), name
    assert packed.next_positions == tuple(one.next_positions[0] for one in single)
    assert [s.splits for s in packed.samples] == [one.samples[0].splits for one in single]
    assert [s.order.tolist() for s in packed.samples] == [one.samples[0].order.tolist() for one in single]


def test_moving_keeps_every_tensor():
    packed = packed_of([text(1, labels=torch.tensor([2])), vit(2), latents(1, velocity=torch.ones(1, LATENT))])
    moved = packed.to("meta")
    for name, value in vars(packed).items():
        if isinstance(value, torch.Tensor):
            assert (getattr(moved, name).device.type, getattr(moved, name).shape) == ("meta", value.shape), name
    assert moved.samples == packed.samples


# Errors ---------------------------------------------------------------------------------------------------------------


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        packed_of()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (ViTImage(torch.zeros(3, PATCH), torch.arange(2)), "ViTImage: 3 patches but 2 position ids"),
        (LatentImage(torch.zeros(3, LATENT), torch.arange(4)), "LatentImage: 3 patches but 4 position ids"),
        (Frames((LatentImage(torch.zeros(1, LATENT), torch.arange(4)),), ()), "1 patches but 4 position ids"),
        (text(1, 2, labels=torch.tensor([1])), "Text: 2 ids but 1 labels"),
        (text(1, 2, labels=torch.tensor([1, 2]), weights=torch.ones(1)), "Text: 2 ids but 1 weights"),
        (latents(3, velocity=torch.zeros(1, LATENT)), r"LatentImage: latents \(3, 4\) but velocity \(1, 4\)"),
    ],
)
def test_tensors_of_different_lengths_are_an_error(segment, message):
    with pytest.raises(ValueError, match=message):
        packed_of([segment])


@pytest.mark.parametrize(("count", "deltas"), [(0, ()), (2, ()), (1, (1,))])
def test_frames_need_one_delta_fewer_than_frames(count, deltas):
    with pytest.raises(ValueError, match=f"got {count} frames and {len(deltas)} deltas"):
        Frames(tuple(latents(1) for _ in range(count)), deltas)
