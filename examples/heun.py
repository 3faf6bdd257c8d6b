"""A solver of one's own, Heun's of second order, beside Euler's: python examples/heun.py [MODEL].

With as many evaluations it comes nearer to where many small steps lead. Heun's last step is Euler's, so the last steps
are small here.
"""

import sys

import bagel
from bagel.demo import CHECKPOINT


def heun(velocity, x, t, next_t):
    v = velocity(x, t)
    if next_t > 0:  # at 0 there is no noise left, and nothing that the model was trained to tell
        v = (v + velocity(x - v * (t - next_t), next_t)) / 2
    return x - v * (t - next_t)


pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
given = {"prompt": "a large red circle in the center on a white background", "seed": 1, "progress": False}
given |= {"timestep_shift": 0.2, "cfg_text_scale": 1.0}
exact = pipe.text_to_image(**given, num_timesteps=101).latents
for times, name, solver in ((33, "Euler", bagel.Euler()), (17, "Heun", heun)):
    error = pipe.text_to_image(**given, num_timesteps=times, solver=solver).latents - exact
    print(f"{name}, {times - 1} steps: {error.norm() / exact.norm():.4f}")
