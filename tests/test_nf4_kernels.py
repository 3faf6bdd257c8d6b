"""Kernels in CUDA C++ for 4-bit weights: their own source is compiled for the CPU, threads being coroutines."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_nf4 import DTYPES, LAYERS, ROUNDING, assert_near, exact, layer_and_input

from bagel.formats import nf4
from bagel.kernels import cuda_nf4, nvrtc
from bagel.kernels.cuda_nf4 import Sizes, launch_of
from bagel.kernels.nf4 import _tensors
from bagel.modeling.stored.nf4 import NF4Linear


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Returns a program for the CPU of the kernel that some options choose."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made, here = {}, Path(__file__).parent

    def program(options: list[str]) -> Path:
        if (key := tuple(options)) not in made:
            folder = tmp_path_factory.mktemp("cuda")
            shutil.copy(cuda_nf4.SOURCE, folder / "kernel.cu")
            command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
            subprocess.run(
                [*command, *options, "-I", folder, "-I", here, here / "nf4_on_cpu.cpp", "-o", folder / "program"],
                check=True,
            )
            made[key] = folder / "program"
        return made[key]

    return program


def run_program(program, tensors, out, numbers, *, blocks: int, warps: int, falling: bool) -> torch.Tensor:
    """Return what a program computes of tensors or None, nine of them, in the form of `out`."""
    data = [b"" if x is None else x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors]
    padded = [*numbers, 0, 0, 0][:5]
    head = struct.pack("18i", *map(len, data), out.nbytes, *padded, blocks, warps, falling)
    done = subprocess.run([program], input=head + b"".join(data), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    assert not found[out.nbytes :].any(), "something was written behind the result"
    return found[: out.nbytes].view(out.dtype).view(out.shape)


PRODUCTS = {  # tokens, columns and rows of the weight, sizes, multiprocessors
    "whole slots, three rounds": (1, (512, 51), Sizes(4, 2, 2), 5),
    "a tail of columns, and warps that share rows": (1, (1088, 13), Sizes(4, 2, 8), 2),
    "more slots than are on their way": (1, (3648, 9), Sizes(8, 2, 3), 1),
    "two tokens, two rows at a time": (2, (1344, 5), Sizes(2, 2, 4), 2),
    "three tokens of four": (3, (576, 10), Sizes(4, 1, 4), 1),
    "eight tokens": (8, (512, 7), Sizes(4, 1, 2), 1),
    "one block of columns": (1, (64, 4), Sizes(4, 2, 4), 3),
}


KINDS = list(zip(LAYERS, DTYPES, strict=True))
EACH = [(name, *KINDS[index % 3]) for index, name in enumerate(PRODUCTS)]
"""A program takes a second to compile: the first case is tried in every type, others in one."""


@pytest.mark.parametrize(("name", "kind", "dtype"), EACH + [(next(iter(PRODUCTS)), *pair) for pair in KINDS[1:]])
def test_the_cuda_kernel_multiplies(compiled, kind, dtype, name):
    tokens, sides, sizes, processors = PRODUCTS[name]
    layer, x, add = layer_and_input(kind, dtype, tokens=tokens, sides=sides)
    most = 1 << (tokens - 1).bit_length()
    launch = launch_of(sides[1], sides[0], sizes, processors)
    program = compiled(cuda_nf4.product_options(dtype, layer.double, sides[0], most, sizes))
    padded = torch.cat([x, torch.full((most - tokens, sides[0]), float("nan")).to(dtype)])
    cases = [(bias, plus, wide) for bias in (False, True) for plus in (False, True) for wide in (False, True)]
    for index, (bias, plus, wide) in enumerate(cases if sides == (512, 51) else cases[-2:]):
        out = torch.empty(tokens, sides[1], dtype=torch.float32 if wide else dtype)
        given = add.to(out.dtype) if plus else None
        tensors = padded, *_tensors(layer.blocks), layer.bias if bias else None, given
        numbers = sides[1], tokens, launch.parts, launch.rounds, int(wide)
        found = run_program(
            program, tensors, out, numbers, blocks=launch.blocks, warps=launch.warps, falling=index % 2 == 1
        )
        wanted = x.double() @ layer.dense(torch.float64).T
        wanted = wanted if not bias else wanted + layer.bias.double()
        assert_near(found, wanted if given is None else wanted + given.double(), ROUNDING[out.dtype])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_the_cuda_kernel_expands_bit_for_bit(compiled, kind, dtype):
    layer, _, _ = layer_and_input(kind, dtype, sides=(1112, 19))
    wanted = nf4.dequantize(layer.blocks, dtype).view(-1)
    program = compiled(cuda_nf4.expansion_options(dtype, layer.double))
    for first, count in ((0, wanted.numel()), (1112, 4 * 1112), (8, 8), (wanted.numel() - 16, 16)):
        tensors = None, *_tensors(layer.blocks), None, None
        numbers = first // 8, count // 8
        found = run_program(program, tensors, wanted[:count], numbers, blocks=2, warps=3, falling=count == 8)
        assert torch.equal(found, wanted[first : first + count])


def test_a_weight_is_shared_out_over_a_gpu():
    for rows, width, processors in ((37888, 3584, 132), (3584, 18944, 132), (3584, 3584, 132), (5, 64, 46), (4, 64, 1)):
        for sizes in cuda_nf4.SIZES.values():
            launch = launch_of(rows, width, sizes, processors)
            tasks = -(-rows // sizes.rows)
            groups = launch.warps // launch.parts
            assert launch.warps <= sizes.warps
            assert launch.blocks <= min(processors, tasks)
            taken = [
                block + launch.blocks * (group + groups * step)
                for block in range(launch.blocks)
                for group in range(groups)
                for step in range(launch.rounds)
            ]
            assert set(range(tasks)) <= set(taken)
            assert len(taken) - tasks < launch.blocks * launch.rounds + launch.blocks


def test_what_the_cuda_kernels_do_not_take_is_left_to_others(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("NVRTC cannot compile a kernel:\nno such GPU")

    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_nf4.kernel_of.__wrapped__("expand", 0) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "build", fail)
    with pytest.warns(UserWarning, match=r"weights in 4 bits .* cannot be built here \(NVRTC .* no such GPU\)"):
        assert cuda_nf4.kernel_of.__wrapped__("expand", 0) is None
    used = []
    monkeypatch.setattr(cuda_nf4, "kernel_of", lambda *given: used.append(given))
    monkeypatch.setattr(cuda_nf4, "processors", lambda device: 132)
    for free, asked in ((227 << 10, 2), (64 << 10, 0)):
        monkeypatch.setattr(cuda_nf4, "room", lambda device, free=free: free)
        used.clear()
        layer, x, _ = layer_and_input(NF4Linear, torch.bfloat16, tokens=3)
        tensors = _tensors(layer.blocks)
        assert cuda_nf4.multiply(x, *tensors, layer.bias, None, dtype=torch.bfloat16) is None
        assert cuda_nf4.expand(*tensors, first=0, count=192, dtype=torch.float16) is None
        assert len(used) == asked
    used.clear()
    monkeypatch.setattr(cuda_nf4, "room", lambda device: 227 << 10)
    assert cuda_nf4.multiply(x, *tensors, layer.bias.float(), None, dtype=torch.bfloat16) is None
    assert cuda_nf4.multiply(x, *tensors, layer.bias, None, dtype=torch.float16) is None
    assert cuda_nf4.multiply(x.repeat(3, 1), *tensors, layer.bias, None, dtype=x.dtype) is None
    assert cuda_nf4.multiply(x, tensors[0][1:], *tensors[1:], layer.bias, None, dtype=x.dtype) is None
    assert cuda_nf4.expand(*tensors, first=4, count=192, dtype=torch.float16) is None
    assert not used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("sides", [(3584, 4608), (18944, 301), (192, 10)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_cuda_kernels_on_a_gpu_compute_what_torch_does(kind, dtype, sides, tokens):
    layer, x, add = layer_and_input(kind, dtype, tokens=tokens, sides=sides)
    wanted = exact(layer, x, add)
    there = layer.cuda()
    tensors = _tensors(there.blocks)
    found = cuda_nf4.multiply(x.cuda(), *tensors, there.bias, add.cuda(), dtype=dtype)
    assert_near(found.cpu(), wanted, ROUNDING[dtype])
    expanded = cuda_nf4.expand(*tensors, first=sides[0], count=3 * sides[0], dtype=dtype)
    assert torch.equal(expanded.view(3, -1), nf4.dequantize(there.blocks, dtype)[1:4])


def test_a_kernel_starts_early_where_it_is_asked_to(monkeypatch):
    seen = []

    class Driver:
        def __getattr__(self, name):
            return lambda *given: 0

        def cuLaunchKernelEx(self, launch, function, pointers, _):
            given = launch._obj
            seen.append(
                (list(given.size), given.stream, given.count, given.attributes[0].id, given.attributes[0].value)
            )
            return 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    kernel = nvrtc.Kernel(None, None, 0)
    kernel(None, 3, blocks=4, threads=64, shared=100, early=True)
    assert seen == [([4, 1, 1, 64, 1, 1, 100], 7, 1, 6, 1)]
