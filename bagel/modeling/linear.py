"""Linear layers, and how the layers around them use whatever stands in their place.

A linear layer here is called as `linear(x)` or, where a residual follows, as `linear(x, add=residual)`, and says with
`takes` what it would like its input as, so that the kernel before it rounds for it. Both are offers: `apply` and
`takes` make them to the classes of this library alone. A layer that hooks watch, or that was wrapped, replaced or
inherited from, is called as `linear(x)` with a plain tensor, and the rest is done beside it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel import kernels
from bagel.kernels import Rounding, Rows, is_own


class Linear(nn.Linear):
    """A dense linear layer that reads its weight as fast as memory allows for a single token too, as in decoding.

    `exact` says whether the weight is what was loaded; stored weights of fewer bits are not.
    """

    contract: ClassVar[type]
    takes: Rounding | None = None
    exact: ClassVar[bool] = True

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out), and add `add` (T, out) to it, which may be written into.

        `Rows` come from a float16 model, whose products are scaled: the result is float32 then.
        """
        return multiply(x, self.weight, self.bias, add=add)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in) that the layer multiplies by, in a floating-point type."""
        return self.weight if dtype is None else self.weight.to(dtype)


class Float32Linear(Linear):
    """A narrow linear layer computed in float32, whatever its weights are stored in.

    Between latents and hidden states: it costs nothing, and rounding the flow's state and velocity to bfloat16 at every
    evaluation would show.
    """

    contract: ClassVar[type]

    def forward(self, x: Tensor, *, add: Tensor | None = None) -> Tensor:
        """Map x (T, in) to (T, out) float32."""
        y = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        return y if add is None else add + y


def multiply(x: Tensor | Rows, weight: Tensor, bias: Tensor | None, *, add: Tensor | None) -> Tensor:
    """Return x (T, in) times a weight (out, in), plus a bias and `add`, as `Linear` does."""
    if isinstance(x, Rows):
        y = F.linear(x.values, weight).to(x.dtype) * x.scale
        y = y if bias is None else y + bias
        return y if add is None else add + y
    return kernels.linear(x, weight, bias, add=add)


# A class inherits its parent's `contract`, which then names another class: what inherits makes no promises.
Linear.contract = Linear
Float32Linear.contract = Float32Linear


def takes(linear: Any) -> Rounding | None:
    """Return how a linear layer would like its input rounded; None where it takes, or gets, plain tensors."""
    wish = getattr(linear, "takes", None)  # looked at first: dense layers have none
    return wish if wish is not None and is_own(linear) else None


def apply(linear: Any, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
    """Return what a linear layer, or what stands in its place, makes of x, plus `add`, which may be written into."""
    if is_own(linear):  # a call goes through two functions of torch more, which would find nothing to do
        return linear.forward(x, add=add)
    y = linear(x.values).to(x.dtype) * x.scale if isinstance(x, Rows) else linear(x)
    return y if add is None else add + y


def is_exact(model: nn.Module) -> bool:
    """Tell whether every stored weight of a model is what was loaded."""
    return all(getattr(module, "exact", True) for module in model.modules())


def formats_of(model: nn.Module) -> list[str]:
    """Return the names of the formats in which a model stores weights of linear layers, beside dense ones."""
    return sorted({getattr(module, "format", "") for module in model.modules()} - {"", "stacked"})
