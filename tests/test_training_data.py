"""Readers of data files, mixing, first-fit packing to a budget, and streams that go on where they stood."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_world import CONFIG, SOURCES, Generated, tokenizer, toy_data, writing

from bagel.packing import LatentImage, Text, ViTImage
from bagel.training import BrokenRowError, Conversations, Editing, ItemMaker, TextItem, TextToImage
from bagel.training.__main__ import main, make_trainer
from bagel.training.stream import Stream, deliveries

MAKER = ItemMaker(CONFIG, tokenizer())


def png(color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def parquet(path: Path, columns: dict, *, rows_a_group: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
    return path


def caption_of(sample) -> str:
    return tokenizer().decode(sample[0].ids)


# Readers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [{"a": "red"}, ["red"], "red"])
def test_text_to_image_rows_are_a_caption_and_its_image(tmp_path, captions):
    parquet(tmp_path / "a.parquet", {"image": [png()], "captions": [json.dumps(captions)]})
    text, image = TextToImage(tmp_path, MAKER).sample(0, random.Random(0))
    assert tokenizer().decode(text.ids) == "red"
    assert (text.droppable, text.loss, image.loss) == (True, False, True)
    assert image.content.shape == (3, 8, 12)
    assert image.content[:, 0, 0].tolist() == [255, 0, 0]
    assert image.position_ids.tolist() == [0, 1, 2, 4, 5, 6]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    parquet(tmp_path / "a.parquet", {"image": [png()] * 5, "captions": [json.dumps(f"w{i}") for i in range(5)]})
    parquet(tmp_path / "b.parquet", {"image": [png()] * 4, "captions": [json.dumps(f"w{i}") for i in range(5, 9)]})
    reader = TextToImage(tmp_path, MAKER, seed=3)
    first, second = ([caption_of(reader.sample(e * 9 + i, random.Random(0))) for i in range(9)] for e in (0, 1))
    assert sorted(first) == sorted(second) == [f"w{i}" for i in range(9)]
    assert first != second
    assert caption_of(TextToImage(tmp_path, MAKER, seed=3).sample(11, random.Random(0))) == second[2]


def test_edits_are_conditions_instruction_and_target_in_turn(tmp_path):
    columns = {
        "image_list": [[png((255, 0, 0)), png((0, 255, 0)), png((0, 0, 255))]],
        "instruction_list": [[["green", "green"], ["blue"]]],
    }
    items = Editing(parquet(tmp_path / "a.parquet", columns), MAKER).sample(0, random.Random(0))
    shown = [(type(item).__name__, getattr(item, "loss", None), item.droppable) for item in items]
    once = [
        ("LatentItem", False, True),
        ("ViTItem", None, True),
        ("TextItem", False, True),
        ("LatentItem", True, False),
    ]
    assert shown == once * 2
    assert items[3].content[:, 0, 0].tolist() == items[4].content[:, 0, 0].tolist() == [0, 255, 0]
    assert tokenizer().decode(items[6].ids) == "blue"


def test_conversations_learn_what_gpt_says(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    talk = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"image": "one.png", "conversations": talk}) + "\n")
    items = Conversations(tmp_path / "talk.jsonl", MAKER).sample(0, random.Random(0))
    assert type(items[0]).__name__ == "ViTItem"
    texts = [(tokenizer().decode(item.ids), item.loss) for item in items[1:]]
    assert texts == [("what is it?", False), ("red", True), ("sure?", False), ("yes", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError: 'conversations'"),
        (json.dumps({"image": "no.png", "conversations": [{"from": "human", "value": "<image>"}]}), "no such file"),
        (json.dumps({"conversations": [{"from": "human", "value": "<image>"}]}), "more <image> than images"),
        (json.dumps({"image": "no.png", "conversations": []}), "no <image> stands for"),
        (json.dumps({"conversations": [{"from": "robot", "value": ""}]}), '"from" must be'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "talk.jsonl").write_text(line + "\n")
    with pytest.raises(BrokenRowError, match=message) as error:
        Conversations(tmp_path / "talk.jsonl", MAKER).sample(0, random.Random(0))
    assert "talk.jsonl line 1" in str(error.value)


def test_broken_rows_are_counted_and_named_and_the_others_used(tmp_path):
    images = [png(), b"no image", png(), None]
    captions = [json.dumps("w0"), json.dumps("w1"), "no json", json.dumps("w3")]
    parquet(tmp_path / "a.parquet", {"image": images, "captions": captions}, rows_a_group=4)
    data = toy_data({"files": TextToImage(tmp_path, MAKER)}, token_budget=30, streams=1)
    stream = Stream(data, 0)
    for _ in range(3):
        stream.next_batch()
    assert stream.broken["files"] == pytest.approx(stream.drawn * 3 / 4, abs=3)
    assert "a.parquet row group 0 row" in stream.state_dict()["examples"]["files"]


def test_a_source_with_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "talk.jsonl").write_text("{}\n")
    stream = Stream(toy_data({"talk": Conversations(tmp_path / "talk.jsonl", MAKER)}), 0)
    with pytest.raises(BrokenRowError, match=r"a thousand samples in a row cannot be used.*line 1"):
        stream.next_batch()


def test_missing_columns_and_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.parquet files"):
        TextToImage(tmp_path, MAKER)
    parquet(tmp_path / "a.parquet", {"image": [png()]})
    with pytest.raises(ValueError, match=r"lacks the columns \['captions'\]"):
        TextToImage(tmp_path, MAKER)


# Mixing and packing ---------------------------------------------------------------------------------------------------


def test_sources_are_drawn_by_their_weights():
    stream = Stream(toy_data(weights={"draw": 3.0, "name": 1.0, "repaint": 0.0}, token_budget=4000), 0)
    for _ in range(5):
        stream.next_batch()
    assert stream.used["repaint"] == 0
    assert stream.used["draw"] / stream.drawn == pytest.approx(0.75, abs=0.05)


def counted(length: int):
    return [TextItem(list(range(10, 8 + length)))]


def test_a_batch_is_packed_first_fit_with_those_that_waited_first():
    lengths = iter([5, 6, 4, 3, 8, 2, 2, 9, 9, 9, 9, 9, 9])
    data = toy_data({"texts": Generated(lambda rng: counted(next(lengths)))}, token_budget=10, streams=1, patience=2)
    stream = Stream(data, 0)
    assert stream.next_batch().packed.layout.lengths == (5, 4)  # 6 and then 3 wait
    assert stream.next_batch().packed.layout.lengths == (6, 3)  # 8 and 2 wait
    assert stream.next_batch().packed.layout.lengths == (8, 2)


def test_no_batch_is_over_budget_and_few_tokens_are_wasted():
    stream = Stream(toy_data(token_budget=200), 0)
    sizes = [stream.next_batch().tokens for _ in range(50)]
    assert max(sizes) <= 200
    assert sum(sizes) / len(sizes) > 190


def test_a_sample_over_the_budget_is_counted_and_named():
    data = toy_data({"texts": Generated(lambda rng: counted(rng.choice([4, 40])))}, token_budget=20)
    stream = Stream(data, 0)
    stream.next_batch()
    assert stream.broken["texts"] > 0
    assert "has 40 tokens; a batch takes 1 to 20" in stream.examples["texts"]


def test_tokens_are_counted_as_they_are_packed():
    data = toy_data()
    rng = random.Random(0)
    from bagel.training import build, collate

    for source in (*SOURCES.values(), Generated(writing)):
        segments = build(source.sample(0, rng), data.rules, rng)
        assert all(isinstance(segment, Text | ViTImage | LatentImage) for segment in segments)
        assert sum(segment.length for segment in segments) == collate([segments], image_tokens=(1, 2)).tokens


def fingerprint(batch) -> tuple:
    return tuple(batch.packed.text_ids.tolist()), tuple(batch.packed.timesteps.tolist())


def test_a_stream_goes_on_where_its_state_was_taken():
    data = toy_data(token_budget=90)
    stream = Stream(data, 1)
    for _ in range(3):
        stream.next_batch()
    state = json.loads(json.dumps(stream.state_dict()))
    want = [fingerprint(stream.next_batch()) for _ in range(4)]
    again = Stream(data, 1)
    again.load_state_dict(state)
    assert [fingerprint(again.next_batch()) for _ in range(4)] == want


def test_streams_see_different_samples():
    seen = Counter(fingerprint(Stream(toy_data(), index).next_batch()) for index in range(4))
    assert max(seen.values()) == 1


@pytest.mark.parametrize(("world_size", "workers", "done"), [(1, 2, 0), (1, 2, 3), (2, 0, 0), (2, 2, 2), (4, 0, 1)])
def test_the_order_of_batches_does_not_depend_on_who_makes_them(world_size, workers, done):
    data, count = toy_data(streams=4), 8
    everyone = deliveries(data, states={}, done=0)
    want = [next(everyone) for _ in range(count)]
    states = {one.stream: one.state for one in want[: done * world_size]}
    for rank in range(world_size):
        feed = deliveries(data, states=states, done=done, rank=rank, world_size=world_size, workers=workers)
        own = range(done * world_size + rank, count, world_size)
        assert [fingerprint(next(feed).batch.to("cpu")) for _ in own] == [
            fingerprint(want[number].batch.to("cpu")) for number in own
        ]


def test_streams_must_divide_among_processes_and_workers():
    with pytest.raises(ValueError, match="2 processes with 3 workers need a number of streams that is a multiple of 6"):
        deliveries(toy_data(streams=4), states={}, done=0, world_size=2, workers=3)


def test_weights_name_sources():
    with pytest.raises(ValueError, match=r"weights must name sources \(draw, name, repaint\), got \['drow'\]"):
        toy_data(weights={"drow": 1.0})


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_trains_a_checkpoint_on_files(tmp_path):
    from conftest import REFERENCE

    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"conversations": talk}) + "\n") * 3)
    parquet(tmp_path / "a.parquet", {"image": [png(size=(64, 64))], "captions": [json.dumps("red")]})
    run = {
        "model": str(REFERENCE / "tiny" / "checkpoint"),
        "data": {
            "token_budget": 100,
            "streams": 2,
            "sources": {
                "talk": {"kind": "conversations", "place": str(tmp_path / "talk.jsonl")},
                "draw": {"kind": "text_to_image", "place": str(tmp_path / "a.parquet"), "weight": 2},
            },
        },
        "train": {"steps": 2, "log_every": 1},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main([str(tmp_path / "run.json"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "0000002" / "ema.safetensors").is_file()
    run["train"]["steps"] = 3
    trainer = make_trainer(run, tmp_path / "out", device="cpu")
    assert trainer.done == 2


def test_the_command_names_a_kind_that_does_not_exist(tmp_path, capsys):
    from conftest import REFERENCE

    values = {"token_budget": 10, "sources": {"talk": {"kind": "talk"}}}
    run = {"model": str(REFERENCE / "tiny" / "checkpoint"), "data": values, "train": {"steps": 1}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "run.json"), "--out", str(tmp_path / "out")])
    assert "kind must be one of text_to_image, editing, conversations" in capsys.readouterr().err


def test_pixels_keep_their_bytes():
    image = Image.new("RGB", (12, 8), (7, 130, 251))
    item = MAKER.latent(image)
    assert item.content.dtype == torch.uint8
    assert item.content[:, 3, 3].tolist() == [7, 130, 251]
