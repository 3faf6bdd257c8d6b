"""The command `bagel`, run as a user would on the small reference model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import REFERENCE
from PIL import Image

from bagel import BagelPipeline, NotEnoughMemoryError, Session
from bagel.cli import main
from bagel.cli.answers import Chat
from bagel.demo import CHECKPOINT
from bagel.options import make_options
from bagel.png import read_info, save_numbered_png, save_png

ROOT = Path(__file__).parents[1]
TINY = REFERENCE / "tiny" / "checkpoint"
IMAGE = REFERENCE / "tiny" / "golden" / "input_landscape.png"
SMALL = ("--model", str(TINY), "--device", "cpu", "--height", "64", "--width", "96", "--steps", "3")
SHORT = ("--model", str(TINY), "--device", "cpu", "--max-new-tokens", "5")
GREEN = Image.new("RGB", (4, 3), "green")


@pytest.fixture(scope="module")
def pipe() -> BagelPipeline:
    return BagelPipeline.from_pretrained(TINY, device="cpu")


@pytest.fixture(autouse=True)
def _loaded_once(pipe, monkeypatch, request):
    """Loading is tested elsewhere; here every command but those that ask for it gets the same model."""
    if "real_loading" not in request.keywords:
        monkeypatch.setattr(BagelPipeline, "from_pretrained", lambda *_, **__: pipe)


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def exit_code(*argv: str | Path) -> int:
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as left:
        return int(left.code or 0)


# Help and exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "text-to-image", "edit", "understand", "chat", "inspect", "evaluate", "demo"])
def test_help_shows_examples(command, capsys):
    assert exit_code(*filter(None, [command]), "--help") == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert f"bagel {command}".strip() in printed


@pytest.mark.parametrize("flag", ["--no-exif", "--resize-once", "--posterior"])
def test_flags_about_input_images_are_those_of_commands_that_read_images(flag, capsys):
    commands = {
        "text-to-image": False,
        "edit": True,
        "understand": flag != "--posterior",
        "chat": flag != "--posterior",
    }
    for command, has in commands.items():
        assert exit_code(command, "--help") == 0
        assert (f"{flag} " in capsys.readouterr().out) == has


def test_version_names_the_distribution(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith("bagel-mot 0.")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "COMMAND"),
        (("text-to-image",), "give a prompt"),
        (("text-to-image", "a", "b", *SMALL, "-o", "one.png"), "2 images need a folder"),
        (("text-to-image", "a", *SMALL, "-o", "one.jpg"), "write one.png"),
        (("text-to-image", "a", *SMALL, "--preset", "nothing"), "preset must be one of"),
        (("text-to-image", "a", *SMALL, "--preset", "gedit"), "is for edit"),
        (("text-to-image", "a", *SMALL, "--cfg-renorm-type", "all"), "cfg_renorm_type must be one of"),
        (("text-to-image", "a", *SMALL, "--dtype", "float8"), "dtype must be one of"),
        (("text-to-image", "a", *SMALL, "--batch-size", "0"), "at least 1"),
        (("text-to-image", "a", *SMALL, "--device", "warp"), "device='warp' cannot be used"),
        (("text-to-image", "--prompts-file", IMAGE, *SMALL), "input_landscape.png is no text in UTF-8"),
        (("edit", IMAGE), "--instruction"),
        (("understand", IMAGE, "--question", "what?", "--stream", "--json"), "not allowed with"),
    ],
)
def test_a_command_that_cannot_be_meant_exits_with_2(argv, says, capsys):
    assert exit_code(*argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("edit", "none.png", "--instruction", "x", *SMALL), "none.png: there is no such file"),
        (("understand", "none.png", "--question", "x", *SHORT), "none.png: there is no such file"),
        (("text-to-image", "--prompts-file", "none.txt", *SMALL), "none.txt: No such file or directory"),
        (("text-to-image", "a", *SMALL, "--height", "65"), "multiple of 16"),
        (("text-to-image", "--prompts-file", ".", *SMALL), ".: Is a directory"),
        (("inspect", "nowhere"), "nowhere does not exist; check its spelling, or fetch a checkpoint: hf download"),
    ],
)
def test_a_failure_is_one_sentence_and_exit_code_1(argv, says, capsys):
    assert exit_code(*argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bagel: ")
    assert says in error
    assert "Error" not in error


def test_debug_raises_what_went_wrong(capsys):
    with pytest.raises(ValueError, match=r"none\.png"):
        main(["edit", "none.png", "--instruction", "x", *SMALL, "--debug"])


def test_an_unexpected_failure_names_its_kind(monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("lost")

    monkeypatch.setattr(BagelPipeline, "text_to_image", broken)
    assert exit_code("text-to-image", "a", *SMALL) == 1
    assert "KeyError: 'lost' (--debug shows where)" in capsys.readouterr().err


# Drawing ---------------------------------------------------------------------------------------------------------


def test_text_to_image_draws_what_the_pipeline_draws(pipe, capsys):
    assert exit_code("text-to-image", "a red circle", "-o", "circle.png", "--seed", "7", *SMALL) == 0
    assert capsys.readouterr().out == "circle.png\n"
    wanted = pipe.text_to_image("a red circle", seed=7, height=64, width=96, num_timesteps=3).image
    with Image.open("circle.png") as image:
        assert image.tobytes() == wanted.tobytes()


def test_images_carry_prompt_seed_and_settings():
    given = ("--seed", "7", "--cfg-interval", "0.1", "0.9", "--negative-prompt", "grün ☃", "--taylorseer")
    assert exit_code("text-to-image", "ein roter Kreis ☃", "-o", "circle.png", *given, *SMALL) == 0
    info = read_info("circle.png")
    assert info["prompt"] == "ein roter Kreis ☃"
    assert info["seed"] == "7"
    assert info["software"].startswith("bagel-mot ")
    wanted = {
        "task": "text-to-image",
        "model": "checkpoint",
        "seed": 7,
        "height": 64,
        "width": 96,
        "num_timesteps": 3,
        "cfg_text_scale": 4.0,
        "cfg_interval": [0.1, 0.9],
        "negative_prompt": "grün ☃",
        "taylorseer": True,
    }
    assert wanted.items() <= json.loads(info["parameters"]).items()


def test_the_recorded_seed_draws_the_same_image_again():
    assert exit_code("text-to-image", "a", "-o", "one.png", *SMALL) == 0
    assert exit_code("text-to-image", "a", "-o", "two.png", "--seed", read_info("one.png")["seed"], *SMALL) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_a_plan_is_told_and_kept(capsys):
    assert exit_code("text-to-image", "a", "-o", "a.png", "--think", "--max-think-tokens", "4", *SMALL) == 0
    printed = capsys.readouterr()
    assert printed.out == "a.png\n"
    assert f"plan: {read_info('a.png')['plan']}" in printed.err


def test_prompts_from_a_file_are_drawn_in_order_with_seeds_that_count_up(capsys):
    Path("prompts.txt").write_text("first\n\n  second ☃ \r\nthird\n", encoding="utf-8")
    options = ("--prompts-file", "prompts.txt", "--seed", "5", "--batch-size", "2", "--json", "-o", "new/folder")
    assert exit_code("text-to-image", "zeroth", *options, *SMALL) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["zeroth", "first", "second ☃", "third"]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8]
    assert [row["path"] for row in rows] == [str(Path("new/folder") / f"bagel-000{n}.png") for n in range(1, 5)]
    assert [read_info(row["path"])["prompt"] for row in rows] == [row["prompt"] for row in rows]


def test_an_option_before_the_prompt_does_not_swallow_it(capsys):
    assert exit_code("text-to-image", *SMALL, "--seed", "1", "a", "b") == 0
    assert capsys.readouterr().out.split() == ["bagel-0001.png", "bagel-0002.png"]


def test_a_preset_is_used_under_what_is_typed():
    assert exit_code("text-to-image", "a", "-o", "a.png", "--preset", "draft", *SMALL) == 0
    parameters = json.loads(read_info("a.png")["parameters"])
    assert parameters["cfg_interval"] == [0.6, 1.0]
    assert parameters["num_timesteps"] == 3


def test_edit_draws_what_the_pipeline_draws(pipe):
    options = ("--instruction", "make it blue", "--seed", "3", "--model", TINY, "--steps", "3", "-o", "blue.png")
    assert exit_code("edit", IMAGE, *options) == 0
    with Image.open(IMAGE) as image, Image.open("blue.png") as found:
        wanted = pipe.edit(image, "make it blue", seed=3, num_timesteps=3).image
        assert found.tobytes() == wanted.tobytes()
    assert json.loads(read_info("blue.png")["parameters"])["inputs"] == [IMAGE.name]


def test_an_input_is_turned_upright_unless_told_otherwise():
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("RGB", (96, 64), "green").save("turned.jpg", exif=exif)
    for option, is_wide in (((), False), (("--no-exif",), True)):
        options = ("--instruction", "make it blue", "--model", TINY, "--steps", "2", "-o", "out.png", "--force")
        assert exit_code("edit", "turned.jpg", *options, *option) == 0
        with Image.open("out.png") as image:
            assert (image.width > image.height) == is_wide


# Files -----------------------------------------------------------------------------------------------------------


def test_an_existing_image_is_kept_before_anything_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr(BagelPipeline, "text_to_image", lambda *_, **__: pytest.fail("it drew"))
    Path("mine.png").write_text("precious")
    assert exit_code("text-to-image", "a", "-o", "mine.png", *SMALL) == 1
    assert "mine.png exists" in capsys.readouterr().err
    assert Path("mine.png").read_text() == "precious"


@pytest.mark.real_loading
def test_a_command_that_fails_leaves_no_folder(capsys):
    assert exit_code("text-to-image", "a", "--model", "no-such-folder/", "-o", "new/folder/") == 1
    assert exit_code("text-to-image", "a", *SMALL, "--height", "65", "-o", "new/folder/") == 1
    assert os.listdir() == []


def test_a_place_that_can_hold_no_images_is_refused_before_anything_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr(BagelPipeline, "text_to_image", lambda *_, **__: pytest.fail("it drew"))
    Path("file").touch()
    assert exit_code("text-to-image", "a", "-o", "file/folder/", *SMALL) == 1
    assert "file is no folder that may be written to" in capsys.readouterr().err


def test_force_replaces_an_existing_image():
    Path("mine.png").write_text("old")
    assert exit_code("text-to-image", "a", "-o", "mine.png", "--force", *SMALL) == 0
    assert read_info("mine.png")["prompt"] == "a"


def test_an_image_that_appears_while_drawing_is_kept():
    Path("late.png").write_text("precious")
    with pytest.raises(FileExistsError):
        save_png(GREEN, "late.png", {})
    assert Path("late.png").read_text() == "precious"
    assert os.listdir() == ["late.png"]


def test_numbers_go_on_after_the_highest():
    for name in ("bagel-0002.png", "bagel-0010.png", "bagel-x.png", "other-0099.png"):
        Path(name).touch()
    assert save_numbered_png(GREEN, ".", "bagel", {}) == Path("bagel-0011.png")


def test_a_number_is_never_given_twice():
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(save_numbered_png(GREEN, ".", "bagel", {}))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, paths)) == sorted(os.listdir()) == [f"bagel-000{n}.png" for n in range(1, 9)]


def test_a_save_that_is_interrupted_leaves_no_file(monkeypatch, capsys):
    def interrupted(self, file, **_):
        file.write(b"half an image")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert exit_code("text-to-image", "a", "-o", "a.png", *SMALL) == 130
    assert "bagel: stopped" in capsys.readouterr().err
    assert os.listdir() == []


def test_ctrl_c_while_drawing_leaves_no_file():
    code = f"""
