"""Within a limit of memory: the same bits, never more than the limit, and nothing wrong after errors."""

from __future__ import annotations

import copy
import gc
import itertools
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, load_pipeline
from PIL import Image
from torch import nn

from bagel.checkpoint import CheckpointError
from bagel.demo import CHECKPOINT as DEMO
from bagel.memory import NotEnoughMemoryError
from bagel.memory.choice import chosen, nbytes, passing
from bagel.memory.movers import OrderlyMover, mover_for
from bagel.memory.placement import experts_of, place, weight_bytes
from bagel.memory.plan import Planner, Request
from bagel.memory.sizes import GIB, parse_bytes
from bagel.memory.units import Piece, Unit
from bagel.pipeline import BagelPipeline

HOST = torch.device("cpu")
PHOTO = Image.effect_noise((70, 52), 80).convert("RGB")
SMALL = {"height": 32, "width": 48, "num_timesteps": 4, "progress": False}


def limited(variant: str, share: float, dtype: torch.dtype = torch.float32) -> BagelPipeline:
    """A pipeline within the least memory that its weights can do with (share 0), up to what they all take (1)."""
    pipe = load_pipeline.__wrapped__(variant, dtype)  # one of its own, which may be changed
    supply = place(pipe.model, pipe.vae, HOST, limit=0, smallest=0)
    units = [unit for pair in supply.layers for unit in pair if unit is not None]
    head = supply.guests[pipe.model.decoder.lm_head].nbytes
    least = max(*(guest.nbytes for guest in supply.guests.values()), head + passing(units, 2))
    every = nbytes(units) + nbytes(supply.guests.values())
    supply.limit, supply.work = int(supply.fixed + least + share * (every - least)), Nothing()
    supply._cached = lambda: 0  # caches are small, but not beside weights of this size
    return pipe


class Nothing:
    """The work of a model that computes in no memory at all."""

    def __call__(self, und: int, gen: int) -> int:
        return 0

    def seeing(self, _: torch.Tensor) -> int:
        return 0

    encoding = decoding = seeing


def results(pipe: BagelPipeline) -> list:
    drawn = pipe.text_to_image("a red circle", seed=1, **SMALL)
    several = pipe.text_to_image(["one", "two words"], seed=[1, 2], **SMALL)
    edited = pipe.edit(PHOTO, "make it blue", seed=3, **SMALL)
    planned = pipe.text_to_image("a red circle", seed=4, think=True, max_think_tokens=6, **SMALL)
    answer = pipe.understand(PHOTO, "What is it?", max_new_tokens=7, progress=False)
    latents = [result.latents for result in (drawn, *several, edited, planned)]
    return [latents, planned.text, answer.token_ids]


def same(found: list, wanted: list) -> bool:
    return all(a.equal(b) for a, b in zip(found[0], wanted[0], strict=True)) and found[1:] == wanted[1:]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_and_stay_within_the_limit(variant, share, dtype):
    wanted = results(load_pipeline(variant, dtype))
    pipe = limited(variant, share, dtype)
    supply = pipe.model.decoder.supply
    most = 0
    new_slot = supply._new_slot

    def counted(size):
        nonlocal most
        slot = new_slot(size)
        most = max(most, supply.fixed + supply._taken() + size)
        return slot

    supply._new_slot = counted
    assert same(results(pipe), wanted)
    assert supply.moves > 0
    assert most <= supply.limit


def test_what_stays_is_copied_once():
    pipe = limited("tiny", 1.0)
    supply = pipe.model.decoder.supply
    started = []
    start = supply.mover.start
    supply.mover.start = lambda fill, *rest: (started.append(fill.__self__), start(fill, *rest))[1]
    pipe.text_to_image("a red circle", seed=1, **SMALL)
    experts = set(itertools.chain(*supply.layers))
    assert len([unit for unit in started if unit in experts]) == len(experts)


def test_a_text_leaves_out_the_gen_experts():
    pipe = limited("tiny", 0.2)
    pipe.understand(PHOTO, "What is it?", max_new_tokens=3, progress=False)
    supply = pipe.model.decoder.supply
    assert not [pair[1] for pair in supply.layers if pair[1] in supply.placed]


def test_a_device_with_one_queue_of_its_own():
    pipe = limited("tiny", 0.1)
    pipe.model.decoder.supply.mover = mover_for(torch.device("mps"))
    assert isinstance(pipe.model.decoder.supply.mover, OrderlyMover)
    assert same(results(pipe), results(load_pipeline("tiny")))


