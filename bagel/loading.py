"""From a source to a loaded model: where it goes, in which type, and the files read into it."""

from __future__ import annotations

from pathlib import Path

import torch

from bagel.checkpoint import Checkpoint, Convert, resolve_source, verify_checksums
from bagel.memory import explain_out_of_memory
from bagel.modeling import Bagel
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

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
    expand: bool = False,
    convert: Convert | None = None,
) -> tuple[Bagel, Autoencoder | None, Tokenizer]:
    """Return model, autoencoder and tokenizer of a folder or Hub id; arguments as `BagelPipeline.from_pretrained`."""
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
        checkpoint.load(model, vae, device=device, dtype=dtype, vae_dtype=vae_dtype, expand=expand, convert=convert)
    return model.eval().requires_grad_(False), None if vae is None else vae.eval().requires_grad_(False), tokenizer


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
    except (RuntimeError, TypeError, AssertionError) as error:  # what torch raises for one that is not there
        reason = str(error).partition("\n")[0].partition(". ")[0]
        there = f"cpu and {torch.cuda.device_count()} CUDA GPU(s)"
        raise ValueError(
            f"device={str(device)!r} cannot be used: torch {torch.__version__} sees {there} here ({reason})"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device='meta' holds no values; use cpu or cuda")
    return chosen


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the type asked for, else float32 on a CPU, bfloat16 on a GPU, float16 on one without bfloat16."""
    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def choose_vae_dtype(vae_dtype: torch.dtype | str | None, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the autoencoder's type: as asked, else bfloat16 beside a bfloat16 model on a GPU, else float32."""
    if vae_dtype is not None:
        return choose_dtype(vae_dtype, device)
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
