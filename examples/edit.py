"""Edit a picture: python examples/edit.py [MODEL [PICTURE]]; MODEL is a checkpoint folder or Hub id."""

import sys

from PIL import Image, ImageDraw

from bagel import BagelPipeline
from bagel.image import open_image
from bagel.png import save_numbered_png

model = sys.argv[1] if len(sys.argv) > 1 else "ByteDance-Seed/BAGEL-7B-MoT"
pipe = BagelPipeline.from_pretrained(model)

if len(sys.argv) > 2:
    picture = open_image(sys.argv[2])
else:
    picture = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(picture).ellipse((200, 120, 440, 360), fill="red")

instruction = "make the background a starry night"
result = pipe.edit(picture, instruction, seed=1, cfg_img_scale=1.5)
print(save_numbered_png(result.image, ".", "edited", {"prompt": instruction, "seed": str(result.seed)}))

# Any interleaving of texts and pictures, and a look at every step on the way.
result = pipe.generate(
    ["A first picture:", picture, "and a second:", result.image, "Draw what comes next."],
    output="image",
    seed=2,
    num_timesteps=12,
    on_step=lambda step: print(f"t {step.t:.2f}  speed {step.velocity.norm():.1f}"),
)
print(save_numbered_png(result.image, ".", "next", {"seed": str(result.seed)}))
