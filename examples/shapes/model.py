"""The small BAGEL of the shapes world: its sizes, and a tokenizer made for its words.

python examples/shapes/model.py FOLDER        writes an untrained model, autoencoder and tokenizer
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable

from bagel.checkpoint import save_checkpoint
from bagel.config import BagelConfig, DecoderConfig, ImageTransform, VAEConfig, ViTConfig
from bagel.evaluation.samples import all_texts_sample
from bagel.modeling import Bagel
from bagel.options import THINK_GENERATE, THINK_UNDERSTAND
from bagel.tokenizer import Tokenizer
from bagel.vae import Autoencoder

SIDE = 64
PIECES = 640  # bytes and merges; special tokens come on top
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = BagelConfig(
    llm_config=DecoderConfig(
        hidden_size=192,
        intermediate_size=240,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=PIECES + 32,
        rope_theta=10000.0,
    ),
    vit_config=ViTConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=16,
    ),
    vae_config=VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    max_latent_size=SIDE // 16,
    vit_max_num_patch_per_side=SIDE // 16,
    vae_image_transform=ImageTransform(SIDE, SIDE // 2, 16),
    vit_image_transform=ImageTransform(SIDE, SIDE // 2, 16),
    timestep_shift=3.0,  # what is where is settled early, at much noise; the same as when drawing
)


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the world's texts and write the files of the official layout."""
    tokenizer = Trainable(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = all_texts_sample(random.Random(0), 20000) + [THINK_GENERATE, THINK_UNDERSTAND] * 200
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {
        str(len(model["vocab"]) + i): {"content": text, "special": True, "normalized": False}
        for i, text in enumerate(SPECIAL)
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def untrained() -> tuple[Bagel, Autoencoder]:
    """Return model and autoencoder with fresh weights, the gen experts copies of the und experts."""
    torch.manual_seed(0)
    model, vae = Bagel(CONFIG), Autoencoder(CONFIG.vae_config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for layer in model.decoder.layers:
        layer.gen.load_state_dict(layer.und.state_dict())
        for expert in (layer.und, layer.gen):
            for output in (expert.attention.o_proj, expert.mlp.down_proj):
                output.weight.data.mul_((2 * len(model.decoder.layers)) ** -0.5)
    torch.nn.init.zeros_(model.llm2vae.weight)
    return model, vae


def main() -> None:
    """Write the untrained checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "tokenizer"
    words.mkdir(exist_ok=True)
    write_tokenizer(words)
    model, vae = untrained()
    save_checkpoint(folder, model, vae, CONFIG, Tokenizer.from_pretrained(words), overwrite=True)
    parts = {"model": model, "autoencoder": vae}
    for name, part in parts.items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
