"""A checkpoint folder, understood from its JSON files and the headers of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from bagel.checkpoint.autoencoder import check_shapes, resolve_vae_config
from bagel.checkpoint.errors import CheckpointError
from bagel.checkpoint.files import (
    JOURNAL,
    OFFICIAL,
    TensorFiles,
    find_autoencoder,
    has_tokenizer,
    instead_of_file,
    path_of,
    read_single,
)
from bagel.checkpoint.keys import official_shapes, targets
from bagel.checkpoint.load import Convert, load_autoencoder, load_model, pieces_of
from bagel.checkpoint.measure import measure
from bagel.checkpoint.resolve import Resolver
from bagel.checkpoint.sources import Source, open_source
from bagel.checkpoint.stated import StatedFiles, read_stated
from bagel.config import BagelConfig
from bagel.memory.units import Piece
from bagel.modeling import Bagel
from bagel.vae import Autoencoder


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, opened but not read: only JSON files and the headers of its weights.

    Attributes:
        folder: where it lies.
        config: what will be built; halves that are missing or were left out are off.
        weights: the model's files, their format, and every tensor's shape and dtype.
        vae: the autoencoder's file, None without a generating half.
        tokenizer_home: the folder whose tokenizer belongs to it, None if there is none; see `tokenizer_folder`.
        notes: where its files disagree and which one was followed, a sentence each.
        lacks: what it cannot do, a sentence each.
    """

    folder: Path
    config: BagelConfig
    weights: Source
    vae: TensorFiles | None
    tokenizer_home: Path | None
    notes: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def vae_file(self) -> Path | None:
        """The autoencoder's file, None without a generating half."""
        return self.vae.files[0] if self.vae else None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder to read the tokenizer from; raises CheckpointError if neither folder nor base has one."""
        if self.tokenizer_home is None:
            raise CheckpointError(
                f"{self.folder} has no tokenizer (vocab.json with merges.txt and tokenizer_config.json): "
                "copy these files from the model it was trained from, or name a folder that has them with base=..."
            )
        return self.tokenizer_home

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        weights: str | None = None,
        visual_gen: bool | None = None,
        visual_und: bool | None = None,
    ) -> Checkpoint:
        """Read what a folder says about itself and check every key, shape and dtype of its weights.

        Args:
            folder: a checkpoint in the official layout.
            base: another folder that supplies what is missing here: JSON files, tokenizer, autoencoder.
            weights: name of the weights file in `folder`; None takes the first known one.
            visual_gen: False leaves out the generating half, True demands it, None takes what there is.
            visual_und: the same for the vision half.

        Raises:
            CheckpointError: for anything missing, unknown, damaged, contradictory or unsupported.
        """
        place = _folder(folder)
        base_place = None if base is None else _folder(base)
        stated = read_stated(place, base_place)
        found = open_source(place, weights)
        measured = measure(found.shapes)
        resolver = Resolver(measured, stated, list(stated.notes))
        vae_file = find_autoencoder(*filter(None, (place, base_place)))
        vae = read_single(vae_file) if vae_file and measured.has_gen and visual_gen is not False else None
        vae_config, vae_notes = resolve_vae_config(vae, stated.model.part("vae_config")) if vae else (None, ())
        whole = resolver.config(vae_config, weights_name=found.files[0].name)
        _check_weights(found, whole, stated, idle_gen=not whole.visual_gen)
        config, lacks = _choose_halves(place, whole, visual_gen, visual_und)
        if config.visual_gen and vae is None:
            raise CheckpointError(
                f"{place} has no ae.safetensors, the autoencoder that drawing and editing need: fetch it from the "
                "checkpoint's source, name a folder that has it with base=..., or pass visual_gen=False to go without"
            )
        return cls(
            folder=place,
            config=config,
            weights=found,
            vae=vae if config.visual_gen else None,
            tokenizer_home=_tokenizer_home(place, base_place),
            notes=(*resolver.notes, *(vae_notes if config.visual_gen else ())),
            lacks=lacks,
        )

    def load(
        self,
        model: Bagel,
        vae: Autoencoder | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype | None = None,
        expand: bool = False,
        convert: Convert | None = None,
        leave: Collection[str] = (),
    ) -> None:
        """Fill a model and an autoencoder that were built on the meta device, tensor by tensor, where they shall live.

        Linear layers whose weights are compressed stay so, and are expanded only while they multiply: the model then
        takes on the device what it takes on the disk. Beyond the weights' destination this takes less than 1 GiB of
        host memory, of DFloat11 less than 2 GiB. The sin-cos tables keep the dtype they are stored in.

        Args:
            model: `Bagel(checkpoint.config)` built under `torch.device("meta")`.
            vae: `Autoencoder(checkpoint.config.vae_config)` built alike; None leaves the autoencoder unread.
            device: where the weights go.
            dtype: floating-point type of the model's weights; None keeps the stored ones.
            vae_dtype: the same for the autoencoder.
            expand: decode compressed weights into `dtype` while they are read, so that every layer is dense.
            convert: called as `convert(name, linear)` for every dense linear layer right after it was filled; what it
                returns takes the layer's place. So a model that is quantised while it is loaded is never whole in
                `dtype`. Layers that stay compressed are not shown to it.
            leave: parameters of the model that are left without values, to be read when they are needed; see `pieces`.

        Raises:
            CheckpointError: for a file that is damaged or changed since `open`, weights that are NaN or infinite, a
                model of another configuration.
            MemoryError: the device has too little free; says how much it takes.
        """
        if vae is not None and self.vae is None:
            raise CheckpointError(f"{self.folder} was opened without an autoencoder: pass vae=None")
        place = torch.device(device)
        load_model(
            model, self.weights, self.config, device=place, dtype=dtype, expand=expand, convert=convert, leave=leave
        )
        if vae is not None and self.vae is not None:
            load_autoencoder(vae, self.vae, device=place, dtype=vae_dtype)

    def nbytes(self, dtype: torch.dtype, vae_dtype: torch.dtype, *, expand: bool = False) -> int:
        """Return the bytes that all weights take once they are loaded; arguments as for `load`."""
        found = 0 if self.vae is None else sum(entry.numel for entry in self.vae.entries.values()) * vae_dtype.itemsize
        for key in official_shapes(self.config):
            entry = self.weights.entries[key]
            kept = self.weights.keeps(key) and not expand
            found += entry.nbytes if kept else entry.numel * dtype.itemsize
        return found

    def kept_linears(self) -> frozenset[str]:
        """Return the names of the linear layers whose weights `load` keeps as they are stored, unless it expands."""
        kept = [target.parameter for key, target in targets(self.config).items() if self.weights.keeps(key)]
        return frozenset(name.removesuffix(".weight") for name in kept)

    def pieces(self, parameter: str) -> list[Piece]:
        """Return where the rows of one of the model's parameters are in the files, for those that `load` has left."""
        return pieces_of(self.weights, self.config, parameter)


