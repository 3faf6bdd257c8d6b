"""Ask about an image: python examples/understand.py [MODEL [IMAGE]]; MODEL is a checkpoint folder or Hub id."""

import sys

from PIL import Image, ImageDraw

import bagel
from bagel.demo import CHECKPOINT

model = sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT
pipe = bagel.load(model, visual_gen=False)  # half the weights are enough to answer

if len(sys.argv) > 2:
    image = bagel.open_image(sys.argv[2])
else:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((192, 192, 320, 320), fill=(220, 30, 40))

answer = pipe.understand(image, "what is in the picture?", max_new_tokens=64)
print(answer.text, f"({len(answer.token_ids)} tokens, {answer.finish_reason})")

# A batch of questions, one pass for all.
questions = ["what color is the circle?", "how many shapes are there?"]
for question, answer in zip(questions, pipe.understand([image] * 2, questions, max_new_tokens=64), strict=True):
    print(question, answer.text)

# An answer as it is written.
for piece in pipe.stream([image, "describe the picture"], max_new_tokens=64):
    print(piece, end="", flush=True)
print()
