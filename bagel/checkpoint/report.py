"""A checkpoint described for a reader: its parts, what it cannot do, and where it fits. No tensor is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bagel.checkpoint.checkpoint import Checkpoint
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import TensorEntry, find_autoencoder, read_single
from bagel.checkpoint.free_memory import free_places
from bagel.checkpoint.keys import find_row, targets
from bagel.memory.plan import BUS, Planner
from bagel.memory.sizes import GIB, said
from bagel.memory.work import Request
from bagel.modeling import Bagel
from bagel.vae import Autoencoder

LIMITS = (8, 12, 16, 24, 32, 48, 80)
"""GiB of GPUs that people have."""
WORKING_SHARE = 0.15
"""Room for activations, caches and the autoencoder's own work, as a share of the weights."""

PARTS = (
    ("embeddings and head", ("decoder.embed_tokens.", "decoder.lm_head.")),
    ("decoder, gen expert", ("decoder.layers.{i}.gen.", "decoder.norm_gen.")),
    ("decoder, und expert", ("decoder.",)),
    ("vision encoder", ("vit.",)),
    ("connector and positions", ("connector.", "vit_pos_embed.")),
    ("latents and time", ("",)),
)


def inspect_checkpoint(source: str | Path | Checkpoint, *, base: str | Path | None = None) -> str:
    """Return a text that tells what a checkpoint is: parts, parameters, dtypes, sizes, what is missing, what fits here.

    Args:
        source: a checkpoint folder, or an opened checkpoint.
        base: see `Checkpoint.open`.

    Raises:
        CheckpointError: the folder's weights cannot be understood even without their generating half.
    """
    trouble: list[str] = []
    checkpoint = source if isinstance(source, Checkpoint) else _open(source, base, trouble)
    blocks = [
        [str(checkpoint.folder)],
        _parts(checkpoint),
        _model(checkpoint),
        _files(checkpoint),
        _listed("cannot", (*trouble, *_missing(checkpoint), *checkpoint.lacks)),
        _listed("notes", checkpoint.notes),
        _fits(checkpoint),
        _limits(checkpoint),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _open(folder: str | Path, base: str | Path | None, trouble: list[str]) -> Checkpoint:
    try:
        return Checkpoint.open(folder, base=base)
    except CheckpointError as error:
        checkpoint = Checkpoint.open(folder, base=base, visual_gen=False)
        trouble.append(str(error))
        return checkpoint


def _missing(checkpoint: Checkpoint) -> list[str]:
    try:
        _ = checkpoint.tokenizer_folder
    except CheckpointError as error:
        return [str(error)]
    return []


def _part_of(key: str) -> str:
    found = find_row(key)
    parameter = found[0].parameter if found else ""
    return next(name for name, prefixes in PARTS if parameter.startswith(prefixes))


@dataclass
class _Sum:
    tensors: int = 0
    values: int = 0
    nbytes: int = 0
    dtypes: tuple[str, ...] = ()

    def add(self, entries: Iterable[TensorEntry]) -> _Sum:
        for entry in entries:
            self.tensors += 1
            self.values += entry.numel
            self.nbytes += entry.nbytes
            self.dtypes = tuple(dict.fromkeys((*self.dtypes, entry.stored_as)))
        return self

    def row(self, name: str) -> str:
        return f"{name:<26}{self.tensors:>8}{self.values:>17,}{_size(self.nbytes):>12}  {', '.join(self.dtypes)}"


def _parts(checkpoint: Checkpoint) -> list[str]:
    sums = {name: _Sum() for name, _ in PARTS}
    for key, entry in checkpoint.weights.entries.items():
        sums[_part_of(key)].add([entry])
    autoencoder = _autoencoder(checkpoint)
    if autoencoder:
        sums["autoencoder"] = _Sum().add(autoencoder)
    held = {name: part for name, part in sums.items() if part.tensors}
    total = _Sum().add([*checkpoint.weights.entries.values(), *autoencoder])
    head = f"{'part':<26}{'tensors':>8}{'parameters':>17}{'size':>12}  stored as"
    return [head, *(part.row(name) for name, part in held.items()), total.row("all")]


def _autoencoder(checkpoint: Checkpoint) -> list[TensorEntry]:
    if checkpoint.vae is not None:
        return list(checkpoint.vae.entries.values())
    file = find_autoencoder(checkpoint.folder)
    return list(read_single(file).entries.values()) if file else []


def _model(checkpoint: Checkpoint) -> list[str]:
    llm, vit, vae = (getattr(checkpoint.config, name) for name in ("llm_config", "vit_config", "vae_config"))
    lines = [
        f"decoder      {llm.layer_module}, {llm.num_hidden_layers} layers, hidden {llm.hidden_size}, "
        f"MLP {llm.intermediate_size}, heads {llm.num_attention_heads}/{llm.num_key_value_heads}, "
        f"vocabulary {llm.vocab_size}{', q/k norm' if llm.qk_norm else ''}"
    ]
    if vit is not None:
        lines.append(
            f"vision       {vit.num_layers} layers, hidden {vit.hidden_size}, patch {vit.patch_size}, "
            f"{'2-D rotary' if vit.rope else 'learned'} positions, table {checkpoint.config.vit_max_num_patch_per_side}"
        )
    if vae is not None:
        side = checkpoint.config.max_latent_size * checkpoint.config.latent_downsample
        lines.append(f"drawing      up to {side}x{side} pixels, autoencoder of {vae.ch} channels x {vae.ch_mult}")
    return lines


def _files(checkpoint: Checkpoint) -> list[str]:
    files = [*checkpoint.weights.files]
    file = checkpoint.vae_file or find_autoencoder(checkpoint.folder)
    files += [file] if file else []
    kind = checkpoint.weights.format
    title = "files" if kind == "safetensors" else f"files (weights in the format {kind})"
    return [title, *(f"  {file}  {_size(file.stat().st_size)}" for file in files)]


def _listed(title: str, sentences: Iterable[str]) -> list[str]:
    lines = [f"  - {sentence}" for sentence in sentences]
    return [title, *lines] if lines else []


def _fits(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    wanted = {"all it has": config}
    if config.visual_gen:
        wanted["understanding half"] = dataclasses.replace(config, visual_gen=False, vae_config=None)
    places = free_places()
    header = "  ".join(f"{place}: {_size(free)} free" for place, free in places.items())
    lines = [f"fits in memory, whole? ({header})"]
    kinds = {"bfloat16": (torch.bfloat16, True), "float32": (torch.float32, True)}
    if checkpoint.weights.format != "safetensors":
        kinds = {"as stored": (torch.bfloat16, False)} | kinds
    for name, part in wanted.items():
        held = dataclasses.replace(checkpoint, config=part, vae=checkpoint.vae if part.visual_gen else None)
        for kind, (dtype, expand) in kinds.items():
            nbytes = held.nbytes(dtype, dtype, expand=expand)
            answers = "  ".join(f"{place}: {_verdict(nbytes, free)}" for place, free in places.items())
            lines.append(f"  {name:<20}{kind:<10}{_size(nbytes):>12}  {answers}")
    return lines


def _limits(checkpoint: Checkpoint) -> list[str]:
    """Say what limits of a GPU's memory mean for the model as it is loaded by default."""
    with torch.device("meta"):
        model = Bagel(checkpoint.config).to(torch.bfloat16)
        vae_config = checkpoint.config.vae_config if checkpoint.config.visual_gen else None
        vae = None if vae_config is None else Autoencoder(vae_config).to(torch.bfloat16)
    _store(model, checkpoint)
    planner = Planner(model, vae, torch.device("cuda"))
    side = planner.work.side(Request())
    kind = "bfloat16" if checkpoint.weights.format == "safetensors" else "as stored"
    lines = [f"on a GPU within a limit (memory=...; {kind}; an image of {side}x{side}, a text about an image)"]
    lines.append(
        f"  {'limit':>8}  {'drawing: stays':>14}  {'arrives each evaluation':>24}  {'writing: arrives each token':>28}"
    )
    for limit in LIMITS:
        plan = planner.plan(limit * GIB)
        lines.append(
            f"  {limit:>4} GiB  {_stays(plan.drawing):>14}  {_arrives(plan.drawing):>24}  {_arrives(plan.writing):>28}"
        )
    does = "draws such an image" if checkpoint.config.visual_gen else "answers"
    lines.append(f"  the least within which it {does}: {said(planner.least())}")
    return [*lines, f"  the times: copied at {BUS / 1e9:.0f} GB/s (PCIe 4), while others compute; results are the same"]


def _store(model: Bagel, checkpoint: Checkpoint) -> None:
    """Let linear layers on the meta device take the bytes that they do as stored, where they stay so."""
    weights, sizes = checkpoint.weights, {}
    for key, target in targets(checkpoint.config).items():
        if weights.keeps(key):
            sizes[target.parameter] = sizes.get(target.parameter, 0) + weights.entries[key].nbytes
    for name, size in sizes.items():
        owner, _, leaf = name.rpartition(".")
        stored = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        if isinstance(model.get_submodule(owner), nn.Linear):
            model.get_submodule(owner).register_parameter(leaf, stored)


def _stays(found: tuple[int, int] | None) -> str:
    return "-" if found is None else "all" if not found[1] else _size(found[0])


def _arrives(found: tuple[int, int] | None) -> str:
    if found is None:
        return "does not fit"
    return "nothing" if not found[1] else f"{_size(found[1])} in {found[1] / BUS:.2f} s"


def _verdict(nbytes: int, free: int) -> str:
    if nbytes * (1 + WORKING_SHARE) <= free:
        return "yes"
    return "the weights, but little more" if nbytes <= free else "no"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.2f} MiB"
