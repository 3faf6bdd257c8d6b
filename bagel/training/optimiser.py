"""AdamW and the moving average of the weights, with their state as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bagel.training.config import TrainConfig
from bagel.training.distributed import like, own, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """One step of AdamW (arXiv 1711.05101) on clipped gradients, and the average that follows it.

    Args:
        parameters: what is trained, by name; whole or sharded.
        config: rates, clipping, decay of the average.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainConfig) -> None:
        self.parameters, self.config = dict(parameters), config
        self.average = {name: own(parameter).clone() for name, parameter in parameters.items()}
        self.adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=next(iter(parameters.values())).device.type == "cuda",
        )

    def step(self, number: int) -> Tensor:
        """Do step `number`, counted from 0, drop the gradients, and return their norm as it was."""
        config, parameters = self.config, list(self.parameters.values())
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf")))
        for group in self.adamw.param_groups:
            group["lr"] = config.lr_at(number)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        weight = 1 - config.ema_decay_at(number)
        average = list(self.average.values())
        torch._foreach_lerp_(average, [own(p) for p in parameters], weight)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def moments(self) -> dict[str, Tensor]:
        """Return the moments, whole and on the CPU, as "exp_avg/NAME" and "exp_avg_sq/NAME"."""
        return {
            f"{kind}/{name}": whole(self.adamw.state[parameter][kind]).cpu().contiguous()
            for name, parameter in self.parameters.items()
            for kind in MOMENTS
        }

    def restore(self, moments: Mapping[str, Tensor], average: Mapping[str, Tensor], *, steps: int) -> None:
        """Take back what `moments` gave, and the average, after `steps` steps."""
        state = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            self.average[name].copy_(own(like(parameter, average[name])))
            kept = {kind: like(parameter, moments[f"{kind}/{name}"]) for kind in MOMENTS}
            state[index] = {"step": torch.tensor(float(steps)), **kept}
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
