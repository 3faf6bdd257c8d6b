"""Compressed checkpoints in safetensors files, each written by hand in its own layout, loaded kept and expanded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoint_variants import TINY, build, edit_json, make_folder, weights_of
from compressed import assert_holds, described, is_matrix, loaded, weights
from conftest import REFERENCE
from safetensors.torch import load_file, save_file

from bagel.checkpoint import Checkpoint, CheckpointError, inspect_checkpoint
from bagel.checkpoint.convert import convert_checkpoint
from bagel.checkpoint.convert.files import Place, safetensors_header
from bagel.config import BAGEL_7B
from bagel.formats import dfloat11
from bagel.modeling.float8 import Float8Linear
from bagel.modeling.linear import Linear, is_exact
from bagel.modeling.stored.dfloat11 import DFloat11Linear
from bagel.modeling.stored.nf4 import NF4Linear
from bagel.modeling.stored.scaled import ScaledLinear
from bagel.modeling.stored.stacked import StackedLinear

UP = "language_model.model.layers.1.mlp.up_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
TABLES = ("embed_tokens.weight", "position_embedding.weight")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def error_of(folder, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def named(key: str) -> str:
    return key.removesuffix(".weight")


# 8-bit floats, three generations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_weights_that_were_only_cast(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) if tensor.ndim == 2 else tensor for key, tensor in weights_of().items()}
    kept = assert_holds(weights(tmp_path / "c", tensors, name="ema-fp8.safetensors"), tensors)
    assert {module.weight.dtype for module in kept.modules() if isinstance(module, ScaledLinear)} == {dtype}
    assert not any(isinstance(module, Linear | Float8Linear) for module in kept.modules())
    assert kept.dtype == torch.float32  # of what is no linear layer


def test_everything_cast_loads_too(tmp_path):
    tensors = {key: tensor.to(E4M3) for key, tensor in weights_of().items()}
    assert_holds(weights(tmp_path / "c", tensors), tensors)


def scaled(dtype=E4M3, *, rows: bool = False):
    """Quantised matrices, their scales, and what both mean."""
    found, scales, meant = {}, {}, {}
    for key, tensor in weights_of().items():
        found[key], meant[key] = tensor, tensor
        if is_matrix(key):
            exact = tensor.float()
            scale = (exact.abs().amax(1, keepdim=True) if rows else exact.abs().max()) / 448
            found[key], scales[key] = (exact / scale).to(dtype), scale
            meant[key] = found[key].float() * scale
    return found, scales, meant


@pytest.mark.parametrize(("marker", "kind"), [(0, Float8Linear), (1, Float8Linear), (2, ScaledLinear)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8(tmp_path, marker, kind, prefix):
    found, scales, meant = scaled()
    tensors = {prefix + key: tensor for key, tensor in found.items()}
    tensors |= {f"{prefix}{named(key)}.scale_weight": scale for key, scale in scales.items()}
    tensors |= {f"{prefix}{named(key)}.scale_input": torch.ones(()) for key in scales}
    tensors[f"{prefix}scaled_fp8"] = torch.empty(marker, dtype=E4M3)
    kept = assert_holds(weights(tmp_path / "c", tensors), meant)
    layers = [module for module in kept.modules() if isinstance(module, Float8Linear | ScaledLinear)]
    assert [type(layer) for layer in layers] == [kind] * 24


def test_scaled_fp8_in_the_wider_type_is_multiplied_as_it_is(tmp_path):
    found, scales, meant = scaled(E5M2)
    tensors = found | {f"{named(key)}.scale_weight": scale for key, scale in scales.items()}
    tensors["scaled_fp8"] = torch.empty(0, dtype=E5M2)
    kept = assert_holds(weights(tmp_path / "c", tensors), meant)
    assert not any(isinstance(module, Float8Linear) for module in kept.modules())


@pytest.mark.parametrize("by_metadata", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_comfy_quant(tmp_path, by_metadata, rows):
    found, scales, meant = scaled(rows=rows)
    tensors = found | {f"{named(key)}.weight_scale": scale for key, scale in scales.items()}
    tensors |= {f"{named(key)}.input_scale": torch.ones(()) for key in scales}
    layers = {named(key): {"format": "float8_e4m3fn"} for key in scales}
    exact = named(UP)
    layers[exact]["full_precision_matrix_mult"] = True
    if by_metadata:
        said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        kept = assert_holds(weights(tmp_path / "c", tensors, metadata=said), meant)
    else:
        tensors |= {f"{name}.comfy_quant": described(value) for name, value in layers.items()}
        kept = assert_holds(weights(tmp_path / "c", tensors), meant)
    assert sum(isinstance(module, Float8Linear) for module in kept.modules()) >= 23


@pytest.mark.parametrize("rows", [True, False])
def test_comfy_int8(tmp_path, rows):
    found, scales, meant, layers = {}, {}, {}, {}
    for key, tensor in weights_of().items():
        found[key], meant[key] = tensor, tensor
        if is_matrix(key):
            exact = tensor.float()
            scale = (exact.abs().amax(1) if rows else exact.abs().max()) / 127
            scales[f"{named(key)}.weight_scale"] = scale
            by_row = scale[:, None] if rows else scale
            found[key] = (exact / by_row).round().to(torch.int8)
            meant[key] = found[key].float() * by_row
            layers[f"{named(key)}.comfy_quant"] = described({"format": "int8_tensorwise"})
    folder = weights(tmp_path / "c", found | scales | layers)
    assert_holds(folder, meant)
    assert Checkpoint.open(folder).weights.format == "int8"


def test_comfy_int8_in_blocks(tmp_path):
    found, extra, meant = {}, {}, {}
    for key, tensor in weights_of().items():
        found[key], meant[key] = tensor, tensor
        if is_matrix(key):
            blocks = tuple(math.ceil(side / 128) for side in tensor.shape)
            scale = 0.01 + torch.rand(blocks, generator=torch.Generator().manual_seed(len(found)))
            found[key] = torch.randint(-127, 128, tensor.shape, dtype=torch.int8)
            extra |= {f"{named(key)}.weight_scale": scale}
            extra |= {f"{named(key)}.comfy_quant": described({"format": "int8_blockwise"})}
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            meant[key] = found[key].float() * wide[: tensor.shape[0], : tensor.shape[1]]
    assert_holds(weights(tmp_path / "c", found | extra), meant)


def test_parts_that_are_not_compressed_stand_beside_those_that_are(tmp_path):
    found, scales, meant = scaled()
    plain = weights_of()
    for key in scales:
        if "q_proj" not in key and "up_proj" not in key:
            found[key], meant[key] = plain[key], plain[key]
    tensors = found | {f"{named(key)}.weight_scale": s for key, s in scales.items() if found[key].dtype == E4M3}
    kept = assert_holds(weights(tmp_path / "c", tensors), meant)
    stacked = [module for module in kept.modules() if isinstance(module, StackedLinear)]
    kinds = {tuple(type(part) for part in module.parts) for module in stacked}
    assert kinds == {(Float8Linear, Linear, Linear), (Linear, Float8Linear)}
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for module in stacked:
        wanted = torch.nn.functional.linear(x, module.dense(), module.bias)
        assert (module(x) - wanted).norm() < 0.04 * wanted.norm()  # inputs are rounded to 8 bits: 0.018


@pytest.mark.parametrize(
    ("format_", "says"),
    [
        ({"format": "nvfp4"}, "in the format nvfp4, which is not read; there are float8_e4m3fn"),
        ({"format": "mxfp8"}, "in the format mxfp8"),
        ({"format": "int8_tensorwise", "convrot": True}, "rotated (convrot)"),
        ({"format": "float8_e5m2"}, "is float8_e5m2, but stores F8_E4M3"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, format_, says):
    found, scales, _ = scaled()
    tensors = found | {f"{named(key)}.weight_scale": scale for key, scale in scales.items()}
    tensors[f"{named(UP)}.comfy_quant"] = described(format_)
    if format_["format"] == "int8_tensorwise":
        tensors[UP] = tensors[UP].view(torch.int8)
    message = error_of(weights(tmp_path / "c", tensors))
    assert says in message
    assert UP in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{named(UP)}.weight_scale": torch.ones(5)}, "has a scale of shape 5 (F32)"),
        ({f"{named(UP)}.weight_scale": torch.tensor(math.inf)}, "NaN or infinite"),
        ({f"{named(UP)}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "comfy_quant is not valid JSON"),
        ({UP: torch.ones(128, 63).to(E4M3)}, f"{UP} with shape 128x63, wanted 128x64"),
        ({UP: torch.full((128, 64), math.nan).to(E4M3)}, "NaN or infinite"),
        ({UP: torch.ones(128, 64, dtype=torch.int8)}, f"holds {UP} as I8, wanted floating point"),
    ],
)
def test_damaged_8_bit_weights_are_named(tmp_path, change, says):
    found, scales, _ = scaled()
    tensors = found | {f"{named(key)}.weight_scale": scale for key, scale in scales.items()} | change
    assert says in error_of(weights(tmp_path / "c", tensors))


# Which files ----------------------------------------------------------------------------------------------------------


def test_a_choice_between_files_is_asked_for(tmp_path):
    folder = weights(tmp_path / "c", weights_of(), name="one.safetensors")
    loaded(folder)
    save_file(weights_of(), folder / "two.safetensors")
    assert "several files of weights (one.safetensors, two.safetensors); name one as weights" in error_of(folder)
    Checkpoint.open(folder, weights="two.safetensors")


def test_inspect_says_how_weights_are_stored(tmp_path):
    found, scales, _ = scaled()
    tensors = found | {f"{named(key)}.weight_scale": scale for key, scale in scales.items()}
    text = inspect_checkpoint(weights(tmp_path / "c", tensors))
    assert "F8_E4M3" in text
    assert "float8" in text


# Converting while loading ---------------------------------------------------------------------------------------------


def test_convert_sees_every_linear_layer_once_and_takes_its_place(tmp_path):
    folder, seen = make_folder(tmp_path / "c"), {}

    def convert(name, linear):
        assert not linear.weight.is_meta
        assert linear.bias is None or not linear.bias.is_meta
        seen[name] = linear.weight.clone()
        return ScaledLinear.of(linear) if "decoder.layers" in name else linear

    model, plain = loaded(folder, convert=convert), loaded(folder)
    linears = {name: part for name, part in plain.named_modules() if isinstance(part, torch.nn.Linear)}
    assert seen.keys() == linears.keys()
    assert all(torch.equal(seen[name], linear.weight) for name, linear in linears.items())
    assert sum(isinstance(module, ScaledLinear) for module in model.modules()) == 24
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_convert_holds_the_dense_layers_of_one_decoder_layer_at_most(tmp_path):
    checkpoint = Checkpoint.open(make_folder(tmp_path / "c"))
    model, _ = build(checkpoint)
    dense = []

    def convert(name, linear):
        parts = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
        dense.append(sum(not part.weight.is_meta for part in parts))
        return ScaledLinear.of(linear)

    checkpoint.load(model, dtype=torch.float32, convert=convert)
    assert len(dense) > 30
    assert max(dense) <= 9  # the file is sorted by name: the eight of a layer, and one of the next


def test_convert_counts_only_the_largest_layer_as_dense(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "c")
    plain = loaded(folder)
    weights = [part.weight.nbytes for part in plain.modules() if isinstance(part, torch.nn.Linear)]
    need = sum(tensor.nbytes for tensor in plain.state_dict().values()) - sum(weights) + max(weights)
    monkeypatch.setattr("bagel.checkpoint.load.free_bytes", lambda device: need)
    loaded(folder, convert=lambda name, linear: ScaledLinear.of(linear))
    with pytest.raises(MemoryError, match="more than cpu has free"):
        loaded(folder)


# DFloat11 -------------------------------------------------------------------------------------------------------------


def sparse_file(path, layout) -> None:
    """Write a safetensors file of which only the header and the given values are on the disk, the rest being a hole."""
    header, offsets = safetensors_header({name: place for name, (place, _) in layout.items()})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(offsets[name] + place.nbytes for name, (place, _) in layout.items()))
        for name, (_, values) in layout.items():
            if values is not None:
                file.seek(offsets[name])
                file.write(values.numpy().tobytes())


def released_units(folder) -> None:
    """Lay out the released 7B as DFloat11's own release does, sizes of the streams made up, all values zero."""
    official = json.loads((REFERENCE / "official_7b.json").read_text())
    shapes = {key: tuple(shape) for key, shape in official["model"].items()}
    for name, file in dfloat11.files_for(shapes).items():
        layout = {key: (Place("BF16", shapes[key], 2 * math.prod(shapes[key])), None) for key in file.plain}
        if file.prefix:
            counts = torch.tensor([math.prod(shapes[key]) for key in file.weights])
            splits, length = counts.cumsum(0)[:-1], int(counts.sum()) // 3
            chunks = -(-length // 4096)
            sizes = {"encoded_exponent": length, "sign_mantissa": int(counts.sum()), "output_positions": 4 * chunks + 4}
            sizes |= {"gaps": 320 * chunks}
            parts = {part: (Place("U8", (size,), size), None) for part, size in sizes.items()}
            parts |= {"luts": (Place("U8", (5, 256), 1280), None)}
            parts |= {"split_positions": (Place("I64", tuple(splits.shape), splits.nbytes), splits)}
            layout |= {f"{file.prefix}.{part}": value for part, value in parts.items()}
        sparse_file(folder / name, layout)
    vae = {key: tuple(shape) for key, shape in official["vae"].items()}
    (folder / "vae").mkdir()
    layout = {key: (Place("F32", shape, 4 * math.prod(shape)), None) for key, shape in vae.items()}
    sparse_file(folder / "vae" / "ae.safetensors", layout)
    for name in ("llm_config.json", "vit_config.json"):
        (folder / name).write_text(json.dumps(official[name]))
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": dfloat11.config_section(shapes)}))


@pytest.mark.parametrize("described", [True, False])
def test_the_released_units_are_understood_from_their_headers(tmp_path, described):
    released_units(tmp_path)
    if not described:
        (tmp_path / "config.json").unlink()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == BAGEL_7B
    assert checkpoint.weights.format == "dfloat11"
    assert len(checkpoint.weights.entries) == 1223
    assert "DF11" in inspect_checkpoint(checkpoint)


def df11(tmp_path):
    convert_checkpoint(TINY, tmp_path / "c", to="dfloat11")
    return tmp_path / "c"


def edited(file, **changes) -> None:
    """Change tensors of a file; None leaves one out."""
    tensors = load_file(file)
    for end, value in changes.items():
        (name,) = (name for name in tensors if name.endswith(f".{end}"))
        old = tensors.pop(name)
        if value is not None:
            tensors[name] = value(old)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gaps": None}, "lacks gaps"),
        ({"gaps": lambda t: t[:-1]}, "gaps has"),
        ({"split_positions": lambda t: t[:-1]}, "holds 13 matrices in the DFloat11 unit"),
        ({"split_positions": lambda t: t + 1}, "no matrix with rows of"),
        ({"sign_mantissa": lambda t: t[:-1]}, "no matrix with rows of"),
        ({"luts": lambda t: t[:, :255].contiguous()}, "luts has shape"),
        ({"encoded_exponent": lambda t: torch.cat([t[:2000], t[2000:2010] ^ 0x55, t[2010:]])}, "damaged"),
        ({"output_positions": lambda t: t.flip(0)}, "output_positions"),
    ],
)
def test_damaged_units_are_named(tmp_path, changes, says):
    folder = df11(tmp_path)
    edited(folder / "language_model_model_layers_1.safetensors", **changes)
    message = error_of(folder, expand=True)
    assert says in message
    assert "layers.1" in message


