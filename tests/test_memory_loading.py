"""Limits of memory before anything is computed: units and their files, plans, sizes, loading."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from conftest import REFERENCE, load_pipeline
from limited_models import HOST, SMALL, Nothing, from_files, limited, results, same
from torch import nn

from bagel.checkpoint import CheckpointError
from bagel.demo import CHECKPOINT as DEMO
from bagel.memory import NotEnoughMemoryError
from bagel.memory.choice import chosen, nbytes, passing
from bagel.memory.placement import experts_of, place, weight_bytes
from bagel.memory.plan import Planner, Request
from bagel.memory.sizes import GIB, parse_bytes
from bagel.memory.units import Piece, Unit
from bagel.pipeline import BagelPipeline

# Units ----------------------------------------------------------------------------------------------------------------


def test_a_unit_is_filled_from_files_piece_by_piece():
    linear = nn.Linear(6, 10, bias=False, device="meta", dtype=torch.bfloat16)
    stored = torch.randn(10, 6, dtype=torch.float32)
    read = []

    def rows(first, last):
        read.append((first, last))
        return stored[4 + first : 4 + last]

    pieces = [Piece(0, 4, lambda first, last: stored[first:last]), Piece(4, 6, rows)]
    unit = Unit("test", [linear], pieces={(linear, "weight"): pieces}, smallest=0)
    memory = torch.empty(unit.nbytes, dtype=torch.uint8)
    unit.fill(memory)
    unit.place(memory)
    assert linear.weight.equal(stored.bfloat16())
    assert read == [(0, 6)]
    unit.place(None)
    assert linear.weight.is_meta


def test_what_stays_is_spread_evenly_and_fits():
    units = [Unit(str(i), [nn.Linear(16, 16, bias=False)], smallest=0) for i in range(28)]
    one = units[0].nbytes
    for room in range(2, 30):
        stays, slots = chosen(units, room * one)
        assert nbytes(stays) + slots <= room * one
        assert len(stays) == (28 if room >= 28 else room - slots // one)
        if 6 < len(stays) < 28:
            places = [index for index, unit in enumerate(units) if unit in stays]
            gaps = [b - a for a, b in itertools.pairwise(places)]
            assert max(gaps) - min(gaps) <= 1
    assert chosen(units, one) is None
    assert passing(units, 3) == 3 * one


# Planning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("8GiB", 8 * GIB),
        ("7.5 gb", 7_500_000_000),
        ("512MiB", 2**29),
        ("500m", 5e8),
        (2**20, 2**20),
        ("2000000", 2_000_000),
    ],
)
def test_sizes_are_understood(size, found):
    assert parse_bytes(size) == found


@pytest.mark.parametrize("size", ["eight", "8 GiBs", "-1GiB", "", "8,5GB", "GB", "4TB", "1e9"])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="memory must be a size"):
        parse_bytes(size)


@pytest.mark.parametrize("size", ["0", "8", 1, "900 KB"])
def test_sizes_without_their_unit_are_refused(size):
    with pytest.raises(ValueError, match=r'too little for anything: add a unit, such as "8GiB"'):
        parse_bytes(size)


@pytest.mark.parametrize("size", [True, 8.5, None])
def test_other_types_are_refused(size):
    with pytest.raises(TypeError, match="memory must be a size"):
        parse_bytes(size)


def full_size() -> Planner:
    from bagel import BAGEL_7B
    from bagel.modeling import Bagel
    from bagel.vae import Autoencoder

    with torch.device("meta"):
        assert BAGEL_7B.vae_config is not None
        return Planner(Bagel(BAGEL_7B).bfloat16(), Autoencoder(BAGEL_7B.vae_config).bfloat16(), torch.device("cuda"))


def test_plans_of_the_released_model():
    planner = full_size()
    arrive = []
    for limit in (6, 8, 12, 16, 24, 28, 32):
        plan = planner.plan(limit * GIB)
        assert plan.drawing is not None
        assert sum(plan.drawing) == nbytes(itertools.chain(*planner.layers))
        arrive.append(plan.drawing[1])
    assert arrive == sorted(arrive, reverse=True)
    assert arrive[-1] == 0
    fits, splits = planner.plan(32 * GIB), planner.plan(24 * GIB)
    assert fits.drawing[1] == fits.writing[1] == 0
    assert splits.drawing[1] > 0
    assert "all they need stays" in planner.plan(16 * GIB).sentence()  # texts
    assert "too little" in planner.plan(GIB).sentence()
    least = planner.least()
    assert planner.plan(least - GIB // 4).drawing is None
    assert planner.least(Request(branches=3)) > least
    painter = planner.painter + planner.work.finishing(Request())  # it has to fit by itself, too
    assert least >= planner.fixed + planner.slack + painter
    assert planner.least(Request(side=512)) < least


def test_units_hold_every_large_weight_of_the_experts():
    model = load_pipeline("tiny").model
    held = sum(part.home.numel() for pair in experts_of(model, smallest=0) for unit in pair for part in unit.parts)
    assert held == sum(p.numel() for p in model.decoder.layers.parameters())


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_within_a_limit_reads_from_the_files_again_and_again(dtype):
    whole = BagelPipeline.from_pretrained(DEMO, device="cpu", dtype=dtype)
    pipe = from_files(DEMO, dtype=dtype)
    supply = pipe.model.decoder.supply
    assert any(parameter.is_meta for parameter in pipe.model.parameters())
    assert same(results(pipe), results(whole))
    assert supply.fixed + supply._taken() <= supply.limit
    assert "MiB" in pipe.placement


def test_what_fits_is_loaded_as_ever():
    pipe = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu", memory="8GiB")
    assert pipe.model.decoder.supply is None
    assert pipe.placement == "all weights stay on cpu"


def test_within_a_limit_weights_can_be_exported_unless_they_are_in_files(tmp_path):
    pipe = limited("tiny", 0.1)
    pipe.text_to_image("a red circle", seed=1, **SMALL)
    pipe.save_pretrained(tmp_path / "out")
    again = BagelPipeline.from_pretrained(tmp_path / "out", device="cpu")
    for (name, a), b in zip(again.model.named_parameters(), load_pipeline("tiny").model.parameters(), strict=True):
        assert a.equal(b), name
    pipe = from_files(DEMO)
    with pytest.raises(ValueError, match="reads its weights from its files"):
        pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="load it quantised"):
        pipe.use_float8()


def test_a_file_that_vanishes_is_one_sentence(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    pipe = from_files(folder)
    (folder / "ema.safetensors").rename(folder / "gone")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        pipe.understand([], "What?", max_new_tokens=2, progress=False)
    (folder / "gone").rename(folder / "ema.safetensors")
    assert pipe.understand([], "What?", max_new_tokens=2, progress=False).text is not None


@pytest.mark.parametrize("form", ["int8", "nf4", "float8"])
def test_quantised_weights_arrive_too(form):
    wanted = BagelPipeline.from_pretrained(DEMO, device="cpu", quantize=form)
    pipe = BagelPipeline.from_pretrained(DEMO, device="cpu", quantize=form)
    supply = place(pipe.model, pipe.vae, HOST, limit=2**40, smallest=0)
    units = [unit for pair in supply.layers for unit in pair if unit is not None]
    guests = max(unit.nbytes for unit in supply.guests.values())
    supply.limit, supply.work = supply.fixed + guests + 6 * max(unit.nbytes for unit in units), Nothing()
    supply._cached = lambda: 0
    assert same(results(pipe), results(wanted))
    assert supply.moves > 0
    assert weight_bytes(pipe.model, None) < 0.8 * weight_bytes(load_pipeline_of_demo().model, None)


def load_pipeline_of_demo() -> BagelPipeline:
    return BagelPipeline.from_pretrained(DEMO, device="cpu")


@pytest.mark.parametrize("form", ["int8", "nf4", "float8"])
def test_quantised_weights_that_memory_does_not_hold_are_refused_in_a_sentence(form):
    with pytest.raises(NotEnoughMemoryError, match=r"quantised weights are kept in memory: .* leave out quantize"):
        BagelPipeline.from_pretrained(DEMO, device="cpu", quantize=form, memory="2MB")


def test_formats_and_parts_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="no format named 'int7'"):
        BagelPipeline.from_pretrained(DEMO, device="cpu", quantize="int7")
    with pytest.raises(ValueError, match="parts of a model are"):
        BagelPipeline.from_pretrained(DEMO, device="cpu", quantize="int8", quantize_parts=("head",))
    with pytest.raises(ValueError, match="not both"):
        BagelPipeline.from_pretrained(DEMO, device="cpu", quantize="int8", convert=lambda name, linear: linear)


def test_a_limit_below_what_never_leaves_the_device_is_refused_at_loading():
    with pytest.raises(NotEnoughMemoryError, match=r"never leave cpu take .* MiB, more than the limit of 1\.0 MiB"):
        BagelPipeline.from_pretrained(DEMO, device="cpu", memory="1MiB")
