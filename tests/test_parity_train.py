"""The packed training forward against the official code: plans, masks, losses, hidden states, gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, golden, golden_json
from training_world import new_reference, reference

from bagel.checkpoint import targets
from bagel.image import patchify
from bagel.packing import IGNORE, DroppedImage, Frames, LatentImage, Text, ViTImage

CASES = [
    ("tiny", "train_step"),
    ("tiny", "train_step_mixed"),
    ("variant_moe", "train_step"),
    ("variant_moe", "train_step_mixed"),
]


class Plan:
    """Rebuild the segments of a golden training step from its plan, taking images in order."""

    def __init__(self, processor, want, plan):
        self.processor, self.want, self.plan = processor, want, plan
        self.shift = plan.get("timestep_shift", processor.config.timestep_shift)
        self.images = self.latent_images()
        self.vit = iter(self.vit_images())

    def vit_images(self):
        sizes = self.want["vit_token_seqlens"].tolist()
        patches, cells = self.want["packed_vit_tokens"].split(sizes), self.want["packed_vit_position_ids"].split(sizes)
        return [ViTImage(a, b) for a, b in zip(patches, cells, strict=True)]

    def latent_images(self):
        want, row = self.want, 0
        for latent, (height, width) in zip(
            want["padded_latent"], self.plan["patchified_vae_latent_shapes"], strict=True
        ):
            count = height * width
            rows = slice(row, row + count)
            row += count
            clean = patchify(latent[:, : 2 * height, : 2 * width], 2)
            noise, logit = want["noise"][rows], want["packed_timesteps"][rows][0]
            t = torch.sigmoid(logit)
            t = (self.shift * t / (1 + (self.shift - 1) * t)).item()
            cells = self.processor.grid(16 * height, 16 * width)
            if t == 0:
                yield LatentImage(clean, cells)
            else:
                yield LatentImage((1 - t) * clean + t * noise, cells, timestep=t, noisy=True, velocity=noise - clean)

    def text(self, text, item):
        segment = self.processor.text(text)
        if not item["loss"]:
            return segment
        ids = segment.ids
        labels = torch.cat(
            [ids[1:], torch.tensor([item["special_token_label"] if item["special_token_loss"] else IGNORE])]
        )
        weights = torch.full(ids.shape, (len(ids) - 1) ** -0.5)
        weights[-1] = 1.0
        return Text(ids, labels, weights)

    def sample(self, sample):
        segments, texts, frames, deltas = [], iter(sample["text"]), [], []
        for item in sample["plan"]:
            dropped = item["enable_cfg"] and self.plan.get("dropout") == 1.0
            if item["type"] == "text":
                text = next(texts)
                segments += [] if dropped else [self.text(text, item)]
            elif dropped:
                segments.append(DroppedImage())
            elif item["type"] == "vit_image":
                segments.append(next(self.vit))
            elif "split_start" in item:
                frames.append(next(self.images))
                if item["split_end"]:
                    segments.append(Frames(tuple(frames), tuple(deltas)))
                    frames, deltas = [], []
                else:
                    deltas.append(item["frame_delta"])
            else:
                segments.append(next(self.images))
        return segments

    def pack(self):
        return self.processor.pack([self.sample(sample) for sample in self.plan["samples"]])


def rebuilt(variant, name):
    model, _, processor = reference(variant)
    want = golden(variant, name)
    return model, want, Plan(processor, want, golden_json(variant, "cases")[name]).pack()


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_packed_batch_is_the_official_one(variant, name):
    _, want, packed = rebuilt(variant, name)
    order, num_und = packed.order, packed.und_positions.shape[0]
    sequence = torch.argsort(order)  # where each row stands in the official sequence
    positions = torch.cat([packed.und_positions, packed.gen_positions])
    assert torch.equal(positions[order], want["packed_position_ids"])
    assert torch.equal(packed.text_ids, want["packed_text_ids"])
    assert torch.equal(sequence[packed.text_rows], want["packed_text_indexes"])
    assert torch.equal(sequence[packed.vit_rows], want["packed_vit_token_indexes"])
    assert torch.equal(packed.vit_position_ids, want["packed_vit_position_ids"])
    assert torch.equal(sequence[num_und:], want["packed_vae_token_indexes"])
    assert torch.equal(packed.latent_position_ids, want["packed_latent_position_ids"])
    assert torch.equal(sequence[packed.label_rows], want["ce_loss_indexes"])
    assert torch.equal(packed.labels, want["packed_label_ids"])
    assert torch.equal(sequence[num_und + packed.target_rows], want["mse_loss_indexes"])
    for index, sample in enumerate(packed.samples):
        assert torch.equal(sample.mask(), want[f"attention_mask{index}"])


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_losses_and_hidden_states_agree(variant, name):
    model, want, packed = rebuilt(variant, name)
    with torch.no_grad():
        hidden = model(packed)
        norm, norm_gen = model.decoder.norm, model.decoder.norm_gen or model.decoder.norm
        normed = torch.cat([norm(hidden.und), norm_gen(hidden.gen)])
        losses = model.losses(packed)
    assert_close(normed[packed.order], want["last_hidden"])
    assert_close(losses.ce, want["ce"])
    assert_close(losses.mse, want["mse"])
    if name == "train_step_mixed":
        assert_close(packed.label_weights, want["ce_loss_weights"])
    assert_close(losses.loss, want["loss"])


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_gradients_agree(variant, name):
    _, want, packed = rebuilt(variant, name)
    model, _, _ = new_reference(variant)
    model.requires_grad_(True)
    model.losses(packed).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    checked = 0
    for key, target in targets(model.config).items():
        norm = want.get(f"grad_norm.{key}")
        if norm is None:
            continue
        gradient = grads[target.parameter][target.start : target.start + target.shape[0]]
        checked += 1
        if norm > 1e-7:  # the ViT's key biases have no gradient but rounding
            assert_close(gradient.norm(), norm, relative=1e-4)
        if f"grad.{key}" in want:
            assert_close(gradient, want[f"grad.{key}"], relative=1e-4)
    assert checked == sum(key.startswith("grad_norm.") for key in want)