def test_a_missing_unit_and_a_broken_configuration_are_named(tmp_path):
    folder = df11(tmp_path)
    (folder / "language_model_model_layers_1.safetensors").rename(tmp_path / "away")
    assert "lacks language_model.model.layers.1." in error_of(folder)
    (tmp_path / "away").rename(folder / "language_model_model_layers_1.safetensors")
    edit_json(folder / "config.json", dfloat11_config={"pattern_dict": {"(": []}, "version": "0.2.0"})
    assert "dfloat11_config" in error_of(folder)


def test_a_truncated_unit_is_named(tmp_path):
    folder = df11(tmp_path)
    file = folder / "language_model_lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "language_model_lm_head.safetensors" in error_of(folder)


def test_units_are_kept_and_hold_the_same(tmp_path):
    kept = assert_holds(df11(tmp_path), weights_of())
    layers = {name: part for name, part in kept.named_modules() if isinstance(part, DFloat11Linear)}
    assert len(layers) == 3 * 8 + 1 + 2 * 6 + 1  # q, k and v of the vision encoder lie in another order: three parts
    assert is_exact(kept)


def test_a_half_that_is_left_out_takes_no_memory(tmp_path):
    folder = df11(tmp_path)
    checkpoint = Checkpoint.open(folder, visual_gen=False)
    model, _ = build(checkpoint)
    checkpoint.load(model, dtype=torch.bfloat16)
    whole = loaded(folder, dtype=torch.bfloat16)
    sizes = [sum(t.untyped_storage().nbytes() for t in m.decoder.layers.state_dict().values()) for m in (model, whole)]
    assert sizes[0] < 0.51 * sizes[1]


