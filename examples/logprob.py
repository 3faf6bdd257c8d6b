"""How likely the model finds given answers to a question: python examples/logprob.py [MODEL]."""

import sys

from PIL import Image, ImageDraw

import bagel
from bagel.demo import CHECKPOINT

image = Image.new("RGB", (512, 512), "white")
ImageDraw.Draw(image).ellipse((128, 128, 384, 384), fill=(220, 30, 40))
pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT, visual_gen=False)
asked = pipe.session().read(image, "what color is the circle?")
for answer in ("red", "pink", "blue"):
    print(f"{answer}: log-probability {sum(asked.score(answer)):.2f}")
