"""The vision encoder against the reference numbers, transformers' SigLIP and its own laws."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import REFERENCE, golden
from safetensors.torch import load_file
from torch import Tensor

from bagel.config import ViTConfig
from bagel.modeling.attention import SDPA, Reference
from bagel.vit.siglip import SiglipViT, rotary_table, rotate

SMALL = ViTConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, image_size=35, patch_size=5
)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Every element within `tolerance` of the largest one."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def random_vit(seed: int = 0, **changes) -> SiglipViT:
    """A small encoder with weights large enough for every layer to matter."""
    config = dataclasses.replace(SMALL, **changes)
    vit = SiglipViT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
        offset = float("norm" in name and name.endswith("weight"))
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + offset
    return vit.requires_grad_(False)


def grid_ids(rows: int, columns: int, side: int) -> Tensor:
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()


def random_patches(vit: SiglipViT, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, vit.config.patch_dim, generator=torch.Generator().manual_seed(seed))


def official_to_ours(official: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The encoder's tensors under the names of `SiglipViT`, from SigLIP's names after `vision_model.`."""
    names = {
        "self_attn.out_proj": "o_proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    state = {}
    for kind in ("weight", "bias"):
        state[f"patch_embedding.{kind}"] = official[f"embeddings.patch_embedding.{kind}"]
        state[f"norm.{kind}"] = official[f"post_layernorm.{kind}"]
        for i in range(num_layers):
            layer = f"encoder.layers.{i}"
            for theirs, ours in names.items():
                state[f"layers.{i}.{ours}.{kind}"] = official[f"{layer}.{theirs}.{kind}"]
            qkv = [official[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"layers.{i}.qkv_proj.{kind}"] = torch.cat(qkv)
    if "embeddings.position_embedding.weight" in official:
        state["position_embedding.weight"] = official["embeddings.position_embedding.weight"]
    return state


@pytest.fixture
def reference_vit(variant) -> SiglipViT:
    folder = REFERENCE / variant / "checkpoint"
    values = json.loads((folder / "vit_config.json").read_text())
    values.pop("model_type")
    config = ViTConfig(**values)
    prefix = "vit_model.vision_model."
    weights = load_file(str(folder / "ema.safetensors"))
    official = {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
    vit = SiglipViT(config)
    vit.load_state_dict(official_to_ours(official, config.num_layers))
    return vit.requires_grad_(False)


def test_every_layer_matches_the_reference(variant, reference_vit):
    want = golden(variant, "components")
    layers = []
    for layer in reference_vit.layers:
        layer.register_forward_hook(lambda module, args, output: layers.append(output))
    out = reference_vit(want["vit.patches"], want["vit.position_ids"], want["vit.seqlens"].tolist())
    assert len(layers) == 2
    for i, layer in enumerate(layers):
        assert_close(layer, want[f"vit.layer{i}"])
    assert_close(out, want["vit.last_hidden"])


def test_features_match_transformers_siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(3)
    vit = random_vit()
    config = vit.config
    oracle = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            vision_use_head=False,
        )
    ).requires_grad_(False)
    for parameter in oracle.parameters():
        parameter.data = torch.randn(parameter.shape) * parameter[0].numel() ** -0.5
    official = {key.removeprefix("vision_model."): value for key, value in oracle.state_dict().items()}
    kernel = official["embeddings.patch_embedding.weight"]  # (hidden, channel, row, column)
    official["embeddings.patch_embedding.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
    vit.load_state_dict(official_to_ours(official, config.num_layers))

    side, size = config.num_patches_per_side, config.patch_size
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    patches = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, channel, rows, columns, row, column)
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(2 * side**2, config.patch_dim)
    got = vit(patches, grid_ids(side, side, side).repeat(2), [side**2] * 2)
    assert_close(got, oracle(pixels).last_hidden_state.flatten(0, 1))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("shapes", [[(2, 3), (4, 5), (1, 1)], [(2, 6), (3, 4), (4, 3)]], ids=["unequal", "equal"])
def test_packed_images_equal_one_by_one(rope, shapes):
    vit = random_vit(rope=rope)
    ids = [grid_ids(*shape, side=7) for shape in shapes]
    lengths = [len(i) for i in ids]
    patches = random_patches(vit, sum(lengths)).split(lengths)
    packed = vit(torch.cat(patches), torch.cat(ids), lengths)
    singles = [vit(p, i, [len(i)]) for p, i in zip(patches, ids, strict=True)]
    assert_close(packed, torch.cat(singles))


@pytest.mark.parametrize("rope", [False, True])
def test_swapping_two_images_swaps_their_features(rope):
    vit = random_vit(rope=rope)
    ids = torch.cat([grid_ids(2, 3, 7), grid_ids(3, 5, 7)])
    patches = random_patches(vit, 21)
    straight = vit(patches, ids, [6, 15])
    swapped = vit(patches.roll(15, 0), ids.roll(15), [15, 6])
    assert_close(swapped, straight.roll(15, 0))


@pytest.mark.parametrize("rope", [False, True])
def test_a_patch_changes_its_own_image_only(rope):
    vit = random_vit(rope=rope)
    ids = torch.cat([grid_ids(2, 3, 7), grid_ids(3, 5, 7)])
    patches = random_patches(vit, 21)
    before = vit(patches, ids, [6, 15])
    patches[7] += 1
    changed = (vit(patches, ids, [6, 15]) != before).any(dim=1)
    assert not changed[:6].any()
    assert changed[6:].all()


def test_rotary_angles_follow_row_and_column():
    cos, sin = rotary_table(torch.tensor([0, 2 * 7 + 5]), side=7, head_dim=8)
    assert cos.shape == sin.shape == (2, 1, 2, 2)
    angles = torch.tensor([[2.0, 2.0 / 100], [5.0, 5.0 / 100]])  # row, column; frequencies 1 and 10000^(-2/4)
    assert_close(cos[1, 0], angles.cos())
    assert_close(sin[1, 0], angles.sin())
    assert_close(cos[0, 0], torch.ones(2, 2))


def test_rotation_pairs_channels_half_a_half_head_apart():
    x = torch.zeros(1, 1, 8)
    x[0, 0, 5] = 1  # second half (column), second frequency, first of its pair: the partner is channel 7
    got = rotate(x, rotary_table(torch.tensor([2 * 7 + 5]), side=7, head_dim=8))
    angle = torch.tensor(0.05)
    assert_close(got[0, 0], torch.stack([torch.zeros(())] * 5 + [angle.cos(), torch.zeros(()), angle.sin()]))


def test_rotary_scores_depend_on_distances_only():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(q_id: int, k_id: int) -> Tensor:
        tables = (rotary_table(torch.tensor([i]), side=9, head_dim=16) for i in (q_id, k_id))
        return (rotate(q, next(tables)) * rotate(k, next(tables))).sum()

    assert_close(score(2 * 9 + 3, 5 * 9 + 1), score(4 * 9 + 7, 7 * 9 + 5))
    assert (score(2 * 9 + 3, 5 * 9 + 1) - score(2 * 9 + 3, 1 * 9 + 5)).abs() > 1e-2


def test_rope_variant_stores_no_positions():
    assert set(random_vit().state_dict()) - set(random_vit(rope=True).state_dict()) == {"position_embedding.weight"}


@pytest.mark.parametrize("rope", [False, True])
def test_features_have_the_type_of_the_weights(rope):
    vit = random_vit(rope=rope)
    patches, ids = random_patches(vit, 6), grid_ids(2, 3, 7)
    want = vit(patches, ids, [6])
    got = vit.to(torch.bfloat16)(patches, ids, [6])
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, tolerance=0.05)


