"""Draw a picture: python examples/text_to_image.py [MODEL]; MODEL is a checkpoint folder or Hub id."""

import sys

from bagel import BagelPipeline
from bagel.png import save_numbered_png

model = sys.argv[1] if len(sys.argv) > 1 else "ByteDance-Seed/BAGEL-7B-MoT"
pipe = BagelPipeline.from_pretrained(model)

prompt = "a lighthouse on a cliff at dusk, oil painting"
result = pipe.text_to_image(prompt, seed=1, think=True, max_think_tokens=200)
print("plan:", result.text)
print(save_numbered_png(result.image, ".", "lighthouse", {"prompt": prompt, "seed": str(result.seed)}))

# A real batch: one pass for both, and each picture is the one its seed gives alone.
prompts = ["a red circle on white", "a blue square on white"]
for one, result in zip(prompts, pipe.text_to_image(prompts, seed=[2, 3], preset="draft"), strict=True):
    print(save_numbered_png(result.image, ".", "shape", {"prompt": one, "seed": str(result.seed)}))
