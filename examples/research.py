"""Look inside: python examples/research.py [MODEL]. Packs a sequence by hand and reads both experts, layer by layer."""

import sys

import torch

from bagel.demo import CHECKPOINT
from bagel.image import patch_positions
from bagel.loading import load_parts
from bagel.packing import LatentImage, Text, pack

model, _, tokenizer = load_parts(sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT)

# A prompt, and a noisy picture of 4 x 6 latent tokens (64 x 96 pixels for the released model) at t = 1 on top of it.
ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode("a red circle"), tokenizer.eos_id])
noise = torch.randn(3 * 4, model.config.patch_latent_dim, generator=torch.Generator().manual_seed(1))
target = LatentImage(noise, patch_positions(3, 4, model.config.max_latent_size), timestep=1.0, noisy=True)
packed = pack([[Text(ids), target]], image_tokens=(tokenizer.image_start_id, tokenizer.image_end_id))
sample = packed.samples[0]
print(f"{packed.und_positions.shape[0]} und tokens, {packed.gen_positions.shape[0]} gen tokens")
print(f"who sees whom: {int(sample.mask().sum())} of {len(sample) ** 2} pairs")


def report(layer, _, streams):
    und, gen = (stream.float().norm(dim=-1).mean().item() for stream in streams)
    print(f"layer {layer.index:2}  mean norm of the residual stream: und {und:8.2f}  gen {gen:8.2f}")


for layer in model.decoder.layers:
    layer.register_forward_hook(report)
with torch.inference_mode():
    context = model.new_context()
    hidden = model.prefill(packed.to(model.device), [context])
    velocity = model.velocity(hidden.gen)
    top = model.decoder.logits(hidden.und[len(ids) - 1 : len(ids)])[0].softmax(-1).topk(3)
print(f"velocity {tuple(velocity.shape)}, norm {velocity.norm():.2f}")
print(
    "after the prompt:",
    [(tokenizer.decode([i]), round(p, 3)) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)],
)
