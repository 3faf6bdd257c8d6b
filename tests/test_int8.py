"""Eight-bit integers: how they are stored, and layers that multiply by them."""

from __future__ import annotations

import pytest
import torch

from bagel.formats import int8

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
