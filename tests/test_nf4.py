"""Four-bit weights: the bits of bitsandbytes, what they stand for, and layers that multiply by them."""

from __future__ import annotations

import pytest
import torch
from interpreted import interpreted
from torch import nn

from bagel.formats import nf4
from bagel.kernels import Rows
from bagel.kernels.nf4 import blocks_times_vectors
from bagel.modeling.linear import apply
from bagel.modeling.stored.nf4 import FP4Linear, NF4DoubleLinear, NF4Linear, layer_of

SHAPES = [(1152, 4304), (96, 160), (7, 1000), (3, 5), (64, 3584)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nf4", "fp4"]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> torch.Tensor:
    """A weight; its first block is zero, where it has several."""
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if weight.numel() > 64:
        weight.view(-1)[:64] = 0
    return weight.to(dtype)


def twin(blocks: nf4.Blocks) -> torch.Tensor:
    """What a weight in 4 bits means, value by value, in float64."""
    indices = torch.stack([blocks.codes >> 4, blocks.codes & 15], dim=1).view(-1).long()
    count = torch.Size(blocks.shape).numel()
    block = torch.arange(count) // 64
    absmax = blocks.absmax
    if isinstance(absmax, nf4.Nested):
        greater = absmax.absmax.double()[torch.arange(len(absmax.codes)) // 256]
        absmax = absmax.table.double()[absmax.codes.long()] * greater + absmax.offset.double()
    return (blocks.codebook.double()[indices[:count]] * absmax.double()[block]).view(blocks.shape)


# The format -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="it has no wheels for some platforms").functional


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_bitsandbytes(bitsandbytes, shape, dtype, kind):
    weight = drawn(shape, dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind)
    found = nf4.quantize(weight, kind)
    assert torch.equal(found.codes, codes.view(-1))
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(found.codebook, state.code)
    if shape[1] % 64 == 0:  # it dequantises some others wrongly on CPUs
        assert torch.equal(nf4.dequantize(found), bitsandbytes.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (3, 5)], ids=str)  # that is one block alone
def test_nested_magnitudes_are_those_of_bitsandbytes(bitsandbytes, shape, dtype):
    weight = drawn(shape, dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    found = nf4.quantize(weight, double=True)
    assert torch.equal(found.codes, codes.view(-1))
    assert torch.equal(found.absmax.table, state.state2.code)
    assert torch.equal(found.absmax.absmax, state.state2.absmax)
    assert torch.equal(found.absmax.offset, state.offset)
    plain = nf4.quantize(weight).absmax - found.absmax.offset
    parts = plain / found.absmax.absmax.repeat_interleave(256)[: len(plain)].where(plain != 0, 1)
    ours, theirs = (found.absmax.table[codes.int()] for codes in (found.absmax.codes, state.absmax))
    # Its CPU kernel looks the nearest value up in 65536 steps of [-1, 1]: where they differ, two are nearly as near.
    assert ((parts - ours).abs() <= (parts - theirs).abs() + 1e-7).all()
    assert ((parts - theirs).abs() - (parts - ours).abs()).max() < 2**-15


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_is_rounded_once_in_float32_and_once_to_its_type(shape, dtype, kind, double):
    blocks = nf4.quantize(drawn(shape, dtype), kind, double=double)
    found, wanted = nf4.dequantize(blocks), twin(blocks)
    assert found.dtype == dtype
    assert found.shape == shape
    # Nested magnitudes are a sum of two roundings before.
    bound = (torch.finfo(dtype).eps / 2 + 2**-22) * wanted.abs() + torch.finfo(dtype).tiny * 2**-10
    assert ((found.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.0925), ("fp4", 0.123)])  # measured 0.0920 and 0.1220
def test_what_is_lost(kind, most):
    weight = 0.02 * torch.randn(512, 4304, generator=torch.Generator().manual_seed(0))
    plain, double = (nf4.dequantize(nf4.quantize(weight, kind, double=double)) for double in (False, True))
    lost = [((found - weight).norm() / weight.norm()).item() for found in (plain, double)]
    assert lost[0] < most
    assert lost[0] < lost[1] < lost[0] + 0.0005


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_once_stays(kind):
    once = nf4.dequantize(nf4.quantize(drawn((96, 160)), kind))
    assert torch.equal(nf4.dequantize(nf4.quantize(once, kind)), once)


@pytest.mark.parametrize("chunk", [64, 192, 1 << 22])
@pytest.mark.parametrize("double", [False, True])
def test_rows_are_those_of_the_whole_whatever_the_chunks(monkeypatch, chunk, double):
    weight = drawn((7, 1000), seed=1)
    wanted = nf4.quantize(weight, double=double)
    monkeypatch.setattr(nf4, "CHUNK", chunk)
    blocks = nf4.quantize(weight, double=double)
    assert torch.equal(blocks.codes, wanted.codes)
    whole = nf4.dequantize(blocks)
    for rows in (slice(0, 1), slice(2, 5), slice(6, 7), slice(3, 3), slice(None), slice(-2, None)):
        assert torch.equal(nf4.dequantize(blocks, rows=rows), whole[rows])


def test_weights_one_above_the_other_are_one_where_no_block_spans_two():
    above, below = drawn((6, 96)), drawn((5, 96), seed=1)
    joined = nf4.join([nf4.quantize(above), nf4.quantize(below)])
    whole = nf4.quantize(torch.cat([above, below]))
    assert joined is not None
    assert joined.shape == (11, 96)
    assert torch.equal(joined.codes, whole.codes)
    assert torch.equal(nf4.dequantize(joined), nf4.dequantize(whole))
    assert nf4.join([nf4.quantize(below), nf4.quantize(above)]) is None
    assert nf4.join([nf4.quantize(above), nf4.quantize(below, "fp4")]) is None
    assert nf4.join([nf4.quantize(above, double=True), nf4.quantize(below, double=True)]) is None


def test_odd_values_and_no_values():
    for shape in ((1, 1), (3, 5), (65,), (2, 3, 7)):
        weight = drawn(shape)
        blocks = nf4.quantize(weight)
        assert len(blocks.codes) == (weight.numel() + 1) // 2
        assert (nf4.dequantize(blocks) - weight).abs().max() <= 0.17 * weight.abs().max()
    assert nf4.dequantize(nf4.quantize(torch.zeros(0, 64))).shape == (0, 64)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_keeps_every_bit_and_is_that_of_bitsandbytes(bitsandbytes, kind, double):
    weight = drawn((96, 192), torch.bfloat16)
    blocks = nf4.quantize(weight, kind, double=double)
    tensors = nf4.to_file("a.weight", blocks)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    theirs = {"a.weight": codes} | {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert {key: (x.dtype, x.shape) for key, x in tensors.items()} == {
        key: (x.dtype, x.shape) for key, x in theirs.items()
    }
    key = f"a.weight.quant_state.bitsandbytes__{kind}"
    assert bytes(tensors[key].tolist()) == bytes(theirs[key].tolist())
    for given in (tensors, theirs):
        found = nf4.from_file("a.weight", given)
        assert (found.kind, found.shape, found.dtype) == (kind, (96, 192), torch.bfloat16)
        assert torch.equal(found.codes, blocks.codes)
    found = nf4.from_file("a.weight", tensors)
    assert torch.equal(nf4.dequantize(found), nf4.dequantize(blocks))


def test_bad_weights_and_bad_files_are_refused():
    weight = drawn((96, 192))
    with pytest.raises(ValueError, match="no 4-bit format named 'nf5'; there are nf4, fp4"):
        nf4.quantize(weight, "nf5")
    with pytest.raises(ValueError, match=r"must be float32, bfloat16, float16, got torch\.float64"):
        nf4.quantize(weight.double())
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            nf4.quantize(torch.full((2, 64), value))
    tensors = nf4.to_file("a.weight", nf4.quantize(weight, double=True))
    changes = {
        "has no description": {"a.weight.quant_state.bitsandbytes__nf4": None},
        "cannot be read": {"a.weight.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)},
        "absmax should be torch.uint8, and is missing": {"a.weight.absmax": None},
        "quant_map should be torch.float32, and is torch.float64": {"a.weight.quant_map": torch.zeros(16).double()},
        "quant_map has 17 elements where a weight of shape": {"a.weight.quant_map": torch.zeros(17)},
        "nested_absmax has 7 elements where a weight of shape \\(96, 192\\) has 2": {
            "a.weight.nested_absmax": torch.zeros(7)
        },
    }
    for message, change in changes.items():
        given = {key: value for key, value in (tensors | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            nf4.from_file("a.weight", given)
    other = bytes(tensors["a.weight.quant_state.bitsandbytes__nf4"].tolist()).replace(b'size": 64', b'size": 32')
    with pytest.raises(ValueError, match="only blocks of 64 and 256"):
        nf4.from_file(
            "a.weight", tensors | {"a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(other)).to(torch.uint8)}
        )


# Layers ---------------------------------------------------------------------------------------------------------------

LAYERS = [NF4Linear, NF4DoubleLinear, FP4Linear]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Most error of a product against the largest of its values: of the weight, the sum, and what is added to it."""


def layer_and_input(kind, dtype, *, tokens: int = 5, sides: tuple[int, int] = (192, 48), bias: bool = True):
    torch.manual_seed(0)
    linear = nn.Linear(*sides, bias=bias).to(dtype)
    return kind.of(linear), torch.randn(tokens, sides[0]).to(dtype), torch.randn(tokens, sides[1]).to(dtype)


def exact(layer, x, add=None):
    """The product with the weight that a layer tells, in float64."""
    y = x.double() @ layer.dense(torch.float64).T
    y = y if layer.bias is None else y + layer.bias.double()
    return y if add is None else y + add.double()


def assert_near(found, wanted, most):
    assert (found.double() - wanted).abs().max() <= most * wanted.abs().max()


@pytest.mark.parametrize("sides", [(192, 48), (104, 7), (7, 5)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_multiplies_by_the_weight_that_it_tells(kind, dtype, tokens, sides):
    for bias in (False, True):
        layer, x, add = layer_and_input(kind, dtype, tokens=tokens, sides=sides, bias=bias)
        assert layer.dense().dtype == dtype
        for given in (None, add):
            found = layer(x, add=None if given is None else given.clone())
            assert found.dtype == dtype
            assert found.shape == (tokens, sides[1])
            if tokens:
                assert_near(found, exact(layer, x, given), ROUNDING[dtype])


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_a_weight_can_be_had(kind):
    layer, _, _ = layer_and_input(kind, torch.bfloat16, sides=(104, 7))
    for rows in (slice(2, 5), slice(0, 0), slice(-1, None)):
        assert torch.equal(layer.dense(torch.float32, rows=rows), layer.dense(torch.float32)[rows])


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_added_may_be_of_another_type_and_products_of_float16_are_scaled(kind):
    layer, x, add = layer_and_input(kind, torch.float16)
    found = layer(x, add=add.float())
    assert found.dtype == torch.float32
    assert_near(found, exact(layer, x, add), ROUNDING[torch.float16])
    large = 1e6 * x.float()
    scale = large.abs().amax(-1, keepdim=True)
    found = apply(layer, Rows((large / scale).half(), scale, torch.float32), add=add.float())
    assert found.dtype == torch.float32
    assert_near(found, exact(layer, large, add), ROUNDING[torch.float16])


@pytest.mark.parametrize("kind", LAYERS)
def test_everything_that_a_layer_holds_can_be_moved(kind):
    layer, _, _ = layer_and_input(kind, torch.bfloat16)
    held = {name for name, x in vars(layer).items() if isinstance(x, torch.Tensor)}
    assert not held
    double = {"nested_absmax", "nested_table", "offset"} if kind is NF4DoubleLinear else set()
    assert {name for name, _ in layer.named_buffers()} == {"codes", "absmax", "codebook"} | double
    sizes = sum(x.nbytes for x in layer.buffers())
    assert sizes <= 0.5625 * 192 * 48 + (64 if not double else 64 + 1024 + 8)
    wanted = layer.dense()
    state = layer.state_dict()
    other = kind.of(nn.Linear(192, 48).bfloat16())
    other.load_state_dict(state)
    assert torch.equal(other.dense(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_few_tokens_are_multiplied_by_a_kernel_and_more_expand_the_weight(monkeypatch, kind, dtype):
    used = []

    def product(x, codes, absmax, codebook, nested, table, offset, *, bias, plus, dtype):
        used.append("product")
        y = x.double() @ layer.dense(torch.float64).T + bias.double()
        return (y.to(dtype) if plus is None else y.to(dtype) + plus).to(dtype)

    def expand(codes, absmax, codebook, nested, table, offset, *, first, count, dtype):
        used.append("expand")
        return nf4.dequantize(layer.blocks, dtype).view(-1)[first : first + count]

    chosen = {"blocks_times_vectors": product, "expand_blocks": expand}
    for tokens, sides, wanted in ((1, (192, 48), "product"), (8, (192, 48), "product"), (9, (192, 48), "expand")):
        layer, x, add = layer_and_input(kind, dtype, tokens=tokens, sides=sides)
        with monkeypatch.context() as patch:
            patch.setattr("bagel.kernels.nf4.find", lambda name, x: chosen[name])
            used.clear()
            found = layer(x, add=add.clone())
            other = layer(x, add=add.double())
        assert used == [wanted] * 2
        assert other.dtype == torch.float64
        for y in (found, other):
            assert_near(y, exact(layer, x, add), ROUNDING[dtype])
    layer, x, _ = layer_and_input(kind, dtype, tokens=1, sides=(104, 48))
    monkeypatch.setattr("bagel.kernels.nf4.find", lambda name, x: chosen[name])
    used.clear()
    layer(x)
    assert used == ["expand"]  # rows that are no whole blocks


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_can_be_compiled(kind):
    layer, x, add = layer_and_input(kind, torch.float32)
    compiled = torch.compile(lambda x, add: layer(x, add=add), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, add), layer(x, add=add))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_can_be_made_of_what_a_file_holds(kind):
    layer, x, _ = layer_and_input(kind, torch.bfloat16)
    found = layer_of(nf4.from_file("a.weight", nf4.to_file("a.weight", layer.blocks)), layer.bias)
    assert type(found) is kind
    assert torch.equal(found(x), layer(x))
    with pytest.raises(ValueError, match=r"a weight of two dimensions, got \(192,\)"):
        layer_of(nf4.quantize(torch.zeros(192), layer.kind, double=layer.double), None)


def test_gradients_pass_through_a_layer():
    layer, x, _ = layer_and_input(NF4Linear, torch.float32)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense().sum(0).expand_as(x), atol=1e-5)


# Kernels --------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("tokens", "sides"), [(1, (192, 10)), (3, (640, 7)), (8, (64, 5)), (1, (8256, 5))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_compute_what_torch_does(monkeypatch, kind, dtype, tokens, sides):
    from bagel.kernels import triton_nf4

    layer, x, add = layer_and_input(kind, dtype, tokens=tokens, sides=sides)
    monkeypatch.setattr("bagel.kernels.nf4.find", lambda name, x: getattr(triton_nf4, name))
    for given in (None, add):
        found = layer(x, add=given)
        assert found.dtype == dtype
        assert_near(found, exact(layer, x, given), 2**-6 if dtype == torch.bfloat16 else ROUNDING[dtype])
    single = blocks_times_vectors(x, layer.blocks, dtype=torch.float32)
    assert_near(single, x.double() @ layer.dense(torch.float64).T, 1e-6)
    # The interpreter cuts what it casts to bfloat16, where GPUs round.
    found, wanted = layer.dense(rows=slice(1, 4)), nf4.dequantize(layer.blocks)[1:4]
    torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@interpreted
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_any_width_are_expanded(monkeypatch, kind):
    from bagel.kernels import triton_nf4

    layer, _, _ = layer_and_input(kind, torch.float16, sides=(102, 90))
    wanted = layer.dense()
    monkeypatch.setattr("bagel.kernels.nf4.find", lambda name, x: getattr(triton_nf4, name))
    for rows in (slice(None), slice(1, 90), slice(3, 4), slice(5, 5)):
        assert torch.equal(layer.dense(rows=rows), wanted[rows])