import sys
import bagel.cli
from bagel.modeling import Denoiser
states = Denoiser.states
def announced(*args):
    Denoiser.states = states
    print("drawing", flush=True)
    return states(*args)
Denoiser.states = announced
sys.exit(bagel.cli.main(["text-to-image", "a", "-o", "a.png", "--model", {str(TINY)!r}, "--steps", "100000"]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "drawing\n"
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, "")
    assert error.splitlines()[-1] == "bagel: stopped"
    assert "Traceback" not in error
    assert os.listdir() == []


# Answers ---------------------------------------------------------------------------------------------------------


def test_understand_prints_the_answer(pipe, capsys):
    assert exit_code("understand", IMAGE, "--question", "what?", *SHORT) == 0
    with Image.open(IMAGE) as image:
        assert capsys.readouterr().out == pipe.understand(image, "what?", max_new_tokens=5).text + "\n"


def test_a_streamed_answer_is_the_same(capsys):
    assert exit_code("understand", IMAGE, "--question", "what?", *SHORT) == 0
    whole = capsys.readouterr().out
    assert exit_code("understand", IMAGE, "--question", "what?", "--stream", *SHORT) == 0
    assert capsys.readouterr().out == whole


def test_understand_as_json_tells_why_it_ended(capsys):
    assert exit_code("understand", IMAGE, "--question", "what?", "--json", *SHORT) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["finish_reason"], row["tokens"]) == ("length", 5)


