"""Weights stored as 8-bit floats: half the memory of bfloat16, and a faster product on GPUs that have them; lossy.

Weights are quantised once, with a scale per output channel; inputs whenever they come, with a scale per token
(arXiv 2209.05433, the e4m3 format).
"""

from __future__ import annotations

import functools
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from bagel import kernels
from bagel.config import MissingHalfError
from bagel.kernels import Rounding, Rows, round_rows
from bagel.modeling.bagel import Bagel
from bagel.modeling.linear import is_exact
from bagel.modeling.mot import DecoderLayer
from bagel.modeling.stored.expanded import multiply_one

FORMAT = torch.float8_e4m3fn
ROUNDING = Rounding(FORMAT, largest=torch.finfo(FORMAT).max, tiny=1e-12)
CAPABILITY = (8, 9)
"""The first CUDA compute capability that multiplies 8-bit floats."""


class Float8Linear(nn.Module):
    """What a linear layer computes, with both factors quantised to 8 bits.

    Args:
        linear: the layer to quantise; on its device.
    """

    contract: ClassVar[type]
    format: ClassVar[str] = "float8"
    takes: Rounding | None = ROUNDING
    exact: ClassVar[bool] = False
    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale, _ = round_rows(linear.weight.detach(), ROUNDING)
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale)  # (out, 1) float32
        self.bias = linear.bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Quantise a layer, on its device."""
        return cls(linear)

    @classmethod
    def stored(cls, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> Float8Linear:
        """Return the layer of a weight (out, in) that is quantised already, and its scales (out, 1) float32."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.register_buffer("weight", weight)
        layer.register_buffer("scale", scale)
        layer.bias = bias
        return layer

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) of its type, and add `add`; a single token on a GPU is not quantised itself."""
        if isinstance(x, Rows) and x.values.dtype != FORMAT:  # of a float16 model, whose products are scaled
            x = x.values.to(x.dtype) * x.scale
        if not isinstance(x, Rows) and x.shape[0] == 1 and (kernel := kernels.find("matrix_times_vector", x)):
            return multiply_one(kernel, self, x, add=add)
        y = self._product(x if isinstance(x, Rows) else round_rows(x, ROUNDING))
        return y if add is None else add + y

    @property
    def in_features(self) -> int:
        """Channels that come in."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Channels that go out."""
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype | None = None, *, rows: slice | None = None) -> Tensor:
        """Return the weight (out, in), or some rows, that the layer multiplies by; float32 by default."""
        part = rows or slice(None)
        return (self.weight[part].float() * self.scale[part]).to(dtype or torch.float32)

    def _product(self, x: Rows) -> Tensor:
        bias = self.bias
        within = bias is not None and bias.dtype == torch.bfloat16  # other types would be rounded to it
        out = _multiply(x, self.weight, self.scale, bias if within else None).to(x.dtype)
        return out if bias is None or within else out + bias


Float8Linear.contract = Float8Linear


def _multiply(x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the bfloat16 product of both factors with their scales."""
    # Not `scaled_mm` of torch.nn.functional, which torch 2.11 cannot compile.
    multiply = functools.partial(torch.ops.aten._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    if weight.is_cuda or _cpu_takes_scales_of_rows():
        return multiply(x.values, weight.t(), scale_a=x.scale, scale_b=scale.t(), bias=bias)
    y = (x.values.float() @ weight.float().t()) * x.scale * scale.t()
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


@functools.cache
def _cpu_takes_scales_of_rows() -> bool:
    """Whether this CPU's product of 8-bit floats takes a scale per row and column; some take one per tensor."""
    rows, one = torch.zeros(16, 16, dtype=FORMAT), torch.ones(16, 1)
    try:
        torch.ops.aten._scaled_mm(rows, rows.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def can_multiply(device: torch.device) -> bool:
    """Whether products of 8-bit floats can be asked of a device: a CPU, or a GPU of NVIDIA from `CAPABILITY` on.

    AMD's GPUs number their capabilities in another way, and many have another format of 8 bits.
    """
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY
    return device.type in ("cpu", "meta")


def check(linear: nn.Linear, name: str) -> None:
    """Refuse a layer that cannot be quantised: see `quantize_linears`, whose errors these are."""
    device = linear.weight.device
    if not can_multiply(device):
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device}"
        raise ValueError(f"{card} cannot multiply 8-bit floats of this format; leave them, or use int8 or nf4")
    if linear.in_features % 16 or linear.out_features % 16:
        raise ValueError(
            f"8-bit layers need sides that are multiples of 16, got {linear.in_features} x {linear.out_features} "
            f"({name})"
        )


def quantize_linears(module: nn.Module) -> int:
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
        check(child, name)
    for parent, name, child in found:
        setattr(parent, name, Float8Linear(child))
    return len(found)


def quantize_experts(model: Bagel, *, und: bool = False) -> int:
    """Quantise the linear layers of a model's gen experts in place, and return how many; see `quantize_linears`.

    The first and the last layer, next to the embeddings and the heads, stay as they are.

    Args:
        model: loaded, on its device.
        und: quantise the und experts too, by which text is decoded.

    Raises:
        ValueError: it is quantised already, has no layers or no gen experts to quantise, or see `quantize_linears`.
        MissingHalfError: it was loaded without its generating half, and `und` is not given.
    """
    if not is_exact(model):
        raise ValueError("this model is quantised to 8-bit floats already; load it again to quantise other parts")
    inner = [layer for layer in model.decoder.layers if isinstance(layer, DecoderLayer)][1:-1]
    if not inner:
        raise ValueError("a model of one or two layers has none to quantise: the first and the last stay as they are")
    if not und and not model.decoder.config.has_gen_expert:
        raise ValueError("this model has one expert for both halves, the und expert: give und=True to quantise it")
    if not und and not model.config.visual_gen:
        raise MissingHalfError(
            "this model was loaded without its generating half: give und=True to quantise the understanding half"
        )
    experts = [layer.gen for layer in inner] + [layer.und for layer in inner if und]
    return sum(quantize_linears(expert) for expert in experts if expert is not None)
