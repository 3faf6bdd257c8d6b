"""Packed training of the whole model, on one device or, under `torchrun`, sharded over many."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bagel.checkpoint import CheckpointError
from bagel.modeling import Bagel
from bagel.modeling.compiling import compile_experts
from bagel.packing import Packed
from bagel.tokenizer import Tokenizer
from bagel.training import state
from bagel.training.batch import on_device
from bagel.training.config import TrainConfig
from bagel.training.distributed import World, join, like, own, rejoined, whole
from bagel.training.logs import Flops, Log, peak_flops
from bagel.training.masks import KERNELS, attention_of
from bagel.training.optimiser import Optimiser
from bagel.training.stream import Data, Delivery, deliveries
from bagel.training.weights import freeze, trainable
from bagel.vae import Autoencoder


class SummedLosses(nn.Module):
    """The model and the sums of its losses over a batch; the root that is sharded."""

    def __init__(self, model: Bagel) -> None:
        super().__init__()
        self.model = model

    def forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the cross-entropies and the sum of the squared errors of a batch.

        Every trained parameter takes part, with weight zero where the batch has no use for it.
        """
        losses = self.model.losses(packed)
        # Of the mean loss only its zero is taken: it ties in both experts to the last layer.
        idle = 0 * losses.loss
        for module in self._idle(packed):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    idle = idle + 0 * parameter.flatten()[:1].float().sum()
        return (losses.ce * packed.label_weights).sum() + idle, losses.mse.sum()

    def _idle(self, packed: Packed) -> list[nn.Module]:
        model, idle = self.model, []
        if model.config.visual_und and not packed.vit_lengths:
            idle += [model.vit, model.connector]
        if model.config.visual_gen and not packed.latents.shape[0]:
            idle += [model.vae2llm, model.time_embedder]
        if model.config.visual_gen and not packed.target_rows.shape[0]:
            idle += [model.llm2vae, model.decoder.norm_gen]
        if not packed.labels.shape[0]:
            idle += [model.decoder.norm, model.decoder.lm_head]
        return [module for module in idle if module is not None]


