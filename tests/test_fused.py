"""Where kernels take the place of modules: same results, and nothing that watches or wraps a module is passed by.

A CPU has no kernels: functions that compute the same stand in for them here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from small_model import rotary_of, small_config
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from bagel import kernels
from bagel.kernels import functions, rotate, silu_mul
from bagel.modeling.float8 import quantize_linears
from bagel.modeling.linear import Linear, apply
from bagel.modeling.mot import Expert
from bagel.vae.autoencoder import ResidualBlock


def rms_norm(x, weight, *, eps):
    return weight * F.rms_norm(x, weight.shape, eps=eps)


def add_rms_norm(x, plus, weight, *, eps):
    return x + plus, rms_norm(x + plus, weight, eps=eps)


def norm_rotate(qk, weights, rotary, *, q_heads, eps):
    exact, heads = qk.float(), [q_heads, qk.shape[1] - q_heads]
    if weights is not None:
        normed = F.rms_norm(exact, exact.shape[-1:], eps=eps).split(heads, dim=1)
        exact = torch.cat([part * weight for part, weight in zip(normed, weights, strict=True)], dim=1)
    return rotate(exact, rotary).to(qk.dtype).split(heads, dim=1)


def gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def matrix_times_vector(x, weight, scale=None, bias=None, plus=None):
    out = F.linear(x, weight, bias)
    return out if plus is None else plus + out


def add_product(plus, x, weight):
    plus += F.linear(x, weight)


def round_rows(x, *, largest, tiny, dtype, turn):
    x = kernels.turn(x.float(), turn)
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=tiny)
    values = x * scale.reciprocal()
    return (values if dtype.is_floating_point else values.round()).to(dtype), scale


def rms_norm_round(x, weight, *, eps, **rounding):
    return round_rows(rms_norm(x, weight, eps=eps), **rounding)


def add_rms_norm_round(x, plus, weight, *, eps, **rounding):
    return x + plus, *rms_norm_round(x + plus, weight, eps=eps, **rounding)


def silu_mul_round(gate_up, **rounding):
    return round_rows(gated(gate_up), **rounding)


ROUND = (round_rows, rms_norm_round, add_rms_norm_round, silu_mul_round)
PLAIN = (rms_norm, add_rms_norm, norm_rotate, matrix_times_vector, add_product)
KERNELS = {"silu_mul": gated} | {kernel.__name__: kernel for kernel in (*PLAIN, *ROUND)}


def choose(monkeypatch, find) -> None:
    """Let kernels be chosen by `find`."""
    monkeypatch.setattr(functions, "find", find)
    monkeypatch.setattr(kernels, "find", find)


@pytest.fixture
def used(monkeypatch):
    """Names of the kernels that were used, in order."""
    names = []

    def find(name, x, *, narrow=False):
        names.append(name)
        return KERNELS[name]

    choose(monkeypatch, find)
    return names


@pytest.fixture
def without(monkeypatch):
    """Returns the kernels to where they are from."""
    return lambda: choose(monkeypatch, lambda name, x, **_: None)


def expert_and_input(tokens: int = 5, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = dataclasses.replace(small_config().llm_config, intermediate_size=48)
    expert = Expert(config).to(dtype)
    for parameter in expert.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(tokens, config.hidden_size, dtype=dtype)
    rotary = rotary_of(config, torch.arange(tokens))
    return expert, x, rotary


def run(expert: Expert, x: torch.Tensor, rotary) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and output; the queries stand for what attention gathers."""
    q, k, v = expert.heads(x, rotary, expert)
    return q, k, v, expert.finish(x, q, expert)


PARTS = (
    *("input_norm", "attention.qkv_proj", "attention.q_norm", "attention.k_norm", "attention.o_proj"),
    *("post_norm", "mlp", "mlp.gate_up_proj", "mlp.down_proj"),
)
"""Everything in an expert that is called."""


def test_the_parts_of_an_expert_are_all_there_are():
    expert, _, _ = expert_and_input()
    assert {name for name, _ in expert.named_modules()} == {"", "attention", *PARTS}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_an_expert_with_kernels_computes_the_same(used, without, tokens, dtype):
    expert, x, rotary = expert_and_input(tokens, dtype)
    before, found = x.clone(), run(expert, x, rotary)
    assert {"norm_rotate", "add_rms_norm"} < set(used)
    assert ("matrix_times_vector" if dtype == torch.bfloat16 and tokens == 1 else "add_product") in used
    assert torch.equal(x, before)
    without()
    for a, b in zip(found, run(expert, x, rotary), strict=True):
        assert_close(a, b, relative=1e-6 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_an_expert_of_8_bit_layers_with_kernels_computes_the_same(used, without):
    expert, x, rotary = expert_and_input()
    quantize_linears(expert)
    found = run(expert, x, rotary)
    assert set(used) == {"rms_norm_round", "norm_rotate", "round_rows", "add_rms_norm_round", "silu_mul_round"}
    without()
    for a, b in zip(found, run(expert, x, rotary), strict=True):
        assert_close(a, b, relative=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_hooks_see_what_they_would_see_without_kernels(used, without, name, quantised):
    expert, x, rotary = expert_and_input()
    if quantised:
        quantize_linears(expert)
    kept = []
    expert.get_submodule(name).register_forward_hook(lambda module, given, result: kept.append((*given, result)))
    out = run(expert, x, rotary)
    without()
    for a, b in zip(out, run(expert, x, rotary), strict=True):
        assert_close(a, b, relative=1e-6)
    found, wanted = kept
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, relative=1e-6)


@torch.no_grad()
def test_a_hook_on_all_modules_sees_every_part(used):
    expert, x, rotary = expert_and_input()
    wanted, seen = run(expert, x, rotary), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    found = run(expert, x, rotary)
    handle.remove()
    assert {id(expert.get_submodule(name)) for name in PARTS} == {id(module) for module in seen}
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, relative=1e-6)


