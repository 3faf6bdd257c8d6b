"""The key table: which tensor of an official file fills which rows of which parameter of `bagel.modeling.Bagel`.

Everything that touches names of tensors (loading, export, the sizes read off a file) goes through `TABLE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bagel.config import BagelConfig, ViTConfig

TIME_FEATURES = 256
TABLE_PARAMETERS = frozenset({"vit_pos_embed.table", "latent_pos_embed.table"})
"""The sin-cos tables: stored, never trained, kept in the dtype they are stored in."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `{i}` is the layer.

    Rows with the same `parameter` stack along its first axis in the order of the table (q, k, v; gate, up).
    `shape` names sizes (see `sizes_of`); `needs` names what the model must have for the tensor to exist.
    """

    official: str
    parameter: str
    shape: tuple[str | int, ...]
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """Where one official tensor goes: rows `start` to `start + shape[0]` of a parameter."""

    parameter: str
    start: int
    shape: tuple[int, ...]


def _linear(official: str, parameter: str, rows: str, columns: str | int, *needs: str) -> Iterator[Row]:
    yield Row(f"{official}.weight", f"{parameter}.weight", (rows, columns), frozenset(needs))
    yield Row(f"{official}.bias", f"{parameter}.bias", (rows,), frozenset(needs))


def _norm(official: str, parameter: str, size: str, *needs: str) -> Iterator[Row]:
    yield Row(f"{official}.weight", f"{parameter}.weight", (size,), frozenset(needs))
    yield Row(f"{official}.bias", f"{parameter}.bias", (size,), frozenset(needs))


def _expert(expert: str, suffix: str, attention_needs: tuple[str, ...], mlp_needs: tuple[str, ...]) -> Iterator[Row]:
    layer, ours = "language_model.model.layers.{i}", f"decoder.layers.{{i}}.{expert}"
    attention, mlp = frozenset(attention_needs), frozenset(mlp_needs)
    heads = attention | {"qk_norm"}
    yield Row(f"{layer}.input_layernorm{suffix}.weight", f"{ours}.input_norm.weight", ("hidden",), attention)
    for part, rows in (("q", "q"), ("k", "kv"), ("v", "kv")):
        yield from _linear(
            f"{layer}.self_attn.{part}_proj{suffix}", f"{ours}.attention.qkv_proj", rows, "hidden", *attention_needs
        )
    yield Row(f"{layer}.self_attn.q_norm{suffix}.weight", f"{ours}.attention.q_norm.weight", ("head",), heads)
    yield Row(f"{layer}.self_attn.k_norm{suffix}.weight", f"{ours}.attention.k_norm.weight", ("head",), heads)
    o_shape = ("hidden", "q")
    yield Row(f"{layer}.self_attn.o_proj{suffix}.weight", f"{ours}.attention.o_proj.weight", o_shape, attention)
    yield Row(f"{layer}.post_attention_layernorm{suffix}.weight", f"{ours}.post_norm.weight", ("hidden",), attention)
    for part in ("gate", "up"):
        official = f"{layer}.mlp{suffix}.{part}_proj.weight"
        yield Row(official, f"{ours}.mlp.gate_up_proj.weight", ("mlp", "hidden"), mlp)
    yield Row(f"{layer}.mlp{suffix}.down_proj.weight", f"{ours}.mlp.down_proj.weight", ("hidden", "mlp"), mlp)


def _decoder() -> Iterator[Row]:
    language = "language_model.model"
    yield Row(f"{language}.embed_tokens.weight", "decoder.embed_tokens.weight", ("vocab", "hidden"))
    yield from _expert("und", "", (), ())
    yield from _expert("gen", "_moe_gen", ("gen_attention",), ("gen_mlp",))
    yield Row(f"{language}.norm.weight", "decoder.norm.weight", ("hidden",))
    yield Row(f"{language}.norm_moe_gen.weight", "decoder.norm_gen.weight", ("hidden",), frozenset({"gen_mlp"}))
    head_shape = ("vocab", "hidden")
    yield Row("language_model.lm_head.weight", "decoder.lm_head.weight", head_shape, frozenset({"head"}))


def _vision() -> Iterator[Row]:
    vision, layer = "vit_model.vision_model", "vit_model.vision_model.encoder.layers.{i}"
    yield from _linear(f"{vision}.embeddings.patch_embedding", "vit.patch_embedding", "vit", "patch", "und")
    yield Row(
        f"{vision}.embeddings.position_embedding.weight",
        "vit.position_embedding.weight",
        ("vit_positions", "vit"),
        frozenset({"und", "positions"}),
    )
    yield from _norm(f"{layer}.layer_norm1", "vit.layers.{i}.norm1", "vit", "und")
    for part in ("q", "k", "v"):
        yield from _linear(f"{layer}.self_attn.{part}_proj", "vit.layers.{i}.qkv_proj", "vit", "vit", "und")
    yield from _linear(f"{layer}.self_attn.out_proj", "vit.layers.{i}.o_proj", "vit", "vit", "und")
    yield from _norm(f"{layer}.layer_norm2", "vit.layers.{i}.norm2", "vit", "und")
    yield from _linear(f"{layer}.mlp.fc1", "vit.layers.{i}.fc1", "vit_mlp", "vit", "und")
    yield from _linear(f"{layer}.mlp.fc2", "vit.layers.{i}.fc2", "vit", "vit_mlp", "und")
    yield from _norm(f"{vision}.post_layernorm", "vit.norm", "vit", "und")


def _glue() -> Iterator[Row]:
    yield from _linear("connector.fc1", "connector.fc1", "hidden", "vit", "und")
    yield from _linear("connector.fc2", "connector.fc2", "hidden", "hidden", "und")
    yield Row("vit_pos_embed.pos_embed", "vit_pos_embed.table", ("vit_table", "hidden"), frozenset({"und"}))
    yield Row("latent_pos_embed.pos_embed", "latent_pos_embed.table", ("latent_table", "hidden"), frozenset({"gen"}))
    yield from _linear("time_embedder.mlp.0", "time_embedder.fc1", "hidden", TIME_FEATURES, "gen")
    yield from _linear("time_embedder.mlp.2", "time_embedder.fc2", "hidden", "hidden", "gen")
    yield from _linear("vae2llm", "vae2llm", "hidden", "latent", "gen")
    yield from _linear("llm2vae", "llm2vae", "latent", "hidden", "gen")


TABLE: tuple[Row, ...] = (*_decoder(), *_vision(), *_glue())
_BY_PATTERN = {row.official: row for row in TABLE}
_LAYER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")


def find_row(key: str) -> tuple[Row, int | None] | None:
    """Return the table's row for an official key and its layer (None outside layers), or None for an unknown key."""
    found = _LAYER.search(key)
    row = _BY_PATTERN.get(_LAYER.sub("{i}", key, count=1))
    if row is None:
        return None
    return row, int(found.group()) if found else None