# bitsandbytes ---------------------------------------------------------------------------------------------------------


def bnb_int8():
    """Every linear layer in LLM.int8(), as the official app stores it, and what it means."""
    found, meant = {}, {}
    for key, tensor in weights_of().items():
        found[key], meant[key] = tensor, tensor.float()
        if tensor.ndim == 2 and key.endswith(".weight") and not key.endswith(TABLES):
            exact = tensor.half().float()
            most = exact.abs().amax(1)
            found[key] = (exact * (127 / most[:, None])).round().to(torch.int8)
            found[f"{named(key)}.SCB"] = most
            found[f"{named(key)}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
            meant[key] = found[key].float() * (most[:, None] / 127)
    return found, meant


def test_llm_int8(tmp_path):
    found, meant = bnb_int8()
    folder = weights(tmp_path / "c", found, name="model_int8.safetensors")
    kept = assert_holds(folder, meant)
    assert not any(isinstance(module, torch.nn.Linear) for module in kept.modules())
    assert Checkpoint.open(folder).weights.format == "int8"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{named(UP)}.SCB": torch.ones(5)}, "should be a matrix of int8 with a scale per row"),
        ({f"{named(UP)}.weight_format": torch.tensor(1, dtype=torch.uint8)}, "stored in tiles for one kind of GPU"),
        ({f"{named(UP)}.SCB": torch.full((128,), math.nan)}, "NaN or infinite as float32 (stored as INT8)"),
        ({UP: torch.ones(64, 64, dtype=torch.int8)}, f"{UP} with shape 64x64, wanted 128x64"),
    ],
)
def test_damaged_llm_int8_is_named(tmp_path, change, says):
    message = error_of(weights(tmp_path / "c", bnb_int8()[0] | change))
    assert says in message
    assert UP in message


