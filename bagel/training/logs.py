"""What a run tells: a progress bar, `log.jsonl`, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bagel.modeling import Bagel, DecoderLayer
from bagel.training.batch import Batch

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second, by a part of the device's name (from the vendors' data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a GPU that is listed, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Flops:
    """Counts the operations of a training step: 6 a weight and token, and attention's share of each visible pair.

    Frozen parts and recomputed layers count like the others, padding does not count.
    """

    def __init__(self, model: Bagel) -> None:
        config = model.config.llm_config
        layers = [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)]
        self.und = sum(_count(layer.und) for layer in layers)
        # Other variants share an expert, or all of it but an MLP of the same size, with the gen tokens.
        own = config.has_gen_attention and model.config.visual_gen
        self.gen = sum(_count(layer.gen) for layer in layers if layer.gen) if own else self.und
        self.vit = _count(model.vit) + _count(model.connector) if model.config.visual_und else 0
        self.head = config.vocab_size * config.hidden_size
        self.pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim

    def of(self, batch: Batch) -> float:
        """Return the operations of forward and backward of a batch."""
        packed = batch.packed
        num_und, num_gen = packed.und_positions.shape[0], packed.gen_positions.shape[0]
        weights = self.und * num_und + self.gen * num_gen
        weights += self.vit * packed.vit_rows.shape[0] + self.head * packed.label_rows.shape[0]
        return 6.0 * weights + self.pair * float(sum(length**2 for length in packed.layout.lengths))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Log:
    """Writes what a run tells, on one process.

    Args:
        out: the run's folder.
        steps: of the whole run.
        done: steps that were done before; later lines of an earlier attempt are removed.
        progress: show a bar, if there is a terminal.
    """

    def __init__(self, out: Path, *, steps: int, done: int, progress: bool) -> None:
        self.file = out / "log.jsonl"
        kept = []
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= done]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.file)
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=None if progress else True)
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=done)

    def step(self) -> None:
        """Advance the bar."""
        self.bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; numbers go to TensorBoard as well."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {"loss": f"{values['loss']:.3f}"}
        rates = [name for name in values if name.endswith("_per_s")]
        shown |= {name.replace("_per_s", "/s"): f"{values[name]:.0f}" for name in rates}
        if "mfu" in values:
            shown["mfu"] = f"{values['mfu']:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Finish the bar and TensorBoard's file."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")
