"""What can be typed: every command with its options. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import os
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
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
  /image PATH   show a picture; the next question may be about it
  /reset        forget everything said and shown
  /quit         leave, as Ctrl-D and Ctrl-C do; Ctrl-C during an answer only stops that answer""",
    "inspect": """examples:
  bagel inspect checkpoints/BAGEL-7B-MoT
  bagel inspect exported --verify""",
    "evaluate": """examples:
  bagel evaluate --model demo
  bagel evaluate --model checkpoints/small --tasks t2i,edit --count 20 --save failed
  bagel evaluate --model demo --dtype bfloat16 --float8 --taylorseer --steps 50 --json lossy.json""",
    "demo": """examples:
  bagel demo
  bagel demo --out pictures""",
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
        description="BAGEL: ask about pictures, draw them, edit them.",
        epilog=EXAMPLES[""],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bagel-mot {bagel.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _text_to_image(_command(commands, "text-to-image", "draw pictures from texts"))
    _edit(_command(commands, "edit", "change a picture as a text says"))
    _understand(_command(commands, "understand", "answer a question about pictures"))
    _chat(_command(commands, "chat", "talk about pictures, with a memory"))
    inspect = _command(commands, "inspect", "tell what a checkpoint folder holds and what fits this machine")
    inspect.add_argument("folder", metavar="FOLDER", help="a checkpoint in the official layout")
    inspect.add_argument("--verify", action="store_true", help="also read every file and compare its checksum")
    _evaluate(
        _command(commands, "evaluate", "measure a model on the shapes world: how often it is right, task by task")
    )
    demo = _command(commands, "demo", "show every task on the small built-in model, in seconds")
    demo.add_argument("--out", metavar="DIR", default="out", help="where the pictures go (default: out)")
    return parser


def _command(commands: Any, name: str, does: str) -> ArgumentParser:
    parser = commands.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="on an error show the traceback")
    return parser


def _text_to_image(parser: ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to draw; each prompt makes one picture")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - reads standard input")
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=1, help="draw N at a time (default: 1)")
    _output(parser)
    _picture_options(parser)
    _text_options(parser, limit="max_think_tokens", limits="the plan of --think")
    _model(parser)


def _edit(parser: ArgumentParser) -> None:
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="the picture to edit; several are all shown, in order"
    )
    parser.add_argument("--instruction", metavar="TEXT", required=True, help="what to change")
    _output(parser)
    _picture_options(parser)
    _text_options(parser, limit="max_think_tokens", limits="the plan of --think")
    _model(parser)


def _understand(parser: ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, shown in order")
    parser.add_argument("--question", metavar="TEXT", required=True, help="what to ask about them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer as it is written")
    form.add_argument("--json", action="store_true", help="print one JSON object")
    _answer_options(parser)
    _model(parser)


def _chat(parser: ArgumentParser) -> None:
    _answer_options(parser)
    _model(parser)


def _evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("--count", metavar="N", type=_positive, default=100, help="examples a row (default: 100)")
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
        "--side", metavar="PIXELS", type=_positive, help="of the pictures (default: as large as the model draws)"
    )
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write all figures and every failure to a new file")
    parser.add_argument("--save", metavar="DIR", help="leave the pictures of failures and a contact sheet of them here")
    _option(
        parser,
        "--steps",
        "--num-timesteps",
        metavar="N",
        type=_positive,
        help="times of the flow, one more than evaluations (default: 25)",
    )
    _option(parser, "--cfg-text-scale", metavar="A", type=float, help="how strongly to follow the text (default: 4)")
    _option(parser, "--taylorseer", action="store_true", help="predict most evaluations: faster, lossy")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object a picture instead of its path")


def _option(group: Any, *flags: str, **settings: Any) -> None:
    """Declare an option of the pipeline, named by its last flag; task and preset decide where it is not typed."""
    name = FOR_PIPELINE + flags[-1].removeprefix("--").replace("-", "_")
    group.add_argument(*flags, dest=name, default=SUPPRESS, **settings)


def _picture_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the picture")
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        help="of the first picture, the next has N+1 (default: random, kept in the PNG)",
    )
    group.add_argument("--preset", metavar="NAME", help="a set of options: notebook, app, gedit, draft")
    _option(group, "--height", metavar="PIXELS", type=_positive, help="a multiple of 16")
    _option(group, "--width", metavar="PIXELS", type=_positive, help="a multiple of 16")
    _option(
        group,
        "--steps",
        "--num-timesteps",
        metavar="N",
        type=_positive,
        help="times of the flow, one more than evaluations (default: 50)",
    )
    _option(group, "--shift", "--timestep-shift", metavar="S", type=float, help="default: 3")
    _option(group, "--cfg-text-scale", metavar="A", type=float, help="how strongly to follow the text (default: 4)")
    _option(
        group, "--cfg-img-scale", metavar="B", type=float, help="how strongly to follow the pictures (edit: 2, else 1)"
    )
    _option(group, "--cfg-interval", metavar=("LOW", "HIGH"), nargs=2, type=float, help="times that are guided")
    _option(group, "--cfg-renorm-type", metavar="TYPE", help="global, channel or text_channel")
    _option(group, "--cfg-renorm-min", metavar="M", type=float, help="0 to 1; 1 switches renormalisation off")
    _option(group, "--negative-prompt", metavar="TEXT", help="what to keep away from")
    _option(group, "--taylorseer", action="store_true", help="predict most evaluations: faster, lossy")


def _answer_options(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=int, help="for --do-sample (default: random)")
    parser.add_argument("--preset", metavar="NAME", help="a set of options: notebook, app, draft")
    _text_options(parser, limit="max_new_tokens", limits="an answer")
    _option(parser, "--stop", metavar="TEXT", action="append", help="end the answer before this text; may be repeated")


def _text_options(parser: ArgumentParser, *, limit: str, limits: str) -> None:
    group = parser.add_argument_group("the text")
    _option(group, "--think", action="store_true", help="write down the reasoning first")
    _option(group, f"--{limit.replace('_', '-')}", metavar="N", type=_positive, help=f"limit of {limits}, in tokens")
    _option(group, "--system-prompt", metavar="TEXT", help="said before everything else, instead of that of --think")
    _option(group, "--do-sample", action="store_true", help="draw tokens instead of taking the likeliest")
    _option(group, "--temperature", metavar="T", type=float, help="for --do-sample (default: 0.3)")
    _option(group, "--top-p", metavar="P", type=float, help="for --do-sample: draw among the likeliest P (default: 1)")


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
    group.add_argument("--float8", action="store_true", help="8-bit floats where they cost little: faster, lossy")
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