def bnb_four_bits(functional, *, nested: bool, kind: str = "nf4", layers_only: bool = True):
    """Matrices quantised by bitsandbytes itself, and what they mean by their own layout."""
    found, meant = {}, {}
    for key, tensor in weights_of().items():
        found[key], meant[key] = tensor, tensor.float()
        linear = tensor.ndim == 2 and key.endswith(".weight") and not key.endswith(TABLES)
        if is_matrix(key) if layers_only else linear:
            codes, state = functional.quantize_4bit(tensor, quant_type=kind, blocksize=64, compress_statistics=nested)
            found[key] = codes
            found |= {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
            absmax = state.absmax
            if nested:
                table, most = state.state2.code, state.state2.absmax.repeat_interleave(256)
                absmax = table[absmax.long()] * most[: absmax.numel()] + state.offset
            pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
            values = state.code[pairs][: tensor.numel()] * absmax.repeat_interleave(64)[: tensor.numel()]
            meant[key] = values.view(tensor.shape)
    return found, meant


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("layers_only", [False, True])
def test_four_bits_of_bitsandbytes(tmp_path, nested, kind, layers_only):
    functional = pytest.importorskip("bitsandbytes.functional")
    found, meant = bnb_four_bits(functional, nested=nested, kind=kind, layers_only=layers_only)
    folder = weights(tmp_path / "c", found, name="model.safetensors")
    kept = assert_holds(folder, meant)
    layers = [module for module in kept.modules() if isinstance(module, NF4Linear)]
    # Where magnitudes are quantised, too, queries, keys and values remain three layers, and gates and values two.
    assert len(layers) >= (6 * (3 + 1 + 2 + 1) if nested else 6 * 4)
    assert Checkpoint.open(folder).weights.format == kind
    assert kind.upper() in inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("end", "change", "says"),
    [
        ("", lambda t: t[:-1], "elements where a weight of shape"),
        (".absmax", lambda t: t[:-1], "elements where a weight of shape"),
        (".absmax", lambda t: t * math.nan, "NaN or infinite as float32 (stored as NF4)"),
        (STATE, lambda t: t[:-1], "describes language_model"),
        (STATE, lambda t: described(json.loads(bytes(t.tolist())) | {"blocksize": 128}), "only blocks of 64"),
        (STATE, lambda t: described(json.loads(bytes(t.tolist())) | {"shape": [64, 64]}), "shape 64x64, wanted 128x64"),
        (".absmax", None, "absmax should be"),
        (STATE, None, "which the model does not know"),
    ],
)
def test_damaged_four_bits_are_named(tmp_path, end, change, says):
    functional = pytest.importorskip("bitsandbytes.functional")
    found, _ = bnb_four_bits(functional, nested=False)
    old = found.pop(UP + end)
    if change is not None:
        found[UP + end] = change(old)
    message = error_of(weights(tmp_path / "c", found))
    assert says in message
    assert UP in message


def test_shards_of_one_weight_may_be_apart(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    found, meant = bnb_four_bits(functional, nested=True)
    folder = make_folder(tmp_path / "c", name=None)
    names = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(found))}
    for name in set(names.values()):
        save_file({key: found[key].contiguous() for key in found if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_holds(folder, meant)
