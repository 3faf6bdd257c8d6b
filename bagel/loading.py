"""From a source to a loaded model: where it goes, in which type, and the files read into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bagel.checkpoint import Checkpoint, Convert, resolve_source, verify_checksums
from bagel.checkpoint.free_memory import free_bytes, host_free_bytes
from bagel.kernels import has_bfloat16
from bagel.memory import NotEnoughMemoryError, explain_out_of_memory
from bagel.memory.placement import left_in_files, place
from bagel.memory.sizes import parse_bytes, said
from bagel.memory.work import Request, Work
from bagel.modeling import Bagel
from bagel.modeling.stored.quantize import EXPERTS, converter, saved_bytes
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

HOST_SPARE = 2 * 2**30
"""Bytes that the host needs beside the weights that it keeps for a GPU."""
OUTSIDE = 768 * 2**20
"""Bytes of a GPU that its libraries take beside torch's allocator once they are used."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_parts(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    vae_dtype: torch.dtype | str | None = None,
    base: str | Path | None = None,
    weights: str | None = None,
    visual_gen: bool | None = None,
    visual_und: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    verify: bool = False,
    progress: bool = True,
    memory: str | int | None = None,
    expand: bool = False,
    quantize: str | None = None,
    quantize_parts: str | Sequence[str] = EXPERTS,
    convert: Convert | None = None,
) -> tuple[Bagel, Autoencoder | None, Tokenizer]:
    """Return model, autoencoder and tokenizer of a folder or Hub id; arguments as `BagelPipeline.from_pretrained`."""
    limit = None if memory is None else parse_bytes(memory)
    parts = _check_changes(quantize, quantize_parts, convert)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    vae_dtype = choose_vae_dtype(vae_dtype, dtype, device)
    folder = resolve_source(
        source, revision=revision, token=token, progress=progress, alone=base is None, weights=weights
    )
    base_folder = None if base is None else resolve_source(base, token=token, progress=progress)
    if verify:
        verify_checksums(folder)
    checkpoint = Checkpoint.open(
        folder, base=base_folder, weights=weights, visual_gen=visual_gen, visual_und=visual_und
    )
    tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    with torch.device("meta"):
        model = Bagel(checkpoint.config)
        draws = checkpoint.config.visual_gen and checkpoint.config.vae_config is not None
        vae = Autoencoder(checkpoint.config.vae_config) if draws and checkpoint.config.vae_config else None
    with explain_out_of_memory(
        f"loading {folder} as {str(dtype).removeprefix('torch.')} on {device}",
        way_out="`bagel inspect` says what fits; use dtype=torch.bfloat16, visual_gen=False if you only ask questions, "
        "or a machine with more memory",
    ):
        needed = checkpoint.nbytes(dtype, vae_dtype, expand=expand)
        if quantize is not None:
            convert = converter(quantize, parts=parts, layers=len(model.decoder.layers))
            kept = () if expand else checkpoint.kept_linears()
            needed -= saved_bytes(model, dtype, quantize, parts, kept=kept)
        types = {"dtype": dtype, "vae_dtype": vae_dtype, "expand": expand, "convert": convert}
        if limit is None and (free := free_bytes(device)) is not None:
            limit = free - (OUTSIDE if device.type == "cuda" else 0)
        work = Work(checkpoint.config, dtype)  # an edit has three branches, the most
        if limit is None or needed + max(work.drawing(Request(branches=3)), work.writing(Request())) <= limit:
            checkpoint.load(model, vae, device=device, **types)
        else:
            _load_within(limit, checkpoint, model, vae, device, needed, types)
    return model.eval().requires_grad_(False), None if vae is None else vae.eval().requires_grad_(False), tokenizer


def _check_changes(quantize: str | None, parts: Sequence[str], convert: Convert | None) -> tuple[str, ...]:
    """Return the parts to quantise, once all is known to be right: before anything is fetched or read.

    Raises:
        ValueError: an unknown format or part, or both ways to change layers at once.
        TypeError: something of another type.
    """
    for name, value in (("quantize", quantize), *(("quantize_parts", part) for part in _several(parts))):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be text, got {type(value).__name__} {value!r}")
    if convert is not None and not callable(convert):
        raise TypeError(f"convert must be called as convert(name, linear), got {type(convert).__name__} {convert!r}")
    if quantize is not None:
        if convert is not None:
            raise ValueError("give quantize or convert, not both")
        converter(quantize, parts=_several(parts), layers=1)
    return _several(parts)


def _several(parts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(parts, str):
        return (parts,)
    if not isinstance(parts, Iterable):
        raise TypeError(f"quantize_parts must be names of parts, got {type(parts).__name__} {parts!r}")
    return tuple(parts)


def _load_within(
    limit: int,
    checkpoint: Checkpoint,
    model: Bagel,
    vae: Autoencoder | None,
    device: torch.device,
    needed: int,
    types: dict[str, Any],
) -> None:
    """Load onto the host, or leave the largest weights in files where it has no room, and place what a limit lets.

    A CPU never holds more than its limit; beside a GPU the host keeps all weights if it can.

    Raises:
        NotEnoughMemoryError: weights are to be converted, which files do not hold, and memory does not hold them; or
            the limit does not even hold what never leaves the device.
    """
    if (convert := types["convert"]) is not None:  # where it is fast; the result goes where it is kept
        types = types | {"convert": lambda name, linear: convert(name, linear.to(device)).to("cpu")}
    on_host = device.type != "cpu" and needed + HOST_SPARE <= host_free_bytes()
    if types["convert"] is not None and not on_host:
        room = limit if device.type == "cpu" else host_free_bytes()
        raise NotEnoughMemoryError(
            f"quantised weights are kept in memory: {said(needed)}, and what computing takes, where there are "
            f"{said(room)}; give more, quantise to fewer bits, or leave out quantize=..., so that weights are "
            "read from their files"
        )
    leave = [] if on_host else sorted(left_in_files(model, types["dtype"]))
    checkpoint.load(model, vae, device="cpu", leave=leave, **types)
    pieces = {}
    for name in leave:
        owner, _, leaf = name.rpartition(".")
        pieces[model.get_submodule(owner), leaf] = checkpoint.pieces(name)
    supply = place(model, vae, device, limit=limit, pieces=pieces)
    if (fixed := supply.fixed + supply.slack) > limit:
        raise NotEnoughMemoryError(
            f"the weights that never leave {device} take {said(fixed)}, more than the limit of {said(limit)}: give "
            "more with memory=..."
        )


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, else a CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: a device that torch does not know, does not see here, or that holds no values.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:  # what torch raises for one not there
        reason = str(error).partition("\n")[0].partition(". ")[0]
        there = f"{'mps, ' * torch.backends.mps.is_available()}cpu and {torch.cuda.device_count()} CUDA GPU(s)"
        raise ValueError(
            f"device={str(device)!r} cannot be used: torch {torch.__version__} sees {there} here ({reason})"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device='meta' holds no values; use cpu or cuda")
    return chosen


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the type asked for, else float32 on a CPU, bfloat16 on a GPU, float16 on one without bfloat16.

    Apple's GPUs (device "mps") get float16: they have bfloat16 from macOS 14 on only.
    """
    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if has_bfloat16(device) else torch.float16
        return {"mps": torch.float16, "xpu": torch.bfloat16}.get(device.type, torch.float32)
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def choose_vae_dtype(vae_dtype: torch.dtype | str | None, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the autoencoder's type: as asked, else bfloat16 beside a bfloat16 model on a GPU, else float32."""
    if vae_dtype is not None:
        return choose_dtype(vae_dtype, device)
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
