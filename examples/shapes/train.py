"""Train the small BAGEL of the shapes world; one command a part, each goes on where it was stopped.

    python examples/shapes/model.py runs/start                                 sizes, tokenizer, fresh weights
    python examples/shapes/train.py vae   --start runs/start --out runs/vae
    python examples/shapes/train.py pool  --start runs/start --vae runs/vae --out runs/pool       without a GPU only
    python examples/shapes/train.py model --start runs/start --vae runs/vae --out runs/model
    python examples/shapes/train.py decoder --vae runs/vae --out runs/decoder     for latents that are drawn, not exact
    python examples/shapes/train.py export --run runs/model --vae runs/decoder --to bagel/demo/checkpoint

With torchrun the model trains on several GPUs: torchrun --nproc-per-node 2 examples/shapes/train.py model ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import torch
from data import WEIGHTS, Shapes
from model import CONFIG, SIDE
from pool import EncodedMaker, Pooled, read_pool, write_pool
from safetensors.torch import load_file

from bagel.config import VAEConfig
from bagel.evaluation.motion import random_motion
from bagel.evaluation.render import render
from bagel.evaluation.samples import sample
from bagel.evaluation.scene import random_scene
from bagel.image import in_unit, to_levels
from bagel.loading import load_parts
from bagel.modeling import Bagel
from bagel.pipeline import BagelPipeline
from bagel.tokenizer import Tokenizer
from bagel.training import Data, Generated, ItemMaker, Rules, TrainConfig, Trainer
from bagel.training.distributed import leave
from bagel.training.state import newest
from bagel.training.vae_training import VAELossWeights, VAETrainer
from bagel.vae import Autoencoder

VAE = TrainConfig(
    steps=9000, lr=1e-3, warmup=300, schedule="cosine", min_lr=0.02, ema_decay=0.999, clip_norm=1.0, log_every=100
)
DECODER = TrainConfig(
    steps=2000, lr=8e-4, warmup=50, schedule="cosine", min_lr=0.01, ema_decay=0.99, clip_norm=1.0, log_every=50
)
MODEL = TrainConfig(
    steps=3818,
    lr=2.5e-3,
    warmup=200,
    schedule="cosine",
    min_lr=0.01,
    optimizer="muon",
    betas=(0.9, 0.98),
    weight_decay=0.01,
    ema_decay=0.998,
    log_every=50,
    precision="bfloat16",
    compile=True,
)


def image(rng: random.Random) -> torch.Tensor:
    """Return one image (3, H, W) uint8 of any task."""
    task = rng.choice(("t2i1", "t2i2", "t2i3", "video"))
    image = rng.choice(sample(rng, task, side=SIDE).outputs)
    return to_levels(image).contiguous()


def placed(rng: random.Random) -> torch.Tensor:
    """Return one image (3, H, W) uint8 of shapes wherever they may stand, most often of three."""
    if rng.random() < 0.25:
        image = rng.choice(random_motion(rng).frames(side=SIDE))
    else:
        image = render(random_scene(rng, objects=rng.choice((1, 2, 3, 3))), side=SIDE)
    return to_levels(image).contiguous()


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder."""
    config = dataclasses.replace(VAE, workers=args.workers, save_every=args.save_every, **args.set)
    torch.manual_seed(0)
    vae = Autoencoder(CONFIG.vae_config)
    trainer = VAETrainer(
        vae,
        image,
        config,
        batch_size=256,
        out=args.out,
        weights=VAELossWeights(l1=1.0, l2=1.0, gradient=0.5, kl=1e-5),
        device=args.device,
    )
    tell(trainer.fit(), args.device)


def train_decoder(args: argparse.Namespace) -> None:
    """Train the autoencoder's decoder on, for latents that are not exact: the model's own."""
    config = dataclasses.replace(DECODER, workers=args.workers, save_every=args.save_every, **args.set)
    trainer = VAETrainer(
        trained_vae(args.vae).to(memory_format=torch.channels_last),
        placed,
        config,
        batch_size=48,
        out=args.out,
        weights=VAELossWeights(l1=1.0, l2=4.0, gradient=1.0, kl=0.0),
        decoder_only=True,
        latent_noise=0.3,
        device=args.device,
    )
    tell(trainer.fit(), args.device)