def listener(pipe: BagelPipeline) -> Session:
    """A session as `bagel chat` keeps one: images enter it by the ViT alone."""
    return Session(pipe.model, None, pipe.processor)


def test_chat_without_an_input_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert exit_code("chat") == 2
    assert "reads questions from the standard input, and there is none" in capsys.readouterr().err


def test_chat_keeps_the_context_of_images_questions_and_answers(pipe, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {IMAGE}\nwhat?\n\nand then?\n/reset\nwhat?\n/quit\nno\n"))
    assert exit_code("chat", *SHORT) == 0
    session = listener(pipe)
    with Image.open(IMAGE) as image:
        first = pipe.understand(image, "what?", max_new_tokens=5).text
        session.read(image, "what?").write(max_new_tokens=5)
    second = session.read("and then?").write(max_new_tokens=5).text
    alone = pipe.generate(["what?"], output="text", max_new_tokens=5).text
    assert capsys.readouterr().out == f"{first}\n{second}\n{alone}\n"


def test_chat_reads_nothing_twice(pipe, monkeypatch):
    lengths: list[int] = []
    hook = pipe.model.register_forward_pre_hook(lambda _, args: lengths.extend(args[0].layout.lengths))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {IMAGE}\nwhat?\nand then?\n"))
    assert exit_code("chat", *SHORT) == 0
    hook.remove()
    question, answer, following = (len(pipe.processor.text(said).ids) for said in ("what?", "", "and then?"))
    assert lengths[1:] == [question, answer + 5, following]


def test_chat_thinks_as_understand_does(pipe, monkeypatch, capsys):
    for prompt in ([], ["--system-prompt", "be brief"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {IMAGE}\nwhat?\n"))
        assert exit_code("chat", *SHORT, "--think", *prompt) == 0
        system = prompt[1] if prompt else None
        with Image.open(IMAGE) as image:
            wanted = pipe.understand(image, "what?", max_new_tokens=5, think=True, system_prompt=system).text
        assert capsys.readouterr().out == f"{wanted}\n"


def test_chat_follows_preset_seed_and_sampling(pipe, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    options = ("--preset", "draft", "--do-sample", "--temperature", "0.9", "--seed", "3", "--stop", "e")
    assert exit_code("chat", "--model", str(TINY), *options) == 0
    given = {"preset": "draft", "do_sample": True, "temperature": 0.9, "seed": 3, "stop": ("e",)}
    assert capsys.readouterr().out == pipe.generate(["what?"], output="text", **given).text + "\n"


def test_chat_goes_on_after_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/image none.png\n/what\nhello\n"))
    assert exit_code("chat", *SHORT) == 0
    printed = capsys.readouterr()
    assert "none.png: there is no such file" in printed.err
    assert "/reset forgets" in printed.err
    assert len(printed.out.splitlines()) >= 1


def test_chat_ends_with_0_on_ctrl_c_at_the_prompt(monkeypatch):
    class Interrupted(io.StringIO):
        def __next__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert exit_code("chat", *SHORT) == 0


def new_chat(pipe: BagelPipeline, **given) -> Chat:
    return Chat(listener(pipe), make_options("understand", given))


@pytest.mark.real_loading
@pytest.mark.parametrize("where", ["bagel.cli.answers.print", "bagel.modeling.Bagel.decode"])
def test_ctrl_c_during_an_answer_stops_only_that_answer(where, monkeypatch, capsys):
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")
    question, calls = "describe the picture", []
    works = type(pipe.model).decode if where.endswith("decode") else print

    def interrupted(*args, **options):
        done = works(*args, **options)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return done

    whole, stopped, session = new_chat(pipe), new_chat(pipe), listener(pipe)
    whole.say(question)
    wanted = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted, raising=False)
        assert stopped.say(question)
    said = capsys.readouterr().out.removesuffix(" [stopped]\n")
    session.read(question)
    assert said == session.write(max_new_tokens=2 if where.endswith("decode") else 3).text
    assert wanted.startswith(said)
    assert len(said) < len(wanted.rstrip())
    assert stopped.say("and then?")
    assert capsys.readouterr().out == session.read("and then?").write().text + "\n"


def test_an_error_leaves_the_chat_as_it_was(pipe, monkeypatch, capsys):
    chat, fresh = new_chat(pipe, max_new_tokens=5), new_chat(pipe, max_new_tokens=5)
    for each in (chat, fresh):
        each.say("what?")
    capsys.readouterr()
    failures = {"forward": ("and then?", f"/image {IMAGE}"), "decode": ("how?",)}  # to read; to answer
    for name, lines in failures.items():
        for line in lines:
            for error in (ValueError("too odd"), NotEnoughMemoryError("too long")):
                with monkeypatch.context() as patch:
                    patch.setattr(type(pipe.model), name, Mock(side_effect=error))
                    assert chat.say(line)
                assert str(error) in capsys.readouterr().err
    for each in (chat, fresh):
        each.say("and then?")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_ctrl_c_while_an_image_is_read_keeps_the_chat(pipe, monkeypatch, capsys):
    chat, fresh = new_chat(pipe, max_new_tokens=5), new_chat(pipe, max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.model), "forward", Mock(side_effect=KeyboardInterrupt))
        assert chat.say(f"/image {IMAGE}")
    assert capsys.readouterr().out == " [stopped]\n"
    for each in (chat, fresh):
        each.say("what?")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# Checkpoints -------------------------------------------------------------------------------------------------


def test_inspect_tells_the_parts(capsys):
    assert exit_code("inspect", TINY) == 0
    printed = capsys.readouterr().out
    assert "gen expert" in printed
    assert "autoencoder" in printed


def test_inspect_verify_finds_a_flipped_bit(pipe, capsys):
    pipe.save_pretrained("exported")
    assert exit_code("inspect", "exported", "--verify") == 0
    assert "match SHA256SUMS" in capsys.readouterr().out
    weights = Path("exported/ema.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert exit_code("inspect", "exported", "--verify") == 1
    assert "ema.safetensors" in capsys.readouterr().err


def test_inspect_verify_without_checksums_is_not_a_success(capsys):
    assert exit_code("inspect", TINY, "--verify") == 1
    assert "SHA256SUMS" in capsys.readouterr().err


@pytest.mark.real_loading
def test_commands_load_the_model_they_are_told(capsys):
    assert exit_code("understand", IMAGE, "--question", "what?", *SHORT) == 0
    assert exit_code("text-to-image", "a", "--model", "no-such-folder/", "-o", "a.png") == 1
    assert "no-such-folder" in capsys.readouterr().err
    assert not Path("a.png").exists()


@pytest.mark.parametrize("model", ["demo", "./demo"])
def test_demo_is_the_name_of_the_built_in_model(model, pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(BagelPipeline, "from_pretrained", lambda source, **_: asked.append(source) or pipe)
    assert exit_code("understand", IMAGE, "--question", "what?", "--model", model, "--max-new-tokens", "2") == 0
    assert asked == [CHECKPOINT if model == "demo" else model]
