"""Products with a weight that is stored in fewer bits: expanded first, for many tokens, or as it is, for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bagel.kernels import Rows
from bagel.modeling.linear import multiply


def multiply_expanded(linear: Any, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
    """Return x (T, in) times the weight that `linear.dense` gives, plus its bias and `add`, which may be written into.

    `Rows` come from a float16 model, whose products are scaled: the result is float32 then.
    """
    weight = linear.dense(x.values.dtype if isinstance(x, Rows) else x.dtype)
    return multiply(x, weight, None if linear.bias is None else linear.bias.to(x.dtype), add=add)


def multiply_one(kernel: Callable[..., Tensor], linear: Any, x: Tensor, *, add: Tensor | None) -> Tensor:
    """Return what a kernel makes of one token (1, in) and a weight with a scale per row, plus its bias and `add`."""
    plus = add if add is not None and add.dtype == x.dtype else None
    y = kernel(x, linear.weight, scale=linear.scale, bias=linear.bias, plus=plus)
    return y if add is None or plus is not None else add + y
