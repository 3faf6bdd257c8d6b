"""What is refused at the border of the library, in which words, and what help() says is accepted."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE, load_pipeline
from PIL import Image
from small_model import IMAGE_TOKENS, latents, packed_of, small_model, text, vit

from bagel import BagelPipeline
from bagel.checkpoint import Checkpoint, CheckpointError
from bagel.config import BagelConfig, ConfigError, DecoderConfig, VAEConfig, ViTConfig
from bagel.demo import CHECKPOINT as DEMO
from bagel.loading import choose_device
from bagel.memory import is_out_of_memory
from bagel.modeling import Bagel
from bagel.options import EDIT, TASKS, make_options
from bagel.packing import pack
from bagel.parameters import options_of

TINY = REFERENCE / "tiny" / "checkpoint"
SMALL = {"num_timesteps": 3, "progress": False, "height": 64, "width": 96}
IMAGE = Image.new("RGB", (64, 96), "red")


@pytest.fixture
def pipe() -> BagelPipeline:
    return load_pipeline("tiny")


# Inputs ----------------------------------------------------------------------------------------------------------

INPUTS = [
    (TypeError, r"got str '/x\.png'; open it with bagel\.open_image", lambda p: p.edit("/x.png", "blue")),
    (TypeError, r"got str 'photo\.jpg'; open it with", lambda p: p.understand(["photo.jpg"], "what?")),
    (TypeError, r"got PosixPath .*; open it with", lambda p: p.understand(Path("photo.jpg"), "what?")),
    (TypeError, r"got str 'b\.png'; open it with", lambda p: p.edit([IMAGE, ["b.png"]], ["a", "b"])),
    (TypeError, r"got str 'ab'; open it with", lambda p: p.edit("ab", ["a", "b"])),
    (TypeError, r"an image must be a PIL image, got None", lambda p: p.edit(None, "blue")),
    (TypeError, r"an image must be a PIL image, got None", lambda p: p.edit(None, ["blue"])),
    (TypeError, r"got ndarray ", lambda p: p.understand(np.zeros((4, 4, 3)), "what?")),
    (TypeError, r"instruction must be a text or a list of texts, got Image", lambda p: p.edit("blue", IMAGE)),
    (TypeError, r"question must be a text .*, got None", lambda p: p.understand(IMAGE, None)),
    (ValueError, r"no image to edit: give at least one", lambda p: p.edit([], "blue")),
    (ValueError, r"no image to edit", lambda p: p.edit([IMAGE, []], ["a", "b"])),
    (ValueError, r"2 texts needs 2 images .*, got 1", lambda p: p.edit(IMAGE, ["a", "b"])),
    (TypeError, r"inputs must be a list .*, got str 'hello'", lambda p: p.stream("hello")),
    (TypeError, r"inputs must be a list .*, got str 'hello'", lambda p: p.generate("hello")),
    (TypeError, r"inputs must be a list .*, got str 'hello'", lambda p: p.generate_batch(["hello"])),
    (TypeError, r"inputs must be a list .*, got None", lambda p: p.generate(None)),
    (ValueError, r"nothing to read", lambda p: p.stream([])),
    (
        TypeError,
        r"an input must be a text or a PIL image, got PosixPath .*; open it",
        lambda p: p.stream([Path("a")]),
    ),
    *[
        (TypeError, rf"prompt must be a text or a list of texts, got {said}", lambda p, v=value: p.text_to_image(v))
        for value, said in ((None, "None"), (3, "int 3"), (b"abc", "bytes b'abc'"), (["a", 3], "list"))
    ],
]


@pytest.mark.parametrize(("error", "message", "call"), INPUTS, ids=[str(i) for i in range(len(INPUTS))])
def test_a_wrong_input_is_refused_at_once_and_named(pipe, error, message, call):
    with pytest.raises(error, match=message):
        call(pipe)


def test_a_question_needs_no_image(pipe):
    wanted = pipe.generate(["what?"], output="text", max_new_tokens=3, seed=0)
    assert pipe.understand([], "what?", max_new_tokens=3, seed=0) == wanted
    assert pipe.understand([[]], ["what?"], max_new_tokens=3, seed=[0]) == [wanted]


# Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "option"),
    [(task, option) for task, (kind, _) in TASKS.items() for option in options_of(kind)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_option_has_a_checked_type_and_a_default_that_passes(task, option):
    needed = {option.needs: True} if option.needs else {}
    needed |= {"think": True} if "do_sample" in needed and task in ("text_to_image", "edit", "draw") else {}
    with pytest.raises(TypeError, match=f"^{option.name} must be .*, got object"):
        make_options(task, needed | {option.name: object()})
    assert getattr(TASKS[task][0](), option.name) == option.default


@pytest.mark.parametrize("name", ["height", "width"])
def test_a_side_of_zero_is_no_default(pipe, name):
    with pytest.raises(ValueError, match=f"{name} must be a positive multiple of 16, got 0"):
        pipe.text_to_image("a", **SMALL | {name: 0})


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), np.int64(3), np.uint8(3)])
def test_seeds_of_the_whole_range_and_of_numpy_work(pipe, seed):
    result = pipe.text_to_image("a", seed=seed, **SMALL)
    assert type(make_options("text_to_image", {"seed": seed}).seed) is int
    assert torch.equal(pipe.text_to_image("a", seed=int(seed), **SMALL).latents, result.latents)


# What help() says ------------------------------------------------------------------------------------------------

METHODS = [
    ("text_to_image", ["prompt"], ["text_to_image"]),
    ("edit", ["images", "instruction"], ["edit"]),
    ("understand", ["images", "question"], ["understand"]),
    ("stream", ["inputs"], ["understand"]),
    ("generate", ["inputs"], ["text_to_image", "edit", "understand"]),
    ("generate_batch", ["batch"], ["text_to_image", "edit", "understand"]),
    ("session", [], ["session"]),
]


@pytest.mark.parametrize(("method", "first", "tasks"), METHODS, ids=[method for method, *_ in METHODS])
def test_signature_and_help_show_every_option_with_its_default(pipe, method, first, tasks):
    function = getattr(BagelPipeline, method)
    parameters = inspect.signature(function).parameters
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["self", *first]
    shown = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in ("output", "preset")}
    assert list(shown) == list(dict.fromkeys(option.name for task in tasks for option in options_of(TASKS[task][0])))
    made = [make_options(task, {}) for task in reversed(tasks)]
    lines = [line.strip() for line in inspect.getdoc(function).splitlines()]
    for name, parameter in shown.items():
        assert parameter.default == [getattr(options, name) for options in made if hasattr(options, name)][-1]
        (line,) = [line for line in lines if line.startswith(f"{name} = ")]
        assert line.startswith(f"{name} = {parameter.default!r}: ")
        assert not line.endswith((": ", ": None"))
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert list(inspect.signature(getattr(pipe, method)).parameters) == list(parameters)[1:]


def test_signature_of_edit_has_guidance_of_its_own():
    shown = inspect.signature(BagelPipeline.edit).parameters
    assert {name: shown[name].default for name in EDIT} == EDIT
    assert shown["cfg_img_scale"].default == 2.0


def test_repr_tells_parts_size_and_place(pipe):
    held = sum(t.nbytes for module in (pipe.model, pipe.vae) for t in (*module.parameters(), *module.buffers()))
    assert repr(pipe) == (
        f"BagelPipeline(decoder, vision, generation, autoencoder; {held / 2**20:.1f} MiB of weights in float32, "
        "on cpu; attention SDPA())"
    )
    half = BagelPipeline.from_pretrained(TINY, device="cpu", dtype="bfloat16", visual_gen=False)
    assert repr(half).startswith("BagelPipeline(decoder, vision; ")
    assert "in bfloat16, on" in repr(half)


def test_repr_tells_how_weights_are_stored():
    small = BagelPipeline.from_pretrained(DEMO, device="cpu", quantize="nf4")
    dense = BagelPipeline.from_pretrained(DEMO, device="cpu")
    assert "of weights in float32 and nf4, on" in repr(small)
    size = [float(repr(pipe).partition("; ")[2].split()[0]) for pipe in (small, dense)]
    assert size[0] < 0.5 * size[1]


def test_latents_of_a_result_take_part_in_gradients(pipe):
    drawn = pipe.text_to_image("a", seed=1, **SMALL).latents
    weight = torch.ones((), requires_grad=True)
    (drawn * weight).sum().backward()
    assert weight.grad == drawn.sum()


# Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["foo", "mps", "meta", "cuda:99", 3.5])
def test_a_device_that_cannot_be_used_is_one_sentence(device):
    with pytest.raises(ValueError, match=r"^device=.*cpu") as caught:
        choose_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [3, None])
def test_a_source_of_another_type_is_named(source):
    with pytest.raises(TypeError, match=r"folder or a Hub id .*, got (int 3|NoneType None)"):
        BagelPipeline.from_pretrained(source, device="cpu")


def test_a_file_for_a_source_is_told_from_a_misspelt_id():
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is a file; name the folder that holds it"):
        BagelPipeline.from_pretrained(TINY / "ema.safetensors", device="cpu")


def test_verify_compares_checksums_before_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "c")
    BagelPipeline.from_pretrained(tmp_path / "c", device="cpu", verify=True)
    config = tmp_path / "c" / "config.json"
    config.write_text(config.read_text() + " ")
    BagelPipeline.from_pretrained(tmp_path / "c", device="cpu")
    with pytest.raises(CheckpointError, match=r"config\.json \(its content differs\)"):
        BagelPipeline.from_pretrained(tmp_path / "c", device="cpu", verify=True)
    with pytest.raises(CheckpointError, match=r"has no SHA256SUMS"):
        BagelPipeline.from_pretrained(TINY, device="cpu", verify=True)


def test_only_a_lack_of_memory_is_called_one(monkeypatch):
    checkpoint = Checkpoint.open(TINY)
    with torch.device("meta"):
        model = Bagel(checkpoint.config)

    def broken(*args, **options):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        checkpoint.load(model)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"))


@pytest.mark.parametrize("half", ["visual_gen", "visual_und"])
def test_a_missing_half_comes_with_a_way_out(half):
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu", **{half: False})
    with pytest.raises(ValueError, match=f"load a checkpoint that has it.* without {half}=False"):
        pipe.edit(IMAGE, "blue", num_timesteps=2)


# Configuration and model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (DecoderConfig, "num_attention_heads", 0),
        (DecoderConfig, "vocab_size", -1),
        (DecoderConfig, "hidden_size", 64.0),
        (ViTConfig, "patch_size", 0),
        (ViTConfig, "num_hidden_layers", True),
        (VAEConfig, "z_channels", "16"),
        (VAEConfig, "ch_mult", (1, 0)),
        (VAEConfig, "ch_mult", ()),
        (BagelConfig, "max_latent_size", 0),
    ],
)
def test_a_size_that_is_no_positive_whole_number_names_its_field(kind, name, value):
    with pytest.raises(ConfigError, match=f"{name} must"):
        kind(**{name: value})


@pytest.mark.parametrize("count", [1, 3])
def test_prefill_wants_a_context_for_each_sample(count):
    model = small_model()
    contexts = [model.new_context() for _ in range(count)]
    with pytest.raises(ValueError, match=f"2 packed samples need as many contexts, got {count}"):
        model.prefill(packed_of([text(3)], [vit(4)]), contexts)
    assert [context.length for context in contexts] == [0] * count


def test_latents_of_a_wrong_width_are_named():
    wide = latents(4)
    wide = type(wide)(torch.zeros(4, 21), wide.position_ids)
    with pytest.raises(ValueError, match=r"latents must have shape \(n, 20\), got \(4, 21\)"):
        small_model()(packed_of([wide]))
    with pytest.raises(ValueError, match="latents of one pack must have one width, got 20 and 21"):
        pack([[latents(4)], [wide]], image_tokens=IMAGE_TOKENS)
    with pytest.raises(ValueError, match=r"LatentImage: rows must have shape \(n, width\), got \(4, 2, 2\)"):
        pack([[type(wide)(torch.zeros(4, 2, 2), wide.position_ids)]], image_tokens=IMAGE_TOKENS)
