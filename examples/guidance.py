"""A guidance of one's own, which fades as the image takes shape: python examples/guidance.py [MODEL]."""

import sys

import bagel
from bagel.demo import CHECKPOINT
from bagel.png import save_numbered_png


class Fading:
    names = ("full", "text_dropped")

    def branches(self, t):
        return self.names if t > 0.2 else self.names[:1]  # the end needs one evaluation instead of two

    def __call__(self, velocities, t):
        v, without = velocities["full"], velocities.get("text_dropped", velocities["full"])
        return without + (1 + 5 * t) * (v - without)


pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
prompt = "three blue stars on a beige background"
result = pipe.text_to_image(prompt, seed=1, num_timesteps=25, guidance=Fading())
print(save_numbered_png(result.image, ".", "fading", {"prompt": prompt, "seed": str(result.seed)}))
print(pipe.understand(result.image, "describe the picture").text)
