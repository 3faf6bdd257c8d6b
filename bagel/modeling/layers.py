"""The weights of one expert in one decoder layer, and what they compute on that expert's tokens.

Shapes: T tokens of the expert, H hidden, Hq query heads, Hkv key/value heads, D channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.config import DecoderConfig
from bagel.kernels import fused, is_plain, is_watched
from bagel.modeling.rope import Rotary, rotate

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (T, Hq, D), keys (T, Hkv, D) and values (T, Hkv, D)."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): float32 inside, rounded to the input's type, then weighted."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x (..., size)."""
        if x.dtype == self.weight.dtype and (rms_norm := fused("rms_norm", x)):
            return rms_norm(x, self.weight, eps=self.eps)
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)

    def of_sum(self, x: Tensor, plus: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + plus (T, size), and its norm."""
        if plus is None:
            return x, self(x)
        plain = x.dtype == plus.dtype == self.weight.dtype and is_plain(self, RMSNorm)
        if plain and (add_rms_norm := fused("add_rms_norm", x)):
            return add_rms_norm(x, plus, self.weight, eps=self.eps)
        total = x + plus
        return total, self(total)


class Linear(nn.Linear):
    """A linear layer that reads its weight as fast as memory allows for a single token too, as in decoding."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, in) to (T, out)."""
        if x.shape[0] == 1 and x.dtype == torch.bfloat16 and (product := fused("matrix_times_vector", x)):
            return product(x, self.weight, bias=self.bias)
        return super().forward(x)

    def of_gated(self, gate_up: Tensor, plus: Tensor) -> Tensor:
        """Map silu(gate) * up of gate and up side by side (T, 2 in) to (T, out), and add plus, which may change."""
        x = gated(gate_up)
        if x.dtype == plus.dtype == self.weight.dtype and is_plain(self, Linear):
            if x.shape[0] == 1 and x.dtype == torch.bfloat16 and (product := fused("matrix_times_vector", x)):
                return product(x, self.weight, bias=self.bias, plus=plus)
            if self.bias is None and (add_product := fused("add_product", x)):
                add_product(plus, x, self.weight)
                return plus
        return plus + self(x)


def of_normed(linear: nn.Module, x: Tensor, norm: RMSNorm, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x + plus (T, in), and what a linear layer maps its norm to (T, out)."""
    own = getattr(linear, "of_normed", None)  # of a layer in 8-bit floats
    if own is not None and (found := own(x, norm, plus)) is not None:
        return found
    total, normed = norm.of_sum(x, plus)
    return total, linear(normed.to(norm.weight.dtype))  # a float16 model keeps its residual stream in float32


def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (T, n) of gate and up side by side (T, 2n)."""
    if silu_mul := fused("silu_mul", gate_up):
        return silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Attention(nn.Module):
    """Projections of one expert around the attention that both experts share."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def project(self, x: Tensor, rotary: Rotary) -> Heads:
        """Return rotated queries and keys, and values, of projected tokens x (T, (Hq + 2 Hkv) D)."""
        qkv = x.unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        # Queries and keys at once; norm and rotation in float32, rounded once just before attention.
        if norm_rotate := fused("norm_rotate", x):
            normed = None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight)
            return *norm_rotate(qk, normed, rotary, q_heads=self.heads, eps=self.eps), v
        q, k = rotate(self._norm(qk.float()), rotary).to(v.dtype).split([self.heads, self.kv_heads], dim=-2)
        return q, k, v

    def _norm(self, qk: Tensor) -> Tensor:
        """Apply `q_norm` and `k_norm` to queries and keys (T, Hq + Hkv, D)."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        weights = [self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)]
        return torch.cat(weights) * F.rms_norm(qk, (self.head_dim,), eps=self.eps)

    def no_heads(self, *, like: Tensor) -> Heads:
        """Return the heads of no tokens, of the type and on the device of `like`."""
        empty = like.new_empty(0, self.heads, self.head_dim)
        return empty, empty[:, : self.kv_heads], empty[:, : self.kv_heads]


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (T, H) to (T, H); float32 out of a float16 model, else the type of x."""
        gate_up = self.gate_up_proj(x)
        if gate_up.dtype != torch.float16:
            return self.down_proj(gated(gate_up))
        # A few channels of this product exceed float16's 65504 in Qwen2.5: scale each token into [-1, 1] and back.
        gate, up = gate_up.chunk(2, dim=-1)
        product = F.silu(gate.float()) * up.float()
        scale = product.abs().amax(-1, keepdim=True).clamp(min=1.0)
        return self.down_proj((product / scale).to(gate_up.dtype)).float() * scale


def add_mlp(mlp: nn.Module, norm: RMSNorm, x: Tensor, plus: Tensor) -> Tensor:
    """Add to the residual stream x (T, H) plus, and then what an MLP maps the norm of that to."""
    if is_plain(mlp, MLP) and not is_watched(norm) and norm.weight.dtype != torch.float16:
        of_gated = getattr(mlp.down_proj, "of_gated", None)  # not there where something wraps the layer
        if of_gated is not None:
            total, gate_up = of_normed(mlp.gate_up_proj, x, norm, plus)
            return of_gated(gate_up, total)
    total, normed = norm.of_sum(x, plus)
    return total + mlp(normed.to(norm.weight.dtype))


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
        if _idle(x):
            return owner.attention.no_heads(like=owner.input_norm.weight)
        return owner.attention.project(of_normed(owner.attention.qkv_proj, x, owner.input_norm)[1], rotary)

    def finish(self, x: Tensor, attended: Tensor, shared: Expert) -> Tensor:
        """Add the attention's result (T, Hq, D) and the MLP to the residual stream x (T, H)."""
        if _idle(x):
            return x
        owner = self if self.own_attention else shared
        return add_mlp(self.mlp, owner.post_norm, x, owner.attention.o_proj(attended.flatten(-2)))


def compile_experts(module: nn.Module, *, backend: str = "inductor") -> None:
    """Compile what the experts within a module compute, when it is first used, for any number of tokens."""
    for part in module.modules():
        if isinstance(part, Expert):
            part.heads = torch.compile(part.heads, dynamic=True, backend=backend)
            part.finish = torch.compile(part.finish, dynamic=True, backend=backend)


def _idle(x: Tensor) -> bool:
    """Whether an expert has no tokens, and no gradients that other processes wait for: then it need not run."""
    return x.shape[0] == 0 and not torch.is_grad_enabled()
