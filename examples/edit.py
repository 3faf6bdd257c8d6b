"""Edit an image: python examples/edit.py [MODEL [IMAGE]]; MODEL is a checkpoint folder or Hub id."""

import sys

from PIL import Image, ImageDraw

import bagel
from bagel.demo import CHECKPOINT
from bagel.png import save_numbered_png

pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)


def circle(x, y):
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((x - 64, y - 64, x + 64, y + 64), fill=(220, 30, 40))
    return image


image = bagel.open_image(sys.argv[2]) if len(sys.argv) > 2 else circle(256, 256)
instruction = "make the background light blue"
result = pipe.edit(image, instruction, seed=1)
print(save_numbered_png(result.image, ".", "edited", {"prompt": instruction, "seed": str(result.seed)}))

# Any interleaving of texts and images, here three frames of a motion, and a look at every step on the way.
result = pipe.generate(
    [circle(128, 256), circle(160, 256), circle(192, 256), "the next frame"],
    output="image",
    seed=2,
    num_timesteps=12,
    on_step=lambda step: print(f"t {step.t:.2f}  speed {step.velocity.norm():.1f}"),
)
print(save_numbered_png(result.image, ".", "next", {"seed": str(result.seed)}))
