"""What only a CUDA GPU shows: bfloat16 no worse than the official code's own, equal backends, loops without waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import REFERENCE, assert_close, golden_json
from test_parity_pipeline import load_case

from bagel import BagelPipeline
from bagel.answering import decode
from bagel.attention import attention
from bagel.contexts import Entry
from bagel.drawing import plan_flow
from bagel.options import make_options
from bagel.sampling import TextSampling, euler, next_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LISTED = golden_json("tiny", "official_bf16_error")["error"]
DRAWN = [name for name, case in golden_json("tiny", "cases")["cases"].items() if "num_timesteps" in case["args"]]


def bar(name: str) -> float:
    """The official code's error; for cases it does not list, 1.25 times the largest of the same task."""
    task = name.split("_")[0]
    return LISTED.get(name, 1.25 * max(error for other, error in LISTED.items() if other.startswith(task)))


def velocity_error(pipe: BagelPipeline, variant: str, name: str) -> float:
    """Relative error of the velocity over a case's evaluations, fed the float32 trajectory and posterior noise."""
    inputs, _, options, case, want = load_case(variant, name)
    noise = [value for key, value in sorted(want.items()) if key.startswith("posterior_noise")]
    task = "edit" if noise else "text_to_image"
    chosen = make_options(task, "image", options | {"posterior_noise": noise or None, "noise": want["init_noise0"]})
    (job,) = pipe._prepared([inputs], [chosen], "image")
    with torch.inference_mode():
        if chosen.think:
            pipe._prefill([job], [[Entry(pipe.parts.text(case["output_text"][0]), "plan")]])
        velocity, _ = plan_flow(pipe.parts, [job])
        found = [velocity([x.to(pipe.device)], index)[0] for index, x in enumerate(want["x_t"])]
    difference = torch.stack(found).float().cpu() - want["v_t"]
    return (difference.norm() / want["v_t"].norm()).item()


@pytest.fixture(scope="module")
def bf16_pipeline() -> BagelPipeline:
    return BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", DRAWN)
def test_bf16_error_is_at_most_the_official_one(bf16_pipeline, name):
    assert velocity_error(bf16_pipeline, "tiny", name) <= bar(name)


@pytest.mark.parametrize("name", ["t2i_global", "edit_text_channel", "t2i_taylorseer"])
def test_float32_on_the_gpu_follows_the_reference(name):
    pipe = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cuda", dtype=torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert velocity_error(pipe, "tiny", name) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_backends_agree_with_the_exact_reference(backend, causal, dtype):
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is optional")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, 128, device="cuda", dtype=dtype, generator=generator)
        for tokens, heads in ((190, 28), (517, 4), (517, 4))
    )
    exact = attention(q, k, v, causal=causal, backend="reference")
    unit = torch.finfo(dtype).eps
    assert_close(attention(q, k, v, causal=causal, backend=backend), exact, relative=2 * unit)


def test_float16_stays_finite_and_near_float32_on_the_gpu():
    pipe = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cuda", dtype=torch.float16)
    assert velocity_error(pipe, "tiny", "t2i_global") < LISTED["t2i_global"]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("given", [{}, {"taylorseer": True}, {"cfg_renorm_type": "channel"}])
def test_drawing_never_waits_for_the_gpu(bf16_pipeline, given):
    options = make_options("text_to_image", "image", {"height": 64, "width": 64, "num_timesteps": 12, **given})
    (job,) = bf16_pipeline._prepared([["a red circle"]], [options], "image")
    tokens = bf16_pipeline.parts.latent_cells(64, 64).shape[0]
    noise = torch.randn(tokens, bf16_pipeline.parts.model.config.patch_latent_dim, device="cuda")
    drawn = []
    for wait in (nullcontext, no_waiting):  # the first time what is made once may wait
        velocity, timesteps = plan_flow(bf16_pipeline.parts, [job])
        with wait():
            drawn += euler(velocity, [noise], timesteps)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], noise)


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [TextSampling(), TextSampling(do_sample=True, temperature=0.7, top_p=0.9)])
def test_decoding_waits_for_the_gpu_only_to_look(bf16_pipeline, sampling):
    parts, options = bf16_pipeline.parts, make_options("understand", "text", {})
    jobs = bf16_pipeline._prepared([["a red circle"], ["and a longer text"]], [options] * 2, "text")
    contexts, seeds = [job.contexts.full for job in jobs], (1, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    wanted = list(decode(parts, contexts, generators, sampling=sampling, max_new_tokens=12))[-1]
    forks = [context.fork() for context in contexts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ids, rows = torch.full((2,), parts.tokenizer.bos_id, device="cuda"), []
    for wait in (nullcontext, no_waiting):
        with wait():
            for _ in range(6):
                ids = next_tokens(parts.model.decode(ids, forks), sampling, generators)
                rows.append(ids)
    for answer, column in zip(wanted, torch.stack(rows).T.tolist(), strict=True):
        assert answer.ids
        assert column[: len(answer.ids)] == answer.ids
