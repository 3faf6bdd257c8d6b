"""From items to packed batches: the official plans, batches in one piece of memory, and both attention masks."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import assert_close, golden, golden_json
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves
from training_world import attending, reference

from bagel.image import patchify
from bagel.modeling import SDPA
from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Packed, Text, ViTImage, pack
from bagel.training.batch import Batch, collate, noised, on_device, padding
from bagel.training.masks import DenseAttention, FlexAttention, _fused, _grouped, attention_of
from bagel.training.samples import (
    Dropout,
    FramesItem,
    LatentItem,
    PixelImage,
    Rules,
    TextItem,
    ViTItem,
    build,
    timestep,
)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")  # what a CPU can do

IMAGE_TOKENS = (91, 92)
PATCH, LATENT = 6, 4
RULES = Rules(bos=7, eos=8, latent_dim=LATENT)


# The official plans ---------------------------------------------------------------------------------------------------


class Official:
    """The items of a golden training step, with the times that were drawn for it."""

    def __init__(self, name: str) -> None:
        self.model, _, self.processor = reference("tiny")
        self.want, self.plan = golden("tiny", name), golden_json("tiny", "cases")[name]
        dropped = Dropout(1.0, 1.0, 1.0) if self.plan.get("dropout") == 1.0 else Dropout(0.0, 0.0, 0.0)
        shift = self.plan.get("timestep_shift", 1.0)
        tokenizer = self.processor.tokenizer
        self.rules = Rules(tokenizer.bos_id, tokenizer.eos_id, 64, shift, dropped, weight_by_length=True)
        sizes = self.want["vit_token_seqlens"].tolist()
        cells = self.want["packed_vit_position_ids"].split(sizes)
        self.vit = iter(list(zip(self.want["packed_vit_tokens"].split(sizes), cells, strict=True)))
        self.logits: list[float] = []
        self.latents = self.clean_latents()

    def clean_latents(self):
        row = 0
        for latent, (h, w) in zip(self.want["padded_latent"], self.plan["patchified_vae_latent_shapes"], strict=True):
            logit = self.want["packed_timesteps"][row].item()
            row += h * w
            yield patchify(latent[:, : 2 * h, : 2 * w], 2), self.processor.grid(16 * h, 16 * w), logit

    def latent(self, item, *, frame: bool = False, first: bool = True) -> LatentItem:
        if item["enable_cfg"] and self.rules.dropout.vae == 1.0:  # dropped: the golden batch has no latents for it
            return LatentItem(torch.empty(1, 64), torch.zeros(1, dtype=torch.long), droppable=True)
        tokens, cells, logit = next(self.latents)
        if item["loss"] and (first or not frame):
            self.logits.append(logit)
        return LatentItem(tokens, cells, loss=bool(item["loss"]))

    def items(self, sample):
        items, texts, frames, deltas = [], iter(sample["text"]), [], []
        for item in sample["plan"]:
            if item["type"] == "text":
                ids = self.processor.tokenizer.encode(next(texts))
                label = item["special_token_label"] if item["special_token_loss"] else None
                items.append(TextItem(ids, bool(item["loss"]), bool(item["enable_cfg"]), label))
            elif item["type"] == "vit_image":
                dropped = item["enable_cfg"] and self.rules.dropout.vit == 1.0
                patches, cells = (torch.empty(1, 588), torch.zeros(1).long()) if dropped else next(self.vit)
                items.append(ViTItem(patches, cells, droppable=bool(item["enable_cfg"])))
            elif "split_start" in item:
                frames.append(self.latent(item, frame=True, first=item["split_start"]))
                deltas += [] if item["split_end"] else [item["frame_delta"]]
                if item["split_end"]:
                    items.append(FramesItem(tuple(frames), tuple(deltas)))
                    frames, deltas = [], []
            else:
                items.append(self.latent(item))
        return items

    def samples(self):
        samples = [self.items(sample) for sample in self.plan["samples"]]
        drawn = iter(self.logits)
        return [build(items, self.rules, random.Random(0), draw=lambda: next(drawn)) for items in samples]


@pytest.mark.parametrize("name", ["train_step", "train_step_mixed"])
def test_items_become_the_official_batch(name):
    official = Official(name)
    want, image_tokens = official.want, official.processor.image_tokens
    samples = official.samples()
    packed = collate(samples, image_tokens=image_tokens).packed
    order = packed.order
    sequence, num_und = torch.argsort(order), packed.und_positions.shape[0]
    assert torch.equal(torch.cat([packed.und_positions, packed.gen_positions])[order], want["packed_position_ids"])
    assert torch.equal(packed.text_ids, want["packed_text_ids"])
    assert torch.equal(sequence[packed.text_rows], want["packed_text_indexes"])
    assert torch.equal(sequence[packed.vit_rows], want["packed_vit_token_indexes"])
    assert torch.equal(packed.latent_position_ids, want["packed_latent_position_ids"])
    assert torch.equal(sequence[packed.label_rows], want["ce_loss_indexes"])
    assert torch.equal(packed.labels, want["packed_label_ids"])
    assert torch.equal(sequence[num_und + packed.target_rows], want["mse_loss_indexes"])
    assert_close(packed.label_weights, want["ce_loss_weights"])
    for index, sample in enumerate(packed.samples):
        assert torch.equal(sample.mask(), want[f"attention_mask{index}"])


@pytest.mark.parametrize("name", ["train_step", "train_step_mixed"])
@pytest.mark.parametrize("kind", ["dense", "flex"])
def test_losses_of_the_official_batch_agree(name, kind):
    official, attention = Official(name), attention_of(kind, device=torch.device("cpu"), dtype=torch.float32)
    batch = collate(official.samples(), image_tokens=official.processor.image_tokens)
    packed = noised(batch.packed, official.want["noise"])
    with torch.no_grad(), attending(official.model, attention):
        losses = official.model.losses(packed)
    assert_close(losses.ce, official.want["ce"])
    assert_close(losses.mse, official.want["mse"])
    if name == "train_step_mixed":  # the other one's loss is not weighted
        assert_close(losses.loss, official.want["loss"])


# Rules ----------------------------------------------------------------------------------------------------------------


def latent_item(count: int = 2, **options) -> LatentItem:
    return LatentItem(torch.arange(count * LATENT).reshape(count, LATENT).float(), torch.arange(count), **options)


def test_a_text_predicts_its_next_ids_and_then_eos():
    (text,) = build([TextItem([3, 4], loss=True)], RULES, random.Random(0))
    assert text.ids.tolist() == [7, 3, 4, 8]
    assert text.labels.tolist() == [3, 4, 8, IGNORE]


def test_a_special_label_is_what_eos_predicts_with_weight_one():
    rules = Rules(bos=7, eos=8, latent_dim=LATENT, weight_by_length=True)
    (text,) = build([TextItem([3, 4, 5], loss=True, special_label=91)], rules, random.Random(0))
    assert text.labels.tolist() == [3, 4, 5, 8, 91]
    assert text.weights.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_a_dropped_image_keeps_its_position_and_a_dropped_text_does_not():
    rules = Rules(bos=7, eos=8, latent_dim=LATENT, dropout=Dropout(1.0, 1.0, 1.0))
    seen = ViTItem(torch.zeros(3, PATCH), torch.arange(3), droppable=True)
    items = [latent_item(droppable=True), seen, TextItem([1], droppable=True), latent_item(loss=True)]
    segments = build(items, rules, random.Random(0))
    assert segments[:2] == [DroppedImage(), DroppedImage()]
    assert len(segments) == 3
    assert collate([segments], image_tokens=IMAGE_TOKENS).packed.gen_positions.tolist() == [2, 2]


@pytest.mark.parametrize(("kind", "rate"), [("text", 0.1), ("vae", 0.3), ("vit", 0.3)])
def test_conditions_are_dropped_at_their_rates(kind, rate):
    items = {
        "text": TextItem([1], droppable=True),
        "vae": latent_item(droppable=True),
        "vit": ViTItem(torch.zeros(1, PATCH), torch.arange(1), droppable=True),
    }
    rng = random.Random(1)
    kept = sum(
        isinstance(s, Text | ViTImage | LatentImage) for _ in range(4000) for s in build([items[kind]], RULES, rng)
    )
    assert abs(1 - kept / 4000 - rate) < 0.03


def test_times_are_logistic_normal_and_shifted_towards_noise():
    rng = random.Random(0)
    shifted = Rules(bos=7, eos=8, latent_dim=LATENT, timestep_shift=3.0)
    times = torch.tensor([build([latent_item(loss=True)], shifted, rng)[0].timestep for _ in range(4000)])
    plain = times / (3 - 2 * times)  # undo the shift
    logits = torch.log(plain / (1 - plain))
    assert abs(logits.mean().item()) < 0.06
    assert abs(logits.std().item() - 1) < 0.06
    assert timestep(float("-inf"), 3.0) == 0.0


def test_times_can_be_drawn_as_sampling_visits_them():
    rng = random.Random(0)
    rules = Rules(bos=7, eos=8, latent_dim=LATENT, timestep_shift=3.0, times="uniform")
    times = torch.tensor([build([latent_item(loss=True)], rules, rng)[0].timestep for _ in range(4000)])
    plain = (times / (3 - 2 * times)).sort().values
    assert (plain - (torch.arange(4000) + 0.5) / 4000).abs().max() < 0.03  # Kolmogorov and Smirnov's distance
    with pytest.raises(ValueError, match="times must be one of logit_normal, uniform, got 'normal'"):
        Rules(bos=7, eos=8, latent_dim=LATENT, times="normal")


def test_frames_with_a_loss_share_one_time_and_clean_ones_have_none():
    frames = FramesItem((latent_item(), latent_item(loss=True), latent_item(loss=True)), (1, 2))
    (split,) = build([frames], RULES, random.Random(0))
    first, second, third = split.images
    assert first.timestep == 0
    assert second.timestep == third.timestep > 0
    assert first.velocity is None


def test_a_target_cannot_be_dropped():
    with pytest.raises(ValueError, match="LatentItem with loss=True cannot be droppable"):
        build([latent_item(loss=True, droppable=True)], RULES, random.Random(0))


# The fast packer ------------------------------------------------------------------------------------------------------

COUNT = st.integers(1, 4)


def segment_text(count: int, labelled: bool) -> Text:
    ids = torch.arange(10, 10 + count)
    if not labelled:
        return Text(ids)
    labels = ids.clone()
    labels[0] = IGNORE
    return Text(ids, labels, torch.rand(count))


def segment_latents(count: int, noisy: bool) -> LatentImage:
    tokens = torch.rand(count, LATENT)
    velocity = torch.rand(count, LATENT) if noisy else None
    return LatentImage(tokens, torch.arange(count), 0.5 * noisy, noisy, velocity, end_label=5 if count == 3 else None)


LATENTS = st.builds(segment_latents, COUNT, st.booleans())
SEGMENT = st.one_of(
    st.builds(segment_text, COUNT, st.booleans()),
    COUNT.map(lambda n: ViTImage(torch.rand(n, PATCH), torch.arange(n), end_label=6 if n == 2 else None)),
    LATENTS,
    st.lists(LATENTS, min_size=1, max_size=3).map(lambda images: Frames(tuple(images), (2,) * (len(images) - 1))),
    st.just(DroppedImage()),
)
SAMPLES = st.lists(st.lists(SEGMENT, min_size=1, max_size=5), min_size=1, max_size=4)


def some_tokens(samples) -> bool:
    return any(not isinstance(segment, DroppedImage) for sample in samples for segment in sample)


def assert_same(found: Packed, wanted: Packed) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert type(a) is type(b)
        assert (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b
    assert found.layout.runs == wanted.layout.runs
    assert found.next_positions == wanted.next_positions


def test_a_batch_is_what_pack_gives_with_the_tokens_of_its_layout():
    samples = [[segment_text(3, True), segment_latents(2, True)], [segment_text(1, False)]]
    batch, packed = collate(samples, image_tokens=IMAGE_TOKENS), pack(samples, image_tokens=IMAGE_TOKENS)
    assert packed.layout.computed is None
    assert batch.packed.layout.computed is not None
    assert packed.layout.tokens is packed.layout.computed
    assert_same(batch.packed, packed)
    assert batch.tokens == 8


def test_a_batch_of_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        collate([[DroppedImage()]], image_tokens=IMAGE_TOKENS)


def test_a_flat_batch_is_the_same_batch():
    segments = [segment_text(3, True), segment_latents(2, True), ViTImage(torch.rand(3, PATCH), torch.arange(3))]
    batch = collate([segments, segments[:1]], image_tokens=IMAGE_TOKENS)
    flat = batch.flat()
    assert flat.skeleton.tokens == batch.tokens
    assert_same(flat.to("cpu").packed, batch.packed)
    assert_same(batch.to("cpu").packed, batch.packed)


# Attention ------------------------------------------------------------------------------------------------------------


def heads(count: int, seed: int, *, query_heads: int = 4, kv_heads: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, query_heads, size), (count, kv_heads, size), (count, kv_heads, size)]
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


@settings(max_examples=15, deadline=None)
@given(SAMPLES.filter(some_tokens))
def test_dense_and_flex_attention_are_the_plan_sample_by_sample(samples):
    packed = pack(samples, image_tokens=IMAGE_TOKENS)
    und, gen = heads(packed.und_positions.shape[0], 1), heads(packed.gen_positions.shape[0], 2)
    with torch.no_grad():
        want, dense, flex = (
            torch.cat(attention.plan(packed.layout)(0, und, gen))
            for attention in (SDPA(), DenseAttention(), FlexAttention(compiled=False))
        )
    assert_close(dense, want)
    assert_close(flex, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_attention_is_fused_attention(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 20, 8, generator=generator).to(dtype) for heads in (6, 2, 2))
    mask = torch.zeros(3, 1, 20, 20, dtype=dtype).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    exact = _fused(q.double(), k.double(), v.double(), mask.double())
    error = (_grouped(q, k, v, mask) - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype == torch.float32 else 8e-3)  # measured 4.5e-3 in bfloat16, where scores are rounded


def test_gradients_of_dense_attention_are_those_of_the_plan():
    samples = [[segment_text(9, True), segment_latents(20, True)], [segment_latents(3, False), segment_text(2, False)]]
    packed = pack(samples, image_tokens=IMAGE_TOKENS)
    und, gen = heads(packed.und_positions.shape[0], 1), heads(packed.gen_positions.shape[0], 2)
    weight = torch.randn(len(packed.order), 4, 8, generator=torch.Generator().manual_seed(3))
    gradients = []
    for attention in (SDPA(), DenseAttention()):
        loss = (torch.cat(attention.plan(packed.layout)(0, und, gen)) * weight).sum()
        gradients.append(torch.autograd.grad(loss, (*und, *gen)))
    for found, want in zip(*gradients, strict=True):
        assert_close(found, want)


# On the device --------------------------------------------------------------------------------------------------------


def test_pixels_are_encoded_in_their_rows_and_noise_makes_the_velocity():
    _, vae, processor = reference("tiny")
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (3, 32, 48), generator=generator, dtype=torch.uint8)
    cells = processor.grid(32, 48)
    rules = Rules(bos=7, eos=8, latent_dim=64)
    items = [LatentItem(torch.ones(6, 64), cells), TextItem([1]), LatentItem(bytes_, cells, loss=True)]
    (clean, _, target) = segments = build(items, rules, random.Random(0))
    assert isinstance(target, PixelImage)
    assert not isinstance(clean, PixelImage)
    batch: Batch = collate([segments], image_tokens=IMAGE_TOKENS)
    packed = on_device(batch, vae=vae, patch=2, generator=torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    posterior = torch.randn((1, 16, 4, 6), generator=again)
    z = patchify(vae.encode(bytes_[None].float() / 127.5 - 1, posterior)[0], 2)
    noise = torch.randn((12, 64), generator=again)
    t = target.timestep
    assert torch.equal(packed.latents[:6], torch.ones(6, 64))
    assert_close(packed.latents[6:], (1 - t) * z + t * noise[6:])
    assert_close(packed.velocity, noise[6:] - z)


def test_few_numbers_of_images_are_encoded():
    sizes = [count + padding(count) for count in range(1, 1025)]
    assert all(count <= size <= 9 / 8 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 64


def test_an_image_shown_twice_is_encoded_once():
    _, vae, processor = reference("tiny")
    content = torch.randint(0, 256, (3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    target = LatentItem(content, processor.grid(32, 48), loss=True)
    other = LatentItem(content + 1, processor.grid(32, 48))
    samples = [build(items, Rules(7, 8, 64), random.Random(0)) for items in ([other, target, target], [target])]
    batch = collate(samples, image_tokens=IMAGE_TOKENS)
    assert [len(pixels) for pixels in batch.pixels] == [2]
    packed = on_device(batch.flat().to("cpu"), vae=vae, patch=2, generator=torch.Generator().manual_seed(5))
    clean = packed.latents[6:] - packed.timesteps[6:, None] * packed.velocity  # x_t - t (noise - z)
    first, second, third = clean.split(6)
    assert_close(second, first)
    assert_close(third, first)
    assert (packed.latents[:6] - first).abs().max() > 0.1
