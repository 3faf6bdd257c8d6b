"""Make a random checkpoint of the released 7B sizes in the official files, load it, and draw with it.

    python benchmarks/full_size.py make FOLDER            writes 29 GB; the tokenizer is copied from --tokenizer
    python benchmarks/full_size.py draw FOLDER -o out.png [--dtype bfloat16]

Speed and memory do not depend on the values of the weights; pictures are noise patterns.
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
from bagel.vae import Autoencoder

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def random_tensor(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Values of a healthy scale: norms near one, biases small, matrices that keep the size of what they map."""
    if len(shape) == 1:
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return base + 0.02 * torch.randn(shape, device=device)
    fan_in = torch.Size(shape[1:]).numel()
    scale = 0.02 if "embed_tokens" in name or "pos_embed" in name else fan_in**-0.5
    return scale * torch.randn(shape, device=device)


def make(folder: Path, tokenizer: Path) -> None:
    """Write ema.safetensors, ae.safetensors and the JSON files of a random 7B."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes = official_shapes(BAGEL_7B)
    model = {name: random_tensor(name, shape, device).bfloat16().cpu() for name, shape in shapes.items()}
    save_file(model, folder / "ema.safetensors", metadata={"format": "pt"})
    del model
    with torch.device("meta"):
        vae = Autoencoder(BAGEL_7B.vae_config)
    tensors = {name: random_tensor(name, tuple(x.shape), device).cpu() for name, x in vae.state_dict().items()}
    save_file(tensors, folder / "ae.safetensors", metadata={"format": "pt"})
    values = BAGEL_7B.to_dict()
    (folder / "llm_config.json").write_text(json.dumps(values["llm_config"]))
    (folder / "vit_config.json").write_text(json.dumps(values["vit_config"]))
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


def draw(folder: Path, output: Path, dtype: str, steps: int, side: int) -> None:
    """Load, draw, and print what it took."""
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    with PeakMemory() as before:
        time.sleep(0.1)
    start = time.perf_counter()
    with PeakMemory() as loading:
        pipe = BagelPipeline.from_pretrained(folder, dtype=dtype)
    print(f"load {time.perf_counter() - start:.1f} s, host memory {before.peak:.2f} -> peak {loading.peak:.2f} GiB")
    for turn in range(2):
        start = time.perf_counter()
        result = pipe.text_to_image("a red circle", height=side, width=side, num_timesteps=steps, seed=turn)
        print(f"{dtype} text-to-image {side}x{side}, {steps} timesteps: {time.perf_counter() - start:.2f} s")
    if torch.cuda.is_available():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print("latents finite:", bool(torch.isfinite(result.latents).all()), "std", round(result.latents.std().item(), 3))
    result.image.save(output)
    start = time.perf_counter()
    answer = pipe.understand(result.image, "what is in the image?", max_new_tokens=64)
    seconds = time.perf_counter() - start
    print(f"understanding, {len(answer.token_ids)} tokens: {seconds:.2f} s")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "draw"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("full_size.png"))
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/reference/tiny/checkpoint"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, default=1024)
    args = parser.parse_args()
    if args.action == "make":
        make(args.folder, args.tokenizer)
    else:
        draw(args.folder, args.output, args.dtype, args.steps, args.side)


if __name__ == "__main__":
    main()
