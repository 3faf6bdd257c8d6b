"""Eight-bit integers: how they are stored, and layers that multiply by them."""

from __future__ import annotations

import pytest
import torch
from interpreted import interpreted
from torch import nn

from bagel import kernels
from bagel.formats import int8
from bagel.kernels import Rounding, functions, round_rows, silu_mul, turn
from bagel.kernels import int8 as products
from bagel.modeling.float8 import Float8Linear
from bagel.modeling.linear import apply
from bagel.modeling.stored.int8 import Int8Linear

SHAPES = [(1152, 4304), (96, 160), (7, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> torch.Tensor:
    """A weight whose rows differ in size, one of them zero."""
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-2, 0, shape[0])[:, None]
    weight[3] = 0
    return weight.to(dtype)


# The format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_integers_are_those_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes", reason="it has no wheels for some platforms").functional
    weight = drawn(shape, torch.float16)
    values, greatest, _ = functional.int8_vectorwise_quant(weight)
    tensors = int8.to_file("a.weight", int8.quantize(weight))
    assert torch.equal(tensors["a.weight"], values)
    torch.testing.assert_close(tensors["a.SCB"], greatest, rtol=2**-23, atol=0)
    assert tensors["a.weight_format"].item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_value_is_off_by_more_than_half_a_step(shape, dtype):
    weight = drawn(shape, dtype)
    found = int8.quantize(weight)
    error = (found.values.double() * found.scale.double() - weight.double()).abs()
    assert (error <= found.scale.double() * (0.5 + 1e-5)).all()
    assert not found.values[3].any()
    assert found.values.abs().max() == 127
    twin = found.values.double() * found.scale.double()
    torch.testing.assert_close(int8.dequantize(found).double(), twin, rtol=2**-23, atol=0)
    wanted = torch.finfo(dtype).eps / 2 + 2**-23
    torch.testing.assert_close(int8.dequantize(found, dtype).double(), twin, rtol=wanted, atol=2**-24)


def test_a_weight_and_its_negative_are_stored_alike():
    weight = drawn((96, 160))
    assert torch.equal(int8.quantize(-weight).values, -int8.quantize(weight).values)


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 24])
def test_rows_are_those_of_the_whole_whatever_the_chunks(monkeypatch, chunk):
    weight = drawn((7, 1000))
    wanted = int8.quantize(weight)
    monkeypatch.setattr(int8, "CHUNK", chunk)
    found = int8.quantize(weight)
    assert torch.equal(found.values, wanted.values)
    whole = int8.dequantize(found)
    for rows in (slice(0, 1), slice(2, 5), slice(3, 3), slice(None), slice(-2, None)):
        assert torch.equal(int8.dequantize(found, rows=rows), whole[rows])


def test_a_file_keeps_the_weight():
    weight = int8.quantize(drawn((96, 160)))
    found = int8.from_file("b.a.weight", int8.to_file("b.a.weight", weight))
    assert torch.equal(found.values, weight.values)
    torch.testing.assert_close(found.scale, weight.scale, rtol=2**-22, atol=0)


