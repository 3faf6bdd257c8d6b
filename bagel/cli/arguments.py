"""What can be typed: every command with its options. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

import bagel

MODEL = "ByteDance-Seed/BAGEL-7B-MoT"
BUILT_IN = "demo"
"""What `--model` calls the model of `bagel.demo`."""

EXAMPLES = {
    "": """examples:
  bagel demo
  bagel text-to-image "a large red circle in the center" --model demo -o shape.png
  bagel text-to-image "a red circle on white" -o circle.png
  bagel edit circle.png --instruction "make it blue" -o blue.png
  bagel understand circle.png --question "What is this?"
  bagel chat
  bagel inspect checkpoints/BAGEL-7B-MoT
  bagel convert checkpoints/BAGEL-7B-MoT checkpoints/bagel-nf4 --to nf4
  bagel evaluate --model demo

bagel COMMAND --help tells the rest. BAGEL_MODEL names the model to use where --model does not.""",
    "text-to-image": """examples:
  bagel text-to-image "a red circle on white" -o circle.png
  bagel text-to-image "a cat" "a dog" --seed 7 --batch-size 2 -o pets/
  bagel text-to-image --prompts-file prompts.txt --preset draft -o drafts/
  bagel text-to-image "a chess game after 1. e4" --think --height 768 --width 1024 -o chess.png""",
    "edit": """examples:
  bagel edit photo.jpg --instruction "make it night" -o night.png
  bagel edit cat.png sofa.png --instruction "put the cat on the sofa" --seed 3 -o out/""",
    "understand": """examples:
  bagel understand photo.jpg --question "How many people are there?"
  bagel understand before.png after.png --question "What has changed?" --stream
  bagel understand chart.png --question "Which bar is tallest?" --think --json""",
    "chat": """examples:
  bagel chat
  bagel chat --model checkpoints/BAGEL-7B-MoT --max-new-tokens 200
  printf '/image photo.jpg\\nWhat is this?\\n' | bagel chat

in the chat:
  /image PATH   show an image; the next question may be about it
  /reset        forget everything said and shown
  /quit         leave, as Ctrl-D and Ctrl-C do; Ctrl-C during an answer only stops that answer""",
    "inspect": """examples:
  bagel inspect checkpoints/BAGEL-7B-MoT
  bagel inspect exported --verify""",
    "convert": """examples:
  bagel convert checkpoints/BAGEL-7B-MoT checkpoints/bagel-df11 --to dfloat11
  bagel convert ByteDance-Seed/BAGEL-7B-MoT checkpoints/bagel-nf4 --to nf4 --shard 2GB
  bagel convert checkpoints/bagel-df11 checkpoints/bagel-bf16 --to bf16

