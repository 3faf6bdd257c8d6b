"""Other devices than the one at hand: what is chosen for them, and that nothing is asked of them that they lack.

There is no such hardware here: functions of torch are replaced by stand-ins, and tensors without values (device "meta")
stand for those of a GPU that is not NVIDIA's.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # modes of dispatch load it, which must not happen while functions of torch.cuda are replaced
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.generation import drawing
from bagel.kernels import functions
from bagel.loading import choose_device, choose_dtype
from bagel.modeling import Bagel, attention, float8, sdpa
from bagel.modeling.attention import SDPA, Reference
from bagel.modeling.bagel import sincos_table
from bagel.vae import Autoencoder

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "bagel"


@pytest.fixture
def gpu(monkeypatch):
    """Returns what makes torch tell of GPUs with these compute capabilities; AMD's with `hip`."""
    caches = functions._kernels, functions._has_bfloat16, functions._has_matrix_units

    def choose(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        def capability(device=None):
            index = device if isinstance(device, int) else torch.device(device or "cuda").index
            return capabilities[index or 0]

        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "hip", hip)
        for cache in caches:
            cache.cache_clear()

    yield choose
    for cache in caches:
        cache.cache_clear()


# What is chosen -------------------------------------------------------------------------------------------------------

PASCAL, TURING, AMPERE, ADA, HOPPER = (6, 1), (7, 5), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("capability", "hip", "dtype"),
    [
        (PASCAL, None, torch.float16),
        (TURING, None, torch.float16),
        (AMPERE, None, torch.bfloat16),
        ((12, 0), None, torch.bfloat16),
        ((9, 0), "6.4", torch.bfloat16),
    ],
)
def test_the_type_of_a_gpu(gpu, capability, hip, dtype):
    gpu(capability, hip=hip)
    assert choose_dtype(None, torch.device("cuda")) == dtype


def test_the_type_is_that_of_the_gpu_asked_for_not_of_the_first(gpu):
    gpu(AMPERE, TURING)
    assert choose_dtype(None, torch.device("cuda:1")) == torch.float16
    assert choose_dtype(None, torch.device("cuda:0")) == torch.bfloat16


def test_the_type_of_other_devices():
    found = {name: choose_dtype(None, torch.device(name)) for name in ("cpu", "mps", "xpu")}
    assert found == {"cpu": torch.float32, "mps": torch.float16, "xpu": torch.bfloat16}


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_a_device_that_torch_has_no_module_for_is_one_sentence(device, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device != "mps")
    with pytest.raises(ValueError, match=r"sees (mps, )?cpu and \d CUDA GPU") as caught:
        choose_device(device)
    assert ("mps, cpu" in str(caught.value)) == (device != "mps")


@pytest.mark.parametrize(
    ("capability", "hip", "able"),
    [(TURING, None, False), ((8, 6), None, False), (ADA, None, True), (HOPPER, "6.4", False)],
)
def test_8_bit_floats_are_for_gpus_that_have_them(gpu, capability, hip, able):
    gpu(capability, hip=hip)
    assert float8.can_multiply(torch.device("cuda")) is able


@pytest.mark.parametrize(("device", "name"), [("cuda", "a GPU"), ("mps", "the device mps"), ("xpu", "the device xpu")])
def test_8_bit_floats_are_refused_elsewhere_in_one_sentence(gpu, device, name):
    gpu(TURING)
    linear = SimpleNamespace(weight=SimpleNamespace(device=torch.device(device)), in_features=16, out_features=16)
    with pytest.raises(ValueError, match=f"^{name} cannot multiply 8-bit floats of this format; .* int8 or nf4$"):
        float8.check(linear, "a")


# Kernels --------------------------------------------------------------------------------------------------------------


def on_gpu(dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(index=0))


@pytest.fixture
def tried(monkeypatch):
    """Stands for the kernels in Triton, and holds the types in which they were tried."""
    found = []
    module = SimpleNamespace(try_some=found.append, silu_mul="the kernel")
    monkeypatch.setattr(functions.importlib, "import_module", lambda name: module)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("capability", "hip"), [(TURING, None), (AMPERE, None), (HOPPER, "6.4")])
def test_kernels_are_tried_and_used_in_types_that_the_gpu_has(gpu, tried, capability, hip):
    gpu(capability, hip=hip)
    own = torch.float16 if capability == TURING else torch.bfloat16
    assert functions.find("silu_mul", on_gpu(torch.float16)) == "the kernel"
    assert functions.find("silu_mul", on_gpu(torch.bfloat16)) == ("the kernel" if own == torch.bfloat16 else None)
    assert tried == [own]


