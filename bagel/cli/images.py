"""The commands that draw: `bagel text-to-image` and `bagel edit`."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import bagel
from bagel.cli.arguments import given_options
from bagel.cli.errors import UsageError
from bagel.cli.model import check_options, load, open_images
from bagel.options import ImageOptions
from bagel.png import save_numbered_png, save_png
from bagel.results import ImageResult


def text_to_image(args: Namespace) -> None:
    """Draw one image per prompt, each saved as soon as its batch is done."""
    prompts = _prompts(args)
    options = check_options(args, "text_to_image")
    place = Destination(args.output, images=len(prompts), force=args.force)
    pipe = load(args, draws=True)
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        given = given_options(args)
        if args.seed is not None:
            given["seed"] = [args.seed + start + i for i in range(len(batch))]
        results = pipe.text_to_image(batch, preset=args.preset, **given)
        for prompt, result in zip(batch, results, strict=True):
            info = describe(result, prompt, options, task="text-to-image", model=args.model)
            _report(args, place.save(result, info), prompt, result)


def edit(args: Namespace) -> None:
    """Change an image, or combine several, as the instruction says."""
    options = check_options(args, "edit")
    place = Destination(args.output, images=1, force=args.force)
    images = open_images(args.images, exif=options.exif)
    pipe = load(args, draws=True)
    result = pipe.edit(images, args.instruction, preset=args.preset, seed=args.seed, **given_options(args))
    info = describe(
        result, args.instruction, options, task="edit", model=args.model, inputs=[Path(p).name for p in args.images]
    )
    _report(args, place.save(result, info), args.instruction, result)


class Destination:
    """Where images go, settled before any is drawn: one file, or a folder of numbered ones.

    Args:
        output: a .png file; or an existing folder, a path that ends in a slash or has no suffix.
        images: how many will come.
        force: replace the file if it exists.

    Raises:
        UsageError: several images for one file, or a file that is no PNG.
        FileExistsError: the file exists already.
        PermissionError: it could not be written there.
    """

    def __init__(self, output: str, *, images: int, force: bool) -> None:
        self.path, self.force = Path(output).expanduser(), force
        ends_in_slash = output.endswith((os.sep, "/"))
        self.is_folder = self.path.is_dir() or ends_in_slash or not self.path.suffix
        if not self.is_folder:
            self._check_file(images)
        elif self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file, so no folder for images; choose another name with -o")
        self.folder = self.path if self.is_folder else self.path.parent
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise PermissionError(f"{there} is no folder that may be written to; choose another place with -o")

    def _check_file(self, images: int) -> None:
        if self.path.suffix.lower() != ".png":
            raise UsageError(f"images are written as PNG, got -o {self.path}; write {self.path.with_suffix('.png')}")
        if images > 1:
            raise UsageError(f"{images} images need a folder, got -o {self.path}; write {self.path.with_suffix('')}/")
        if self.path.exists() and not self.force:
            raise FileExistsError(f"{self.path} exists; choose another name with -o, or replace it with --force")

    def save(self, result: ImageResult, info: dict[str, str]) -> Path:
        """Write an image and return where it is; its folder is made for the first one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_folder:
            return save_numbered_png(result.image, self.path, "bagel", info)
        return save_png(result.image, self.path, info, overwrite=self.force)


def describe(
    result: ImageResult, prompt: str, options: ImageOptions, *, task: str, model: str, inputs: Sequence[str] = ()
) -> dict[str, str]:
    """Return the PNG's text entries: prompt, seed, plan if there is one, all parameters as JSON, software."""
    parameters: dict[str, Any] = {"task": task, "model": Path(model).name if Path(model).is_dir() else model}
    if inputs:
        parameters["inputs"] = list(inputs)
    parameters |= {"seed": result.seed, "height": result.image.height, "width": result.image.width}
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, str | bool | int | float | tuple) and field.name not in ("progress", "stop"):
            parameters.setdefault(field.name, value)
    info = {"prompt": prompt, "seed": str(result.seed)}
    if result.text is not None:
        info["plan"] = result.text
    return info | {
        "parameters": json.dumps(parameters, ensure_ascii=False),
        "software": f"bagel-mot {bagel.__version__}",
    }


def _report(args: Namespace, path: Path, prompt: str, result: ImageResult) -> None:
    if args.json:
        size = {"height": result.image.height, "width": result.image.width}
        row = {"path": str(path), "prompt": prompt, "seed": result.seed, "plan": result.text} | size
        print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    if result.text is not None:
        print(f"plan: {result.text}", file=sys.stderr)
    print(path, flush=True)


def _prompts(args: Namespace) -> list[str]:
    prompts = list(args.prompts)
    if args.prompts_file == "-":
        prompts += [line.strip() for line in sys.stdin if line.strip()]
    elif args.prompts_file is not None:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"{args.prompts_file} is no text in UTF-8 ({error}); save it as UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError("there is nothing to draw: give a prompt, or a --prompts-file with one prompt per line")
    return prompts
