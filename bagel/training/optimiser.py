"""AdamW, or Muon with AdamW, and the moving average of the weights, with their state as tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_lerp_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

from bagel.training.config import TrainConfig
from bagel.training.distributed import is_sharded, like, own, whole

TOGETHER = 2**24
"""Values of the matrices that Muon moves at a time, at most; it needs some 20 bytes for each."""


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv 2502.16982), its steps as large as AdamW's, that moves matrices of one shape together.

    A small model has so many small matrices that launching their products one by one takes longer than all else.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                count = max(1, TOGETHER // shape.numel())
                for first in range(0, len(parameters), count):
                    self._move(parameters[first : first + count], group, lr=group["lr"] * 0.2 * max(shape) ** 0.5)

    def _move(self, parameters: list[Tensor], group: dict[str, Any], *, lr: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        moments = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        _foreach_lerp_(moments, gradients, 1 - group["momentum"])
        ahead = torch.stack(gradients).lerp_(torch.stack(moments), group["momentum"])
        update = orthogonal(ahead, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
        _foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        _foreach_add_(parameters, list(update.float().unbind()), alpha=-lr)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float) -> Tensor:
    """Return matrices near to x (n, rows, columns) whose singular values are all about one, in bfloat16.

    By a Newton-Schulz iteration, as `torch.optim.Muon` has it.
    """
    a, b, c = coefficients
    wide = x.shape[1] <= x.shape[2]
    x = x.bfloat16() if wide else x.bfloat16().mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Optimiser:
    """One step on clipped gradients, and the average of the weights that follows it.

    "adamw" (arXiv 1711.05101) for all parameters; or "muon" (arXiv 2502.16982) for the matrices of the layers, whose
    steps are scaled to be as large as AdamW's, with AdamW for the rest.

    Args:
        parameters: what is trained, by name; whole, or with "adamw" sharded.
        config: rates, clipping, decay of the average.

    Raises:
        ValueError: "muon" with sharded parameters, or without matrices of layers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: TrainConfig) -> None:
        self.parameters, self.config = dict(parameters), config
        self.average = {name: own(parameter).clone() for name, parameter in parameters.items()}
        matrices, rest = self._split()
        lr, decay = config.lr, config.weight_decay
        fused = next(iter(parameters.values())).device.type == "cuda"
        self.parts: list[tuple[torch.optim.Optimizer, Mapping[str, Tensor], tuple[str, ...]]] = []
        if rest:
            adamw = torch.optim.AdamW(
                rest.values(), lr=lr, weight_decay=decay, betas=config.betas, eps=config.eps, fused=fused
            )
            self.parts.append((adamw, rest, ("exp_avg", "exp_avg_sq")))
        if matrices:
            muon = Muon(matrices.values(), lr=lr, weight_decay=decay)
            self.parts.append((muon, matrices, ("momentum_buffer",)))

    def _split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what Muon moves, and the rest."""
        if self.config.optimizer == "adamw":
            return {}, self.parameters
        if any(map(is_sharded, self.parameters.values())):
            raise ValueError("optimizer='muon' needs whole matrices and cannot train sharded ones; use 'adamw'")
        matrices = {name: p for name, p in self.parameters.items() if ".layers." in name and p.ndim == 2}
        if not matrices:
            raise ValueError("optimizer='muon' moves the matrices of layers, and none are trained here; use 'adamw'")
        return matrices, {name: p for name, p in self.parameters.items() if name not in matrices}

    def step(self, number: int) -> Tensor:
        """Do step `number`, counted from 0, drop the gradients, and return their norm as it was."""
        config, parameters = self.config, list(self.parameters.values())
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf")))
        for optimizer, _, _ in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(number)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weight = 1 - config.ema_decay_at(number)
        average = list(self.average.values())
        _foreach_lerp_(average, [own(p) for p in parameters], weight)
        return norm

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizers' state, whole and on the CPU, as "exp_avg/NAME" and so on."""
        return {
            f"{kind}/{name}": whole(optimizer.state[parameter][kind]).cpu().contiguous()
            for optimizer, parameters, kinds in self.parts
            for name, parameter in parameters.items()
            for kind in kinds
        }

    def restore(self, moments: Mapping[str, Tensor], average: Mapping[str, Tensor], *, steps: int) -> None:
        """Take back what `moments` gave, and the average, after `steps` steps."""
        for name, parameter in self.parameters.items():
            self.average[name].copy_(own(like(parameter, average[name])))
        for optimizer, parameters, kinds in self.parts:
            state = {}
            for index, (name, parameter) in enumerate(parameters.items()):
                kept = {kind: like(parameter, moments[f"{kind}/{name}"]) for kind in kinds}
                state[index] = {"step": torch.tensor(float(steps)), **kept}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
