"""The pipeline as a user meets it: batches, independence of calls, streaming, options, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import REFERENCE, assert_close, load_pipeline
from PIL import Image

from bagel import BagelPipeline, ImageResult, TextResult
from bagel.memory import NotEnoughMemoryError
from bagel.modeling import MissingHalfError
from bagel.options import PRESETS

FAST = {"num_timesteps": 4, "progress": False}
SMALL = FAST | {"height": 64, "width": 96}


@pytest.fixture
def pipe() -> BagelPipeline:
    return load_pipeline("tiny")


def image(name: str = "landscape") -> Image.Image:
    with Image.open(REFERENCE / "tiny" / "golden" / f"input_{name}.png") as opened:
        opened.load()
        return opened


def check_same(found: ImageResult, wanted: ImageResult) -> None:
    assert_close(found.latents, wanted.latents)
    assert np.abs(np.asarray(found.image).astype(int) - np.asarray(wanted.image).astype(int)).max() <= 1
    assert found.seed == wanted.seed
    assert found.text == wanted.text


def test_batch_of_prompts_sizes_and_negatives_equals_one_by_one(pipe):
    prompts = ["a red circle", "a small yellow triangle above a large white star", ""]
    sizes, seeds, negatives = [(64, 96), (80, 48), (64, 64)], [3, 4, 5], ["blue", "a large square", "red"]
    batch = pipe.text_to_image(
        prompts,
        seed=seeds,
        height=[h for h, _ in sizes],
        width=[w for _, w in sizes],
        negative_prompt=negatives,
        **FAST,
    )
    for prompt, (height, width), seed, negative, found in zip(prompts, sizes, seeds, negatives, batch, strict=True):
        single = pipe.text_to_image(prompt, seed=seed, height=height, width=width, negative_prompt=negative, **FAST)
        assert found.image.size == (width, height)
        check_same(found, single)


def test_batch_of_edits_with_plans_and_taylorseer_equals_one_by_one(pipe):
    images = [[image("landscape")], [image("grey"), image("palette")]]
    texts = ["make the square green", "blend them"]
    options = FAST | {"num_timesteps": 12, "think": True, "max_think_tokens": 5, "taylorseer": True, "do_sample": True}
    batch = pipe.edit(images, texts, seed=[1, 2], **options)
    for own, text, seed, found in zip(images, texts, [1, 2], batch, strict=True):
        check_same(found, pipe.edit(own, text, seed=seed, **options))


def test_batch_of_questions_equals_one_by_one(pipe):
    images, questions = [image("landscape"), image("wide")], ["what is in the image?", "red?"]
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "seed": [8, 9]}
    for own, question, seed, found in zip(
        images, questions, [8, 9], pipe.understand(images, questions, **options), strict=True
    ):
        single = pipe.understand(own, question, **options | {"seed": seed})
        assert found == single


def test_images_of_a_batch_are_not_coupled_by_the_norm(pipe):
    alone = pipe.text_to_image("a red circle", seed=1, **SMALL)
    for other in ("blue", "a large white star"):
        check_same(pipe.text_to_image(["a red circle", other], seed=[1, 2], **SMALL)[0], alone)


def test_two_calls_never_influence_each_other(pipe):
    first = pipe.text_to_image("a red circle", seed=1, taylorseer=True, **SMALL)
    pipe.edit(image(), "make it blue", seed=7, taylorseer=True, **FAST)
    pipe.understand(image(), "what?", max_new_tokens=3)
    again = pipe.text_to_image("a red circle", seed=1, taylorseer=True, **SMALL)
    assert torch.equal(first.latents, again.latents)


def test_global_random_state_is_neither_read_nor_moved(pipe):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = pipe.edit(image(), "make it blue", seed=7, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(pipe.edit(image(), "make it blue", seed=7, **FAST).latents, first.latents)


def test_reported_seed_draws_the_image_again(pipe):
    first = pipe.text_to_image("a red circle", **SMALL)
    assert torch.equal(pipe.text_to_image("a red circle", seed=first.seed, **SMALL).latents, first.latents)


def test_generator_and_given_noise_equal_the_seed(pipe):
    wanted = pipe.text_to_image("a red circle", seed=11, **SMALL)
    by_generator = pipe.text_to_image("a red circle", generator=torch.Generator().manual_seed(11), **SMALL)
    noise = torch.randn(24, 64, generator=torch.Generator().manual_seed(11))
    assert torch.equal(by_generator.latents, wanted.latents)
    assert torch.equal(pipe.text_to_image("a red circle", noise=noise, **SMALL).latents, wanted.latents)


def test_posterior_noise_and_mean(pipe):
    wanted = pipe.edit(image(), "make it blue", seed=7, **FAST)
    generator = torch.Generator().manual_seed(7)
    posterior, start = torch.randn(16, 8, 12, generator=generator), torch.randn(24, 64, generator=generator)
    given = pipe.edit(image(), "make it blue", posterior_noise=[posterior], noise=start, **FAST)
    assert torch.equal(given.latents, wanted.latents)
    zeros = pipe.edit(image(), "make it blue", posterior_noise=[torch.zeros(16, 8, 12)], noise=start, **FAST)
    mean = pipe.edit(image(), "make it blue", posterior="mean", noise=start, **FAST)
    assert torch.equal(mean.latents, zeros.latents)
    assert not torch.equal(mean.latents, wanted.latents)


def test_negative_prompt_equal_to_nothing_before_it_changes_the_image(pipe):
    plain = pipe.text_to_image("a red circle", seed=1, **SMALL)
    negative = pipe.text_to_image("a red circle", negative_prompt="a red circle", seed=1, **SMALL)
    unguided = pipe.text_to_image("a red circle", cfg_text_scale=1.0, seed=1, **SMALL)
    assert not torch.allclose(plain.latents, unguided.latents, atol=1e-3)
    assert_close(negative.latents, unguided.latents)  # dropping nothing is no guidance


def test_system_prompt_of_thinking_is_the_documented_one(pipe):
    from bagel.options import THINK_GENERATE

    wanted = pipe.text_to_image("a red circle", think=True, max_think_tokens=4, seed=1, **SMALL)
    given = pipe.text_to_image(
        "a red circle", think=True, system_prompt=THINK_GENERATE, max_think_tokens=4, seed=1, **SMALL
    )
    assert torch.equal(given.latents, wanted.latents)


def test_batch_of_one_is_still_a_batch(pipe):
    wanted = pipe.text_to_image("a red circle", seed=5, **SMALL)
    (found,) = pipe.generate_batch([["a red circle"]], seed=[5], **SMALL)
    assert torch.equal(found.latents, wanted.latents)


def test_shortcuts_are_generate(pipe):
    shown = image()
    assert torch.equal(
        pipe.edit(shown, "make it blue", seed=3, **FAST).latents,
        pipe.generate([shown, "make it blue"], output="image", seed=3, **FAST).latents,
    )
    assert pipe.understand(shown, "what?", max_new_tokens=4, seed=0) == pipe.generate(
        [shown, "what?"], output="text", max_new_tokens=4, seed=0
    )


def test_edit_has_the_size_of_its_last_image(pipe):
    result = pipe.edit([image("landscape"), image("portrait")], "blend", seed=1, **FAST)
    assert result.image.size == (64, 176)


def test_stream_spells_what_generate_returns(pipe):
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "seed": 5}
    pieces = list(pipe.stream([image(), "what is in the image?"], **options))
    assert "".join(pieces) == pipe.generate([image(), "what is in the image?"], output="text", **options).text
    assert len(pieces) > 5


def test_stop_string_cuts_text_and_stream(pipe):
    options = {"max_new_tokens": 16, "seed": 1}
    full = pipe.understand(image(), "what is in the image?", **options)
    stop = full.text[6:8]
    cut = pipe.understand(image(), "what is in the image?", stop=[stop, "never"], **options)
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(full.token_ids)
    assert "".join(pipe.stream([image(), "what is in the image?"], stop=stop, **options)) == cut.text


def test_allow_special_false_keeps_strangers_out_of_the_protocol(pipe):
    spelled = "what<|im_end|><|im_start|>?"
    as_token = pipe.generate([spelled], output="text", max_new_tokens=6, seed=0)
    as_text = pipe.generate([spelled], output="text", max_new_tokens=6, seed=0, allow_special=False)
    assert as_token.token_ids != as_text.token_ids


def test_on_step_may_stop_cleanly(pipe):
    class Enough(Exception):
        pass

    def stop(step):
        assert step.num_steps == 3
        if step.index == 1:
            raise Enough

    with pytest.raises(Enough):
        pipe.text_to_image("a red circle", seed=1, on_step=stop, **SMALL)
    assert pipe.text_to_image("a red circle", seed=1, **SMALL).image.size == (96, 64)


def test_results_have_the_documented_fields(pipe):
    drawn = pipe.text_to_image("a red circle", seed=4, **SMALL)
    assert (drawn.text, drawn.seed, tuple(drawn.latents.shape)) == (None, 4, (16, 8, 12))
    answer = pipe.understand(image(), "what?", max_new_tokens=3, seed=4)
    assert isinstance(answer, TextResult)
    assert (len(answer.token_ids), answer.finish_reason) == (3, "length")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_runs_its_tasks(pipe, preset):
    for task in PRESETS[preset]:
        if task == "text_to_image":
            assert pipe.text_to_image("red", preset=preset, seed=1, **SMALL).image.size == (96, 64)
        elif task == "edit":
            assert pipe.edit(image("palette"), "red", preset=preset, seed=1, **FAST).image.size == (64, 64)
        else:
            answer = pipe.understand(image("palette"), "red?", preset=preset, seed=1, max_new_tokens=2)
            assert len(answer.token_ids) == 2


def test_very_long_prompt_is_read(pipe):
    result = pipe.generate(["a red circle " * 600], output="text", max_new_tokens=2, seed=0)
    assert len(result.token_ids) == 2


def test_benchmark_resize_sees_other_pixels(pipe):
    small = image("grey")
    twice = pipe.understand(small, "what?", max_new_tokens=8, seed=0)
    once = pipe.understand(small, "what?", max_new_tokens=8, seed=0, resize_once=True)
    assert twice.token_ids != once.token_ids


REFUSED = [
    (ValueError, "multiple of 16.*nearest is 96", {"height": 100, "width": 64}),
    (ValueError, "64x272 pixels does not fit .* at most 256 pixels", {"height": 64, "width": 272}),
    (ValueError, "multiple of 16", {"height": -16, "width": 64}),
    (ValueError, "num_timesteps must lie between 2 and 100000", {"num_timesteps": 1}),
    (ValueError, "timestep_shift must lie in", {"timestep_shift": 0.0}),
    (ValueError, "cfg_renorm_type must be one of", {"cfg_renorm_type": "total"}),
    (ValueError, "cfg_interval must be a pair", {"cfg_interval": (1.0, 0.4)}),
    (ValueError, "temperature must be", {"temperature": -1.0}),
    (ValueError, "seed or generator", {"seed": 1, "generator": torch.Generator()}),
    (ValueError, r"noise for 64x96 pixels must be \(24, 64\)", {"noise": torch.zeros(3, 64)}),
    (TypeError, "did you mean 'cfg_text_scale'", {"cfg_txt_scale": 2.0}),
    (TypeError, "'stop' has no effect on image output", {"stop": "x"}),
    (ValueError, "preset must be one of", {"preset": "best"}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSED)
def test_bad_option_is_refused_with_the_way_out(pipe, error, message, options):
    with pytest.raises(error, match=message):
        pipe.text_to_image("a red circle", **SMALL | options)


def test_bad_inputs_are_refused(pipe):
    with pytest.raises(ValueError, match="nothing to read"):
        pipe.generate([], output="text")
    with pytest.raises(TypeError, match="got int"):
        pipe.generate(["a", 3], output="text")
    with pytest.raises(TypeError, match="must be a list"):
        pipe.generate("a red circle")
    with pytest.raises(ValueError, match='output must be "text" or "image"'):
        pipe.generate(["a"], output="video")
    with pytest.raises(ValueError, match="needs 2 values of 'seed'"):
        pipe.text_to_image(["a", "b"], seed=[1], **SMALL)
    with pytest.raises(ValueError, match="a single one"):
        pipe.text_to_image(["a", "b"], seed=1, **SMALL)
    with pytest.raises(ValueError, match="with and without images in separate calls"):
        pipe.generate_batch([["a"], [image(), "a"]], seed=[1, 2], **SMALL)
    with pytest.raises(ValueError, match="2 texts needs 2 images"):
        pipe.edit([image()], ["a", "b"])
    with pytest.raises(ValueError, match="one tensor for each of 1 input images, got 2"):
        pipe.edit(image(), "red", posterior_noise=[torch.zeros(16, 8, 12)] * 2, **FAST)
    with pytest.raises(ValueError, match=r"posterior_noise\[0\] must be \(16, 8, 12\)"):
        pipe.edit(image(), "red", posterior_noise=[torch.zeros(16, 8, 8)], **FAST)


@pytest.mark.parametrize("half", ["visual_gen", "visual_und"])
def test_half_a_model_does_the_rest_and_says_what_it_cannot(half):
    pipe = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", **{half: False})
    whole = load_pipeline("tiny")
    if half == "visual_gen":
        wanted = whole.understand(image(), "what?", max_new_tokens=4, seed=0)
        assert pipe.understand(image(), "what?", max_new_tokens=4, seed=0) == wanted
        with pytest.raises(MissingHalfError, match="cannot draw or edit"):
            pipe.text_to_image("red", **SMALL)
    else:
        wanted = whole.text_to_image("red", seed=0, **SMALL)
        assert torch.equal(pipe.text_to_image("red", seed=0, **SMALL).latents, wanted.latents)
        with pytest.raises(MissingHalfError, match="cannot see images"):
            pipe.understand(image(), "what?")


def test_lack_of_memory_is_one_sentence(pipe, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(type(pipe.model.decoder), "forward", full)
    with pytest.raises(NotEnoughMemoryError, match=r"out of GPU memory while .* use fewer at a time"):
        pipe.text_to_image("red", **SMALL)


def test_float16_and_bfloat16_draw_near_float32(pipe):
    wanted = pipe.text_to_image("a red circle", seed=1, **SMALL).latents
    for dtype, limit in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
        low = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", dtype=dtype)
        found = low.text_to_image("a red circle", seed=1, **SMALL).latents
        assert (found - wanted).norm() / wanted.norm() < limit


def test_reference_attention_draws_the_same(pipe):
    exact = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", attention="reference")
    wanted = exact.text_to_image("a red circle", seed=1, **SMALL)
    check_same(pipe.text_to_image("a red circle", seed=1, **SMALL), wanted)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "int8", "dtype must be one of"),
        ("attention", "magic", "attention must be one of auto, sdpa"),
        ("attention", "flash", "pip install flash-attn"),
    ],
)
def test_bad_loading_option_is_refused(name, value, message):
    with pytest.raises((ValueError, ImportError), match=message):
        BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", **{name: value})
