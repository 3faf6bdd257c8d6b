"""DFloat11 where it is used: what GPUs run, checked on a CPU, and layers that compute what dense ones do, bit for bit.

The CUDA kernel's own source is compiled for the CPU, threads being coroutines; the Triton kernel is interpreted where
Triton is there (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_model import small_config
from test_dfloat11 import ADVERSARIAL, normal, same
from torch import Tensor, nn

from bagel import Bagel
from bagel.formats import dfloat11
from bagel.formats.dfloat11 import Piece, cut, encode, limits_of
from bagel.kernels import Rows, cuda_dfloat11, expand_dfloat11, nvrtc
from bagel.modeling.linear import Linear, is_exact
from bagel.modeling.stored.dfloat11 import DFloat11Linear

RANGES = [(0, 1, 0, 1), (1 / 3, 1, 0, 1), (0, 1, 1 / 3, 1 / 2), (1 / 7, 8 / 9, 0.01, 0.98)]
"""Of the weights a piece, and of those what is expanded, in parts of the whole."""


def pieces_of(weights: Tensor):
    """Yield pieces of weights, ranges of them, and the weights that lie there."""
    unit, numel = encode([weights]), weights.numel()
    for first, last, low, high in RANGES:
        a, b = int(first * numel), int(last * numel)
        start, stop = int(low * (b - a)), int(high * (b - a))
        if start < stop:
            yield cut(unit, a, b), start, stop, weights.flatten()[a:b][start:stop]
    if numel > 100:
        yield cut(unit), 8, numel - numel % 8, weights.flatten()[8 : numel - numel % 8]


# Kernels --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The CUDA kernel's source as a program for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cuda")
    source = cuda_dfloat11.SOURCE.read_text()
    source = source.replace("extern __shared__ uint4 shared[];", "").replace("__shared__", "static")
    (folder / "kernel.cu").write_text(source)
    here = Path(__file__).parent
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        *cuda_dfloat11.options(),
        "-I",
        folder,
        "-I",
        here,
    ]
    subprocess.run([*command, here / "dfloat11_on_cpu.cpp", "-o", folder / "program"], check=True)
    return folder / "program"


def run_program(program: Path, piece: Piece, start: int, stop: int, *, blocks: int, falling: bool) -> Tensor:
    slots, shared = cuda_dfloat11.room(limits_of(piece))
    data = [part.contiguous().numpy().tobytes() for part in piece]
    numbers = (piece.luts.shape[0] - 1, start, stop, slots, blocks, falling, shared)
    head = struct.pack("13i", *map(len, data), *numbers)
    done = subprocess.run([program], input=head + b"".join(data), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = np.frombuffer(done.stdout, np.int16)
    assert not found[stop - start :].any(), "something was written behind the range"
    return torch.from_numpy(found[: stop - start].copy()).view(torch.bfloat16)


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_cuda_kernel_expands_every_range(program, name, falling):
    for piece, start, stop, wanted in pieces_of(ADVERSARIAL[name]):
        blocks = 1 + falling  # fewer than chunks: each takes several
        assert same(run_program(program, piece, start, stop, blocks=blocks, falling=falling), wanted), (start, stop)


@pytest.mark.parametrize("name", ["normal", "long codes", "a single exponent", "one weight"])
def test_the_triton_kernel_expands_every_range(name):
    pytest.importorskip("triton", reason="it comes with torch for CUDA")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    from bagel.kernels.triton_dfloat11 import expand_dfloat11 as expand

    for piece, start, stop, wanted in pieces_of(ADVERSARIAL[name][:200]):
        assert same(expand(piece, limits_of(piece), start=start, stop=stop), wanted), (start, stop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_kernels_on_a_gpu_expand_every_range(name):
    from bagel.kernels.triton_dfloat11 import expand_dfloat11 as by_triton

    for piece, start, stop, wanted in pieces_of(ADVERSARIAL[name]):
        there, limits = Piece(*(part.cuda() for part in piece)), limits_of(piece)
        assert cuda_dfloat11.kernel_of(0) is not None
        for expand in (cuda_dfloat11.expand_dfloat11, by_triton, expand_dfloat11):
            assert same(expand(there, limits, start=start, stop=stop).cpu(), wanted), (start, stop)


def test_without_a_gpu_no_kernel_is_built(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_dfloat11.kernel_of.__wrapped__(0) is None
    with pytest.raises(OSError, match="needs a build of torch for CUDA"):
        nvrtc._nvrtc.__wrapped__()


def test_a_kernel_that_cannot_be_built_is_told_once(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("NVRTC cannot compile a kernel:\nno such GPU")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "build", fail)
    with pytest.warns(UserWarning, match=r"cannot be built here \(NVRTC cannot compile a kernel: no such GPU\)"):
        assert cuda_dfloat11.kernel_of.__wrapped__(0) is None


def test_a_kernel_gets_its_arguments_and_asks_for_shared_memory_once(monkeypatch):
    calls, taken = [], []

    class Driver:
        def __getattr__(self, name):
            return lambda *given: calls.append((name, given)) or 0

        def cuLaunchKernel(self, function, *given):
            *size, _, pointers, _ = given
            kinds = (ctypes.c_void_p, ctypes.c_int)
            taken.append((size, [ctypes.cast(p, ctypes.POINTER(k))[0] for p, k in zip(pointers, kinds, strict=True)]))
            return 700 if size[0] == 13 else 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    kernel = nvrtc.Kernel(ctypes.c_void_p(1), ctypes.c_void_p(2), 0)
    x = torch.ones(3)
    for shared in (100, 50_000, 50_000, 60_000):
        kernel(x, -5, blocks=4, threads=32, shared=shared)
        assert taken[-1] == ([4, 1, 1, 32, 1, 1, shared], [x.data_ptr(), -5])
    asked = [given[2] for name, given in calls if name == "cuFuncSetAttribute"]
    assert asked == [50_000, 60_000]
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with error 700"):
        kernel(x, 1, blocks=13, threads=32)
    names = [name for name, _ in calls]
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 5


# Layers ---------------------------------------------------------------------------------------------------------------


def linear_of(inside: int, outside: int, *, bias: bool) -> Linear:
    linear = Linear(inside, outside, bias=bias).bfloat16().requires_grad_(False)
    linear.weight.copy_(normal(outside, inside))
    return linear


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_the_dense_one_does_bit_for_bit(bias, tokens):
    dense = linear_of(96, 160, bias=bias)
    layer, x, add = DFloat11Linear.of(dense), normal(tokens, 96, std=1), normal(tokens, 160, std=1)
    assert same(layer(x), dense(x))
    assert same(layer(x, add=add.clone()), dense(x, add=add.clone()))
    rows = Rows(x, torch.ones(tokens, 1), torch.float32)
    assert torch.equal(layer(rows), dense(rows))
    assert (layer.in_features, layer.out_features) == (96, 160)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_converts_its_weight_for_other_types(dtype):
    dense = linear_of(64, 48, bias=True)
    layer, wide, x = DFloat11Linear.of(dense), copy.deepcopy(dense).to(dtype), normal(3, 64, std=1).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer.to(dtype)(x), wide(x))
    assert torch.equal(layer.dense(dtype), dense.weight.to(dtype))


def test_a_layer_gives_rows_of_its_weight():
    dense = linear_of(130, 300, bias=False)
    layer = DFloat11Linear.of(dense)
    for rows in (None, slice(0, 300), slice(17, 18), slice(211, None), slice(5, 5), slice(9, 3)):
        wanted = dense.weight if rows is None else dense.weight[rows]
        assert same(layer.dense(rows=rows), wanted)
        assert layer.dense(rows=rows).shape == wanted.shape


def test_layers_own_what_they_hold_and_no_more():
    matrices = [normal(256, 256), normal(512, 128)]
    unit = encode(matrices)
    layers = [DFloat11Linear(cut(unit, 0, 65_536), 256), DFloat11Linear(cut(unit, 65_536), 512)]
    for layer, matrix in zip(layers, matrices, strict=True):
        assert same(layer.dense(), matrix)
        held = {name: buffer for name, buffer in layer.named_buffers() if name not in ("lookup", "luts")}
        assert set(held) == {"stream", "sign_mantissa", "positions", "gaps"}
        for buffer in held.values():
            assert buffer.untyped_storage().nbytes() == buffer.nbytes
        nbytes = sum(buffer.nbytes for buffer in held.values())
        assert nbytes < 1.45 * matrix.numel() + 2 * 4_500  # of bfloat16's 2; at both ends a chunk in part
    with pytest.raises(ValueError, match="65536 weights of DFloat11 are no matrix of 255 rows"):
        DFloat11Linear(cut(unit, 0, 65_536), 255)


def test_layers_of_other_types_are_refused():
    with pytest.raises(ValueError, match=r"holds bfloat16 weights, got torch\.float32"):
        DFloat11Linear.of(nn.Linear(8, 8))


@torch.no_grad()
def test_a_model_of_compressed_layers_computes_the_same():
    torch.manual_seed(0)
    dense = Bagel(small_config()).bfloat16().eval()
    for parameter in dense.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    model = copy.deepcopy(dense)
    found = [name for name, part in model.decoder.named_modules() if type(part) is Linear]
    for name in found:
        model.decoder.set_submodule(name, DFloat11Linear.of(model.decoder.get_submodule(name)))
    assert len(found) > 8
    assert is_exact(model)
    wanted, seen = {}, {}
    for into, part in ((wanted, dense), (seen, model)):
        for name, linear in part.decoder.named_modules():
            if name in found:
                linear.register_forward_hook(lambda _, __, out, into=into, name=name: into.setdefault(name, out))
        x = part.decoder.embed_tokens(torch.arange(9))
        for layer in part.decoder.layers:
            attention = layer.und.attention
            x = layer.und.mlp(attention.o_proj(attention.qkv_proj(x)[:, : attention.o_proj.in_features]), add=x)
        into["head"] = part.decoder.lm_head(x)
    assert wanted.keys() == seen.keys()
    for name, value in wanted.items():
        assert same(seen[name], value), name


@torch.no_grad()
def test_a_compiled_layer_computes_the_same():
    dense = linear_of(64, 48, bias=True)
    layer, x = DFloat11Linear.of(dense), normal(3, 64, std=1)
    assert same(torch.compile(layer, backend="eager", fullgraph=True)(x), dense(x))


def test_limits_leave_room_for_every_chunk_and_window():
    for weights in ADVERSARIAL.values():
        piece = cut(encode([weights]))
        limits, counts = limits_of(piece), np.diff(piece.positions.numpy())
        assert limits.chunk == counts.max()
        codes = dfloat11.decoding._Codes(piece)
        assert codes._windows(0, len(counts))[0].max() <= limits.window