@torch.no_grad()
def test_a_layer_that_somebody_compiled_is_used_as_compiled():
    expert, x, rotary = expert_and_input()
    wanted, compiled = run(expert, x, rotary), []
    expert.mlp.down_proj.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    found = run(expert, x, rotary)
    assert len(compiled) == 1
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, relative=1e-6)


class Doubling(Linear):
    """A layer that somebody has changed by inheritance."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """A layer that somebody has wrapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@torch.no_grad()
@pytest.mark.parametrize("change", ["inherited", "wrapped", "patched", "mlp wrapped"])
def test_layers_that_somebody_changed_are_called(used, change):
    expert, x, rotary = expert_and_input()
    attended = expert.heads(x, rotary, expert)[0]
    mlp, total = expert.mlp, x + expert.attention.o_proj(attended.flatten(-2))
    wanted = total + 2 * mlp(expert.post_norm(total))
    down = mlp.down_proj
    if change == "inherited":
        mlp.down_proj = Doubling(down.in_features, down.out_features, bias=False)
        mlp.down_proj.weight = down.weight
    elif change == "wrapped":
        mlp.down_proj = Wrapped(down)
    elif change == "patched":
        inner = down.forward
        down.forward = lambda x: 2 * inner(x)
    else:
        expert.mlp = Wrapped(mlp)
    assert_close(expert.finish(x, attended, expert), wanted, relative=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_whatever_stands_in_the_place_of_a_part_takes_effect(used, without, name, quantised):
    expert, x, rotary = expert_and_input()
    if quantised:
        quantize_linears(expert)
    plain = run(expert, x, rotary)
    expert.set_submodule(name, Wrapped(expert.get_submodule(name)))
    found = run(expert, x, rotary)
    without()
    for a, b in zip(found, run(expert, x, rotary), strict=True):
        assert_close(a, b, relative=1e-6)
    assert max((a - b).abs().max() for a, b in zip(found, plain, strict=True)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_float32_stream_beside_bfloat16_layers_stays_float32(used, tokens):
    linear = Linear(6, 4, bias=False).bfloat16()
    gate_up, stream = torch.randn(tokens, 12, dtype=torch.bfloat16), torch.randn(tokens, 4)
    before, found = stream.clone(), apply(linear, silu_mul(gate_up), add=stream)
    assert found.dtype == torch.float32
    assert torch.equal(stream, before), "nothing of another type is written into"


class Shrunk(nn.Linear):
    """A layer from elsewhere: it takes nothing but a tensor."""


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_from_elsewhere_is_called_with_a_tensor_and_added_to_beside(used, tokens):
    linear, x, stream = Shrunk(6, 4), torch.randn(tokens, 6), torch.randn(tokens, 4)
    before = stream.clone()
    assert_close(apply(linear, x, add=stream), before + linear(x), relative=1e-6)
    assert not used


def group_norm_silu(x, weight, bias, *, groups, eps, plus=None):
    return F.silu(F.group_norm(x if plus is None else x + plus[:, None, None], groups, weight, bias, eps))


def add_biased(x, y, bias):
    return x + y + bias[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("watched", [None, "norm1", "conv1", "norm2", "conv2"])
@pytest.mark.parametrize("out_channels", [32, 64])
def test_a_residual_block_with_kernels_computes_the_same(monkeypatch, out_channels, watched):
    torch.manual_seed(0)
    block, x, used, calls = ResidualBlock(32, out_channels).double(), torch.randn(2, 32, 5, 7).double(), [], []
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    wanted = block(x)
    if watched:
        block.get_submodule(watched).register_forward_hook(lambda *_: calls.append(watched))
    own = {"group_norm_silu": group_norm_silu, "add_biased": add_biased}
    choose(monkeypatch, lambda name, x, *, narrow: used.append((name, narrow)) or own[name])
    assert_close(block(x), wanted, relative=1e-9)
    assert set(used) == {(name, True) for name in own}
    assert calls == ([watched] if watched else [])
