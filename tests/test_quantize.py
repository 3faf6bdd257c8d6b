"""Which layers of a model are quantised, and what it does then."""

from __future__ import annotations

import copy

import pytest
import test_every_module
import torch
from small_model import DENSE, MOE, new_model
from test_every_module import check
from torch import nn

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.kernels import functions
from bagel.modeling.float8 import Float8Linear, quantize_experts
from bagel.modeling.linear import is_exact
from bagel.modeling.stored.quantize import FORMATS, PARTS, converter, quantize

PROMPT = "a large red star in the center on a white background"
OURS = [name for name in FORMATS if name != "float8"]
LINEARS = ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def plain():
    """The built-in model, an image that it draws, and what it says about it."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    drawn = pipe.text_to_image(PROMPT, seed=3, num_timesteps=4, progress=False)
    return pipe, drawn, pipe.understand(drawn.image, "what color is the background?").token_ids


def quantised(model: nn.Module, format: str) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is FORMATS[format].layer}


MOVED = {"float8": 0.162, "int8": 0.066, "nf4": 0.173, "nf4-double": 0.173, "fp4": 0.268}
"""How far the latents of this small model move, as measured."""


@pytest.mark.parametrize("format", FORMATS)
def test_the_small_model_draws_and_answers(plain, format):
    pipe, drawn, answer = copy.copy(plain[0]), plain[1], plain[2]
    pipe.model = copy.deepcopy(pipe.model)
    layers = len(pipe.model.decoder.layers)
    kept = 2 if format == "float8" else 0
    assert quantize(pipe.model, format) == 2 * 4 * (layers - kept)
    assert not is_exact(pipe.model)
    found = pipe.text_to_image(PROMPT, seed=3, num_timesteps=4, progress=False)
    moved = ((found.latents - drawn.latents).norm() / drawn.latents.norm()).item()
    assert moved == pytest.approx(MOVED[format], rel=0.3)  # rounding differs between CPUs
    assert pipe.understand(drawn.image, "what color is the background?").token_ids == answer


def test_parts_are_what_they_say():
    expected = {
        "und": {f"decoder.layers.{i}.und.{name}" for i in range(3) for name in LINEARS},
        "gen": {f"decoder.layers.{i}.gen.{name}" for i in range(3) for name in LINEARS},
        "lm_head": {"decoder.lm_head"},
    }
    for part, names in expected.items():
        model = new_model()
        assert quantize(model, "nf4", parts=(part,)) == len(names)
        assert quantised(model, "nf4") == names
    model = new_model()
    linears = {name for name, module in model.vit.named_modules() if isinstance(module, nn.Linear)}
    quantize(model, "int8", parts=("vit",))
    assert quantised(model, "int8") == {f"vit.{name}" for name in linears}
    every = new_model()
    quantize(every, "int8", parts=("all",))
    assert quantised(every, "int8") == set().union(*expected.values(), quantised(model, "int8"))
    assert set(expected) | {"vit"} == set(PARTS)
    left = {name for name, module in every.named_modules() if isinstance(module, nn.Linear)}
    assert {"vae2llm", "llm2vae"} < left
    assert not any(name.startswith(("decoder", "vit")) for name in left)


def test_float8_is_what_it_was(plain):
    one, other = (copy.deepcopy(plain[0].model) for _ in range(2))
    quantize(one, "float8", parts=("gen",))
    quantize_experts(other)
    assert quantised(one, "float8") == quantised(other, "float8") != set()
    for name in quantised(one, "float8"):
        assert torch.equal(one.get_submodule(name).dense(), other.get_submodule(name).dense())


@pytest.mark.parametrize("layer_module", [MOE, DENSE])
def test_models_of_other_kinds_are_quantised_too(layer_module):
    model = new_model(layer_module)
    und = 4 * 3
    gen = 2 * 3 if layer_module == MOE else 0
    assert quantize(model, "nf4") == und + gen
    with pytest.raises(ValueError, match="no linear layer to quantise in gen, und: they were quantised before"):
        quantize(model, "int8")
    assert quantize(model, "int8", parts=("lm_head",)) == 1


def test_layers_are_converted_one_by_one_as_they_are_loaded():
    model = new_model()
    convert = converter("nf4-double", parts=("gen",), layers=3)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changed = {name for name, linear in linears.items() if convert(name, linear) is not linear}
    assert changed == {f"decoder.layers.{i}.gen.{name}" for i in range(3) for name in LINEARS}
    convert = converter("float8", parts=("und",), layers=3)
    linear = nn.Linear(32, 16)
    assert convert("decoder.layers.0.und.mlp.down_proj", linear) is linear
    assert convert("decoder.layers.2.und.mlp.down_proj", linear) is linear
    assert type(convert("decoder.layers.1.und.mlp.down_proj", linear)) is Float8Linear
    assert convert("decoder.layers.1.gen.mlp.down_proj", linear) is linear


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_says_what_it_is(format):
    layer = FORMATS[format].layer.of(nn.Linear(64, 32).requires_grad_(False))
    assert layer.format == format
    assert (layer.in_features, layer.out_features, layer.exact) == (64, 32, False)
    assert type(layer).contract is type(layer)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.dense(torch.float16, rows=slice(3, 5)).shape == (2, 64)


def test_bad_wishes_are_refused():
    model = new_model()
    with pytest.raises(ValueError, match="no format named 'int4'; there are float8, int8, nf4, nf4-double, fp4"):
        quantize(model, "int4")
    for parts in ((), ("und", "vae")):
        with pytest.raises(ValueError, match="parts of a model are und, gen, lm_head, vit, or all; got"):
            quantize(model, "nf4", parts=parts)
    with pytest.raises(ValueError, match="multiples of 16"):
        quantize(model, "float8")
    assert is_exact(model)
    model.decoder.layers[1].und.attention.o_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(model, "int8", parts=("und",))


pipe = test_every_module.pipe
kernels = test_every_module.kernels
AMONG = [
    f"model.decoder.layers.1.{expert}.{name}" for expert in ("und", "gen") for name in (*LINEARS, "mlp", "post_norm")
]


@pytest.mark.parametrize("name", AMONG)
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_hook_fires_and_a_replacement_takes_effect(pipe, format, name):
    quantize(pipe.model, format)
    check(pipe, name, exact=False)  # rounding to few bits makes much of the least difference


@pytest.mark.parametrize("name", AMONG)
def test_they_do_where_kernels_round(pipe, kernels, monkeypatch, name):
    quantize(pipe.model, "int8")
    monkeypatch.setattr(functions, "_turns", lambda x, size: True)
    monkeypatch.setattr(functions, "HALF", ())
    monkeypatch.setitem(test_every_module.KERNELS, "matrix_times_vector", test_every_module.one_row)
    monkeypatch.setitem(test_every_module.KERNELS, "integer_product", None)
    check(pipe, name, exact=False)


def test_one_part_may_be_given_by_its_name_alone():
    model = new_model()
    assert quantize(model, "nf4", parts="gen") == quantize(new_model(), "nf4", parts=("gen",)) > 0
