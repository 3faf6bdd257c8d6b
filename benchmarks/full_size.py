"""Make a random checkpoint of the released 7B sizes in the official files, and see what loading it costs.

    python -m benchmarks.full_size make FOLDER            writes 29 GB; the tokenizer is copied from --tokenizer
    python -m benchmarks.full_size load FOLDER [--dtype bfloat16]

To measure anything but the loading, `python -m benchmarks --random-7b` needs no files.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bagel import BAGEL_7B, BagelPipeline
from bagel.checkpoint import official_shapes
from bagel.demo import CHECKPOINT
from bagel.vae import Autoencoder
from benchmarks.weights import mean_and_spread

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def make(folder: Path, tokenizer: Path) -> None:
    """Write ema.safetensors, ae.safetensors and the JSON files of a random 7B."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        mean, spread = mean_and_spread(name, shape)
        return mean + spread * torch.randn(shape, device=generator.device, generator=generator)

    model = {name: values(name, shape).bfloat16().cpu() for name, shape in official_shapes(BAGEL_7B).items()}
    save_file(model, folder / "ema.safetensors", metadata={"format": "pt"})
    del model
    config = BAGEL_7B.to_dict()
    assert BAGEL_7B.vae_config is not None
    with torch.device("meta"):
        vae = Autoencoder(BAGEL_7B.vae_config)
    tensors = {name: values(name, tuple(x.shape)).cpu() for name, x in vae.state_dict().items()}
    save_file(tensors, folder / "ae.safetensors", metadata={"format": "pt"})
    (folder / "llm_config.json").write_text(json.dumps(config["llm_config"]))
    (folder / "vit_config.json").write_text(json.dumps(config["vit_config"]))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)


class PeakMemory:
    """Largest host memory of this process while active, anonymous and file-backed, sampled every 20 ms, in GiB."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.running = 0.0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * resource.getpagesize() / 2**30)
            time.sleep(0.02)

    def __exit__(self, *_) -> None:
        self.running = False
        self.thread.join()


def load(folder: Path, dtype: str) -> None:
    """Load, and print what it took."""
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    with PeakMemory() as before:
        time.sleep(0.1)
    start = time.perf_counter()
    with PeakMemory() as loading:
        pipe = BagelPipeline.from_pretrained(folder, dtype=dtype)
    print(f"load {time.perf_counter() - start:.1f} s, host memory {before.peak:.2f} -> peak {loading.peak:.2f} GiB")
    if torch.cuda.is_available():
        print(f"GPU memory {torch.cuda.memory_allocated() / 2**30:.1f} GiB")
    print(pipe)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.action == "make":
        make(args.folder, args.tokenizer)
    else:
        load(args.folder, args.dtype)


if __name__ == "__main__":
    main()