@torch.no_grad()
def test_kernels_are_not_built_for_gpus_that_triton_does_not_know(gpu, tried):
    gpu(PASCAL)
    with pytest.warns(UserWarning, match=r"Triton cannot build kernels here \(it needs .* 7\.0, got 6\.1\)"):
        assert functions.find("silu_mul", on_gpu(torch.float16)) is None
    assert tried == []


@pytest.mark.parametrize(
    ("capability", "hip", "able"), [(TURING, None, False), (AMPERE, None, True), (HOPPER, "6", False)]
)
def test_matrix_units_are_those_of_nvidia(gpu, capability, hip, able):
    gpu(capability, hip=hip)
    assert functions.has_matrix_units(on_gpu(torch.float16)) is able


FAKE_TRITON = """
import sys, types, torch
def module(name, **parts):
    sys.modules[name] = types.ModuleType(name)
    for part, value in parts.items():
        setattr(sys.modules[name], part, value)
    return sys.modules[name]
class Any(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None
language = sys.modules["triton.language"] = Any("triton.language")
language.constexpr = int
module("triton", jit=lambda function: function, language=language, cdiv=None, next_power_of_2=None)
"""


def test_triton_without_what_nvidia_has_alone_is_enough():
    code = f"""{FAKE_TRITON}
from bagel.kernels import triton_kernels, triton_rows
torch.version.cuda = None
assert triton_rows.early() == {{"EARLY": False}}
triton_rows.wait(False)
"""
    assert run_python(code) == ""


# Attention ------------------------------------------------------------------------------------------------------------


def heads(queries: int, keys: int, *, hq: int = 6, hkv: int = 2, batch: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = (queries, hq, 16), (keys, hkv, 16), (keys, hkv, 16)
    return [torch.randn(*([batch] if batch else []), *shape, generator=generator) for shape in shapes]


def rules(queries: int, keys: int) -> list[dict]:
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0] = True
    return [{}, {"causal": True}, {"mask": mask}]


CARDS = {
    "before Ampere, and masks or float32 on others": lambda q, k, *_: q.shape[1] == k.shape[1],
    "no kernel at all": lambda *_: False,
}
"""What torch has a kernel for."""


@pytest.mark.parametrize("scores", [2**27, 600])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("hkv", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (20, 50), (1, 41)])
def test_where_grouped_heads_have_no_kernel_results_are_the_same(monkeypatch, queries, keys, hkv, batch, card, scores):
    q, k, v = heads(queries, keys, hkv=hkv, batch=batch)
    for rule in rules(queries, keys):
        exact = SDPA()(q, k, v, **rule)
        with monkeypatch.context() as patch:
            patch.setattr(sdpa, "has_kernel", CARDS[card])
            patch.setattr(sdpa, "SCORES", scores)
            found = SDPA()(q, k, v, **rule)
        assert found.shape == exact.shape
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-6)


def test_gradients_are_the_same_where_grouped_heads_have_no_kernel(monkeypatch):
    found = []
    for card in (lambda *_: True, *CARDS.values()):
        monkeypatch.setattr(sdpa, "has_kernel", card)
        given = [x.requires_grad_() for x in heads(9, 12)]
        SDPA()(*given).square().sum().backward()
        found.append([x.grad for x in given])
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("card", CARDS)
def test_no_more_scores_are_asked_for_at_once_than_fit(monkeypatch, card):
    asked = []
    attend = F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        asked.append((tuple(q.shape), tuple(k.shape)))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)  # without groups: it fails for them

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(sdpa, "has_kernel", CARDS[card])
    monkeypatch.setattr(sdpa, "SCORES", 4096)
    SDPA()(*heads(100, 120))
    if card == "no kernel at all":  # 6 heads and 120 keys: 5 queries at a time
        assert asked == [((3, 2, 5, 16), (3, 2, 120, 16))] * 20
    else:
        assert asked == [((3, 2, 100, 16), (3, 2, 120, 16))]


def test_keys_of_a_single_sample_are_not_copied_for_all_heads():
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in heads(5, 7))
    spread = sdpa.spread(q, k, v)
    assert [x.data_ptr() for x in spread] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert [x.shape[:2] for x in spread] == [(3, 2)] * 3


def test_torch_is_asked_which_kernel_it_has_for_a_gpu(monkeypatch):
    def stand_in(device: str, kv: int) -> SimpleNamespace:
        return SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device), shape=(1, kv, 4, 16))

    asked = []

    def choose(q, k, v, mask, dropout, causal, *, enable_gqa):
        asked.append(enable_gqa)
        return (SDPBackend.MATH if enable_gqa else SDPBackend.EFFICIENT_ATTENTION).value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    for kv, there in ((2, False), (6, True)):
        assert sdpa.has_kernel(stand_in("cuda", 6), *[stand_in("cuda", kv)] * 2, None, False) is there
    assert asked == [True, False]
    for device, there in (("cpu", True), ("meta", True), ("mps", False), ("xpu", False)):
        assert sdpa.has_kernel(stand_in(device, 6), *[stand_in(device, 2)] * 2, None, False) is there
    assert len(asked) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernels", [[SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]], ids=len)