def tell(vae: Autoencoder, device: str) -> None:
    """Print how well images that were not trained on are reconstructed."""
    rng = random.Random("held-out pictures")
    pixels = in_unit(torch.stack([image(rng) for _ in range(512)]).to(device))
    noise = torch.randn(vae.moments(pixels)[0].shape, generator=torch.Generator().manual_seed(0))
    error = (vae.decode(vae.encode(pixels, noise)).clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
    decibels = -10 * error.log10()
    print(f"reconstruction: {decibels.mean():.1f} dB on average, {decibels.min():.1f} dB at worst, {vae.config}")


def trained_vae(folder: Path) -> Autoencoder:
    """Return the autoencoder of a run."""
    found = newest(folder)
    if found is None:
        raise SystemExit(f"{folder} holds no autoencoder yet: run `train.py vae --out {folder}` first")
    values = json.loads((found / "vae_config.json").read_text())
    vae = Autoencoder(VAEConfig(**values | {"ch_mult": tuple(values["ch_mult"])}))
    vae.load_state_dict(load_file(found / "ae.safetensors"))
    return vae


def with_vae(args: argparse.Namespace) -> tuple[Bagel, Autoencoder, Tokenizer]:
    """Return a model, fresh or from a run, and its tokenizer with the autoencoder that was trained for them."""
    model, _, tokenizer = load_parts(newest(args.start) or args.start, device="cpu", dtype=torch.float32)
    vae = trained_vae(args.vae)
    model.config = dataclasses.replace(model.config, vae_config=vae.config, timestep_shift=CONFIG.timestep_shift)
    return model, vae, tokenizer


def make_pool(args: argparse.Namespace) -> None:
    """Encode images ahead; goes on where it was stopped."""
    model, vae, tokenizer = with_vae(args)
    write_pool(args.out, ItemMaker(model.config, tokenizer), vae, blocks=args.blocks, side=SIDE)


def train_model(args: argparse.Namespace) -> None:
    """Train the model on all tasks, from the weights in --start or from where the run in --out stopped."""
    model, vae, tokenizer = with_vae(args)
    makers = {task: Shapes(task, ItemMaker(model.config, tokenizer), SIDE) for task in WEIGHTS}
    if args.pool:
        encoded = EncodedMaker(model.config, tokenizer)
        pool = read_pool(args.pool)
        makers |= {task: Pooled(Shapes(task, encoded, SIDE), examples) for task, examples in pool.items()}
    data = Data(
        sources={task: Generated(make) for task, make in makers.items()},
        rules=Rules.of(model.config, tokenizer, times="uniform"),
        image_tokens=(tokenizer.image_start_id, tokenizer.image_end_id),
        token_budget=args.tokens,
        weights=WEIGHTS,
        seed=args.seed,
        streams=1 if args.pool else 48,
    )
    train = dataclasses.replace(MODEL, workers=args.workers, save_every=args.save_every, **args.set)
    trainer = Trainer(model, data, train, tokenizer=tokenizer, out=args.out, vae=vae, device=args.device)
    trainer.fit(time_limit=args.time_limit)
    leave()


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of a run in bfloat16, autoencoder included."""
    folder = newest(args.run)
    if folder is None:
        raise SystemExit(f"{args.run} holds no checkpoint yet")
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    if args.vae:
        pipe.vae.load_state_dict(trained_vae(args.vae).state_dict())
    pipe.save_pretrained(args.to, overwrite=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("vae", "model", "decoder"):
        command = commands.add_parser(name)
        if name != "decoder":
            command.add_argument("--start", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--workers", type=int, default=0)
        command.add_argument("--save-every", type=int, default=1000)
        command.add_argument("--set", type=json.loads, default={}, help='other settings as JSON, e.g. {"steps": 100}')
        if name != "vae":
            command.add_argument("--vae", type=Path, required=True)
        if name == "model":
            command.add_argument("--tokens", type=int, default=65536, help="tokens of a step (default 65536)")
            command.add_argument("--seed", type=int, default=8, help="of the samples (default 8)")
            command.add_argument("--pool", type=Path, help="draw from images encoded ahead")
            command.add_argument("--time-limit", type=float, help="save and stop after so many seconds")
    command = commands.add_parser("pool")
    command.add_argument("--start", type=Path, required=True)
    command.add_argument("--vae", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--blocks", type=int, default=200, help="files of a thousand examples")
    command = commands.add_parser("export")
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--vae", type=Path, help="an autoencoder with a decoder of its own")
    command.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    run = {"vae": train_vae, "pool": make_pool, "model": train_model, "decoder": train_decoder, "export": export}
    run[args.command](args)


if __name__ == "__main__":
    main()
