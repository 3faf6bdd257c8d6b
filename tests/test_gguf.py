"""GGUF blocks against the `gguf` package, and GGUF files as checkpoints."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from checkpoint_variants import build, make_folder, weights_of
from compressed import assert_holds, dense_of, gguf_file, is_matrix, loaded, raw_blocks, wide_checkpoint
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from torch import nn

from bagel.checkpoint import Checkpoint, CheckpointError
from bagel.formats import gguf as codec
from bagel.modeling.stored.gguf import GGUFLinear
from bagel.modeling.stored.stacked import StackedLinear

K_TYPES = [kind for kind, block in codec.BLOCKS.items() if block.elements == 256]
Q = "language_model.model.layers.0.self_attn.q_proj.weight"


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", codec.BLOCKS)
def test_blocks_mean_what_the_package_says(kind):
    raw = raw_blocks(kind, 5, 768)
    if not codec.BLOCKS[kind].scales:
        raw.reshape(-1, 2)[:, 1] &= 0x3F  # no NaN, no infinity
    wanted = quants.dequantize(raw, GGMLQuantizationType[kind])
    found = codec.dequantize(torch.from_numpy(raw), kind)
    assert found.shape == (5, 768)
    assert np.array_equal(found.numpy(), wanted)


def test_large_weights_are_expanded_a_part_at_a_time(monkeypatch):
    raw = torch.from_numpy(raw_blocks("Q4_K", 7, 512))
    whole = codec.dequantize(raw, "Q4_K")
    monkeypatch.setattr(codec, "CHUNK", 1000)
    assert torch.equal(codec.dequantize(raw, "Q4_K"), whole)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "BF16"])
def test_quantising_gives_the_packages_bytes(kind):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    weight[3, :32], weight[5] = 0, (weight[5] * 4).round() / 4  # a block of zeros; values half way between two codes
    for given in (weight, weight.bfloat16()):
        wanted = quants.quantize(given.float().numpy(), GGMLQuantizationType[kind])
        assert np.array_equal(codec.quantize(given, kind).numpy(), wanted)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="Q4_K cannot be written; choose one of Q8_0, Q4_0, Q5_0, BF16"):
        codec.quantize(torch.ones(2, 256), "Q4_K")
    with pytest.raises(ValueError, match="Q8_0 packs 32 weights at a time, and a row of 40"):
        codec.quantize(torch.ones(2, 40), "Q8_0")
    with pytest.raises(ValueError, match="blocks of 34 bytes, and 33"):
        codec.dequantize(torch.zeros(1, 33, dtype=torch.uint8), "Q8_0")


@pytest.mark.parametrize("kind", [kind for kind, block in codec.BLOCKS.items() if block.scales])
def test_scales_that_are_not_finite_are_seen(kind):
    raw = torch.from_numpy(raw_blocks(kind, 4, 512))
    assert codec.is_finite(raw, kind)
    for offset in codec.BLOCKS[kind].scales:
        spoilt = raw.clone()
        spoilt[2, codec.BLOCKS[kind].bytes + offset : codec.BLOCKS[kind].bytes + offset + 2] = 0x7C  # a NaN
        assert not codec.is_finite(spoilt, kind)


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_of_blocks_multiplies_by_what_it_stores(dtype):
    torch.manual_seed(0)
    dense = nn.Linear(64, 48).to(dtype)
    layer = GGUFLinear.of(dense)
    x, residual = torch.randn(7, 64, dtype=dtype), torch.randn(7, 48, dtype=dtype)
    wanted = nn.functional.linear(x, layer.dense(dtype), dense.bias)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x, add=residual.clone()), residual + wanted)
    assert (layer.in_features, layer.out_features, layer.blocks.dtype) == (64, 48, torch.uint8)
    assert torch.equal(layer.dense(rows=slice(5, 9)), layer.dense()[5:9])
    assert (layer.dense() - dense.weight.float()).abs().max() < 2e-3 * dense.weight.abs().max() * 4


def test_a_stack_computes_what_its_parts_do():
    torch.manual_seed(0)
    parts = [nn.Linear(64, rows, bias=False) for rows in (32, 16, 24)]
    bias = nn.Parameter(torch.randn(72))
    stacked = StackedLinear([GGUFLinear.of(parts[0]), parts[1], GGUFLinear.of(parts[2], "Q4_0")], bias)
    x = torch.randn(3, 64)
    wanted = nn.functional.linear(x, stacked.dense(), bias)
    torch.testing.assert_close(stacked(x), wanted)
    torch.testing.assert_close(stacked(x, add=torch.ones(3, 72)), wanted + 1)
    assert torch.equal(stacked.dense()[32:48], parts[1].weight)
    for rows in (slice(0, 0), slice(30, 50), slice(40, 72), slice(5, 6)):
        assert torch.equal(stacked.dense(rows=rows), stacked.dense()[rows])
    assert (stacked.takes, stacked.exact) == (None, False)


# Files ----------------------------------------------------------------------------------------------------------------


def simple(key, tensor) -> str:
    """The types of a usual file: quantised matrices, float32 vectors, the rest in bfloat16."""
    return "F32" if tensor.ndim == 1 else "Q8_0" if is_matrix(key) else "BF16"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_is_loaded_as_it_is_stored(tmp_path, kind, prefix):
    folder = make_folder(tmp_path / "c", name=None)
    tensors = weights_of()

    def choose(key, tensor):
        return simple(key, tensor).replace("Q8_0", kind)

    gguf_file(
        folder / "bagel.gguf", {prefix + key: t for key, t in tensors.items()}, lambda k, t: choose(k[len(prefix) :], t)
    )
    wanted = {key: _expanded(tensor, choose(key, tensor)) for key, tensor in tensors.items()}
    kept = assert_holds(folder, wanted)
    layers = [module for module in kept.modules() if isinstance(module, GGUFLinear)]
    assert len(layers) == 3 * 2 * 4
    assert {layer.kind for layer in layers} == {kind}


def _expanded(tensor, kind):
    packed = quants.quantize(tensor.float().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType[kind]).copy())


def test_types_that_torch_does_not_expand_are_expanded_by_the_package(tmp_path):
    folder = wide_checkpoint(tmp_path / "c")
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    raw, kinds = {}, {}
    for number, (key, tensor) in enumerate(tensors.items()):
        kinds[key] = simple(key, tensor)
        if is_matrix(key):
            kind = [*K_TYPES, "TQ2_0", "MXFP4"][number % (len(K_TYPES) + 2)]
            kinds[key] = "raw"
            if kind in codec.BLOCKS:
                tensors[key] = torch.from_numpy(raw_blocks(kind, *tensor.shape, seed=number))
            else:
                packed = quants.quantize(tensor.float().numpy(), GGMLQuantizationType[kind])
                tensors[key] = torch.from_numpy(packed)
            raw[key] = GGMLQuantizationType[kind]
    gguf_file(folder / "x.gguf", tensors, lambda key, tensor: kinds[key], raw=raw)
    wanted = {
        key: torch.from_numpy(quants.dequantize(tensor.numpy(), raw[key]).copy()) if key in raw else tensor
        for key, tensor in tensors.items()
    }
    kept = assert_holds(folder, wanted)
    assert any(isinstance(module, StackedLinear) for module in kept.modules())  # q, k and v of different types
    checkpoint = Checkpoint.open(folder)
    assert {"Q4_K", "IQ4_XS", "MXFP4"} <= {entry.stored_as for entry in checkpoint.weights.entries.values()}


def test_shapes_that_were_changed_are_restored(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    tensors = weights_of()
    stored = tensors | {Q: tensors[Q].view(-1, 32), "llm2vae.weight": tensors["llm2vae.weight"].flatten()}
    shapes = {key: tensors[key].shape for key in (Q, "llm2vae.weight")}
    kinds = {key: simple(key, tensors[key]) for key in tensors}
    gguf_file(folder / "x.gguf", stored, lambda key, tensor: kinds[key], shapes=shapes, architecture="pig")
    wanted = {key: _expanded(tensor, kinds[key]) for key, tensor in tensors.items()}
    assert_holds(folder, wanted)


def test_a_kept_model_takes_what_the_file_does(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "c", name=None)
    gguf_file(folder / "x.gguf", weights_of(), simple)
    checkpoint = Checkpoint.open(folder)
    nbytes = sum(
        e.nbytes if e.kind else e.numel * 2 for k, e in checkpoint.weights.entries.items() if "pos_emb" not in k
    )
    nbytes += sum(e.numel * 4 for k, e in checkpoint.weights.entries.items() if "pos_embed" in k)
    monkeypatch.setattr("bagel.checkpoint.load.free_bytes", lambda device: nbytes)
    model, _ = build(checkpoint)
    checkpoint.load(model, dtype=torch.bfloat16)
    with pytest.raises(MemoryError):
        checkpoint.load(build(checkpoint)[0], dtype=torch.bfloat16, expand=True)


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_names_are_listed(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    gguf_file(folder / "x.gguf", weights_of() | {"blk.0.attn_q.weight": torch.ones(4, 4)}, simple)
    assert "holds blk.0.attn_q.weight 4x4, which the model does not know" in error_of(folder)


def test_a_wrong_shape_is_named(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    gguf_file(folder / "x.gguf", weights_of() | {Q: torch.ones(63, 64)}, simple)
    assert f"{Q} with shape 63x64, wanted 64x64" in error_of(folder)


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.002, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    folder = make_folder(tmp_path / "c", name=None)
    file = folder / "x.gguf"
    gguf_file(file, weights_of(), simple)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "x.gguf" in error_of(folder)


def test_damaged_headers_give_one_sentence_or_load(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    file = folder / "x.gguf"
    gguf_file(file, weights_of(), simple)
    content = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    refused = {}
    for place in [*range(0, 24), *rng.integers(24, 9000, 60)]:
        content[place] ^= 0x10
        file.write_bytes(content)
        try:
            Checkpoint.open(folder)
        except CheckpointError as error:  # and nothing else
            refused[int(place)] = str(error)
        content[place] ^= 0x10
    assert all(str(folder) in said for said in refused.values())
    assert refused.keys() >= {*range(4), *range(8, 24)}  # what it is, and how many tensors and fields it has
    assert len(refused) > 40


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    gguf_file(folder / "x.gguf", weights_of(), simple)
    reader = gguf.GGUFReader(folder / "x.gguf")
    offset = next(int(tensor.data_offset) for tensor in reader.tensors if tensor.name == Q)
    del reader
    content = bytearray((folder / "x.gguf").read_bytes())
    content[offset : offset + 2] = b"\x00\x7c"
    (folder / "x.gguf").write_bytes(content)
    assert f"NaN or infinite as float32 (stored as Q8_0) in {Q}" in error_of(folder)


def test_the_package_is_asked_for_by_name(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "c", name=None)
    (folder / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install gguf" in error_of(folder)


def test_kept_and_expanded_models_compute_the_same(tmp_path):
    folder = make_folder(tmp_path / "c", name=None)
    gguf_file(folder / "x.gguf", weights_of(), simple)
    kept, expanded = loaded(folder), loaded(folder, expand=True)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(kept.modules(), expanded.modules(), strict=False):
        if isinstance(one, GGUFLinear) and one.in_features == 64:
            assert torch.equal(dense_of(one), other.weight)
            torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)