def _folder(source: str | Path) -> Path:
    place = path_of(source, "a checkpoint's folder")
    if not place.is_dir():
        if place.is_file():
            raise CheckpointError(f"{place} is a file; {instead_of_file(place)}")
        raise CheckpointError(
            f"{place} does not exist; check its spelling, or fetch a checkpoint: hf download {OFFICIAL} "
            f"--local-dir {place}"
        )
    if (place / JOURNAL).is_file():
        raise CheckpointError(f"{place} holds a conversion that is not done; run the same `bagel convert` again")
    return place


def _check_weights(found: Source, config: BagelConfig, stated: StatedFiles, *, idle_gen: bool) -> None:
    wanted = official_shapes(config)
    if idle_gen:
        # Idle gen experts of an understanding-only run: known tensors, of the right shape or not, that are not read.
        known = official_shapes(dataclasses.replace(config, visual_gen=True))
        wanted |= {key: found.entries[key].shape for key in known if key in found.entries}
    hints = []
    for part in (stated.decoder, stated.vit):
        layers = part.integer("num_hidden_layers")
        if layers is not None:
            hints.append(f"{layers[1]} says {layers[0]} layers")
    check_shapes(found, wanted, "; ".join(hints))


def _choose_halves(
    place: Path, whole: BagelConfig, visual_gen: bool | None, visual_und: bool | None
) -> tuple[BagelConfig, tuple[str, ...]]:
    lacks: list[str] = []
    for asked, there, name, half, cannot in (
        (visual_gen, whole.visual_gen, "visual_gen", "generating", "it cannot draw or edit images"),
        (
            visual_und,
            whole.visual_und,
            "visual_und",
            "vision",
            "it cannot see images, so not edit them either",
        ),
    ):
        if asked and not there:
            raise CheckpointError(f"{name}=True, but {place} has no {half} half: {cannot}")
        if not there:
            lacks.append(f"this checkpoint has no {half} half: {cannot}")
        elif asked is False:
            lacks.append(f"the {half} half was left out ({name}=False): {cannot}")
    if visual_gen is False and whole.visual_gen:
        whole = dataclasses.replace(whole, visual_gen=False, vae_config=None)
    if visual_und is False and whole.visual_und:
        whole = dataclasses.replace(whole, visual_und=False, vit_config=None)
    return whole, tuple(lacks)


def _tokenizer_home(place: Path, base: Path | None) -> Path | None:
    return next((candidate for candidate in (place, base) if candidate and has_tokenizer(candidate)), None)
