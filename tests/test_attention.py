"""Attention: every one against the float64 definition, the alignment of the causal rule, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from small_model import latents, new_model, packed_of, small_model, text, vit

from bagel.modeling.attention import (
    BACKENDS,
    SDPA,
    Attention,
    Flash,
    Flash3,
    Reference,
    _has_fa3,
    attention_of,
    check_backend,
    lower_right_causal,
)
from bagel.packing import Layout

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
"""Unit roundoff: half a step at 1, one bit finer than `torch.finfo(...).eps` says."""


def heads(tq: int, tk: int, *, hq: int = 6, hkv: int = 3, d: int = 16, dtype=torch.float32, device="cpu"):
    """Random queries (tq, hq, d), keys and values (tk, hkv, d)."""
    generator = torch.Generator().manual_seed(tq * 100 + tk)
    shapes = (tq, hq, d), (tk, hkv, d), (tk, hkv, d)
    return [torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for shape in shapes]


def by_hand(q, k, v, see: torch.Tensor) -> torch.Tensor:
    """The definition, one query and one head at a time, in float64; see (Tq, Tk) says who looks where."""
    out = torch.empty(q.shape, dtype=torch.float64)
    share = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[see[i], h // share].double(), v[see[i], h // share].double()
            weights = torch.exp(keys @ q[i, h].double() / q.shape[2] ** 0.5)
            out[i, h] = (weights / weights.sum()) @ values
    return out


def rule(name: str, tq: int, tk: int) -> tuple[dict, torch.Tensor]:
    """The arguments of a rule and the mask it stands for."""
    if name == "full":
        return {}, torch.ones(tq, tk, dtype=torch.bool)
    if name == "causal":
        return {"causal": True}, torch.tensor([[j <= tk - tq + i for j in range(tk)] for i in range(tq)])
    mask = torch.rand(tq, tk, generator=torch.Generator().manual_seed(9)) < 0.4
    mask[:, 1] = True
    return {"mask": mask}, mask


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "causal", "mask"])
@pytest.mark.parametrize(("tq", "tk"), [(5, 5), (4, 9), (1, 7)])
def test_reference_is_the_definition(name, tq, tk):
    q, k, v = (x.double() for x in heads(tq, tk))
    arguments, see = rule(name, tq, tk)
    torch.testing.assert_close(Reference()(q, k, v, **arguments), by_hand(q, k, v, see), rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "mask"])
@pytest.mark.parametrize(("tq", "tk"), [(33, 33), (20, 50), (1, 41)])
def test_sdpa_is_within_the_types_rounding_of_the_reference(tq, tk, name, dtype, device):
    q, k, v = heads(tq, tk, dtype=dtype, device=device)
    arguments, see = rule(name, tq, tk)
    arguments = {key: value.to(device) if key == "mask" else value for key, value in arguments.items()}
    exact = Reference()(q.double(), k.double(), v.double(), mask=see.to(device))
    found = SDPA()(q, k, v, **arguments)
    assert found.dtype == dtype
    # Scores of size 4 and weights are rounded, and sums of values up to 4: a few roundings of the largest value.
    assert (found.double() - exact).abs().max().item() <= 8 * ROUNDING[dtype] * v.abs().max().item()


def test_grouped_queries_use_the_key_head_of_their_group():
    q, k, v = heads(3, 4, hq=6, hkv=2)
    whole = SDPA()(q, k, v)
    for group in range(2):
        own = SDPA()(q[:, 3 * group : 3 * group + 3], k[:, group, None], v[:, group, None])
        torch.testing.assert_close(whole[:, 3 * group : 3 * group + 3], own, rtol=0, atol=1e-6)


# The causal rule ------------------------------------------------------------------------------------------------------


def test_lower_right_causal_mask_literal():
    drawn = ["xxx..", "xxxx.", "xxxxx"]
    found = lower_right_causal(3, 5, torch.device("cpu")).tolist()
    assert ["".join("x" if seen else "." for seen in row) for row in found] == drawn


@pytest.mark.parametrize("attention", [SDPA(), Reference()], ids=str)
def test_causal_with_longer_keys_is_not_aligned_at_the_upper_left(attention):
    q, k, v = heads(3, 8, hq=2, hkv=2)
    found = attention(q, k, v, causal=True)
    upper_left = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
    assert (found - upper_left).abs().amax(dim=(1, 2)).min() > 0.1  # every query would be wrong
    torch.testing.assert_close(found[-1:], attention(q[-1:], k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", [SDPA(), Reference()], ids=str)
def test_a_single_causal_query_sees_every_key(attention):
    q, k, v = heads(1, 6)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [kind() for kind in BACKENDS.values()], ids=BACKENDS)
def test_both_rules_at_once_are_refused(attention):
    q, k, v = heads(2, 2)
    with pytest.raises(ValueError, match="not both"):
        attention(q, k, v, causal=True, mask=torch.ones(2, 2, dtype=torch.bool))


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_an_unknown_name_is_refused_with_the_names_of_all():
    for ask in (lambda: attention_of("xformers", **CPU), lambda: check_backend("xformers")):
        with pytest.raises(ValueError, match="one of auto, sdpa, fa3, flash, reference, or an object, got 'xformers'"):
            ask()


def test_a_name_stands_for_an_object_and_an_object_for_itself(monkeypatch):
    for module in ("fa3_fwd_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=None))
    found = {name: attention_of(name, **CPU) for name in BACKENDS}
    assert found == {"sdpa": SDPA(), "fa3": Flash3(), "flash": Flash(), "reference": Reference()}
    own = Reference()
    assert attention_of(own, **CPU) is own


def test_flash_without_its_package_says_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it now fails
    for ask in (lambda: check_backend("flash"), lambda: Flash()(*heads(2, 2, dtype=torch.bfloat16))):
        with pytest.raises(ImportError, match=r"pip install flash-attn.*auto"):
            ask()


def test_auto_is_torchs_attention_on_a_cpu():
    assert attention_of("auto", **CPU) == SDPA()


@pytest.mark.parametrize("package", [None, SimpleNamespace(flash_attn_func=None)], ids=["absent", "there"])
def test_auto_takes_flash_attention_3_on_hopper_where_it_can_be_imported(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", package)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    _has_fa3.cache_clear()
    assert attention_of("auto", device=gpu, dtype=torch.bfloat16) == (Flash3() if package else SDPA())
    assert attention_of("auto", device=gpu, dtype=torch.float16) == SDPA()
    _has_fa3.cache_clear()
    if package is None:
        with pytest.raises(ImportError, match=r"pip install fa3-fwd.*auto"):
            check_backend("fa3")


def test_flash_attention_3_gets_what_it_can_compute_and_nothing_else(monkeypatch):
    asked = []

    def func(q, k, v, *, causal):
        asked.append(causal)
        return flash_twin(q, k, v, causal=causal)

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_func=func))
    q, k, v = heads(3, 7, dtype=torch.bfloat16)
    wanted = Reference()(q, k, v, causal=True)
    assert torch.equal(Flash3()(q, k, v, causal=True), wanted)
    Flash3()(q, k, v, mask=torch.ones(3, 7, dtype=torch.bool))
    Flash3()(*heads(3, 7))
    Flash3()(q.requires_grad_(), k, v).sum().backward()
    assert asked == [True]


def flash_twin(q, k, v, *, causal):
    """What the package computes: a batch axis in front, key heads not repeated, causal aligned at the lower right."""
    return torch.stack([Reference()(a, b, c, causal=causal) for a, b, c in zip(q, k, v, strict=True)])


@pytest.mark.parametrize("causal", [False, True])
def test_flash_hands_over_and_takes_back_the_right_shapes(monkeypatch, causal):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_twin))
    q, k, v = heads(3, 7, dtype=torch.bfloat16)
    assert check_backend("flash") == "flash"
    wanted = Reference()(q, k, v, causal=causal)
    assert torch.equal(Flash()(q, k, v, causal=causal), wanted)


def test_flash_refuses_what_it_cannot_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_twin))
    with pytest.raises(ValueError, match="got float32"):
        Flash()(*heads(2, 2))
    with pytest.raises(ValueError, match="no arbitrary mask"):
        Flash()(*heads(2, 2, dtype=torch.bfloat16), mask=torch.ones(2, 2, dtype=torch.bool))


# How tokens find each other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [SDPA(), Reference()], ids=str)
def test_a_batch_is_one_by_one(attention):
    singles = [heads(3, 7) for _ in range(4)]
    for number, (q, _, _) in enumerate(singles):
        q.add_(number)
    q, k, v = (torch.stack(parts) for parts in zip(*singles, strict=True))
    wanted = torch.stack([attention(*single, causal=True) for single in singles])
    torch.testing.assert_close(attention(q, k, v, causal=True), wanted, rtol=0, atol=1e-6)


def test_the_weights_of_the_reference_are_what_it_sums_values_with():
    q, k, v = heads(4, 9, hq=6, hkv=2)
    weights = Reference().weights(q, k, causal=True)
    assert (weights.shape, weights.dtype) == ((6, 4, 9), torch.float64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 4, dtype=torch.float64))
    assert not weights[:, lower_right_causal(4, 9, q.device).logical_not()].any()
    gathered = torch.einsum("hqk,khd->qhd", weights, v.double().repeat_interleave(3, dim=1))
    torch.testing.assert_close(gathered.float(), Reference()(q, k, v, causal=True))


class Watched(Attention):
    """An attention that remembers what it was asked."""

    def __init__(self, aligns_right: bool) -> None:
        self.asked, self.aligns_right = [], aligns_right

    def __call__(self, q, k, v, *, causal=False, mask=None, layer=0):
        self.asked.append((q.shape[0], k.shape[0], causal, mask is not None, layer))
        return SDPA()(q, k, v, causal=causal, mask=mask)


@pytest.mark.parametrize("aligns_right", [False, True])
def test_an_attention_in_the_place_of_a_models_own_gets_every_layer_and_rule(aligns_right):
    model, watched = new_model(), Watched(aligns_right)
    context, packed = model.new_context(), packed_of([text(4)], [vit(3), text(2)], [latents(5)])
    wanted = model(packed)
    model.attention = watched
    for found, states in zip(model(packed), wanted, strict=True):
        assert_close(found, states)
    rules = [(4, 4, True, False), (7, 7, False, True), (7, 7, False, False)]
    assert watched.asked == [(*rule, layer) for layer in range(3) for rule in rules]
    watched.asked.clear()
    for segment in (text(4), text(3), vit(2), text(1)):
        model.prefill(packed_of([segment], starts=[context.position]), [context], only_keys=True)
    below = [(4, 4, True, False), (3, 7, aligns_right, not aligns_right), (4, 11, False, False), (1, 12, True, False)]
    assert watched.asked == [(*rule, layer) for rule in below for layer in range(2)], "the last layer gathers nothing"
    watched.asked.clear()
    model.decode(torch.tensor([3]), [context])
    assert watched.asked == [(1, 13, True, False, layer) for layer in range(3)]


def test_a_mask_is_made_once_for_all_layers(monkeypatch):
    made = []
    mask = Layout.mask
    monkeypatch.setattr(Layout, "mask", lambda layout, sample: made.append(sample) or mask(layout, sample))
    small_model()(packed_of([text(4)], [vit(3), text(2)], [text(2), latents(5)]))
    assert made == [1, 2]


def test_importing_the_library_imports_no_backend(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise RuntimeError('imported unasked')\n")
    root = Path(__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; import bagel; "
        "print([name for name in ('flash_attn', 'triton', 'xformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
