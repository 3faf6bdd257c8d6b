"""The commands that answer: `bagel understand` and `bagel chat`."""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from bagel.cli.arguments import given_options
from bagel.cli.model import check_options, load, open_images
from bagel.image import ImageError, open_image
from bagel.inputs import Input
from bagel.pipeline import BagelPipeline

HELP = "commands: /image PATH shows a picture, /reset forgets everything, /quit leaves"


def understand(args: Namespace) -> None:
    """Print the answer to one question."""
    check_options(args, "understand", "text")
    images = open_images(args.images)
    pipe = load(args, draws=False)
    options = _options(args)
    if args.stream:
        _print_pieces(pipe.stream([*images, args.question], **options))
        return
    result = pipe.understand(images, args.question, **options)
    if args.json:
        row = {
            "text": result.text,
            "finish_reason": result.finish_reason,
            "tokens": len(result.token_ids),
            "seed": result.seed,
        }
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(result.text)


def chat(args: Namespace) -> None:
    """Talk until the input ends; everything said and shown stays in the context until /reset."""
    check_options(args, "understand", "text")
    chat = Chat(load(args, draws=False), _options(args))
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a line editor
        print(HELP, file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # at the prompt; during an answer `say` takes it
        for line in _lines():
            if not chat.say(line):
                return


class Chat:
    """A conversation: the texts, pictures and answers so far, all read again for each answer."""

    def __init__(self, pipe: BagelPipeline, options: dict[str, Any]) -> None:
        self.pipe, self.options = pipe, options
        self.history: list[Input] = []

    def say(self, line: str) -> bool:
        """Obey a command or answer a line; return whether the conversation goes on."""
        line = line.strip()
        if line == "/quit":
            return False
        if line == "/reset":
            self.history.clear()
        elif line.startswith("/image "):
            self._show(line.removeprefix("/image ").strip())
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            self._answer(line)
        return True

    def _show(self, path: str) -> None:
        try:
            self.history.append(open_image(path.strip("'\"")))
        except ImageError as error:
            print(error, file=sys.stderr)

    def _answer(self, question: str) -> None:
        said: list[str] = []
        try:
            _print_pieces(self.pipe.stream([*self.history, question], **self.options), kept=said)
        except KeyboardInterrupt:
            print(" [stopped]", flush=True)
        except (ValueError, MemoryError) as error:  # the question is forgotten; shorter ones may still be answered
            print(error, file=sys.stderr)
            return
        self.history.append(question)
        if said:
            self.history.append("".join(said))


def _options(args: Namespace) -> dict[str, Any]:
    return {"preset": args.preset, "seed": args.seed} | given_options(args)


def _print_pieces(pieces: Iterator[str], *, kept: list[str] | None = None) -> None:
    for piece in pieces:
        if kept is not None:
            kept.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)


def _lines() -> Iterator[str]:
    """Yield what is typed, after a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
