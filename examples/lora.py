"""LoRA (arXiv 2106.09685) by hand on linear layers of both experts: python examples/lora.py [MODEL].

Both learn a world whose reds are blue: one to draw it from words, the other to describe it.
"""

import random
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import bagel
from bagel.demo import CHECKPOINT
from bagel.evaluation.samples import sample
from bagel.packing import IGNORE, LatentImage, Text


class LoRA(nn.Module):
    def __init__(self, linear, rank=8):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features).to(linear.weight) * linear.in_features**-0.5)
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def lesson(example):
    prompt, image = example.inputs[0], Image.merge("RGB", example.outputs[0].split()[::-1])
    said, (z, _), t = pipe.processor.text(prompt), session.encode(image), random.random()
    noise, answer = torch.randn_like(z), torch.cat([said.ids[1:], torch.tensor([IGNORE])])
    cells = pipe.processor.grid(image.height, image.width)
    drawn = LatentImage((1 - t) * z + t * noise, cells, timestep=t, noisy=True, velocity=noise - z)
    return [said, drawn], [pipe.processor.see(image), Text(said.ids, labels=answer)]


pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
layers, session = pipe.model.decoder.layers, pipe.session(posterior="mean")
for name, linear in list(layers.named_modules()):
    if name.endswith(("qkv_proj", "o_proj", "down_proj")):
        layers.set_submodule(name, LoRA(linear))
random.seed(0)
torch.manual_seed(0)
examples = [sample(random.Random(seed), "t2i1", side=64, detail="full") for seed in range(2)]
batch = pipe.processor.pack([part for example in examples for part in lesson(example)]).to(pipe.device)
optimizer = torch.optim.AdamW([p for p in pipe.model.parameters() if p.requires_grad], lr=3e-3)
for step in range(20):
    losses = pipe.model.losses(batch)
    optimizer.zero_grad()
    losses.loss.backward()
    optimizer.step()
    print(f"step {step}: text {losses.ce.mean():.3f}, image {losses.mse.mean():.3f}")
