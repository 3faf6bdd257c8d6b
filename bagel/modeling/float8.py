"""Linear layers in 8-bit floats: half the memory of bfloat16, and a faster product on GPUs that have them; lossy.

Weights are rounded once, a scale for each output channel; inputs whenever they come, a scale for each token
(arXiv 2209.05433, the e4m3 format).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bagel.kernels import fused, is_plain
from bagel.modeling.bagel import Bagel, MissingHalfError
from bagel.modeling.layers import RMSNorm, gated
from bagel.modeling.mot import DecoderLayer

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
TINY = 1e-12
"""Smallest scale, so that a row of zeros can be divided by its own."""
ROUNDING = {"largest": LARGEST, "tiny": TINY, "dtype": FORMAT}
CAPABILITY = (8, 9)
"""The first CUDA compute capability that multiplies 8-bit floats."""


class Float8Linear(nn.Module):
    """What a linear layer computes, with both factors rounded to 8 bits.

    Args:
        linear: the layer to round; on its device.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale)  # (out, 1) float32
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, in) to (T, out) of its type; a single token on a GPU is not rounded itself."""
        if x.shape[0] == 1 and (product := fused("matrix_times_vector", x)):
            return product(x, self.weight, scale=self.scale, bias=self.bias)
        return self._product(*rounded(x), x.dtype)

    def of_normed(self, x: Tensor, norm: RMSNorm, plus: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return x + plus (T, in), and what its norm is mapped to (T, out); None where kernels cannot."""
        plain = is_plain(self, Float8Linear) and is_plain(norm, RMSNorm) and x.dtype == norm.weight.dtype
        if not plain or x.shape[0] == 1:
            return None
        if plus is None:
            if norm_round := fused("rms_norm_round", x):
                rows, scale = norm_round(x, norm.weight, eps=norm.eps, **ROUNDING)
                return x, self._product(rows, scale, x.dtype)
        elif plus.dtype == x.dtype and (add_norm_round := fused("add_rms_norm_round", x)):
            total, rows, scale = add_norm_round(x, plus, norm.weight, eps=norm.eps, **ROUNDING)
            return total, self._product(rows, scale, x.dtype)
        return None

    def of_gated(self, gate_up: Tensor, plus: Tensor) -> Tensor:
        """Map silu(gate) * up of gate and up side by side (T, 2 in) to (T, out), and add plus."""
        plain, single = is_plain(self, Float8Linear), gate_up.shape[0] == 1
        if plain and not single and (silu_mul_round := fused("silu_mul_round", gate_up)):
            rows, scale = silu_mul_round(gate_up, **ROUNDING)
            return plus + self._product(rows, scale, gate_up.dtype)
        x = gated(gate_up)
        if plain and single and x.dtype == plus.dtype and (product := fused("matrix_times_vector", x)):
            return product(x, self.weight, scale=self.scale, bias=self.bias, plus=plus)
        return plus + self(x)

    def _product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        bias = self.bias
        within = bias is not None and bias.dtype == torch.bfloat16  # other types would be rounded to it
        out = torch.ops.aten._scaled_mm(  # not `scaled_mm` of torch.nn.functional, which torch 2.11 cannot compile
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            bias=bias if within else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        out = out.to(dtype)
        return out if bias is None or within else out + bias


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (n, k) in 8 bits and the float32 scales (n, 1) of its rows."""
    if round_rows := fused("round_rows", x):
        return round_rows(x, **ROUNDING)
    exact = x.float()
    scale = (exact.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=TINY)
    return (exact * scale.reciprocal()).to(FORMAT), scale


def round_linears(module: nn.Module) -> int:
    """Put 8-bit layers in the place of all linear layers within a module and return how many there were.

    Raises:
        ValueError: a layer whose sides are no multiples of 16, or a GPU that has no 8-bit floats.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for _, name, child in found:
        device = child.weight.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
            raise ValueError(f"{torch.cuda.get_device_name(device)} cannot multiply 8-bit floats; use bfloat16")
        if child.in_features % 16 or child.out_features % 16:
            raise ValueError(
                f"8-bit layers need sides that are multiples of 16, got {child.in_features} x {child.out_features} "
                f"({name})"
            )
    for parent, name, child in found:
        setattr(parent, name, Float8Linear(child))
    return len(found)


def round_experts(model: Bagel, *, und: bool = False) -> int:
    """Round the linear layers of a model's gen experts in place, and return how many; see `round_linears`.

    The first and the last layer, next to the embeddings and the heads, stay as they are.

    Args:
        model: loaded, on its device.
        und: round the und experts too, by which text is decoded.

    Raises:
        ValueError: it is rounded already, has no layers or no gen experts to round, or see `round_linears`.
        MissingHalfError: it was loaded without its generating half, and `und` is not given.
    """
    if is_rounded(model):
        raise ValueError("this model is rounded to 8-bit floats already; load it again to round other parts")
    inner = [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)][1:-1]
    if not inner:
        raise ValueError("a model of one or two layers has none to round: the first and the last stay as they are")
    if not und and not model.decoder.config.has_gen_expert:
        raise ValueError("this model has one expert for both halves, the und expert: give und=True to round it")
    if not und and not model.config.visual_gen:
        raise MissingHalfError(
            "this model was loaded without its generating half: give und=True to round the understanding half"
        )
    experts = [layer.gen for layer in inner] + [layer.und for layer in inner if und]
    return sum(round_linears(expert) for expert in experts if expert is not None)


def is_rounded(model: nn.Module) -> bool:
    """Tell whether any layer of a model is rounded."""
    return any(isinstance(module, Float8Linear) for module in model.modules())
