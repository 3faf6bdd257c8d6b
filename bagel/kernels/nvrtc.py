"""Kernels from CUDA C++ source, built when first used by NVRTC, the compiler library that comes with torch.

For what Triton cannot say: threads that go different ways, and shared memory that they address as they like.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DYNAMIC_SHARED, CARVEOUT = 8, 9
"""Attributes of functions: bytes of shared memory that a block may have, and the percentage of it in the cache."""
EARLY = 6
"""Attribute of a launch: the kernel starts while the one before it ends, and waits for that itself."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """A kernel on one GPU; see `build`."""

    def __init__(self, function: ctypes.c_void_p, context: ctypes.c_void_p, device: int) -> None:
        self.function, self.context, self.device = function, context, device
        self.shared = 48 * 1024  # bytes that need not be asked for

    def __call__(
        self, *arguments: Tensor | int | None, blocks: int, threads: int, shared: int = 0, early: bool = False
    ) -> None:
        """Start the kernel on the current stream of its GPU.

        Args:
            arguments: tensors on the GPU, None for a null pointer, and what the kernel takes as `int`.
            blocks: how many.
            threads: of a block.
            shared: bytes of shared memory for a block, beside what the source declares with a size.
            early: start while the kernel before ends: the source waits for it where it has to (`griddepcontrol`).
        """
        driver = _driver()
        values = [
            ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p(None if x is None else x.data_ptr())
            for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        _check(driver.cuCtxPushCurrent_v2(self.context), "cuCtxPushCurrent")  # a new thread has none
        try:
            if shared > self.shared:
                _check(driver.cuFuncSetAttribute(self.function, DYNAMIC_SHARED, shared), "cuFuncSetAttribute")
                self.shared = shared
            size = (blocks, 1, 1, threads, 1, 1, shared)
            if early:
                attribute = _Attribute(id=EARLY, value=1)
                launch = _Launch((ctypes.c_uint * 7)(*size), stream, ctypes.pointer(attribute), 1)
                code = driver.cuLaunchKernelEx(ctypes.byref(launch), self.function, pointers, None)
                _check(code, "cuLaunchKernelEx")
            else:
                _check(driver.cuLaunchKernel(self.function, *size, stream, pointers, None), "cuLaunchKernel")
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def build(source: str, name: str, *, device: int, options: Sequence[str] = (), carveout: int = 100) -> Kernel:
    """Return a kernel by its name in a source (declared `extern "C"`), built for a GPU.

    Args:
        source: in CUDA C++.
        name: of the kernel.
        device: the GPU.
        options: for the compiler.
        carveout: the percentage of the cache of a multiprocessor that is wanted as shared memory.

    Raises:
        OSError: torch's copy of NVRTC, or the driver, is not found.
        RuntimeError: the source does not compile, or the GPU does not take it.
    """
    driver = _driver()
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # creates the context
        code = ctypes.create_string_buffer(_compile(source, device, options))
        module, function, context = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
        _check(driver.cuFuncSetAttribute(function, CARVEOUT, carveout), "cuFuncSetAttribute")
    return Kernel(function, context, device)


def _compile(source: str, device: int, options: Sequence[str]) -> bytes:
    """Return the machine code of a source for a GPU."""
    nvrtc = _nvrtc()
    major, minor = torch.cuda.get_device_capability(device)
    given = [option.encode() for option in (f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *options)]
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None),
        "nvrtcCreateProgram",
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        if failed:
            raise RuntimeError(
                f"NVRTC cannot compile a kernel: {_read(nvrtc, 'ProgramLog', program).decode().strip(chr(0))}"
            )
        return _read(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    data = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
    return data.raw


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with error {code}")


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    library.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    return library


@functools.cache
def _nvrtc() -> Any:
    """Return the NVRTC of the CUDA that torch was built with: from the packages beside torch, else wherever it is."""
    if torch.version.cuda is None:
        raise OSError("NVRTC needs a build of torch for CUDA")
    major = torch.version.cuda.partition(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(torch.__file__).parent / "lib"]
    folders += [
        lib for folder in (spec.submodule_search_locations or () if spec else ()) for lib in Path(folder).glob("*/lib")
    ]
    found = next((file for folder in folders if (file := folder / name).is_file()), name)
    return ctypes.CDLL(str(found))