If it is stopped, the same command goes on where it was.""",
    "evaluate": """examples:
  bagel evaluate --model demo
  bagel evaluate --model checkpoints/small --tasks t2i,edit --count 20 --save failed
  bagel evaluate --model demo --dtype bfloat16 --float8 --taylorseer --steps 50 --json lossy.json""",
    "demo": """examples:
  bagel demo
  bagel demo --out images""",
}

FOR_PIPELINE = "pipeline."
"""Before the name of an argument that goes to the pipeline as it is, if it was typed."""


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the pipeline options that were typed; the others keep the defaults of their task or preset."""
    given = {n.removeprefix(FOR_PIPELINE): value for n, value in vars(args).items() if n.startswith(FOR_PIPELINE)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command."""
    parser = ArgumentParser(
        prog="bagel",
        description="BAGEL: ask about images, draw them, edit them.",
        epilog=EXAMPLES[""],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bagel-mot {bagel.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    _command(commands, "text-to-image", "draw images from texts", _text_to_image)
    _command(commands, "edit", "change an image as a text says", _edit)
    _command(commands, "understand", "answer a question about images", _understand)
    _command(commands, "chat", "talk about images, with a memory", _answer_options)
    _command(commands, "inspect", "tell what a checkpoint folder holds and what fits this machine", _inspect)
    _command(commands, "convert", "write a checkpoint in another format: smaller, or back to bfloat16", _convert)
    does = "measure a model on the shapes world: how often it is right, task by task"
    _command(commands, "evaluate", does, _evaluate)
    _command(commands, "demo", "show every task on the small built-in model, in seconds", _demo)
    return parser


class _Command(ArgumentParser):
    """The parser of one command. It gets its arguments when it is used: the declarations of options import torch."""

    fill: Callable[[ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)


def _command(commands: Any, name: str, does: str, fill: Callable[[ArgumentParser], None]) -> None:
    parser = commands.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="on an error show the traceback")
    parser.fill = fill


def _text_to_image(parser: ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to draw; each prompt makes one image")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one per line; - reads standard input")
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=1, help="draw N at a time (default: 1)")
    _image_options(parser, "text_to_image")


def _edit(parser: ArgumentParser) -> None:
    from bagel.options import Encoding, Seeing

    parser.add_argument("images", metavar="IMAGE", nargs="+", help="the image to edit; several are all shown, in order")
    parser.add_argument("--instruction", metavar="TEXT", required=True, help="what to change")
    _image_options(parser, "edit", Seeing, Encoding)


def _understand(parser: ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images, shown in order")
    parser.add_argument("--question", metavar="TEXT", required=True, help="what to ask about them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer as it is written")
    form.add_argument("--json", action="store_true", help="print one JSON object")
    _answer_options(parser)


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=f"a checkpoint of any format, or {BUILT_IN}")
    parser.add_argument("--verify", action="store_true", help="also read every file and compare its checksum")


def _convert(parser: ArgumentParser) -> None:
    from bagel.checkpoint.convert import NAMES

    parser.add_argument("source", metavar="SRC", help=f"a checkpoint folder of any format, a Hub id, or {BUILT_IN}")
    parser.add_argument("folder", metavar="DST", help="where it goes: a new folder, or one where this was interrupted")
    parser.add_argument("--to", required=True, choices=NAMES, help=", ".join(NAMES), metavar="FORMAT")
    parser.add_argument("--shard", metavar="SIZE", help="most bytes in a file, such as 2GB (default: 4GB)")
    parser.add_argument(
        "--every-linear", action="store_true", help="quantise every linear layer, not the decoder layers' alone"
    )
    parser.add_argument("--base", metavar="SOURCE", help="where to take what SRC lacks: configurations, tokenizer, VAE")
    parser.add_argument("--weights", metavar="FILE", help="which weights, where SRC holds several")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def _demo(parser: ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="out", help="where the images go (default: out)")


def _evaluate(parser: ArgumentParser) -> None:
    from bagel.options import GUIDANCE, Flow, Guiding

    parser.add_argument("--count", metavar="N", type=_positive, default=100, help="examples per row (default: 100)")
    parser.add_argument(
        "--tasks",
        metavar="LIST",
        help="some of timing,t2i,wordings,new_pairs,guidance,caption,qa,edit,think,frames (default: all)",
    )
    parser.add_argument(
        "--split", default="held_out", help="of the examples: held_out, new_pairs or train (default: held_out)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of examples and noise (default: 0)")
    parser.add_argument(
        "--side", metavar="PIXELS", type=_positive, help="of the images (default: as large as the model draws)"
    )
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write all figures and every failure to a new file")
    parser.add_argument("--save", metavar="DIR", help="leave the images of failures and a contact sheet of them here")
    _options(parser, Flow, defaults={"num_timesteps": 25})
    _options(parser, Guiding, without=[name for name in GUIDANCE if name != "cfg_text_scale"])
    parser.set_defaults(preset=None)
    _model(parser)


def _output(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        default=".",
        help="a .png file, or a folder that gets bagel-0001.png and so on (default: the current folder)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead of its path")


def _image_options(parser: ArgumentParser, task: str, *seen: Any) -> None:
    from bagel.options import DEFAULTS, Drawing, Planning, Reading, Shown

    _output(parser)
    group = parser.add_argument_group("the image")
    told = "of the first image, the next has N+1" if task == "text_to_image" else "of the noise"
    group.add_argument("--seed", metavar="N", type=int, help=f"{told} (default: random, kept in the PNG)")
    group.add_argument("--preset", metavar="NAME", help="a set of options: notebook, app, gedit, draft")
    # One text has one way to be dropped.
    _options(group, Drawing, without=("drop",), defaults=DEFAULTS.get(task))
    _options(parser.add_argument_group("the plan"), Planning)
    _options(parser.add_argument_group("reading"), Reading, *seen, Shown)
    _model(parser)


def _answer_options(parser: ArgumentParser) -> None:
    from bagel.options import Reading, Seeing, Shown, Thinking, Writing

    parser.add_argument("--seed", metavar="N", type=int, help="for --do-sample (default: random)")
    parser.add_argument("--preset", metavar="NAME", help="a set of options: notebook, app, draft")
    _options(parser.add_argument_group("the text"), Thinking, Writing)
    _options(parser.add_argument_group("reading"), Reading, Seeing, Shown)
    _model(parser)


def _options(group: Any, *kinds: Any, without: Sequence[str] = (), defaults: Any = None) -> None:
    """Declare options of the pipeline; task and preset decide where one is not typed."""
    from bagel.parameters import add_flags

    for kind in kinds:
        add_flags(group, kind, leave_out=without, defaults=defaults, dest=FOR_PIPELINE + "{}")


def _model(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model",
        metavar="SOURCE",
        default=os.environ.get("BAGEL_MODEL") or MODEL,
        help=f"a checkpoint folder, a Hub id, or {BUILT_IN}, the small built-in model (default: $BAGEL_MODEL, else "
        f"{MODEL}, a download of 29 GB)",
    )
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    group.add_argument("--dtype", help="bfloat16, float16 or float32 (default: what suits the device)")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what may be taken on the device, such as 8GiB (default: what is free); weights that do not fit arrive "
        "when they are needed, and results are the same",
    )
    group.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="store the decoder's weights in fewer bits: float8, int8, nf4, nf4-double or fp4 (lossy)",
    )
    group.add_argument(
        "--float8",
        action="store_true",
        help="as --quantize float8, of the one expert that draws or answers: faster, lossy",
    )
    group.add_argument("--attention", default="auto", help="auto, sdpa, fa3, flash or reference (default: auto)")
    group.add_argument(
        "--base", metavar="SOURCE", help="where to take what SOURCE lacks: configurations, tokenizer, VAE"
    )
    group.add_argument("--weights", metavar="FILE", help="which weights, where SOURCE holds several")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
