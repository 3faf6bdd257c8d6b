"""How strongly each part of an image looks at a word of its prompt: python examples/attention_maps.py [MODEL]."""

import sys

from PIL import Image

import bagel
from bagel.demo import CHECKPOINT
from bagel.png import save_numbered_png


class Watched(bagel.Reference):
    def __call__(self, q, k, v, *, layer=0, **rule):
        if layer == 2:
            seen.append(self.weights(q, k, **rule).mean(0))  # (Tq, Tk), the mean of all heads
        return super().__call__(q, k, v, layer=layer, **rule)


seen = []
pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
pipe.model.attention = Watched()
image = pipe.text_to_image("a large red circle at the top left on a white background", seed=1, num_timesteps=25).image
look = seen[-1][2:, 1 + len(pipe.tokenizer.encode("a large"))]  # from the latents, at what follows bos and "a large"
look = (255 * look / look.max()).byte().reshape(image.height // 16, image.width // 16).cpu()
print(save_numbered_png(Image.fromarray(look.numpy()).resize(image.size), ".", "red", {"layer": "2"}))
