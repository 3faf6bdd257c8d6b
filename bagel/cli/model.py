"""What the commands that run a model share: their options checked early, the model loaded, images opened."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from PIL import Image

from bagel.cli.arguments import BUILT_IN, given_options
from bagel.cli.errors import UsageError
from bagel.demo import CHECKPOINT
from bagel.image import open_image
from bagel.loading import choose_device, choose_dtype
from bagel.memory.sizes import parse_bytes
from bagel.modeling.attention import check_backend
from bagel.modeling.stored.quantize import check_format
from bagel.options import make_options
from bagel.pipeline import BagelPipeline


def check_options(args: Namespace, task: str) -> Any:
    """Return the options of a task as typed, checked before anything slow begins.

    Raises:
        UsageError: a value that the pipeline would refuse.
    """
    try:
        check_backend(args.attention)
        choose_dtype(args.dtype, choose_device(args.device))
        if args.memory is not None:
            parse_bytes(args.memory)
        if args.quantize is not None:
            check_format(args.quantize)
            if args.float8:
                raise ValueError("--float8 and --quantize exclude each other: --quantize float8 takes all experts")
        return make_options(task, given_options(args), args.preset)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def open_images(paths: Sequence[str], *, exif: bool) -> list[Image.Image]:
    """Return the images in RGB, with `exif` turned upright as their EXIF data say."""
    return [open_image(path, exif=exif) for path in paths]


def load(args: Namespace, *, draws: bool) -> BagelPipeline:
    """Return the model that was asked for, without its generating half if it need not draw; "demo" is built in."""
    print(f"loading {args.model}", file=sys.stderr)
    pipe = BagelPipeline.from_pretrained(
        CHECKPOINT if args.model == BUILT_IN else args.model,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        base=args.base,
        weights=args.weights,
        revision=args.revision,
        visual_gen=None if draws else False,
        memory=args.memory,
        quantize=args.quantize,
    )
    if pipe.model.decoder.supply is not None:
        print(pipe.placement, file=sys.stderr)
    return pipe.use_float8(und=not draws) if args.float8 else pipe