def test_a_gpu_with_fewer_kernels_holds_few_scores(monkeypatch, kernels, dtype):
    monkeypatch.setattr(attention, "KERNELS", kernels)  # what images are restricted to
    q, k, v = (x.to("cuda", dtype) for x in heads(4096, 8000, hq=28, hkv=4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = SDPA()(q, k, v)
    held = torch.cuda.max_memory_allocated() - before  # all scores would be 3.4 GiB in float32, twice
    assert held < (2**28 if len(kernels) > 1 else 2**31)
    exact = Reference()(q[:64], k, v)
    torch.testing.assert_close(found[:64], exact, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-5)


def test_the_definition_is_as_wide_as_the_device_allows():
    for device, wide in (("mps", "float"), ("cuda", "double"), ("cpu", "double")):
        x = SimpleNamespace(device=torch.device(device), float=lambda: "float", double=lambda: "double")
        assert attention._wide(x) == wide


# A GPU that is not NVIDIA's -------------------------------------------------------------------------------------------


class Apples(TorchDispatchMode):
    """Fails where a tensor of the device "meta" is asked for what Apple's GPUs lack."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_iter((out, args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tensors if x.is_meta]
        assert all(x.dtype not in (torch.float64, torch.bfloat16, torch.complex64) for x in made), func
        assert "pin_memory" not in func.name(), func
        assert not (made and kwargs.get("non_blocking")), func  # the source may be gone before it is copied
        return out


@pytest.fixture
def no_cuda(monkeypatch):
    """Fails where anything is asked of torch.cuda that other GPUs cannot answer."""

    def refuse(*_, **__):
        raise AssertionError("asked of torch.cuda")

    for name, value in vars(torch.cuda).items():
        if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in HARMLESS:
            monkeypatch.setattr(torch.cuda, name, refuse)


class Arrived(Exception):
    """All that is left is to decode an image, which reads its pixels."""


@pytest.fixture
def apple(no_cuda):
    """The built-in model in float16 without its values."""
    real = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    with torch.device("meta"):
        model, vae = Bagel(real.model.config).half(), Autoencoder(real.vae.config)
    return BagelPipeline(model.eval(), vae.eval(), real.tokenizer, attention="auto")


@pytest.mark.parametrize(
    ("task", "inputs", "given"),
    [
        ("text_to_image", ["a red circle"], {"negative_prompt": "blue"}),
        ("edit", [Image.new("RGB", (64, 64), "red"), "make it blue"], {"taylorseer": True}),
    ],
)
def test_drawing_asks_nothing_of_a_gpu_that_apples_lack(apple, monkeypatch, task, inputs, given):
    def decoded(vae, latents):
        assert latents.is_meta
        raise Arrived

    monkeypatch.setattr(drawing, "decoded", decoded)
    with Apples(), pytest.raises(Arrived):
        getattr(apple, task)(*inputs, num_timesteps=6, height=64, width=64, progress=False, **given)


def test_answering_asks_nothing_of_a_gpu_that_apples_lack(apple):
    with Apples(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # where tokens are read at last
        apple.understand(Image.new("RGB", (64, 64), "red"), "what color is it?", max_new_tokens=20, do_sample=True)


def test_fixed_tables_need_no_float64_of_the_device():
    with Apples(), torch.device("meta"):
        assert sincos_table(3, 8).is_meta


# Nothing is asked of CUDA without looking -----------------------------------------------------------------------------

HARMLESS = {"is_available", "device_count", "is_initialized"}
"""Functions of torch.cuda that answer everywhere."""
BEHIND = {
    "bagel/kernels/functions.py": {
        "let_compilers_use_kernels": "called by `compile_model` for a GPU",
    },
    "bagel/kernels/nvrtc.py": {
        "Kernel.__call__": "made by `build` only",
        "build": "called by `kernel_of`, which looks at torch.version.cuda",
        "_compile": "called by `build`",
    },
    "bagel/kernels/cuda_dfloat11.py": {
        "can_expand": "asks `kernel_of` first, and is called for a GPU",
        "expand_dfloat11": "called where `can_expand` allows it",
    },
    "bagel/kernels/cuda_nf4.py": {
        name: "called by `triton_nf4`, which is there for a GPU"
        for name in ("multiply", "room", "at_once", "processors")
    },
    "bagel/modeling/graphs.py": {
        "GraphMemory.capture": "called where `can_capture` allows it",
        "_captured": "called by `GraphMemory.capture`",
    },
    "bagel/modeling/decoding.py": {
        "DecodeStep._captured": "called where `can_capture` allows it",
        "has_room": "called by `take_step` behind `can_capture`",
    },
    "bagel/modeling/stored/scaled.py": {"_kernels_take": "called where `find` has found a kernel for a GPU"},
    "bagel/memory/host.py": {
        "lock_pages": "called where weights wait for a GPU of CUDA",
        "unlock_pages": "called with what `lock_pages` has locked",
    },
    "bagel/memory/movers.py": {
        f"GPUMover.{name}": "a mover that is chosen for GPUs of CUDA alone"
        for name in ("__init__", "start", "now", "wait", "finish")
    },
    "bagel/training/batch.py": {"FlatBatch.pin_memory": "called by a loader with pin_memory, for a GPU of CUDA alone"},
    "bagel/training/stream.py": {"Delivery.pin_memory": "called by a loader with pin_memory, for a GPU of CUDA alone"},
}
"""Functions that ask without looking themselves, with who has looked."""


def asks(function: ast.AST) -> bool:
    """Whether a function calls what only CUDA answers."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "pin_memory":
                return True
            if ast.unparse(node.func.value) == "torch.cuda" and node.func.attr not in HARMLESS:
                return True
    return False


def looks(function: ast.AST) -> bool:
    """Whether a function looks which device it has before it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and any(getattr(part, "value", "") == "cuda" for part in node.comparators):
            return True
        if isinstance(node, ast.Attribute) and (
            node.attr == "is_cuda" or ast.unparse(node).startswith("torch.version.")
        ):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.is_available":
            return True
    return False


def functions_of(tree: ast.Module) -> dict[str, ast.AST]:
    """Return the functions and methods of a module by name."""
    found = {}
    for node in tree.body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}" if part is not node else part.name] = part
    return found


def test_nothing_is_asked_of_cuda_without_looking_for_it():
    unseen = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        if file.name.startswith("triton_"):
            continue  # found by `find` alone
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [name for name, function in functions_of(tree).items() if asks(function) and not looks(function)]
        outside = [node for node in tree.body if not isinstance(node, ast.ClassDef | ast.FunctionDef) and asks(node)]
        assert not outside, f"{file}: torch.cuda is asked while importing"
        if names:
            unseen[file.relative_to(ROOT).as_posix()] = set(names)
    found = {(file, name) for file, names in unseen.items() for name in names}
    assert found <= {(file, name) for file, known in BEHIND.items() for name in known}


def test_what_asks_and_what_looks_is_seen_by_this_test():
    asking = "def f():\n    torch.cuda.synchronize()"
    assert asks(ast.parse(asking))
    assert asks(ast.parse("x.pin_memory()"))
    assert not asks(ast.parse("torch.cuda.is_available()"))
    assert not looks(ast.parse(asking))
    for guard in ('device.type == "cuda"', 'device.type != "cuda"', "x.is_cuda", "torch.version.hip is None"):
        assert looks(ast.parse(f"if {guard}:\n    torch.cuda.synchronize()"))


# Without a GPU, Triton, and all that is optional ----------------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


WITHOUT = """
import sys
BLOCKED = {"triton", "bitsandbytes", "gguf", "flash_attn", "fa3_fwd_interface", "cupy", "dfloat11"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, warnings
warnings.simplefilter("error")
assert not torch.cuda.is_available()
"""


def test_every_module_imports_without_a_gpu_and_without_triton():
    code = f"""{WITHOUT}
import importlib, pkgutil, bagel
missing = set()
for part in pkgutil.walk_packages(bagel.__path__, "bagel."):
    if part.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(part.name)
    except ModuleNotFoundError as error:
        assert error.name == "triton", error
        missing.add(part.name.rpartition(".")[2])
assert all(name.startswith("triton_") or name == "operators" for name in missing), missing
assert "operators" in missing
"""
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == ""


def test_everything_works_without_a_gpu_and_without_triton():
    code = f"""{WITHOUT}
import bagel
from bagel.demo import CHECKPOINT
from bagel.modeling.stored.quantize import quantize
for format in (None, "int8", "nf4"):
    pipe = bagel.load(CHECKPOINT)
    if format:
        assert quantize(pipe.model, format) > 0
    drawn = pipe.text_to_image("a large red circle in the center", seed=1, num_timesteps=12, progress=False)
    assert pipe.understand(drawn.image, "what color is the circle?").text == "red", format
    edited = pipe.edit(drawn.image, "paint the circle blue", seed=2, num_timesteps=12, progress=False)
    assert pipe.understand(edited.image, "what color is the circle?").text == "blue", format
    assert "cpu" in repr(pipe)
"""
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == ""
