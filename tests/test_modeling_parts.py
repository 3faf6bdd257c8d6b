"""Parts of the model: the und path against transformers, norms, rotary and sin-cos tables, float16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from small_model import latents, new_model, packed_of, packs, rotary_of, small_config, text, timestep_features, vit
from torch import Tensor

from bagel.kernels import rotate
from bagel.modeling import Bagel, Branch, Denoiser
from bagel.modeling.bagel import PositionTable, TimestepEmbedder, sincos_table
from bagel.modeling.mot import MLP, RMSNorm

# The und path is Qwen -------------------------------------------------------------------------------------------------


def qwen_of(model: Bagel):
    """The model's und path in transformers: Qwen3 with attention bias, or Qwen2 where q and k are not normed."""
    import transformers

    llm = model.config.llm_config
    name = "Qwen3" if llm.qk_norm else "Qwen2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_hidden_layers,
        num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_key_value_heads,
        head_dim=llm.head_dim,
        vocab_size=llm.vocab_size,
        rms_norm_eps=llm.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        tie_word_embeddings=llm.tie_word_embeddings,
        attention_bias=True,
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=None,
    )
    oracle = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    oracle.load_state_dict(qwen_weights(model, qwen3=llm.qk_norm))
    return oracle


def qwen_weights(model: Bagel, *, qwen3: bool) -> dict[str, Tensor]:
    decoder, llm = model.decoder, model.config.llm_config
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    weights = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": head.weight,
    }
    sizes = [heads * llm.head_dim for heads in (llm.num_attention_heads, *[llm.num_key_value_heads] * 2)]
    for index, layer in enumerate(decoder.layers):
        und, at = layer.und, f"model.layers.{index}."
        for kind in ("weight", "bias"):
            parts = getattr(und.attention.qkv_proj, kind).split(sizes)
            weights |= {f"{at}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        weights[f"{at}self_attn.o_proj.weight"] = und.attention.o_proj.weight
        if qwen3:
            weights[f"{at}self_attn.o_proj.bias"] = torch.zeros(llm.hidden_size)
            weights[f"{at}self_attn.q_norm.weight"] = und.attention.q_norm.weight
            weights[f"{at}self_attn.k_norm.weight"] = und.attention.k_norm.weight
        gate, up = und.mlp.gate_up_proj.weight.chunk(2)
        weights |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
        weights[f"{at}mlp.down_proj.weight"] = und.mlp.down_proj.weight
        weights[f"{at}input_layernorm.weight"] = und.input_norm.weight
        weights[f"{at}post_attention_layernorm.weight"] = und.post_norm.weight
    return weights


@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"qk_norm": False}],
    ids=["qwen3_grouped", "qwen3_ungrouped", "qwen3_one_key_head_tied", "qwen2"],
)
def test_the_und_path_is_qwen_with_attention_bias(sizes):
    model = new_model(**sizes)
    ids = text(23).ids
    with torch.no_grad():
        wanted = qwen_of(model)(ids[None], output_hidden_states=True)
    hidden = model(packed_of([text(23)])).und
    assert_close(model.decoder.norm(hidden), wanted.hidden_states[-1][0])
    assert_close(model.decoder.logits(hidden), wanted.logits[0])


# Norm and positions ---------------------------------------------------------------------------------------------------