def test_gradients_reach_every_parameter():
    vit = random_vit(rope=True).requires_grad_(True)
    vit(random_patches(vit, 6), grid_ids(2, 3, 7), [4, 2]).square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_released_sizes_match_the_published_table():
    table = json.loads((REFERENCE / "official_7b.json").read_text())["model"]
    prefix = "vit_model.vision_model."
    official = {
        key.removeprefix(prefix): torch.empty(shape, device="meta") for key, shape in table.items() if prefix in key
    }
    with torch.device("meta"):
        vit = SiglipViT(ViTConfig())
    want = official_to_ours(official, num_layers=26)
    assert {key: value.shape for key, value in vit.state_dict().items()} == {
        key: value.shape for key, value in want.items()
    }
    assert len(official) == 26 * 16 + 5
    assert sum(p.numel() for p in vit.parameters()) == sum(value.numel() for value in official.values())


@pytest.mark.parametrize("shapes", [[(2, 3), (4, 5)], [(2, 6), (3, 4)]], ids=["unequal", "equal"])
def test_another_attention_may_gather_and_gets_every_layer(shapes):
    vit, asked = random_vit(), []
    ids = torch.cat([grid_ids(*shape, side=7) for shape in shapes])
    lengths = [rows * columns for rows, columns in shapes]
    patches = random_patches(vit, sum(lengths))
    wanted = vit(patches, ids, lengths)

    def attend(q, k, v, *, layer):
        asked.append((layer, q.shape[:2]))
        return Reference()(q, k, v)

    for attention in (attend, Reference(), SDPA()):
        vit.attention = attention
        assert_close(vit(patches, ids, lengths), wanted)
    counts = [(2, lengths[0])] if len(set(lengths)) == 1 else [(1, length) for length in lengths]
    assert asked == [(layer, count) for layer in range(len(vit.layers)) for count in counts]


@pytest.mark.parametrize("lengths", [[6, 14], [6, 16], [21, 0], [22, -1], []])
def test_lengths_that_do_not_fit_are_refused(lengths):
    vit = random_vit()
    with pytest.raises(ValueError, match=rf"sum to the 21 patches given, got .* with sum {sum(lengths)}"):
        vit(random_patches(vit, 21), torch.zeros(21, dtype=torch.long), lengths)


def test_a_wrong_patch_size_is_refused():
    vit = random_vit()
    with pytest.raises(ValueError, match=r"\(N, 75\), got \(6, 74\)"):
        vit(random_patches(vit, 6)[:, 1:], grid_ids(2, 3, 7), [6])


def test_position_ids_of_another_length_are_refused():
    vit = random_vit()
    with pytest.raises(ValueError, match=r"position_ids must have shape \(6,\), one a patch, got \(5,\)"):
        vit(random_patches(vit, 6), grid_ids(1, 5, 7), [6])
