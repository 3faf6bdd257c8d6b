"""The benchmark command: what it counts against figures known for the 7B, and its table and file on a small model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import REFERENCE
from small_model import small_config
from torch.utils.flop_counter import FlopCounterMode

from bagel import BAGEL_7B, BagelPipeline
from bagel.config import VAEConfig
from bagel.modeling import Bagel
from bagel.options import make_options
from benchmarks import floors
from benchmarks.__main__ import main
from benchmarks.bench import Bench
from benchmarks.floors import Phase, Tokens
from benchmarks.jobs import JOBS
from benchmarks.measure import Ceilings, Timing
from benchmarks.table import COLUMNS, Row, make_row, table
from benchmarks.weights import random_pipeline

LLM = BAGEL_7B.llm_config
TINY = REFERENCE / "tiny" / "checkpoint"
PROMPT = 40  # tokens of a short prompt
TERA = 1e12


def asked(task: str) -> list[int]:
    options = make_options(task, {})
    return [len(options.guide.branches(t)) for t in options.timesteps[:-1].tolist()]


def drawn(task: str, contexts: list[int]) -> list[Phase]:
    counted = floors.computed_branches(asked(task), taylorseer=False)
    return [
        dataclasses.replace(floors.evaluation(BAGEL_7B, 4096, [contexts[i] for i in due], 2), count=count)
        for due, count in counted.items()
    ]


def total(phases: list[Phase]) -> float:
    return sum(phase.flops * phase.count for phase in phases) / TERA


def test_one_expert_of_the_7b_has_6525_million_weights():
    assert floors.expert_weights(LLM) == 6_525_288_448


def test_a_token_of_the_7b_holds_57344_bytes_of_keys_and_values():
    assert floors.kv_bytes(LLM, 2) == 57_344


def test_an_evaluation_of_the_7b_is_60_tflop():
    linear = 2 * 4098 * floors.expert_weights(LLM) / TERA
    attention = floors.attention_flops(LLM, Tokens(und=2, gen=4096, start=PROMPT).pairs) / TERA
    assert (round(linear, 1), round(attention, 1)) == (53.5, 6.8)
    assert round(floors.evaluation(BAGEL_7B, 4096, [PROMPT], 2).flops / TERA, 1) == 60.3


def test_text_to_image_of_the_7b_is_90_forwards_and_5424_tflop():
    phases = drawn("text_to_image", [PROMPT, 0])
    assert sum(phase.forwards * phase.count for phase in phases) == 90
    assert total(phases) == pytest.approx(5424, abs=1.5)


def test_an_edit_of_the_7b_is_147_forwards_and_10476_tflop():
    shown = 4098 + 4902
    phases = [
        *drawn("edit", [shown + PROMPT, shown, PROMPT]),
        floors.forward(LLM, [Tokens(und=2, gen=4096)], 2, name="image"),
        floors.forward(LLM, [Tokens(und=4902, start=4098)], 2, name="patches"),
        floors.forward(LLM, [Tokens(und=PROMPT, start=s, causal=True) for s in (shown, 0)], 2, name="text"),
        floors.vision(BAGEL_7B.vit_config, LLM.hidden_size, 4900, 2),
        *(floors.autoencoding(VAEConfig(), 1024, 1024, 2, decode=decode) for decode in (False, True)),
    ]
    assert sum(phase.forwards * phase.count for phase in phases) == 147
    assert total(phases) == pytest.approx(10_476, abs=5)


def test_taylorseer_computes_36_of_90_forwards():
    counted = floors.computed_branches(asked("text_to_image"), taylorseer=True)
    assert sum(len(due) * count for due, count in counted.items()) == 36


def test_decoding_the_7b_reads_14_gb_a_token():
    phase = floors.decoding(LLM, [0], 1, 2)
    assert phase.bytes == 2 * (6_525_288_448 + 152_064 * 3584) + 57_344
    assert floors.decoding(LLM, [100], 3, 2).bytes == phase.bytes + (100 + 1) * 57_344


@pytest.mark.parametrize(("height", "width"), [(128, 128), (192, 192), (80, 208), (176, 112)])
def test_a_counted_evaluation_is_what_the_model_multiplies_whatever_the_size(height, width):
    pipe = BagelPipeline.from_pretrained(TINY, device="cpu", attention="reference")  # its products are all counted
    session = pipe.session().read("a red circle")
    velocity = session.velocity(height=height, width=width)
    noise = velocity.noise()
    with FlopCounterMode(display=False) as counter:
        velocity(noise, 1.0)
    phase = floors.evaluation(pipe.model.config, len(noise), [session.contexts.full.length, 0], 4)
    assert counter.get_total_flops() == phase.flops


def test_counted_vision_is_what_the_encoder_multiplies():
    config = small_config()
    with torch.device("meta"):  # where attention is no fused kernel, so that the counter sees it
        model, patches, cells = Bagel(config), torch.empty(9, 12), torch.zeros(9, dtype=torch.long)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.embed_patches(patches, cells, (9,))
    assert config.vit_config is not None
    assert counter.get_total_flops() == floors.vision(config.vit_config, 48, 9, 4).flops


def test_the_floor_of_a_job_takes_the_slower_ceiling_of_each_phase():
    work = [Phase("computes", flops=30, bytes=10, count=2, forwards=3), Phase("reads", flops=10, bytes=80)]
    timing = Timing(first=9.0, repeats=(5.0, 4.0, 8.0), calls=1)
    row = make_row("job", "sizes", timing, work, Ceilings(matmul=10, copy=20), peak=2**30)
    assert row.floor == 2 * 3 + 4
    assert (row.last, row.median, row.spread, row.forwards) == (8.0, 5.0, 0.8, 6)
    assert (row.bound, row.matmul_share, row.copy_share) == ("matmul", 7 / 8, 5 / 8)
    assert (row.tflop, row.gb, row.peak_gib) == (70 / TERA, 100 / 1e9, 1.0)


def test_a_random_model_never_ends_a_text():
    pipe = random_pipeline(small_config(visual_gen=False), device="cpu", tokenizer=TINY)
    answer = pipe.generate(["a red circle"], output="text", max_new_tokens=12)
    assert (len(answer.token_ids), answer.finish_reason) == (12, "length")


def test_every_job_counts_forwards_as_long_as_it_writes_or_draws():
    bench = Bench(BagelPipeline.from_pretrained(TINY, device="cpu"), quick=True)
    forwards = {}
    for name in ("t2i-512-20-x4", "decode-8", "vit-980"):
        job = JOBS[name](bench, name)
        forwards[name] = sum(phase.forwards * phase.count for phase in job.work(job.run()))
    # Seven evaluations, of which six are at t > 0.4.
    assert forwards == {"t2i-512-20-x4": 4 * (7 + 6), "decode-8": 4, "vit-980": 0}


def test_command_prints_a_table_and_writes_it_down(tmp_path, capsys):
    result = tmp_path / "result.json"
    command = ["--model", str(TINY), "--device", "cpu", "--quick", "--repeat", "2", "--json", str(result)]
    main([*command, "--jobs", "edit-1024-50", "understand-1024", "--profile"])
    printed = capsys.readouterr().out
    heading = next(line for line in printed.splitlines() if line.startswith("job"))
    assert heading.split("sizes")[0].split() == " ".join(name for name, _ in COLUMNS).split()
    for stage in ("prefill", "vae encode", "vae decode", "decode", "evaluation, 3 branches", "the rest"):
        assert f"\n  {stage} " in printed, stage
    written = json.loads(result.read_text())
    edit, understand = written["rows"]
    assert {field.name for field in dataclasses.fields(Row)} == set(edit)
    assert (edit["job"], edit["forwards"], len(edit["repeats"])) == ("edit-1024-50", 21, 2)
    assert edit["last"] == edit["repeats"][-1] > 0 < edit["floor"]
    assert understand["first_token"] > 0
    assert written["machine"]["dtype"] == "float32"
    assert written["ceilings"]["matmul"] > 0 < written["ceilings"]["copy"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    main([*command[:-2], "--jobs", "edit-1024-50", "--against", str(result)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("edit-1024-50"))
    assert f" {edit['last']:.3g} " in line


def test_switches_are_used_and_written_down(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(BagelPipeline, "use_float8", lambda pipe, **given: used.append(given))
    monkeypatch.setattr(BagelPipeline, "compile", lambda pipe: used.append("compile"))
    command = ["--model", str(TINY), "--device", "cpu", "--quick", "--repeat", "1", "--jobs", "vae-decode-1024"]
    main([*command, "--float8", "all", "--compile", "--json", str(tmp_path / "result.json")])
    machine = json.loads((tmp_path / "result.json").read_text())["machine"]
    assert used == [{"und": True}, "compile"]
    assert machine["float8"] == "all"
    assert machine["compile_s"] >= 0


def test_an_earlier_result_twice_as_slow_is_named_so():
    work, ceilings = [Phase("all", flops=1, bytes=1)], Ceilings(matmul=1, copy=1)
    row = make_row("job", "sizes", Timing(1.0, (2.0,), 1), work, ceilings, peak=None)
    (_, line) = table([row], {"job": {"last": 4.0}}).splitlines()
    assert line.split()[-3:] == ["4", "2.00x", "sizes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--jobs", "sing"], "invalid choice: 'sing'"),
        (["--against", "nowhere.json"], "nowhere.json is no earlier result"),
        (["--json", "no/folder/out.json"], "there is no folder no/folder"),
        (["--repeat", "0"], "must be at least 1, got 0"),
    ],
)
def test_command_refuses_what_it_cannot_do(arguments, told, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err