def test_bad_weights_and_bad_files_are_refused():
    for bad in (torch.zeros(4), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="must be a matrix of floats"):
            int8.quantize(bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        int8.quantize(torch.full((2, 64), float("nan")))
    tensors = int8.to_file("a.weight", int8.quantize(drawn((96, 160))))
    with pytest.raises(ValueError, match="in tiles for one kind of GPU"):
        int8.from_file("a.weight", tensors | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"without their scales \(a\.SCB\)"):
        int8.from_file("a.weight", {"a.weight": tensors["a.weight"]})
    with pytest.raises(ValueError, match=r"a scale per row, got \(96, 160\) torch\.int8 and \(160,\) scales"):
        int8.from_file("a.weight", tensors | {"a.SCB": torch.zeros(160)})


# Turning and rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 512])
def test_turning_keeps_products_and_is_its_own_inverse(size):
    x, weight = (torch.randn(4, 1536, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(turn(x, size) @ turn(weight, size).T, x @ weight.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(turn(turn(x, size), size), x, rtol=1e-5, atol=1e-6)
    assert turn(x.bfloat16(), size).dtype == torch.bfloat16


def test_turning_is_by_the_hadamard_matrix():
    rows = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(turn(torch.eye(4), 4), torch.tensor(rows) / 2)
    one = torch.zeros(1, 1024)
    one[0, 517] = 512**0.5
    torch.testing.assert_close(turn(one, 512).abs(), torch.cat([torch.zeros(1, 512), torch.ones(1, 512)], 1))


def test_integers_are_rounded_to_nearest_and_rows_of_zeros_stay():
    x = torch.tensor([[127.0, 1.5, 2.5, -0.6, 0.4], [0.0] * 5])
    values, scale, dtype = round_rows(x, Rounding(torch.int8, largest=127, tiny=1e-12))
    assert values.tolist() == [[127, 2, 2, -1, 0], [0] * 5]
    assert (values.dtype, scale.dtype, dtype) == (torch.int8, torch.float32, torch.float32)
    assert scale.tolist() == [[1.0], [pytest.approx(1e-12)]]


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "another"])
@pytest.mark.parametrize("sides", [(18944, 24), (1040, 7), (5, 3)], ids=str)
def test_sums_of_products_are_exact(sides, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (rows, sides[0]), generator=generator) for rows in (3, sides[1]))
    x[0], weight[0] = 127, 127  # the greatest sum: far beyond the integers of float32
    rows, narrow = x.to(torch.int8), weight.to(torch.int8)
    found = products._exact(rows, narrow) if device == "cpu" else products._in_floats(rows, narrow)
    assert torch.equal(found, (x @ weight.T).int())


# Layers ---------------------------------------------------------------------------------------------------------------

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Most error of a sum rounded to its type, twice with what is added, against the largest value."""


def layer_and_input(dtype, *, tokens: int = 5, sides: tuple[int, int] = (192, 48), bias: bool = True):
    torch.manual_seed(0)
    linear = nn.Linear(*sides, bias=bias).to(dtype)
    return Int8Linear.of(linear), torch.randn(tokens, sides[0]).to(dtype), torch.randn(tokens, sides[1]).to(dtype)


def exact(layer, x, add=None):
    """The product of the rows that a layer rounds its input to and of its integers, in float64."""
    rows = round_rows(x, layer.takes)
    y = (rows.values.double() * rows.scale.double()) @ (layer.weight.double() * layer.scale.double()).T
    y = y if layer.bias is None else y + layer.bias.double()
    return y if add is None else y + add.double()


def assert_near(found, wanted, most):
    assert (found.double() - wanted).abs().max() <= most * wanted.abs().max()


@pytest.mark.parametrize("sides", [(192, 48), (104, 7), (7, 5), (1536, 16)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_multiplies_by_the_weight_that_it_tells(dtype, tokens, sides):
    for bias in (False, True):
        layer, x, add = layer_and_input(dtype, tokens=tokens, sides=sides, bias=bias)
        for given in (None, add):
            found = layer(x, add=None if given is None else given.clone())
            assert found.dtype == dtype
            assert found.shape == (tokens, sides[1])
            if tokens:
                assert_near(found, exact(layer, x, given), ROUNDING[dtype])
                rows = layer(round_rows(x, layer.takes), add=given)
                assert torch.equal(rows, found)
        turned = layer.weight.double() * layer.scale.double()
        torch.testing.assert_close(layer.dense(torch.float64), turn(turned, layer.turn).double(), rtol=0, atol=1e-6)
        assert torch.equal(layer.dense(dtype, rows=slice(1, 4)), layer.dense(dtype)[1:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_lost(dtype):
    layer, x, _ = layer_and_input(dtype, tokens=64, sides=(1024, 256))
    torch.manual_seed(0)
    linear = nn.Linear(1024, 256).to(dtype)
    wanted = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert (layer(x).double() - wanted).norm() / wanted.norm() < 0.013  # measured 0.0116 to 0.0117
    weight = linear.weight.double()
    assert (layer.dense(torch.float64) - weight).norm() / weight.norm() < 0.0095  # measured 0.0084


OUTLIERS = {
    "none": lambda x: x,
    "8 channels, 60 times": lambda x: x * 60.0 ** (torch.arange(3584) % 448 == 7),
    "one of them 600 times": lambda x: x * 60.0 ** (torch.arange(3584) % 448 == 7) * 10.0 ** (torch.arange(3584) == 7),
    "a token of its own": lambda x: x * 100.0 ** ((torch.arange(3584) == 9) & (torch.arange(64)[:, None] == 5)),
    "products of two": lambda x: x * x.roll(1, dims=1) * 200.0 ** (torch.arange(3584) % 600 == 7),
}
MEASURED = {  # errors of integers that are turned, of those that are not, and of 8-bit floats; for normal weights
    "none": (0.0121, 0.0124, 0.0370),
    "8 channels, 60 times": (0.0110, 0.0844, 0.0343),
    "one of them 600 times": (0.0114, 0.0734, 0.0297),
    "a token of its own": (0.0122, 0.0278, 0.0368),
    "products of two": (0.0104, 0.0683, 0.0297),
}


@pytest.mark.parametrize("name", OUTLIERS)
def test_a_few_large_channels_cost_the_others_little(name):
    torch.manual_seed(0)
    linear = nn.Linear(3584, 256, bias=False).bfloat16()
    nn.init.normal_(linear.weight, std=0.02)
    x = OUTLIERS[name](torch.randn(64, 3584)).bfloat16()
    wanted = x.double() @ linear.weight.double().T
    plain = Int8Linear(int8.quantize(linear.weight), None)
    found = [
        ((layer(x).double() - wanted).norm() / wanted.norm()).item()
        for layer in (Int8Linear.of(linear), plain, Float8Linear.of(linear))
    ]
    assert found == pytest.approx(MEASURED[name], rel=0.03)


def test_what_is_added_may_be_of_another_type_and_products_of_float16_are_scaled():
    layer, x, add = layer_and_input(torch.float16)
    found = layer(x, add=add.float())
    assert found.dtype == torch.float32
    assert_near(found, exact(layer, x, add), ROUNDING[torch.float16])
    gate_up = 2e2 * torch.randn(6, 2 * 192).half()
    gate, up = gate_up.float().chunk(2, dim=1)
    wanted = nn.functional.silu(gate) * up
    found = apply(layer, silu_mul(gate_up, rounding=layer.takes), add=add[:1].float().expand(6, -1).clone())
    assert found.dtype == torch.float32
    dense = wanted.double() @ layer.dense(torch.float64).T + layer.bias.double() + add[:1].double()
    assert_near(found, dense, 0.02)  # rounded to 8 bits: measured 0.012


def test_a_single_token_on_a_gpu_is_not_rounded(monkeypatch):
    def one_row(x, weight, *, scale, bias, plus):
        y = (x.double() @ (weight.double() * scale.double()).T + bias.double()).to(x.dtype)
        return y if plus is None else y + plus

    chosen = {"matrix_times_vector": one_row}
    monkeypatch.setattr(kernels, "find", lambda name, x: chosen[name])
    layer, x, add = layer_and_input(torch.bfloat16, tokens=1)
    dense = x.double() @ layer.dense(torch.float64).T + layer.bias.double()
    assert_near(layer(x), dense, 2**-7)
    for given in (add, add.float()):
        found = layer(x, add=given)
        assert found.dtype == given.dtype
        assert_near(found, dense + add.double(), 2**-7)


@torch.no_grad()
def test_a_layer_can_be_compiled():
    layer, x, add = layer_and_input(torch.float32)
    compiled = torch.compile(lambda x, add: layer(x, add=add), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, add), layer(x, add=add))


def test_a_layer_of_a_file_turns_nothing():
    torch.manual_seed(0)
    linear, x = nn.Linear(192, 48).half(), torch.randn(5, 192).half()
    weight = int8.from_file("a.weight", int8.to_file("a.weight", int8.quantize(linear.weight.detach())))
    layer = Int8Linear(weight, linear.bias)
    torch.testing.assert_close(layer.dense(), int8.dequantize(weight))
    assert_near(layer(x), exact(layer, x), ROUNDING[torch.float16])
    with pytest.raises(ValueError, match="192 columns cannot be turned by 512"):
        Int8Linear(weight, None, turn=512)


def test_everything_that_a_layer_holds_can_be_moved():
    layer, _, _ = layer_and_input(torch.bfloat16)
    assert not [name for name, x in vars(layer).items() if isinstance(x, torch.Tensor)]
    assert {name: x.dtype for name, x in layer.named_buffers()} == {"weight": torch.int8, "scale": torch.float32}


# Kernels --------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("tokens", "sides"), [(5, (512, 48)), (17, (200, 33)), (130, (264, 260))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_of_the_product_computes_what_torch_does(dtype, tokens, sides):
    from bagel.kernels import triton_int8

    layer, x, add = layer_and_input(dtype, tokens=tokens, sides=sides)
    rows = round_rows(x, layer.takes)
    for given in (None, add):
        found = triton_int8.integer_product(
            rows.values, rows.scale, layer.weight, layer.scale, layer.bias, given, dtype=dtype
        )
        assert_near(found, exact(layer, x, given), 2**-6 if dtype == torch.bfloat16 else ROUNDING[dtype])


@interpreted
@pytest.mark.parametrize("size", [1, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter cuts bfloat16
def test_kernels_round_as_torch_does(monkeypatch, dtype, size):
    from bagel.kernels import triton_int8, triton_rows

    torch.manual_seed(0)
    x, plus, weight = torch.randn(3, 1536).to(dtype), torch.randn(3, 1536).to(dtype), torch.randn(1536).to(dtype)
    rounding = Rounding(torch.int8, largest=127, tiny=1e-12, turn=size)
    options = rounding._asdict()
    normed = functions.rms_norm(x + plus, weight, eps=1e-6)[1]
    total, *added = triton_rows.add_rms_norm_round(x, plus, weight, eps=1e-6, **options)
    torch.testing.assert_close(total, x + plus)
    gated = silu_mul(torch.cat([x, plus], dim=1).float()).to(dtype)
    cases = {
        "rows": (triton_rows.round_rows(x, **options), x),
        "norm": (
            triton_rows.rms_norm_round(x, weight, eps=1e-6, **options),
            functions.rms_norm(x, weight, eps=1e-6)[1],
        ),
        "sum": (added, normed),
        "gate": (triton_rows.silu_mul_round(torch.cat([x, plus], dim=1), **options), gated),
    }
    for name, ((values, scale), given) in cases.items():
        wanted = round_rows(given, rounding)
        torch.testing.assert_close(scale, wanted.scale, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=0)
        off = (values.int() - wanted.values.int()).abs()
        assert off.max() <= 1, name  # where float sums in another order fall on the other side of a half
        assert off.float().mean() < (0.05 if dtype == torch.float16 else 0.001), name
    if size > 1:
        torch.testing.assert_close(triton_int8.turn_rows(x, size), turn(x, size), rtol=2e-3, atol=2e-3)


def one_token(width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A token and a weight of all 8-bit integers, whose products float32 adds up exactly, in any order."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(low, 128, (rows, width), generator=generator) for low, rows in ((-3, 1), (-128, 7)))
    weight[2, :256] = torch.arange(-128, 128)
    return x.clamp_(max=3).float().to(device), weight.to(device, torch.int8)


def check_one_token(width: int, device: str) -> None:
    from bagel.kernels.triton_vectors import matrix_times_vector

    x, weight = one_token(width, device)
    plain = x @ weight.float().T
    assert torch.equal(matrix_times_vector(x, weight), plain)
    scale, bias, plus = (torch.rand(shape).to(device) for shape in ((7, 1), (7,), (1, 7)))
    found = matrix_times_vector(x, weight, scale, bias, plus)
    torch.testing.assert_close(found, plain * scale.T + bias + plus)


@interpreted
@pytest.mark.parametrize("width", [256, 1100, 8256])
def test_one_token_is_multiplied_by_every_integer(width):
    check_one_token(width, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("width", [256, 1100, 8256])
def test_one_token_is_multiplied_by_every_integer_on_a_gpu(width):
    check_one_token(width, "cuda")