def sizes_of(config: BagelConfig) -> dict[str, int]:
    """Return the value of every size that the table's shapes name."""
    llm, vit = config.llm_config, config.vit_config or ViTConfig()
    return {
        "hidden": llm.hidden_size,
        "mlp": llm.intermediate_size,
        "head": llm.head_dim,
        "q": llm.num_attention_heads * llm.head_dim,
        "kv": llm.num_key_value_heads * llm.head_dim,
        "vocab": llm.vocab_size,
        "latent": config.patch_latent_dim,
        "latent_table": config.max_latent_size**2,
        "vit": vit.hidden_size,
        "vit_mlp": vit.intermediate_size,
        "patch": vit.patch_dim,
        "vit_positions": vit.num_patches_per_side**2,
        "vit_table": config.vit_max_num_patch_per_side**2,
    }


def _features(config: BagelConfig) -> frozenset[str]:
    llm, vit = config.llm_config, config.vit_config
    return frozenset(
        name
        for name, there in {
            "head": not llm.tie_word_embeddings,
            "qk_norm": llm.qk_norm,
            "gen": config.visual_gen,
            "gen_mlp": config.visual_gen and llm.has_gen_expert,
            "gen_attention": config.visual_gen and llm.has_gen_attention,
            "und": config.visual_und,
            "positions": vit is not None and not vit.rope,
        }.items()
        if there
    )


def _layers_of(row: Row, config: BagelConfig) -> range:
    if "{i}" not in row.official:
        return range(1)
    if row.official.startswith("language_model."):
        return range(config.llm_config.num_hidden_layers)
    return range(config.vit_config.num_layers if config.vit_config else 0)


def targets(config: BagelConfig) -> dict[str, Target]:
    """Return for every official key of the model (the autoencoder excluded) the parameter rows that it fills.

    The und half (ViT) and the gen half are there as `config.visual_und` and `config.visual_gen` say.
    """
    features, sizes = _features(config), sizes_of(config)
    filled: dict[str, int] = {}
    result: dict[str, Target] = {}
    for row in TABLE:
        if not row.needs <= features:
            continue
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in row.shape)
        for layer in _layers_of(row, config):
            parameter = row.parameter.replace("{i}", str(layer))
            start = filled.get(parameter, 0)
            filled[parameter] = start + shape[0]
            result[row.official.replace("{i}", str(layer))] = Target(parameter, start, shape)
    return result


def official_shapes(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every official key of the model, as `ema.safetensors` holds them."""
    return {key: target.shape for key, target in targets(config).items()}


def parameter_shapes(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and stored buffer of `Bagel`, fused rows counted together."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets(config).values():
        shapes[target.parameter] = (target.start + target.shape[0], *target.shape[1:])
    return shapes
