"""A conversation of four turns and two images: python examples/conversation.py [MODEL].

The built-in model was never trained on conversations, but manages this one.
"""

import sys

import bagel
from bagel.demo import CHECKPOINT

pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
with pipe.session(seed=1) as chat:
    chat.read("a large red circle in the center on a white background").draw(num_timesteps=25).image.save("white.png")
    print(chat.read("what color is the circle?").write().text)
    chat.read("make the background light blue").draw(num_timesteps=25).image.save("blue.png")
    print(chat.read("how big is the red circle?").write().text)
