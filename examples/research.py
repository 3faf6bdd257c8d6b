"""Look inside: python examples/research.py [MODEL]. Packs a sequence by hand and reads both experts, layer by layer."""

import sys

import torch

import bagel
from bagel.demo import CHECKPOINT
from bagel.packing import LatentImage

pipe = bagel.load(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)
model, processor = pipe.model, pipe.processor

# A prompt, and a noisy image of 48 x 64 pixels, 3 x 4 latent tokens, at t = 1 on top of it.
prompt = processor.text("a red circle")
noise = torch.randn(3 * 4, model.config.patch_latent_dim, generator=torch.Generator().manual_seed(1))
packed = processor.pack([[prompt, LatentImage(noise, processor.grid(48, 64), timestep=1.0, noisy=True)]])
sample = packed.samples[0]
print(f"{packed.und_positions.shape[0]} und tokens, {packed.gen_positions.shape[0]} gen tokens")
print(f"who sees whom: {int(sample.mask().sum())} of {len(sample) ** 2} pairs")


def report(layer, _, streams):
    und, gen = (stream.float().norm(dim=-1).mean().item() for stream in streams)
    print(f"layer {layer.index:2}  mean norm of the residual stream: und {und:8.2f}  gen {gen:8.2f}")


for layer in model.decoder.layers:
    layer.register_forward_hook(report)
with torch.inference_mode():
    hidden = model(packed.to(model.device))
    velocity = model.velocity(hidden.gen)
    top = model.logits(hidden.und[prompt.length - 1 : prompt.length])[0].softmax(-1).topk(3)
print(f"velocity {tuple(velocity.shape)}, norm {velocity.norm():.2f}")
words = [pipe.tokenizer.decode([token]) for token in top.indices.tolist()]
print("after the prompt:", [(word, round(p, 3)) for word, p in zip(words, top.values.tolist(), strict=True)])