class Trainer:
    """Trains a model and keeps its checkpoints in a folder; goes on where an earlier run in that folder stopped.

    Args:
        model: float32 weights, fresh or loaded; moved to the device.
        data: see `bagel.training.stream.Data`.
        config: see `TrainConfig`.
        tokenizer: goes into the checkpoints.
        out: the run's folder.
        vae: goes into the checkpoints, and encodes images that come as pixels; frozen.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        progress: show a progress bar on a terminal.
        on_step: called with (step, values) after every line of the log.

    Raises:
        ValueError: settings that contradict one another.
        CheckpointError: a folder that cannot be resumed.
    """

    def __init__(
        self,
        model: Bagel,
        data: Data,
        config: TrainConfig,
        *,
        tokenizer: Tokenizer,
        out: str | Path,
        vae: Autoencoder | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        on_step: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        if model.dtype != torch.float32:
            raise ValueError(f"training keeps float32 weights, got {model.dtype}; load the model with dtype=float32")
        if model.config.visual_gen and vae is None:
            raise ValueError("a model that draws needs its autoencoder (vae=...): it belongs to its checkpoints")
        if config.attention == "flex" and model.config.llm_config.head_dim < 16:
            size = model.config.llm_config.head_dim
            raise ValueError(f"flex attention needs heads of at least 16 channels, got {size}; use attention='dense'")
        self.world: World = join(device)
        if config.batches % self.world.size:
            raise ValueError(f"batches must be a multiple of the {self.world.size} processes, got {config.batches}")
        self.data, self.config, self.tokenizer, self.on_step = data, config, tokenizer, on_step
        self.out, self.progress = Path(out), progress
        self.model_config = model.config
        self.device = self.world.device
        self.vae = None if vae is None else vae.to(self.device).eval().requires_grad_(False)
        self.flops = Flops(model)
        freeze(model.to(self.device), config.freeze)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        model.attention = attention_of(config.attention, device=self.device, dtype=dtype)
        self.root = _prepared(SummedLosses(model.train()), config, self.world)
        self.parameters = trainable(self.root.model)
        self.optimiser = Optimiser(self.parameters, config)
        self.done = 0
        self.streams: dict[int, dict[str, Any]] = {}
        self._resume()

    # Running --------------------------------------------------------------------------------------------------------

    def fit(self, *, time_limit: float | None = None) -> int:
        """Train to the end, or for `time_limit` seconds, save, and return the number of steps done.

        Raises:
            FloatingPointError: the loss or the gradient is no longer finite; nothing is saved then.
        """
        config = self.config
        log = Log(self.out, steps=config.steps, done=self.done, progress=self.progress) if self.world.leads else None
        window = _Window(self)
        end = float("inf") if time_limit is None else time.monotonic() + time_limit
        feed = self._feed()
        try:
            while self.done < config.steps:
                window.add(*self.step(feed))
                if log is not None:
                    log.step()
                if self.done % config.log_every == 0 or self.done == config.steps:
                    self._report(window, log)
                if config.save_every and self.done % config.save_every == 0:
                    window.check()
                    self.save()
                if self._late(end):
                    break
            window.check()
            self.save()
        finally:
            if log is not None:
                log.close()
        return self.done

    def step(self, feed: Iterator[Delivery]) -> tuple[Tensor, dict[str, float]]:
        """Do one optimizer step; return the losses (cross-entropy, flow, gradient norm) and counts of this process."""
        config, world = self.config, self.world
        arrived = [next(feed) for _ in range(config.batches // world.size)]
        skeletons = [one.batch.skeleton for one in arrived]
        local = {
            "labels": sum(one.labels for one in arrived),
            "targets": float(sum(batch.packed.target_rows.shape[0] for batch in skeletons)),
            "tokens": float(sum(batch.tokens for batch in skeletons)),
            "flops": sum(self.flops.of(batch) for batch in skeletons),
        }
        labels, targets = world.sum([local["labels"], local["targets"]])
        # Gradients are averaged over processes: world.size undoes it. A loss that no batch has counts nothing.
        scale_ce = config.ce_weight * world.size / labels if labels else 0.0
        scale_mse = config.mse_weight * world.size / (targets * self.model_config.patch_latent_dim) if targets else 0.0
        sums = torch.zeros(2, device=self.device)
        for index, delivery in enumerate(arrived):
            ce, mse = self._forward(delivery, (self.done * len(arrived) + index) * world.size + world.rank)
            (scale_ce * ce + scale_mse * mse).backward()
            sums += torch.stack([ce.detach() / max(labels, 1e-30), mse.detach() / max(targets, 1e-30)])
            self.streams[delivery.stream] = delivery.state
        norm = self.optimiser.step(self.done)
        self.done += 1
        sums[1] /= self.model_config.patch_latent_dim
        local |= {"has_ce": float(labels > 0), "has_mse": float(targets > 0)}
        return torch.cat([sums, norm.reshape(1)]), local

    def _forward(self, delivery: Delivery, number: int) -> tuple[Tensor, Tensor]:
        """Return the summed losses of batch `number` of the run."""
        batch = delivery.batch.to(self.device)
        # Noise depends on the batch's number alone, not on what was drawn before it or which process draws it.
        seed = random.Random(f"{self.config.seed}/{number}").getrandbits(63)
        generator = torch.Generator(self.device).manual_seed(seed)
        narrow = self.config.precision == "bfloat16"
        planless = sdpa_kernel(KERNELS) if self.device.type == "cuda" else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow), planless:
            packed = on_device(batch, vae=self.vae, patch=self.model_config.latent_patch_size, generator=generator)
            return self.root(packed)

    def _feed(self) -> Iterator[Delivery]:
        config, world = self.config, self.world
        return deliveries(
            self.data,
            states=self.streams,
            done=self.done * config.batches // world.size,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            pin=self.device.type == "cuda",
        )

    def _late(self, end: float) -> bool:
        late = time.monotonic() >= end
        return late if end == float("inf") else self.world.sum([float(late)])[0] > 0

    # Telling --------------------------------------------------------------------------------------------------------

    def _report(self, window: _Window, log: Log | None) -> None:
        values = window.values()
        broken: Counter[str] = Counter()
        for stream in self.world.gather(self.streams).values():
            broken.update(stream["broken"])
        if broken:
            values["broken"] = dict(broken)
            values["broken_first"] = {name: self._first_broken(name) for name in broken}
        if log is not None:
            log.write(self.done, values)
        if self.on_step is not None:
            self.on_step(self.done, values)

    def _first_broken(self, name: str) -> str:
        examples = [stream["examples"][name] for stream in self.streams.values() if name in stream["examples"]]
        return examples[0] if examples else "seen by another process"

    # Keeping --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none; see `bagel.training.state`."""
        weights = {name: whole(tensor).cpu() for name, tensor in self.root.model.state_dict().items()}
        average = self.optimiser.average
        average = {name: whole(rejoined(p, average[name])).cpu() for name, p in self.parameters.items()}
        moments = self.optimiser.moments()
        streams = {str(index): stream for index, stream in self.world.gather(self.streams).items()}
        if self.world.leads:
            values = {"step": self.done, "streams": streams, "train": self.config.to_dict(), **self._identity()}
            saved = state.Saved(weights, weights | average, moments, values)
            parts = {"config": self.model_config, "vae": self.vae, "tokenizer": self.tokenizer}
            state.save(self.out, saved, keep=self.config.keep, **parts)
        self.world.wait()

    def _resume(self) -> None:
        if self.world.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            state.clean(self.out)
        self.world.wait()
        folder = state.newest(self.out)
        if folder is None:
            return
        saved = state.load(folder)
        self._check_same(folder, saved.state)
        self.done = saved.state["step"]
        streams = {int(index): stream for index, stream in saved.state["streams"].items()}
        self.streams = {i: stream for i, stream in streams.items() if i % self.world.size == self.world.rank}
        model_state = self.root.model.state_dict()
        if {n: t.shape for n, t in model_state.items()} != {n: t.shape for n, t in saved.weights.items()}:
            raise CheckpointError(f"{folder} holds a model of another configuration; choose another folder")
        for name, tensor in model_state.items():
            own(tensor).copy_(own(like(tensor, saved.weights[name])))
        self.optimiser.restore(saved.moments, saved.ema, steps=self.done)

    def _check_same(self, folder: Path, old: dict[str, Any]) -> None:
        new, old = self._identity(), {"optimizer": "adamw"} | old
        was = {name: old[name] for name in new}
        if was != new:
            raise CheckpointError(
                f"{folder} was made with {json.dumps(was)}; going on with {json.dumps(new)} would not be the same run: "
                "choose another folder, or those settings"
            )

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed, as JSON values."""
        config = self.config
        kept = {"seed": config.seed, "batches": config.batches, "optimizer": config.optimizer}
        return {"data": self.data.identity(), "freeze": list(config.freeze), **kept}


def _prepared(root: SummedLosses, config: TrainConfig, world: World) -> SummedLosses:
    """Switch on what the settings ask for: recomputed activations, compiled experts, sharding."""
    layers = list(root.model.decoder.layers)
    if config.compile:
        compile_experts(root)
    for layer in layers:
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    world.shard(root, layers)
    return root


class _Window:
    """What happened since the last line of the log; numbers stay on the device until they are asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.peak = peak_flops(trainer.device) if trainer.config.precision == "bfloat16" else None
        self._clear()

    def _clear(self) -> None:
        self.began = time.monotonic()
        self.sums: Tensor | None = None
        self.counts: Counter[str] = Counter()
        self.steps = 0

    def add(self, sums: Tensor, counts: dict[str, float]) -> None:
        """Add a step."""
        self.sums = sums if self.sums is None else self.sums + sums
        for name, value in counts.items():
            self.counts[name] += value  # pyright: ignore[reportArgumentType]
        self.steps += 1

    def check(self) -> None:
        """Raise FloatingPointError if a loss or gradient since the last line was not finite."""
        if self.sums is not None and not bool(self.sums.isfinite().all()):
            raise FloatingPointError(
                f"the loss or its gradient is not finite by step {self.trainer.done}: lower lr or clip_norm, or look "
                "at the data; the last checkpoint is intact"
            )

    def values(self) -> dict[str, Any]:
        """Return the means since the last call, over all processes, and begin anew."""
        self.check()
        assert self.sums is not None
        trainer, world = self.trainer, self.trainer.world
        ce, mse, norm = self.sums.tolist()
        ce, mse, tokens, flops = world.sum([ce, mse, self.counts["tokens"], self.counts["flops"]])
        seconds = time.monotonic() - self.began
        ce, mse = ce / max(self.counts["has_ce"], 1), mse / max(self.counts["has_mse"], 1)
        config = trainer.config
        values: dict[str, Any] = {"loss": config.ce_weight * ce + config.mse_weight * mse, "ce": ce, "mse": mse}
        values |= {"grad_norm": norm / self.steps, "lr": config.lr_at(trainer.done - 1)}
        values |= {"tokens_per_s": tokens / seconds, "seconds": seconds}
        if self.peak is not None:
            values["mfu"] = flops / seconds / (self.peak * world.size)
        self._clear()
        return values
