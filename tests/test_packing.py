"""Packing: small samples written out (positions, order, splits, masks), laws on random ones, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Layout, Packed, Text, Tokens, ViTImage, pack, sees

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


def test_an_empty_text_is_a_split_of_no_tokens():
    packed = packed_of([vit(2), Text(torch.empty(0, dtype=torch.long))])
    assert splits(packed) == [(4, "full"), (0, "causal")]
    assert packed.vit_rows.tolist() == [1, 2]
    assert packed.next_positions == (1,)


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


@pytest.mark.parametrize(
    ("segment", "length", "advance"),
    [
        (text(7, 8, 9), 3, 3),
        (vit(4), 6, 1),
        (latents(4), 6, 1),
        (latents(4, noisy=True), 6, 0),
        (Frames((latents(1), latents(2)), (3,)), 7, 4),
        (Frames((latents(1), latents(2, noisy=True)), (3,)), 7, 3),
        (DroppedImage(), 0, 1),
    ],
)
def test_a_segment_knows_its_length_and_how_far_it_advances_the_position(segment, length, advance):
    assert (segment.length, segment.advance) == (length, advance)
    packed = packed_of([segment], starts=[10])
    assert (packed.layout.lengths, packed.next_positions) == ((length,), (10 + advance,))


def test_targets_are_the_gen_rows_that_have_a_velocity():
    noisy = latents(2, noisy=True, timestep=0.5, velocity=torch.full((2, LATENT), 3.0))
    packed = packed_of([latents(3), noisy], [noisy])
    assert packed.target_rows.tolist() == [3, 4, 5, 6]
    assert packed.velocity.shape == (4, LATENT)


# Laws -----------------------------------------------------------------------------------------------------------------

COUNT = st.integers(1, 4)
END_LABEL = st.none() | st.just(5)


def segment_text(count: int, labelled: bool, weighted: bool) -> Text:
    labels = torch.tensor([IGNORE, *range(30, 29 + count)]) if labelled else None
    return text(*range(count), labels=labels, weights=torch.arange(count) / 4 if weighted else None)


def segment_latents(count: int, noisy: bool, end_label: int | None) -> LatentImage:
    velocity = torch.ones(count, LATENT) if noisy else None
    return latents(count, noisy=noisy, timestep=0.5 * noisy, velocity=velocity, end_label=end_label)


LATENT_IMAGE = st.builds(segment_latents, COUNT, st.booleans(), END_LABEL)
SEGMENT = st.one_of(
    st.builds(segment_text, COUNT, st.booleans(), st.booleans()),
    st.builds(lambda count, label: ViTImage(torch.zeros(count, PATCH), torch.arange(count), label), COUNT, END_LABEL),
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


class Twin:
    """Every token of samples in sequence order, one by one from the definitions."""

    def __init__(self, samples, starts) -> None:
        self.tokens: list[dict] = []
        self.next_positions = []
        for sample, segments in enumerate(samples):
            position, split = starts[sample], 0
            for segment in segments:
                self.place = {"sample": sample, "split": split}
                position = self.segment(segment, position)
                split += not isinstance(segment, DroppedImage)
            self.next_positions.append(position)

    def segment(self, segment, position: int) -> int:
        if isinstance(segment, DroppedImage):
            return position + 1
        if isinstance(segment, Frames):
            for image, delta in zip(segment.images, (0, *segment.deltas), strict=True):
                position += delta
                self.image(image, "full", position)
            return position + (not segment.images[-1].noisy)
        if not isinstance(segment, Text):
            noisy = isinstance(segment, LatentImage) and segment.noisy
            self.image(segment, "noise" if noisy else "full", position)
            return position + (not noisy)
        for index, id_ in enumerate(segment.ids.tolist()):
            label = IGNORE if segment.labels is None else segment.labels[index].item()
            weight = 1.0 if segment.weights is None else segment.weights[index].item()
            self.token("causal", position + index, id=id_, label=label, weight=weight)
        return position + len(segment.ids)

    def image(self, image, rule: str, position: int) -> None:
        self.token(rule, position, id=START)
        for _ in image.position_ids:
            if isinstance(image, LatentImage):
                self.token(rule, position, gen=True, time=image.timestep, aimed=image.velocity is not None)
            else:
                self.token(rule, position)
        self.token(rule, position, id=END, label=IGNORE if image.end_label is None else image.end_label)

    def token(self, rule: str, position: int, **values) -> None:
        token = {"id": None, "label": IGNORE, "weight": 1.0, "gen": False, "number": len(self.tokens), **self.place}
        self.tokens.append({**token, "rule": rule, "position": position, **values})

    @staticmethod
    def sees(query: dict, key: dict) -> bool:
        if query["split"] == key["split"]:
            return query["rule"] != "causal" or key["number"] <= query["number"]
        return key["split"] < query["split"] and key["rule"] != "noise"


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
    assert torch.equal(packed.labels, torch.cat([one.labels for one in single]))
    assert packed.velocity.shape[0] == sum(one.velocity.shape[0] for one in single)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_packing_is_what_a_loop_over_tokens_gives(samples, starts):
    packed, twin = packed_of(*samples, starts=starts), Twin(samples, starts)
    und, gen = ([token for token in twin.tokens if token["gen"] == which] for which in (False, True))
    written = [token for token in und if token["id"] is not None]
    labelled = [token for token in written if token["label"] != IGNORE]
    assert packed.und_positions.tolist() == [token["position"] for token in und]
    assert packed.gen_positions.tolist() == [token["position"] for token in gen]
    assert packed.text_ids.tolist() == [token["id"] for token in written]
    assert packed.text_rows.tolist() == [und.index(token) for token in written]
    assert packed.vit_rows.tolist() == [row for row, token in enumerate(und) if token["id"] is None]
    assert packed.timesteps.tolist() == [token["time"] for token in gen]
    assert packed.label_rows.tolist() == [und.index(token) for token in labelled]
    assert packed.labels.tolist() == [token["label"] for token in labelled]
    assert packed.label_weights.tolist() == [token["weight"] for token in labelled]
    assert packed.target_rows.tolist() == [row for row, token in enumerate(gen) if token["aimed"]]
    assert packed.next_positions == tuple(twin.next_positions)
    tokens = packed.layout.tokens
    assert tokens.sample.tolist() == [token["sample"] for token in twin.tokens]
    assert tokens.split.tolist() == [token["split"] for token in twin.tokens]
    for index, sample in enumerate(packed.samples):
        own = [token for token in twin.tokens if token["sample"] == index]
        assert sample.mask().tolist() == [[twin.sees(query, key) for key in own] for query in own]
        assert torch.equal(packed.layout.mask(index), sample.stream_mask())
        length, advance = (sum(getattr(segment, name) for segment in samples[index]) for name in ("length", "advance"))
        assert (length, advance) == (len(sample), packed.next_positions[index] - starts[index])
    assert packed.layout.lengths == tuple(len(sample) for sample in packed.samples)


@settings(max_examples=30, deadline=None)
@given(SAMPLES)
def test_all_tokens_at_once_see_what_they_see_sample_by_sample(samples):
    packed = packed_of(*samples)
    tokens = packed.layout.tokens.by_row()
    together = sees(tokens.at((..., None)), tokens.at(None))
    num_und = packed.und_positions.shape[0]
    for sample in packed.samples:
        und = torch.arange(sample.und.start, sample.und.stop)
        rows = torch.cat([und, torch.arange(num_und + sample.gen.start, num_und + sample.gen.stop)])
        assert torch.equal(together[rows][:, rows], sample.stream_mask())
        together[rows[:, None], rows] = False
    assert not together.any()  # nobody sees another sample


# Layouts --------------------------------------------------------------------------------------------------------------


def test_a_layout_of_tokens_is_that_of_texts_of_one_token():
    layout, packed = Layout.of_tokens(3), packed_of(*[[text(7)]] * 3)
    assert layout == packed.layout
    assert [(s.und, s.gen, splits(packed)) for s in layout.samples] == [
        (slice(row, row + 1), slice(0, 0), [(1, "causal")]) for row in range(3)
    ]


def test_a_layout_makes_its_tokens_when_they_are_asked_for_and_takes_them_along():
    layout = packed_of([text(7), latents(1, noisy=True)]).layout
    assert layout.to("meta") is layout
    assert layout.tokens is layout.tokens
    moved = layout.to("meta")
    assert moved.samples == layout.samples
    assert [values.device.type for values in moved.tokens] == ["meta"] * len(Tokens._fields)
    assert layout.tokens.noise.tolist() == [False, True, True, True]


def test_moving_keeps_every_tensor():
    packed = packed_of([text(1, labels=torch.tensor([2])), vit(2), latents(1, velocity=torch.ones(1, LATENT))])
    moved = packed.to("meta")
    for name, value in vars(packed).items():
        if isinstance(value, torch.Tensor):
            assert (getattr(moved, name).device.type, getattr(moved, name).shape) == ("meta", value.shape), name
    assert moved.samples == packed.samples


@pytest.mark.parametrize("computed", [False, True])
def test_a_packed_batch_is_a_tree_of_tensors_and_its_layout_a_structure(computed):
    packed = packed_of([text(1, 2), vit(2)], [latents(3)])
    if computed:
        assert packed.layout.tokens.rows.shape == (11,)
    leaves, structure = tree_flatten(packed)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == (21 if computed else 15)
    assert [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)] == [2]  # vit_lengths
    again = tree_unflatten(leaves, structure)
    assert (again.layout.runs, again.next_positions) == (packed.layout.runs, packed.next_positions)
    assert again.samples == packed.samples
    assert tree_flatten(packed_of([text(1, 2, 3)]))[1] != structure


class LatentsSeen(torch.nn.Module):
    """Sums, for each sample, the latents that its last und token sees."""

    def forward(self, packed: Packed) -> torch.Tensor:
        sums = []
        for index, sample in enumerate(packed.samples):
            und = sample.und.stop - sample.und.start
            seen = packed.layout.mask(index)[und - 1, und:].float()
            sums.append(seen @ packed.latents[sample.gen].sum(1) * len(sample) / 4)
        return torch.stack(sums)


def test_a_program_exported_for_a_layout_takes_other_values():
    first, second = (packed_of([text(7, 8), latents(2, value=value)], [vit(2)]) for value in (1.0, 3.0))
    program = torch.export.export(LatentsSeen(), (first,))
    assert torch.equal(program.module()(second), LatentsSeen()(second))
    assert program.module()(second).tolist() == [36, 0]
    structure = tree_flatten(first)[1]
    assert treespec_loads(treespec_dumps(structure)) == structure


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
