"""DFloat11: units of the released encoder are read and written byte for byte, and everything else comes back whole."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file
from torch import Tensor

from bagel.checkpoint import official_shapes
from bagel.config import BAGEL_7B
from bagel.formats import dfloat11
from bagel.formats.dfloat11 import Unit, check, decode, encode

FOLDER = REFERENCE / "dfloat11"
STORED = load_file(FOLDER / "units.safetensors")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
UNITS = {
    name: Unit(*(STORED[f"{name}.{part}"] for part in Unit._fields))
    for name in sorted({key.partition(".")[0] for key in STORED})
}
RNG = torch.Generator().manual_seed(0)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two bfloat16 tensors are alike bit for bit, signs of zeros included."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def normal(*shape: int, std: float = 0.02) -> Tensor:
    return (torch.randn(*shape, generator=RNG) * std).bfloat16()


def of_patterns(patterns: Tensor) -> Tensor:
    return patterns.to(torch.int16).view(torch.bfloat16)


def fibonacci() -> Tensor:
    """Exponents that occur as often as makes a code as long as can be: 26 of them."""
    counts = [1, 1]
    while len(counts) < 26:
        counts.append(counts[-1] + counts[-2])
    exponents = torch.repeat_interleave(torch.arange(26), torch.tensor(counts))
    return of_patterns(exponents[torch.randperm(len(exponents), generator=RNG)] << 7)


ADVERSARIAL = {
    "normal": normal(301, 257),
    "one weight": normal(1),
    "a single exponent": torch.ones(70_001, dtype=torch.bfloat16),
    "two exponents": torch.tensor([1.0, -2.0]).bfloat16().repeat(40_000),
    "zeros of both signs": torch.tensor([0.0, -0.0]).bfloat16().repeat(5_000),
    "denormals": of_patterns(torch.randint(0, 128, (9_999,), generator=RNG)),
    "everything that can be held": of_patterns(
        torch.cat([torch.arange(240 * 128), torch.arange(240 * 128) - 2**15])[torch.randperm(61_440, generator=RNG)]
    ),
    "long codes": fibonacci(),
    "mostly zeros": normal(40_000) * (torch.rand(40_000, generator=RNG) > 0.97),
}


# Units of the released encoder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_released_units_are_read_bit_for_bit(name):
    unit = check(UNITS[name], name)
    hashes = [value["sha256"] for key, value in EXPECTED.items() if key.startswith(f"{name}.")]
    weights, starts = decode(unit), unit.starts
    matrices = [weights[a:b] for a, b in itertools.pairwise(starts)]
    assert [hashlib.sha256(matrix.view(torch.int16).numpy().tobytes()).hexdigest() for matrix in matrices] == hashes


@pytest.mark.parametrize("name", UNITS)
def test_units_are_written_as_the_released_encoder_writes_them(name):
    unit = UNITS[name]
    shapes = [value["shape"] for key, value in EXPECTED.items() if key.startswith(f"{name}.")]
    starts, weights = unit.starts, decode(unit)
    matrices = [weights[a:b].view(shape) for a, b, shape in zip(starts, starts[1:], shapes, strict=False)]
    for part, found, wanted in zip(Unit._fields, encode(matrices), unit, strict=True):
        assert torch.equal(found, wanted), part


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_everything_comes_back(name):
    weights = ADVERSARIAL[name]
    unit = check(encode([weights]))
    assert same(decode(unit), weights.flatten())
    assert unit.encoded_exponent.numel() < weights.numel() + 32


def test_codes_are_as_long_as_the_format_allows():
    assert encode([ADVERSARIAL["long codes"]]).luts[-1].max() == 26  # beside the end's own
    counts, codes = [1, 1], None
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    codes = dfloat11.encoding.huffman(dict(enumerate(counts)))
    assert max(code.length for code in codes.values()) == 32
    assert sum(2.0**-code.length for code in codes.values()) == 1.0
    luts = torch.from_numpy(dfloat11.encoding.luts_of(codes))
    for symbol, (length, bits) in codes.items():
        ahead = torch.tensor([bits << 32 - length]).numpy()
        found, size = dfloat11.unit.first_code(ahead, luts[:-1].numpy(), luts[-1].numpy())
        assert symbol < 0 or (int(found[0]), int(size[0])) == (symbol, length)


def test_a_code_is_optimal():
    counts = torch.bincount((ADVERSARIAL["normal"].view(torch.int16).flatten().int() >> 7) & 255)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log2()).sum()
    unit = encode([ADVERSARIAL["normal"]])
    bits = 8 * unit.encoded_exponent.numel() / unit.numel
    assert entropy <= bits < entropy + 0.1  # measured 0.03 more


@pytest.mark.parametrize("name", ["normal", "two exponents", "long codes", "everything that can be held"])
def test_ranges_are_the_weights_in_them(name):
    weights = ADVERSARIAL[name].flatten()
    unit, numel = encode([weights]), weights.numel()
    positions = dfloat11.unit.positions_of(unit)
    edges = {0, 1, 7, 4095, numel // 2, numel - 1, numel, *positions[:3].tolist(), int(positions[-2]) - 1}
    edges = sorted(edge for edge in edges if 0 <= edge <= numel)
    for start in edges:
        for stop in edges:
            if start < stop:
                piece = dfloat11.cut(unit, start, stop)
                assert same(dfloat11.decode_piece(piece), weights[start:stop]), (start, stop)
    assert len(dfloat11.cut(unit, 5, 6).positions) == 2  # one chunk is enough for one weight
    inner = dfloat11.cut(unit, numel // 3, numel)
    assert same(dfloat11.decode_piece(inner, 11, 4_321), weights[numel // 3 :][11:4_321])


def test_matrices_of_a_unit_follow_each_other():
    matrices = [normal(3, 50), normal(70, 81), normal(9)]
    unit = check(encode(matrices))
    assert unit.starts == [0, 150, 5820, 5829]
    for matrix, start, stop in zip(matrices, unit.starts, unit.starts[1:], strict=False):
        assert same(decode(unit, start, stop), matrix.flatten())
    out = torch.zeros(70, 81, dtype=torch.bfloat16)
    decode(unit, 150, 5820, out=out)
    assert same(out, matrices[1])


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (7, 6), (-1, 5), (0, 10**9)])
def test_ranges_outside_are_refused(start, stop):
    with pytest.raises(IndexError, match="were asked for of a unit of"):
        decode(UNITS["tiny"], start, stop)


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -(2.0**113), 2.0**120])
def test_what_cannot_be_held_is_refused(weight):
    with pytest.raises(ValueError, match=r"^1 weights are NaN, infinite or of magnitude 2\*\*113"):
        encode([torch.tensor([1.0, weight, 2.0**112]).bfloat16()])


def test_other_types_and_nothing_are_refused():
    with pytest.raises(ValueError, match=r"holds bfloat16 weights, got torch\.float32"):
        encode([torch.ones(3)])
    for nothing in ([], [torch.ones(0).bfloat16()]):
        with pytest.raises(ValueError, match="needs at least one matrix, and no empty one"):
            encode(nothing)


# Damage ---------------------------------------------------------------------------------------------------------------

GOOD = encode([normal(60_000), normal(7_000)])
LUTS = GOOD.luts.clone()


def changed(tensor: Tensor, index, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("part", "tensor", "sentence"),
    [
        ("encoded_exponent", GOOD.encoded_exponent.int(), "is int32 .*, not uint8 of one axis"),
        ("luts", GOOD.luts[-1], "is uint8 .*, not uint8 of two axes"),
        ("split_positions", GOOD.split_positions.int(), "is int32 .*, not int64"),
        ("sign_mantissa", GOOD.sign_mantissa[:0], "has 0 bytes"),
        ("gaps", GOOD.gaps[:-1], "bytes of encoded_exponent need"),
        ("output_positions", GOOD.output_positions[:-4], "bytes of encoded_exponent need"),
        ("split_positions", torch.tensor([60_000, 60_000]), "does not rise between 0 and 67000"),
        ("split_positions", torch.tensor([67_000]), "does not rise between 0 and 67000"),
        ("luts", LUTS[:, :200].contiguous(), r"has shape \(\d, 200\)"),
        ("luts", changed(LUTS, (-1, 120), 33), "gives lengths other than 1 to 32"),
        ("luts", changed(LUTS, (-1, 250), 9), "or codes of exponents of 240"),
        ("luts", changed(LUTS, (0, 3), 240), r"points to more than the \d tables"),
        ("output_positions", changed(GOOD.output_positions, 0, 1), "does not rise from 0 to the 67000 weights"),
        ("output_positions", changed(GOOD.output_positions, -4, 1), "does not rise from 0 to the 67000 weights"),
        ("output_positions", changed(GOOD.output_positions, 5, 96), "gives chunk 0 24... codes, which no chunk can"),
        ("sign_mantissa", GOOD.sign_mantissa[:-1], "does not rise from 0 to the 66999 weights"),
    ],
)
def test_parts_that_do_not_fit_are_told_in_a_sentence(part, tensor, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        check(GOOD._replace(**{part: tensor}), "layer 7")
    assert str(caught.value).startswith("layer 7 is no DFloat11 unit: ")
    assert str(caught.value).endswith("fetch or convert it again")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_the_stream_is_found_unless_a_window_hides_it():
    weights, told = decode(GOOD), 0
    for bit in range(3, 8 * 4096 * 5, 2_557):
        stream = GOOD.encoded_exponent.clone()
        stream[bit // 8] ^= 128 >> bit % 8
        broken = check(GOOD._replace(encoded_exponent=stream))
        try:
            found = decode(broken)
        except ValueError as error:
            sentence = str(error)
        else:  # as many codes, of the same length together, took the place of some
            differ = (found != weights).nonzero()
            assert differ.max() - differ.min() < 32
            continue
        told += 1
        assert sentence.startswith("a DFloat11 stream is damaged: ")
        assert "\n" not in sentence
    assert told > 20  # measured 27 of 65; files carry no checksums


def test_wrong_positions_and_gaps_are_found():
    for part, index in (("gaps", 40), ("output_positions", 4)):
        wrong = getattr(GOOD, part).clone()
        wrong[index] ^= 16
        with pytest.raises(ValueError, match="a DFloat11 stream is damaged: "):
            decode(check(GOOD._replace(**{part: wrong})))


# Files ----------------------------------------------------------------------------------------------------------------

KEYS = official_shapes(BAGEL_7B)
CONFIG = {
    "dfloat11_config": {
        "version": "0.2.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": {
            r"language_model\.model\.embed_tokens": [],
            r"language_model\.model\.layers.\d+": [
                *(f"self_attn.{part}_proj" for part in "qkvo"),
                *(f"self_attn.{part}_proj_moe_gen" for part in "qkvo"),
                *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
                *("mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"),
            ],
            r"language_model\.lm_head": [],
            r"vit_model": [
                *(
                    f"vision_model.encoder.layers.{layer}.{part}"
                    for layer in range(26)
                    for part in (*(f"self_attn.{x}_proj" for x in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
                ),
                "vision_model.embeddings.patch_embedding",
            ],
        },
    }
}
"""What the release of BAGEL in this format says."""


def test_the_released_models_section_is_written_as_its_release_has_it():
    assert {"dfloat11_config": dfloat11.config_section(KEYS)} == CONFIG
    assert list(dfloat11.config_section(KEYS)["pattern_dict"]) == list(CONFIG["dfloat11_config"]["pattern_dict"])


def test_the_released_models_files_hold_what_its_release_has_in_them():
    files = dfloat11.files_for(KEYS)
    assert len(files) == 28 + 4
    layer = files["language_model_model_layers_3.safetensors"]
    assert layer.prefix == "language_model.model.layers.3"
    assert (len(layer.weights), len(layer.plain)) == (14, 14)
    assert files["language_model_lm_head.safetensors"].weights == ("language_model.lm_head.weight",)
    assert len(files["vit_model.safetensors"].weights) == 157
    assert "vit_model.vision_model.embeddings.position_embedding.weight" in files["vit_model.safetensors"].plain
    assert len(files["model.safetensors"].plain) == 16
    held = [key for file in files.values() for key in (*file.weights, *file.plain)]
    assert sorted(held) == sorted(KEYS)


def test_the_units_of_a_checkpoint_are_found_with_their_weights():
    keys = [
        f"{file.prefix}.{part}" for file in dfloat11.files_for(KEYS).values() for part in Unit._fields if file.prefix
    ]
    units = dfloat11.units_of([*keys, "llm2vae.weight"], dfloat11.read_config(CONFIG))
    assert units == {file.prefix: file.weights for file in dfloat11.files_for(KEYS).values() if file.prefix}
    with pytest.raises(ValueError, match=r"unit vit_model lacks gaps; fetch it again"):
        dfloat11.units_of([key for key in keys if key != "vit_model.gaps"], dfloat11.read_config(CONFIG))
    with pytest.raises(ValueError, match=r"no pattern of dfloat11_config says what the DFloat11 unit vit_model holds"):
        dfloat11.units_of(keys, {r"language_model\..*": []})


def test_matrices_are_read_by_name_and_in_runs():
    names = [f"layer.{index}.weight" for index in range(3)]
    matrices = [normal(30, 70), normal(20, 70), normal(11, 5)]
    tensors = dfloat11.unit_tensors("layer", encode(matrices))
    opened = dfloat11.open_unit(tensors.__getitem__, "layer", names)
    for name, matrix in zip(names, matrices, strict=True):
        assert same(opened.dense(name), matrix.flatten())
    both = torch.cat(matrices[:2])
    assert same(dfloat11.decode_piece(opened.piece(names[:2])), both.flatten())
    with pytest.raises(ValueError, match="do not follow each other in their DFloat11 unit"):
        opened.piece([names[0], names[2]])
    with pytest.raises(ValueError, match="holds 3 matrices by split_positions, but 2 by dfloat11_config"):
        dfloat11.open_unit(tensors.__getitem__, "layer", names[:2])


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (None, r"no dfloat11_config: weights of DFloat11 0\.1\.0, which lack it"),
        ({"version": "0.1.0"}, r"DFloat11 0\.1\.0 cannot be read"),
        ({"threads_per_block": [256]}, r"has threads_per_block \[256\], and only \[512\]"),
        ({"bytes_per_thread": 4}, "has bytes_per_thread 4, and only 8"),
        ({"bytes_per_thread": None}, "has bytes_per_thread None, and only 8"),
        ({"pattern_dict": ["x"]}, "has no pattern_dict of lists"),
        ({"pattern_dict": {"x": "y"}}, "has no pattern_dict of lists"),
        ({"pattern_dict": {"(": []}}, r"has a broken pattern, '\('"),
    ],
)
def test_sections_of_another_kind_are_refused(section, sentence):
    config = {} if section is None else {"dfloat11_config": CONFIG["dfloat11_config"] | section}
    with pytest.raises(ValueError, match=sentence):
        dfloat11.read_config(config)


def test_newer_versions_have_the_same_layout():
    section = CONFIG["dfloat11_config"] | {"version": "0.5.0", "threads_per_block": 512}
    assert dfloat11.read_config({"dfloat11_config": section}) == {
        pattern: tuple(names) for pattern, names in section["pattern_dict"].items()
    }
