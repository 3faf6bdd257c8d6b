"""A model back into the official layout, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import AUTOENCODER_NAMES, DTYPE_BYTES, WEIGHT_NAMES, quoted
from bagel.checkpoint.keys import parameter_shapes, targets
from bagel.checkpoint.load import DTYPES, STEP_BYTES
from bagel.config import BagelConfig
from bagel.modeling import Bagel
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

CHECKSUMS = "SHA256SUMS"
INDEX_NAME = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_checkpoint(
    folder: str | Path,
    model: Bagel,
    vae: Autoencoder | None,
    config: BagelConfig,
    tokenizer: Tokenizer,
    *,
    max_shard_bytes: int | None = None,
    weights_name: str = "ema.safetensors",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder in the official layout, every field of the configuration spelled out.

    Files appear under their names only when all are complete. Host memory: one slice of a tensor at a time.

    Args:
        folder: made if it is not there.
        model: weights in any dtype, which is kept.
        vae: the autoencoder, None exactly when `config.visual_gen` is false.
        config: what the model was built from.
        tokenizer: its files are copied.
        max_shard_bytes: most bytes of tensors in a file; None writes one file.
        weights_name: name of that one file, `ema.safetensors`, `model.safetensors` or `model_bf16.safetensors`.
        overwrite: replace files of the same names.

    Raises:
        CheckpointError: files in the way, a model of another configuration, a full disk.
    """
    place = Path(folder).expanduser()
    if weights_name not in WEIGHT_NAMES:
        raise CheckpointError(f"weights_name must be one of {', '.join(WEIGHT_NAMES)}, got {weights_name!r}")
    if (vae is None) == config.visual_gen:
        raise CheckpointError("an autoencoder belongs to a model exactly if config.visual_gen is true")
    tensors = official_tensors(model, config)
    files: dict[str, Content] = config_files(config)
    files |= {path.name: path for path in tokenizer.files}
    files |= _weight_files(tensors, weights_name, max_shard_bytes)
    if vae is not None:
        files[AUTOENCODER_NAMES[0]] = dict(vae.state_dict())
    _check_place(place, [*files, CHECKSUMS], overwrite=overwrite)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write_all(place, files)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error}") from error


Content = dict[str, Tensor] | str | Path
"""What goes into a file: tensors, text, or the bytes of another file."""


def official_tensors(model: Bagel, config: BagelConfig) -> dict[str, Tensor]:
    """Return the official keys of a model's state, views of its parameters with fused rows taken apart.

    Raises CheckpointError if the model is not one of this configuration, or holds compressed weights.
    """
    packed = [name for name, part in model.named_modules() if _is_packed(part)]
    if packed:
        raise CheckpointError(
            f"the model holds compressed weights ({quoted(packed, 1)}) and cannot be exported: load it with "
            "expand=True, or use `bagel convert --to bf16`"
        )
    state = model.state_dict()
    wanted = parameter_shapes(config)
    wrong = [name for name in {**wanted, **state} if name not in state or wanted.get(name) != tuple(state[name].shape)]
    if wrong:
        raise CheckpointError(f"the model was built from another configuration: {quoted(wrong)} differ")
    return {
        key: state[target.parameter][target.start : target.start + target.shape[0]]
        for key, target in targets(config).items()
    }


def _is_packed(module: nn.Module) -> bool:
    return hasattr(module, "dense") and not isinstance(module, nn.Linear)


def config_files(config: BagelConfig, more: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Content]:
    """Return the JSON files of a configuration, every field spelled out; `more` has fields to add, by file."""
    decoder = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **dataclasses.asdict(config.llm_config)}
    values: dict[str, Any] = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        **config.to_dict(),
        "llm_config": decoder,
    }
    files = {"config.json": values, "llm_config.json": decoder}
    if config.vit_config is not None:
        vit = {"model_type": "siglip_vision_model", **dataclasses.asdict(config.vit_config)}
        files["vit_config.json"] = values["vit_config"] = vit
    given = more or {}
    return {name: json.dumps({**content, **given.get(name, {})}, indent=2) + "\n" for name, content in files.items()}


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _weight_files(tensors: dict[str, Tensor], name: str, max_shard_bytes: int | None) -> dict[str, Content]:
    if max_shard_bytes is None:
        return {name: tensors}
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        if shards[-1] and _nbytes(shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][key] = tensor
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": _nbytes(tensors)}, "weight_map": weight_map}
    files: dict[str, Content] = dict(zip(names, shards, strict=True))
    files[INDEX_NAME] = json.dumps(index, indent=2) + "\n"
    return files