def test_an_error_half_way_leaves_nothing_wrong():
    pipe, wanted = limited("tiny", 0.2), results(load_pipeline("tiny"))

    class Broken(RuntimeError):
        pass

    def fail(*_):
        raise Broken

    hook = pipe.model.decoder.layers[1].register_forward_hook(fail)
    with pytest.raises(Broken) as caught:  # the traceback is held, as a notebook would
        pipe.text_to_image("a red circle", seed=1, **SMALL)
    hook.remove()
    assert same(results(pipe), wanted)
    assert caught.value


@pytest.mark.parametrize("files", [False, True])
def test_stopping_at_any_point_of_placing_weights_leaves_nothing_wrong(monkeypatch, files):
    if files:
        wanted, pipe = BagelPipeline.from_pretrained(DEMO, device="cpu"), from_files(DEMO)
    else:
        wanted, pipe = load_pipeline("tiny"), limited("tiny", 0.1)
    options = {"num_timesteps": 2, "progress": False, "seed": 1}
    latents = wanted.text_to_image("a red circle", **options).latents
    for name in ("place", "fill"):
        for point in (1, 2, 4):
            original, calls = getattr(Unit, name), itertools.count(1)

            def stopped(self, memory, original=original, calls=calls, point=point):
                if next(calls) == point:
                    raise KeyboardInterrupt
                original(self, memory)

            with monkeypatch.context() as patch:
                patch.setattr(Unit, name, stopped)
                with pytest.raises(KeyboardInterrupt):
                    pipe.text_to_image("a red circle", **options)
            assert pipe.text_to_image("a red circle", **options).latents.equal(latents), (name, point)


def test_stopping_a_stream_and_drawing_between_its_tokens():
    plain, pipe = load_pipeline("tiny"), limited("tiny", 0.1)
    found = []
    for own in (plain, pipe):
        with own.session() as session:
            session.read("tell me a story")
            stream = session.stream(max_new_tokens=12)
            pieces = [next(stream) for _ in range(3)]
            image = own.text_to_image("a red circle", seed=1, **SMALL)
            pieces += [next(stream) for _ in range(2)]
            stream.close()
            found.append((pieces, image.latents.tolist()))
    assert found[0] == found[1]


def test_two_threads_share_one_model():
    pipe, wanted = limited("tiny", 0.1), load_pipeline("tiny")
    found = {}

    def draw(seed):
        found[seed] = pipe.text_to_image("a red circle", seed=seed, **SMALL).latents

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert found[seed].equal(wanted.text_to_image("a red circle", seed=seed, **SMALL).latents)


def test_too_small_a_limit_is_one_sentence_and_can_be_raised():
    pipe = limited("tiny", 0.2)
    supply = pipe.model.decoder.supply
    limit, supply.limit = supply.limit, supply.fixed
    with pytest.raises(NotEnoughMemoryError, match=r"more than the limit of .* give more with memory="):
        pipe.text_to_image("a red circle", seed=1, **SMALL)
    supply.limit = limit
    assert same(results(pipe), results(load_pipeline("tiny")))


def test_room_is_made_more_than_once_before_a_forward():
    pipe = limited("tiny", 0.6)
    pipe.understand([], "What?", max_new_tokens=2, progress=False)
    supply = pipe.model.decoder.supply
    free = supply.limit - supply.fixed - supply._taken()
    for share in (1, 2, 3):  # as for the caches of two branches, then for what is denoised
        supply.make_room(free + share * supply.layers[0][0].nbytes)
    assert supply._taken() <= supply.limit - supply.fixed - free - 3 * supply.layers[0][0].nbytes
    assert same(results(pipe), results(load_pipeline("tiny")))


def test_caches_count_while_they_live():
    pipe = limited("tiny", 0.6)
    supply = pipe.model.decoder.supply
    del supply._cached
    before = supply._cached()
    with pipe.session() as session:
        session.read("a few words")
        own = {id(cache): cache for cache in supply.caches}.values()
        assert supply._cached() == before + sum(cache.keys.nbytes + cache.values.nbytes for cache in own) > before
    del session, own
    gc.collect()
    assert supply._cached() == before


def test_calling_the_model_from_within_itself_is_refused():
    pipe = limited("tiny", 0.2)
    decoder = pipe.model.decoder
    ids = torch.zeros(1, dtype=torch.long)
    decoder.layers[0].register_forward_hook(lambda *_: decoder.next_logits(ids, ids, None))
    with pytest.raises(RuntimeError, match="cannot be called from within itself"):
        pipe.text_to_image("a red circle", seed=1, **SMALL)


