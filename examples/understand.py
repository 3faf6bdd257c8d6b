"""Ask about a picture: python examples/understand.py [MODEL [PICTURE]]; MODEL is a checkpoint folder or Hub id."""

import sys

from PIL import Image, ImageDraw

from bagel import BagelPipeline
from bagel.image import open_image

model = sys.argv[1] if len(sys.argv) > 1 else "ByteDance-Seed/BAGEL-7B-MoT"
pipe = BagelPipeline.from_pretrained(model, visual_gen=False)  # half the weights are enough to answer

if len(sys.argv) > 2:
    picture = open_image(sys.argv[2])
else:
    picture = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(picture).ellipse((200, 120, 440, 360), fill="red")

answer = pipe.understand(picture, "What is in the picture?", max_new_tokens=64)
print(answer.text, f"({len(answer.token_ids)} tokens, {answer.finish_reason})")

# The same as it is written, with the conversation so far as its context.
inputs = [picture, "What is in the picture?", answer.text, "And what is behind it?"]
for piece in pipe.stream(inputs, max_new_tokens=64):
    print(piece, end="", flush=True)
print()
