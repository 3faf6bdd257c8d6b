"""The commands that answer: `bagel understand` and `bagel chat`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace

from bagel.cli.arguments import given_options
from bagel.cli.errors import UsageError
from bagel.cli.model import check_options, load, open_images
from bagel.generation import Session
from bagel.image import open_image
from bagel.options import THINK_UNDERSTAND, SessionOptions, TextOptions

HELP = "commands: /image PATH shows an image, /reset forgets everything, /quit leaves"


def understand(args: Namespace) -> None:
    """Print the answer to one question."""
    options: TextOptions = check_options(args, "understand")
    images = open_images(args.images, exif=options.exif)
    pipe = load(args, draws=False)
    given = {"preset": args.preset, "seed": args.seed} | given_options(args)
    if args.stream:
        _print_pieces(pipe.stream([*images, args.question], **given))
        return
    result = pipe.understand(images, args.question, **given)
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
    """Talk until the input ends; everything said and shown stays in the session until /reset."""
    options: TextOptions = replace(check_options(args, "understand"), seed=args.seed)
    if sys.stdin is None:
        raise UsageError("bagel chat reads questions from the standard input, and there is none: use bagel understand")
    pipe = load(args, draws=False)
    system = THINK_UNDERSTAND if options.think and options.system_prompt is None else options.system_prompt
    own = options.part(SessionOptions, system_prompt=system, draws=False)  # images enter by the ViT alone
    chat = Chat(Session(pipe.model, None, pipe.processor, own), options)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() a line editor
        print(HELP, file=sys.stderr)
    with suppress(KeyboardInterrupt):  # at the prompt; what is under way is stopped by `say`
        for line in _lines():
            if not chat.say(line):
                return


class Chat:
    """A conversation at a terminal.

    Args:
        session: holds the texts, images and answers so far.
        options: how answers are written.
    """

    def __init__(self, session: Session, options: TextOptions) -> None:
        self.session, self.options = session, options

    def say(self, line: str) -> bool:
        """Obey a command or answer a line; return whether the conversation goes on."""
        line = line.strip()
        if line == "/quit":
            return False
        if line == "/reset":
            self.session.reset()
        elif line.startswith("/image "):
            self._try(self._show, line.removeprefix("/image ").strip())
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            self._try(self._answer, line)
        return True

    def _try(self, act: Callable[[str], None], said: str) -> None:
        """Do something; an error is told and leaves no trace, Ctrl-C keeps what was answered before it."""
        before = self.session.fork()
        try:
            act(said)
        except KeyboardInterrupt:
            print(" [stopped]", flush=True)
        except (ValueError, MemoryError) as error:
            self.session = before
            print(error, file=sys.stderr)

    def _show(self, path: str) -> None:
        self.session.read(open_image(path.strip("'\""), exif=self.options.exif))

    def _answer(self, question: str) -> None:
        options = self.options
        answer = self.session.read(question).stream(
            max_new_tokens=options.text_limit, stop=options.stop, sampling=options.chooser
        )
        # Closed at once, so that what was said of a stopped answer is in the session.
        with closing(answer):
            _print_pieces(answer)


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _lines() -> Iterator[str]:
    """Yield what is typed, after a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(EOFError):
        while True:
            yield input("> ")
