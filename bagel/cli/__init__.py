"""The command `bagel`. Only `arguments` is imported at once: `bagel --help` does not wait for torch."""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from bagel.cli.arguments import build_parser
from bagel.cli.errors import UsageError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 asked wrongly, 130 stopped by Ctrl-C.

    What goes wrong is one sentence on stderr; `--debug` raises it instead. As usual with argparse, help and mistyped
    options leave by SystemExit (0 and 2).
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that is lacking, or a bad byte, is no reason to stop
    args = build_parser().parse_args(argv)
    try:
        _run(args)
        if sys.stdout is not None:  # as it is where a shell has closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("bagel: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has left; nothing more can be said there, at exit neither
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.debug:
            raise
        print(f"bagel: {_sentence(error)}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    return OK


def _run(args: Namespace) -> None:
    match args.command:
        case "text-to-image":
            from bagel.cli.images import text_to_image

            text_to_image(args)
        case "edit":
            from bagel.cli.images import edit

            edit(args)
        case "understand":
            from bagel.cli.answers import understand

            understand(args)
        case "chat":
            from bagel.cli.answers import chat

            chat(args)
        case "inspect":
            from bagel.cli.folders import inspect

            inspect(args)
        case "convert":
            from bagel.cli.convert import convert

            convert(args)
        case "evaluate":
            from bagel.cli.evaluate import evaluate

            evaluate(args)
        case "demo":
            from bagel.cli.demo import demo

            demo(args)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    expected = isinstance(error, ValueError | TypeError | OSError | MemoryError | ImportError | ArithmeticError)
    text = " ".join(str(error).split())
    return text if expected and text else f"{type(error).__name__}: {text} (--debug shows where)"
