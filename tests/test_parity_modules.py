"""Every stage of the model against the numbers of the official code, elementwise in float32."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import REFERENCE, assert_close, golden, load_pipeline
from safetensors import safe_open
from small_model import timestep_features

from bagel import BagelPipeline
from bagel.image import in_unit, open_image, patch_positions, patchify, prepare_input
from bagel.modeling.bagel import sincos_table
from bagel.modeling.cache import claim_all
from bagel.packing import LatentImage, Text, ViTImage, pack


@pytest.fixture
def pipe(variant) -> BagelPipeline:
    return load_pipeline(variant)


def test_timestep_embedding_agrees(variant, pipe):
    want = golden(variant, "components")
    assert_close(timestep_features(pipe.model.time_embedder, want["time.t"]), want["time.frequencies"])
    assert_close(pipe.model.time_embedder(want["time.t"]), want["time.embedding"])


def test_position_tables_agree_stored_and_computed(variant, pipe):
    want = golden(variant, "components")
    for module, name in (
        (pipe.model.latent_pos_embed, "latent_pos_embed"),
        (pipe.model.vit_pos_embed, "vit_pos_embed"),
    ):
        table = want[f"{name}.table"]
        assert torch.equal(module.table, table)
        side = int(table.shape[0] ** 0.5)
        assert_close(sincos_table(side, table.shape[1]), table)


def test_connector_and_vit_positions_agree(variant, pipe):
    want = golden(variant, "components")
    assert_close(pipe.model.connector(want["vit.last_hidden"]), want["vit.connector"])
    assert_close(pipe.model.vit_pos_embed(want["vit.position_ids"]), want["vit.pos_embed"])
    tokens = pipe.model.embed_patches(
        want["vit.patches"], want["vit.position_ids"], tuple(want["vit.seqlens"].tolist())
    )
    assert_close(tokens, want["vit.connector"] + want["vit.pos_embed"])


def test_latent_projections_and_head_agree(variant, pipe):
    want = golden(variant, "components")
    model = pipe.model
    assert_close(model.vae2llm(want["vae2llm.in"]), want["vae2llm.out"])
    assert_close(model.llm2vae(want["llm2vae.in"]), want["llm2vae.out"])
    assert_close(model.decoder.lm_head(want["llm2vae.in"]), want["lm_head.out"])


def test_latent_cells_agree(variant, pipe):
    want = golden(variant, "components")["pos.latent_64x96"]
    assert pipe.processor.grid(64, 96).tolist() == want.tolist()


def steps_of(variant: str) -> list[tuple[str, str]]:
    with safe_open(str(REFERENCE / variant / "golden" / "decoder.safetensors"), "pt") as file:
        return [tuple(step) for step in json.loads(file.metadata()["steps"])]


def segment(pipe, variant: str, kind: str, what: str, posterior_noise):
    config, tokenizer = pipe.model.config, pipe.tokenizer
    if kind == "text":
        return Text(torch.tensor([tokenizer.bos_id, *tokenizer.encode(what), tokenizer.eos_id]))
    image = open_image(REFERENCE / variant / "golden" / f"input_{what}.png")
    prepared = prepare_input(
        image, vae_rule=config.vae_image_transform, vit_rule=config.vit_image_transform, patch_size=14
    )
    if kind == "vit":
        side = config.vit_max_num_patch_per_side
        cells = patch_positions(*prepared.vit_grid, side, interpolate=config.interpolate_pos)
        return ViTImage(prepared.vit_patches, cells)
    latents = pipe.vae.encode(in_unit(prepared.vae_levels)[None], posterior_noise)[0]
    width, height = prepared.size
    return LatentImage(patchify(latents, 2), pipe.processor.grid(height, width))


class Layers:
    """Both streams after every layer, in the order of the sequence."""

    def __init__(self, model):
        self.found = []
        self.handles = [layer.register_forward_hook(self.keep) for layer in model.decoder.layers]

    def keep(self, module, args, output):
        self.found.append(torch.cat([output.und, output.gen]))

    def in_order(self, order):
        found, self.found = [x[order] for x in self.found], []
        return found


@torch.inference_mode()
def test_decoder_agrees_at_every_step_layer_and_in_its_cache(variant, pipe):
    want = golden(variant, "decoder")
    model = pipe.model
    context = model.new_context()
    layers = Layers(model)
    orders = []
    for index, (kind, what) in enumerate(steps_of(variant)):
        own = segment(pipe, variant, kind, what, want.get(f"step{index}.posterior_noise"))
        packed = pack([[own]], image_tokens=pipe.processor.image_tokens, starts=[context.position])
        orders.append(packed.order + context.length)
        model.prefill(packed, [context])
        assert context.length == want[f"step{index}.kv_len"].item()
        assert context.position == want[f"step{index}.rope"].item()
        for number, found in enumerate(layers.in_order(packed.order)):
            assert_close(found, want[f"step{index}.layer{number}"])
    order = torch.cat(orders)
    for number in range(len(model.decoder.layers)):
        keys, values = context.held()
        assert_close(keys[number][order], want[f"cache.key{number}"])
        assert_close(values[number][order], want[f"cache.value{number}"])

    noisy = LatentImage(want["flow.x_t"], pipe.processor.grid(64, 96), timestep=want["flow.t"].item(), noisy=True)
    packed = pack([[noisy]], image_tokens=pipe.processor.image_tokens, starts=[context.position])
    hidden = model(packed, claim_all([context], packed.layout.lengths, keeps=False))
    for number, found in enumerate(layers.in_order(packed.order)):
        assert_close(found, want[f"flow.layer{number}"])
    assert_close(model.velocity(hidden.gen), want["flow.v_t"])
