"""Eight-bit floats: what they round, how far the velocities move, and what is refused."""

from __future__ import annotations

import pytest
import torch
from small_model import DENSE, small_config
from torch import nn

from bagel import BagelPipeline
from bagel.cli import main
from bagel.demo import CHECKPOINT
from bagel.modeling import Bagel, MissingHalfError
from bagel.modeling.float8 import Float8Linear, round_experts, round_linears
from bagel.modeling.layers import gated

PROMPT = "a large red star in the center on a white background"


def test_a_large_bias_is_not_rounded_and_gates_are_multiplied_before():
    linear = nn.Linear(64, 32)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    layer = Float8Linear(linear)
    without = layer(x[:, :64]) - linear.bias
    linear.bias.data += 200.3
    torch.testing.assert_close(layer(x[:, :64]), without + linear.bias, rtol=0, atol=1e-4)
    assert torch.equal(layer.of_gated(x, x[:, :32]), x[:, :32] + layer(gated(x)))


@pytest.fixture
def pipe():
    return BagelPipeline.from_pretrained(CHECKPOINT, device="cpu")


def test_a_rounded_layer_is_exact_for_what_eight_bits_hold():
    linear = nn.Linear(16, 32)
    linear.weight.data = torch.randint(-7, 8, (32, 16)).float()
    x = torch.randint(-7, 8, (5, 16)).float()
    linear.weight.data[:, 0], x[:, 0] = 7.0, 7.0  # then every row has the same scale, a power of two off 448 / 7
    linear.bias.data.zero_()
    torch.testing.assert_close(Float8Linear(linear)(x), linear(x), rtol=2**-8, atol=0)  # the sum goes through bfloat16


def test_every_row_has_its_own_scale():
    linear = nn.Linear(64, 32)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None]
    linear.bias.data.zero_()
    found, wanted = Float8Linear(linear)(x), linear(x)
    error = (found - wanted).norm(dim=1)[:-1] / wanted.norm(dim=1)[:-1]
    assert error.max() < 0.06  # measured 0.044; one scale for all would lose the first rows whole
    assert not found[-1].any()


def test_the_first_and_last_layer_and_the_understanding_half_stay(pipe):
    pipe.use_float8()
    rounded = {name for name, module in pipe.parts.model.named_modules() if isinstance(module, Float8Linear)}
    layers = len(pipe.parts.model.decoder.layers)
    parts = ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert rounded == {f"decoder.layers.{i}.gen.{part}" for i in range(1, layers - 1) for part in parts}


def test_answers_stay_and_pictures_move_little(pipe):
    options = {"seed": 3, "num_timesteps": 10, "progress": False}
    plain = pipe.text_to_image(PROMPT, **options)
    text = pipe.understand(plain.image, "what color is the background?").token_ids
    pipe.use_float8()
    rounded = pipe.text_to_image(PROMPT, **options)
    error = (rounded.latents - plain.latents).norm() / plain.latents.norm()
    assert 1e-3 < error < 0.2
    assert pipe.understand(plain.image, "what color is the background?").token_ids == text


def test_understanding_can_be_rounded_too(pipe):
    assert round_experts(pipe.parts.model, und=True) == 2 * 4 * (len(pipe.parts.model.decoder.layers) - 2)
    assert pipe.understand([], PROMPT, max_new_tokens=4).token_ids


def test_what_cannot_be_rounded_is_refused(pipe, tmp_path):
    pipe.use_float8()
    with pytest.raises(ValueError, match="rounded to 8-bit floats already"):
        pipe.use_float8(und=True)
    with pytest.raises(ValueError, match="rounded to 8-bit floats and cannot be exported"):
        pipe.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"multiples of 16, got 16 x 24 \(0\)"):
        round_linears(nn.Sequential(nn.Linear(16, 24)))
    with pytest.raises(ValueError, match="one or two layers"):
        round_experts(Bagel(small_config(num_hidden_layers=2)))
    with pytest.raises(ValueError, match="one expert for both halves"):
        round_experts(Bagel(small_config(DENSE)))
    without = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", visual_gen=False)
    with pytest.raises(MissingHalfError, match="give und=True"):
        without.use_float8()


def test_the_command_line_rounds_what_it_uses(monkeypatch, tmp_path, capsys):
    rounded = []
    monkeypatch.setattr("bagel.modeling.float8.round_linears", lambda module: rounded.append(module) or 1)
    monkeypatch.chdir(tmp_path)
    common = ["--model", "demo", "--device", "cpu", "--float8"]
    assert main(["text-to-image", "a red circle", "--steps", "3", *common]) == 0
    drawing = len(rounded)
    picture = next(tmp_path.iterdir())
    assert main(["understand", str(picture), "--question", "what?", "--max-new-tokens", "2", *common]) == 0
    assert drawing == len(rounded) - drawing == 6  # inner layers of gen experts, then of und experts
