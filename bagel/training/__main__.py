"""`python -m bagel.training RUN.json`: train a checkpoint further, or its sizes from scratch, on data files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagel.loading import load_parts
from bagel.training import Conversations, Editing, TextToImage, fresh_model
from bagel.training.config import TrainConfig
from bagel.training.distributed import leave
from bagel.training.samples import Dropout, ItemMaker, Rules
from bagel.training.stream import Data, Source
from bagel.training.trainer import Trainer

EXAMPLE = """\
RUN.json:
  {"model": "checkpoint folder", "fresh": false,
   "data": {"token_budget": 32768, "seed": 0, "weight_by_length": true, "times": "logit_normal",
            "dropout": {"text": 0.1, "vae": 0.3, "vit": 0.3},
            "sources": {"draw": {"kind": "text_to_image", "place": "t2i/", "weight": 2},
                        "edit": {"kind": "editing", "place": "edit/"},
                        "talk": {"kind": "conversations", "place": "talk.jsonl", "images": "images/"}}},
   "train": {"steps": 10000, "lr": 1e-4, "precision": "bfloat16", "save_every": 500}}

examples:
  python -m bagel.training run.json --out runs/first
  torchrun --nproc-per-node 8 -m bagel.training run.json --out runs/first

The same command goes on where a stopped run was last saved.
"""
KINDS = {"text_to_image": TextToImage, "editing": Editing, "conversations": Conversations}


def sources_of(values: dict[str, dict[str, Any]], maker: ItemMaker, seed: int) -> dict[str, Source]:
    """Return the readers that a run's JSON names.

    Raises:
        ValueError: a kind that does not exist, or an argument that its reader does not take.
    """
    sources: dict[str, Source] = {}
    for name, value in values.items():
        options = {key: entry for key, entry in value.items() if key not in ("kind", "weight")}
        if value.get("kind") not in KINDS:
            raise ValueError(f"source {name}: kind must be one of {', '.join(KINDS)}, got {value.get('kind')!r}")
        try:
            sources[name] = KINDS[value["kind"]](maker=maker, seed=seed, **options)
        except TypeError as error:
            raise ValueError(f"source {name}: {error}") from error
    return sources


def make_trainer(run: dict[str, Any], out: str | Path, *, device: str | None = None) -> Trainer:
    """Return the trainer of a run's JSON values; see the help of this command.

    Raises:
        ValueError: settings that do not exist or contradict one another.
    """
    model, vae, tokenizer = load_parts(run["model"], device="cpu", dtype="float32", progress=False)
    data, seed = run["data"], run["data"].get("seed", 0)
    if run.get("fresh", False):
        model = fresh_model(model.config, seed=seed)
    rules = Rules.of(
        model.config,
        tokenizer,
        times=data.get("times", "logit_normal"),
        dropout=Dropout(**data.get("dropout", {})),
        weight_by_length=data.get("weight_by_length", False),
    )
    packing = {name: data[name] for name in ("token_budget", "patience", "streams") if name in data}
    packed = Data(
        sources_of(data["sources"], ItemMaker(model.config, tokenizer), seed),
        rules,
        (tokenizer.image_start_id, tokenizer.image_end_id),
        weights={name: value.get("weight", 1.0) for name, value in data["sources"].items()},
        seed=seed,
        **packing,
    )
    config = TrainConfig.from_dict(run["train"])
    return Trainer(model, packed, config, tokenizer=tokenizer, out=out, vae=vae, device=device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bagel.training",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="JSON file: model, data, train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run's checkpoints and log")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop and save after so long")
    options = parser.parse_args(arguments)
    try:
        trainer = make_trainer(json.loads(options.run.read_text(encoding="utf-8")), options.out, device=options.device)
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"{parser.prog}: {type(error).__name__}: {error}\n")
    trainer.fit(time_limit=options.time_limit)
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
