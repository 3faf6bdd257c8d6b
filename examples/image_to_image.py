"""Vary an image: draw on from the middle of the flow with another text: python examples/image_to_image.py [MODEL]."""

import sys

import bagel
from bagel.demo import CHECKPOINT

pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
image = pipe.text_to_image("a large red circle in the center on a white background", seed=1, num_timesteps=25).image
session = pipe.session(seed=2).read("a large orange circle in the center on a white background")
clean, (height, width) = session.encode(image)
velocity = session.velocity(height=height, width=width)
times = bagel.flow_timesteps(25, shift=3.0)[7:]  # from below 0.9 on
start = (1 - times[0]) * clean + times[0] * velocity.noise()
varied = session.decode(bagel.integrate(bagel.Euler(), velocity, start, times), height, width)
varied.save("varied.png")
print(pipe.understand(varied, "describe the picture").text)