def test_a_hook_may_use_the_head_and_the_autoencoder_between_layers():
    def found(pipe):
        seen, latents = [], torch.ones(1, 16, 4, 6)

        def look(_, args, x):
            seen.append(pipe.model.logits(x.und).clone())
            seen.append(pipe.vae.decode(latents).clone())

        hooks = [layer.register_forward_hook(look) for layer in pipe.model.decoder.layers]
        ids = pipe.understand(PHOTO, "What?", max_new_tokens=2, progress=False).token_ids
        for hook in hooks:
            hook.remove()
        return seen, ids

    wanted = found(load_pipeline.__wrapped__("tiny"))
    for share in (0.25, 0.5):
        pipe = limited("tiny", share)
        assert same(found(pipe), wanted)
        assert same(results(pipe), results(load_pipeline("tiny")))
    pipe = limited("tiny", 0.0)  # the autoencoder does not fit beside a layer that computes
    with pytest.raises(NotEnoughMemoryError, match="using the autoencoder needs"):
        found(pipe)


def test_threads_with_different_tasks_share_one_model():
    pipe, wanted, wrong = limited("tiny", 0.3), load_pipeline("tiny"), []
    tasks = [
        lambda own: own.understand(PHOTO, "What is it?", max_new_tokens=7, progress=False).token_ids,
        lambda own: own.text_to_image("a red circle", seed=1, **SMALL).latents.tolist(),
        lambda own: own.edit(PHOTO, "blue", seed=2, **SMALL).latents.tolist(),
    ]

    def work(task):
        expected = task(wanted)
        wrong.extend(index for index in range(6) if task(pipe) != expected)

    threads = [threading.Thread(target=work, args=(task,)) for task in (*tasks, tasks[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_wait_while_a_guest_computes():
    pipe = limited("tiny", 0.0)
    supply, decoder = pipe.model.decoder.supply, pipe.model.decoder
    for module, call in (
        (decoder.lm_head, lambda: pipe.model.logits(torch.ones(1, decoder.config.hidden_size))),
        (pipe.vae.decoder.conv_out, lambda: pipe.vae.decode(torch.ones(1, 16, 2, 2))),
    ):
        gone = threading.Event()
        other = threading.Thread(target=lambda gone=gone: (supply.release(), gone.set()))
        early = []

        def before(*_, other=other, gone=gone, early=early):
            other.start()
            early.append(gone.wait(0.2))

        hook = module.register_forward_pre_hook(before)
        with torch.inference_mode():
            call()
        hook.remove()
        other.join()
        assert early == [False]
        assert gone.is_set()


def test_caches_are_counted_while_other_threads_make_some():
    pipe = BagelPipeline.from_pretrained(REFERENCE / "tiny" / "checkpoint", device="cpu")
    supply = place(pipe.model, pipe.vae, HOST, limit=2**40, smallest=0)
    made, wrong, done = [pipe.model.new_context() for _ in range(200)], [], threading.Event()

    def count():
        while not done.is_set():
            try:
                supply.make_room(0)
            except RuntimeError as error:
                wrong.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=count)
        thread.start()
        made += [pipe.model.new_context() for _ in range(2000)]
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not wrong
    assert len(supply.caches) == len(made)


def test_gradients_are_refused():
    pipe = limited("tiny", 0.2)
    decoder = pipe.model.decoder
    packed = pipe.processor.pack([[pipe.processor.text("a red circle")]], starts=[0])
    assert pipe.model(packed).und.isfinite().all()
    decoder.layers[0].und.mlp.down_proj.weight.requires_grad_(True)
    with torch.no_grad():
        assert pipe.model(packed).und.isfinite().all()
    with pytest.raises(RuntimeError, match="has no gradients: load it without memory"):
        pipe.model(packed)


def test_a_copy_is_refused():
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(limited("tiny", 0.2).model)


def test_release_gives_everything_back():
    pipe = limited("tiny", 0.2)
    pipe.text_to_image("a red circle", seed=1, **SMALL)
    supply = pipe.model.decoder.supply
    supply.release()
    assert supply._taken() == 0
    for unit in itertools.chain(*supply.layers):
        for part in unit.parts:
            assert getattr(part.owner, part.leaf).data_ptr() == part.home.data_ptr()


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


def from_files(folder: Path, dtype: str = "float32") -> BagelPipeline:
    """A pipeline that reads about half of its experts again and again, in a limit that does not count its caches."""
    whole = BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    left = [name for name, _ in whole.model.named_parameters() if "layers" in name and "proj.weight" in name]
    nbytes_left = sum(whole.model.get_parameter(name).nbytes for name in left)
    size = weight_bytes(whole.model, whole.vae)
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype=dtype, memory=size - nbytes_left // 2)
    pipe.model.decoder.supply.work = Nothing()
    pipe.model.decoder.supply.make_room = lambda _: None
    pipe.model.decoder.supply._cached = lambda: 0
    return pipe


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