def test_rms_norm_rounds_the_normalised_value_before_the_weight():
    norm = RMSNorm(3, eps=1e-6).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 0.7)
    # Normalised 0.643, 1.287, 0.965; rounding once, after the weight, would give 0.44921875, 0.8984375.
    found = norm(torch.tensor([2, 4, 3], dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [0.451171875, 0.90234375, 0.67578125]


def test_rms_norm_of_float32_rounds_nothing_though_the_weight_is_bfloat16():
    norm = RMSNorm(3, eps=0.5).to(torch.bfloat16)
    x = torch.tensor([[2.0, 4.0, 3.0], [0.0, 0.0, 0.1]])
    mean_squares = x.double().square().mean(-1, keepdim=True)
    assert_close(norm(x), x.double() / (mean_squares + 0.5).sqrt(), relative=1e-7)


def test_rotary_embedding_is_a_rotation_of_complex_numbers():
    heads, dim, theta = 3, 8, 1e4
    x = torch.randn(5, heads, dim, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 7, 50])
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double())
    frequencies = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angles = positions[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    found = rotate(x, rotary_of(small_config(rope_theta=theta).llm_config, positions))
    assert_close(found, torch.cat([turned.real, turned.imag], dim=-1))


def test_sincos_table_encodes_the_column_in_the_first_half():
    table = sincos_table(3, 8)
    assert table.shape == (9, 8)
    row, column, slow = 1, 2, 0.01  # frequencies 10000^0 and 10000^(-1/2)
    wanted = [f(angle * s) for angle in (column, row) for f in (math.sin, math.cos) for s in (1, slow)]
    assert table[row * 3 + column].tolist() == pytest.approx(wanted, abs=1e-7)
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sincos_table(3, 6)


def test_a_stored_position_table_wins():
    table = PositionTable(3, 8)
    stored = torch.arange(72.0).reshape(9, 8)
    table.load_state_dict({"table": stored})
    assert torch.equal(table(torch.tensor([7, 2])), stored[[7, 2]])


def test_timestep_features_literal():
    slow = 0.01  # 10000^(-1/2)
    wanted = [math.cos(0.5), math.cos(0.5 * slow), math.sin(0.5), math.sin(0.5 * slow)]
    assert timestep_features(TimestepEmbedder(8, 4), torch.tensor([0.5]))[0].tolist() == pytest.approx(wanted, abs=1e-7)
    zero = timestep_features(TimestepEmbedder(8), torch.tensor([0.0]))[0]
    assert zero.tolist() == [1.0] * 128 + [0.0] * 128


# float16 --------------------------------------------------------------------------------------------------------------


def loud_model() -> Bagel:
    """A float16 model whose MLP products go far beyond 65504."""
    model = new_model()
    for layer in model.decoder.layers:
        for expert in (layer.und, layer.gen):
            expert.mlp.gate_up_proj.weight.mul_(400)
    return model.half()


@pytest.fixture(scope="module")
def loud() -> Bagel:
    return loud_model()


def test_float16_mlp_survives_a_product_that_overflows(loud):
    mlp: MLP = loud.decoder.layers[0].und.mlp
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).half()
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    assert torch.isfinite(gate).all()
    assert torch.isfinite(up).all()
    assert not torch.isfinite(mlp.down_proj(F.silu(gate) * up)).all()  # the plain formula does overflow
    exact_gate, exact_up = (x.double() @ mlp.gate_up_proj.weight.double().T).chunk(2, dim=-1)
    exact = (F.silu(exact_gate) * exact_up) @ mlp.down_proj.weight.double().T
    assert exact.abs().max() > 65504
    assert_close(mlp(x), exact, relative=4 * 2**-11)


def test_float16_small_products_are_not_lost_beside_large_tokens():
    mlp = MLP(small_config().llm_config)
    torch.nn.init.constant_(mlp.gate_up_proj.weight, 0.5)
    torch.nn.init.constant_(mlp.down_proj.weight, 1.0)
    x = torch.stack([torch.full((48,), 40.0), torch.full((48,), 1e-3)])
    wanted = mlp(x)
    found = mlp.half()(x.half())
    for row in range(2):  # each within its own rounding
        assert_close(found[row], wanted[row], relative=8 * 2**-11)


def test_float16_model_agrees_with_float32_to_its_rounding(loud):
    packed = packed_of([text(4), vit(3), latents(3, seed=2)])
    exact = new_model()
    exact.load_state_dict({name: value.float() for name, value in loud.state_dict().items()})
    found, wanted = loud(packed), exact(packed)
    assert wanted.und.abs().max() > 65504  # the residual stream itself would overflow
    for states, twin in zip(found, wanted, strict=True):
        assert states.dtype == torch.float32
        assert_close(states, twin, relative=20 * 2**-11)
    assert_close(loud.decoder.logits(found.und), exact.decoder.logits(wanted.und), relative=40 * 2**-11)
    assert_close(loud.velocity(found.gen), exact.velocity(wanted.gen), relative=40 * 2**-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_prefill_decode_and_denoise_to_float32_results(dtype):
    model = new_model().to(dtype)
    context = model.new_context()
    model.prefill(packed_of([text(3)]), [context])
    assert context.cache.keys.dtype == dtype
    assert model.decode(torch.tensor([5]), [context]).dtype == torch.float32
    image = latents(4, noisy=True)
    work = Denoiser(model, [image], [Branch(0, context)], pack=packs, times=[1.0])
    velocity = model.velocity(work.states(image.latents, 1.0, (0,))[0])
    assert (velocity.dtype, velocity.shape) == (torch.float32, (4, 20))
