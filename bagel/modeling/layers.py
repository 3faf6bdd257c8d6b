"""The weights of one expert in one decoder layer, and what they compute on that expert's tokens.

Shapes: T tokens of the expert, H hidden, Hq query heads, Hkv key/value heads, D channels per head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bagel import kernels
from bagel.config import DecoderConfig
from bagel.kernels import Rounding, Rows, silu_mul
from bagel.modeling.linear import Linear, apply, is_own, takes
from bagel.modeling.rope import Rotary, rotate

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (T, Hq, D), keys (T, Hkv, D) and values (T, Hkv, D)."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): float32 inside, rounded to the input's type, then weighted."""

    contract: ClassVar[type]

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, *, add: Tensor | None = None, rounding: Rounding | None = None) -> Any:
        """Normalise the last axis of x (..., size); with `add` return x + add and its norm, all by one kernel.

        With `rounding` the norm may come as `bagel.kernels.Rows`.
        """
        total, h = kernels.rms_norm(x, self.weight, eps=self.eps, add=add, rounding=rounding)
        return h if add is None else (total, h)


RMSNorm.contract = RMSNorm


def normed(norm: nn.Module, x: Tensor, *, to: nn.Module, add: Tensor | None = None) -> tuple[Tensor, Tensor | Rows]:
    """Return x + add (T, H), and its norm as the layer `to` would like its input."""
    if is_own(norm):
        found = norm(x, add=add, rounding=takes(to))
        total, h = (x, found) if add is None else found
    else:
        total = x if add is None else x + add
        h = norm(total)
        total = x if add is None else total.clone()  # what a hook has seen must not be written into
    weight = getattr(norm, "weight", None)
    if isinstance(h, Tensor) and isinstance(weight, Tensor):
        h = h.to(weight.dtype)  # a float16 model keeps its residual stream in float32
    return total, h


class Attention(nn.Module):
    """Projections of one expert around the attention that both experts share."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes, self.eps = (heads, kv_heads, size), config.rms_norm_eps  # Hq, Hkv, D
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv_heads) * size)
        self.o_proj = Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, eps=config.rms_norm_eps) if config.qk_norm else None

    def split(self, qkv: Tensor, rotary: Rotary) -> Heads:
        """Return rotated queries and keys, and values, of projected tokens (T, (Hq + 2 Hkv) D).

        Norm and rotation are computed in float32 and rounded once, just before attention; queries and keys at once
        where nothing watches, wraps or replaces their norms.
        """
        q_norm, k_norm, (heads, kv_heads, size) = self.q_norm, self.k_norm, self.sizes
        qk, v = qkv.unflatten(-1, (-1, size)).split([heads + kv_heads, kv_heads], dim=-2)
        if q_norm is None or k_norm is None or (is_own(q_norm) and is_own(k_norm)):
            weights = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
            return *kernels.norm_rotate(qk, weights, rotary, q_heads=heads, eps=self.eps), v
        q, k = qk.float().split([heads, kv_heads], dim=-2)
        return rotate(q_norm(q), rotary).to(v.dtype), rotate(k_norm(k), rotary).to(v.dtype), v


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)); called as a linear layer is."""

    contract: ClassVar[type]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    @property
    def takes(self) -> Rounding | None:
        """How the input would best be rounded, see `bagel.modeling.linear`."""
        return takes(self.gate_up_proj)

    def forward(self, x: Tensor | Rows, *, add: Tensor | None = None) -> Tensor:
        """Map tokens (T, H) to (T, H) and add `add`; float32 out of a float16 model, else the type of x."""
        h = silu_mul(apply(self.gate_up_proj, x), rounding=takes(self.down_proj))
        return apply(self.down_proj, h, add=add)


MLP.contract = MLP


class Expert(nn.Module):
    """One expert's half of a layer.

    In the MoE variant the gen expert owns an MLP only and shares the norms and the attention of its layer's und
    expert, which it then gets as `shared`.
    """

    def __init__(self, config: DecoderConfig, *, own_attention: bool = True) -> None:
        super().__init__()
        if own_attention:
            self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.attention = Attention(config)
            self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.own_attention = own_attention

    def heads(self, x: Tensor, rotary: Rotary, shared: Expert) -> Heads:
        """Return queries, keys and values of the residual stream x (T, H)."""
        owner = self if self.own_attention else shared
        if x.shape[0] == 0 and not torch.is_grad_enabled():  # with gradients, other processes wait for its own
            dtype, (q, kv, size) = getattr(owner.input_norm, "weight", x).dtype, owner.attention.sizes
            keys = x.new_empty(0, kv, size, dtype=dtype)
            return x.new_empty(0, q, size, dtype=dtype), keys, keys
        _, h = normed(owner.input_norm, x, to=owner.attention.qkv_proj)
        return owner.attention.split(apply(owner.attention.qkv_proj, h), rotary)

    def finish(self, x: Tensor, seen: Tensor, shared: Expert) -> Tensor:
        """Add what attention gathered (T, Hq, D), and then the MLP, to the residual stream x (T, H)."""
        owner = self if self.own_attention else shared
        if x.shape[0] == 0 and not torch.is_grad_enabled():
            return x
        gathered = apply(owner.attention.o_proj, seen.flatten(-2))
        x, h = normed(owner.post_norm, x, add=gathered, to=self.mlp)
        return apply(self.mlp, h, add=x)


def compile_experts(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compile what the experts within a module compute, when it is first used, for any number of tokens."""
    for part in module.modules():
        if isinstance(part, Expert):
            part.heads = torch.compile(part.heads, dynamic=True, backend=backend)
            part.finish = torch.compile(part.finish, dynamic=True, backend=backend)