def _check_place(place: Path, names: list[str], *, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is a file; name a folder")
    there = [name for name in names if (place / name).exists()]
    if there and not overwrite:
        raise CheckpointError(f"{place} already holds {quoted(there)}; choose another folder or pass overwrite=True")
    present = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    known = (*WEIGHT_NAMES, INDEX_NAME)
    other = [name for name in present if (name in known or SHARD.fullmatch(name)) and name not in names]
    if other:
        raise CheckpointError(
            f"{place} holds other weights ({quoted(other)}), which could be read in place of the new ones; "
            "remove them or choose another folder"
        )


def _write_all(place: Path, files: dict[str, Content]) -> None:
    mark = secrets.token_hex(4)
    temporary = {name: place / f".{name}.{mark}.tmp" for name in (*files, CHECKSUMS)}
    try:
        digests = {name: write_content(temporary[name], content) for name, content in files.items()}
        write_content(temporary[CHECKSUMS], "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        for name, path in temporary.items():
            os.replace(path, place / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@dataclass
class _HashingFile:
    """Writes to a file and keeps the SHA-256 of what was written."""

    file: BinaryIO

    def __post_init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.hash.update(data)
        return self.file.write(data)


def write_content(path: Path, content: Content, *, replace: bool = False) -> str:
    """Write one file, new or `replace`, wait until the disk has it, and return its SHA-256."""
    with path.open("wb" if replace else "xb") as file:
        out = _HashingFile(file)
        if isinstance(content, str):
            out.write(content.encode())
        elif isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, out)
        else:
            _write_tensors(out, content)
        file.flush()
        os.fsync(file.fileno())
    return out.hash.hexdigest()


def _write_tensors(out: _HashingFile, tensors: dict[str, Tensor]) -> None:
    """Write the safetensors format: header length, JSON header, then the tensors, widest dtype first."""

    def alignment(item: tuple[str, Tensor]) -> tuple[int, str]:
        return -DTYPE_BYTES[DTYPE_NAMES[item[1].dtype]], item[0]

    ordered = sorted(tensors.items(), key=alignment)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)
    for _, tensor in ordered:
        for part in _slices(tensor):
            out.write(part.numpy().data.cast("B"))


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor on the host, some rows at a time."""
    rows = max(1, tensor.shape[0] * STEP_BYTES // max(tensor.nbytes, 1))
    for part in tensor.detach().split(rows):
        yield part.to("cpu").contiguous().flatten().view(torch.uint8)


def verify_checksums(folder: str | Path) -> tuple[str, ...]:
    """Read every file that `SHA256SUMS` lists, compare its checksum and return their names.

    Raises CheckpointError naming the files that are missing or whose content differs, or if nothing is listed.
    """
    place = Path(folder).expanduser()
    sums = place / CHECKSUMS
    if not sums.is_file():
        raise CheckpointError(f"{place} has no {CHECKSUMS} to verify its files with; exports of this library have one")
    names, wrong = [], []
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if found is None:
            raise CheckpointError(f"{sums} line {number} is not '<sha256>  <file name>'")
        digest, name = found.groups()
        names.append(name)
        try:
            with (place / name).open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == digest.lower()
        except OSError as error:
            wrong.append(f"{name} ({error.strerror})")
        else:
            wrong += [] if same else [f"{name} (its content differs)"]
    if not names:
        raise CheckpointError(f"{sums} lists no files; export or fetch the checkpoint again")
    if wrong:
        raise CheckpointError(f"{place} does not match its {CHECKSUMS}: {quoted(wrong)}; fetch these files again")
    return tuple(names)
