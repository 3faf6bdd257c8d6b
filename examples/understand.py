"""Ask about a picture: python examples/understand.py [MODEL [PICTURE]]; MODEL is a checkpoint folder or Hub id."""

import sys

from PIL import Image, ImageDraw

from bagel import BagelPipeline
from bagel.demo import CHECKPOINT
from bagel.image import open_image

model = sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT
pipe = BagelPipeline.from_pretrained(model, visual_gen=False)  # half the weights are enough to answer

if len(sys.argv) > 2:
    picture = open_image(sys.argv[2])
else:
    picture = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(picture).ellipse((192, 192, 320, 320), fill=(220, 30, 40))

answer = pipe.understand(picture, "what is in the picture?", max_new_tokens=64)
print(answer.text, f"({len(answer.token_ids)} tokens, {answer.finish_reason})")

# A batch of questions, one pass for all.
questions = ["what color is the circle?", "how many shapes are there?"]
for question, answer in zip(questions, pipe.understand([picture] * 2, questions, max_new_tokens=64), strict=True):
    print(question, answer.text)

# An answer as it is written.
for piece in pipe.stream([picture, "describe the picture"], max_new_tokens=64):
    print(piece, end="", flush=True)
print()
