"""Compressed checkpoints made from small ones, and what must be true of every one that is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoint_variants import TINY, build, make_folder
from safetensors.torch import save_file
from small_model import randomise, small_config
from torch import Tensor, nn

from bagel.checkpoint import Checkpoint, save_checkpoint, targets
from bagel.checkpoint.export import official_tensors
from bagel.formats.gguf import BLOCKS
from bagel.modeling import Bagel
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

Tensors = dict[str, Tensor]


def is_matrix(key: str) -> bool:
    """Whether a tensor is one of the decoder layers' matrices."""
    return key.startswith("language_model.") and "_proj" in key and key.endswith(".weight")


def weights(folder: Path, tensors: Mapping[str, Tensor], *, name: str = "ema.safetensors", **options) -> Path:
    """Make a folder like the small reference one with these weights."""
    make_folder(folder, name=None)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, **options)
    return folder


def gguf_file(file: Path, tensors: Mapping[str, Tensor], kind: Callable[[str, Tensor], str], **fields) -> None:
    """Write a GGUF file with the package's own quantiser, in the type that `kind` names for each tensor."""
    writer = gguf.GGUFWriter(file, fields.pop("architecture", "bagel"))
    for key, shape in fields.pop("shapes", {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
    for key, tensor in tensors.items():
        name = kind(key, tensor)
        if name == "raw":
            writer.add_tensor(key, tensor.numpy(), raw_dtype=fields["raw"][key])
            continue
        quantised = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[name])
        writer.add_tensor(key, quantised, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def raw_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes that are sane blocks of a type: their float16 scales are small."""
    block, rng = BLOCKS[kind], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // block.elements, block.bytes), dtype=np.uint8)
    for offset in block.scales:
        scale = (rng.normal(size=raw.shape[:2]) * 1e-3).astype(np.float16)
        raw[..., offset : offset + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def wide_checkpoint(folder: Path) -> Path:
    """A checkpoint whose decoder matrices have rows of 256 weights, as blocks of that many need."""
    config = small_config(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2)
    model = Bagel(config)
    randomise(model)
    tokenizer = Tokenizer.from_pretrained(TINY)
    vae = Autoencoder(config.vae_config)
    save_checkpoint(folder, model.bfloat16(), vae.bfloat16(), config, tokenizer)
    return folder


def dense_of(linear: nn.Module) -> Tensor:
    """The float32 weight that a layer multiplies by, whatever it stores."""
    return linear.weight.float() if isinstance(linear, nn.Linear) else linear.dense(torch.float32)


def loaded(folder: Path, **options) -> Bagel:
    checkpoint = Checkpoint.open(folder)
    model, _ = build(checkpoint)
    checkpoint.load(model, **{"dtype": torch.float32} | options)
    return model


def assert_holds(folder: Path, wanted: Mapping[str, Tensor]) -> Bagel:
    """Assert that a checkpoint holds these tensors, expanded and kept, to the bit; return the kept model."""
    checkpoint = Checkpoint.open(folder)
    kept = loaded(folder)
    for decodes_there in (False, True):  # by the host, or by the device as on GPUs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bagel.checkpoint.load.decodes_there", lambda device, there=decodes_there: there)
            expanded = loaded(folder, expand=True)
        state = official_tensors(expanded, checkpoint.config)
        for key, tensor in wanted.items():
            assert torch.equal(state[key].float(), tensor.float()), key
    for key, target in targets(checkpoint.config).items():
        path, _, leaf = target.parameter.rpartition(".")
        module = kept.get_submodule(path)
        whole = dense_of(module) if leaf == "weight" and hasattr(module, "in_features") else getattr(module, leaf)
        rows = whole[target.start : target.start + target.shape[0]]
        assert torch.equal(rows.float(), wanted[key].float()), key
    assert not any(tensor.is_meta for tensor in (*kept.parameters(), *kept.buffers()))
    return kept


def described(value: dict) -> Tensor:
    """JSON as a tensor of bytes."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
