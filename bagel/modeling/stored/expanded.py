"""The product of a stored weight that is expanded for it: the way of many tokens, where expanding costs little."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bagel import kernels
from bagel.kernels import Rows


def multiply_expanded(linear: Any, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
    """Return x (T, in) times the weight that `linear.dense` gives, plus its bias and `add`, which may be written into.

    `Rows` come from a float16 model, whose products are scaled: the result is float32 then.
    """
    bias = linear.bias
    if isinstance(x, Rows):
        y = F.linear(x.values, linear.dense(x.values.dtype)).to(x.dtype) * x.scale
        y = y if bias is None else y + bias
        return y if add is None else add + y
    return kernels.linear(x, linear.dense(x.dtype), None if bias is None else bias.to(x.dtype), add=add)
