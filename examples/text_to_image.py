"""Draw images: python examples/text_to_image.py [MODEL]; MODEL is a checkpoint folder or Hub id."""

import sys

import bagel
from bagel.demo import CHECKPOINT
from bagel.png import save_numbered_png

pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)

# With a plan, for what has to be worked out first.
prompt = "as many pink stars as a tricycle has wheels"
result = pipe.text_to_image(prompt, seed=1, think=True, max_think_tokens=200)
print("plan:", result.text)
print(save_numbered_png(result.image, ".", "stars", {"prompt": prompt, "seed": str(result.seed)}))

# A real batch: one pass for both, and each image is the one its seed gives alone.
prompts = ["a large red circle on a white background", "a small blue square on a black background"]
for one, result in zip(prompts, pipe.text_to_image(prompts, seed=[2, 3], preset="draft"), strict=True):
    print(save_numbered_png(result.image, ".", "shape", {"prompt": one, "seed": str(result.seed)}))
