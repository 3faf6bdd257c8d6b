"""Within a limit of memory: the same bits, never more than the limit, and nothing wrong after errors."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading

import pytest
import torch
from conftest import REFERENCE, load_pipeline
from limited_models import HOST, PHOTO, SMALL, from_files, limited, results, same

from bagel.demo import CHECKPOINT as DEMO
from bagel.memory import NotEnoughMemoryError
from bagel.memory.movers import OrderlyMover, mover_for
from bagel.memory.placement import place
from bagel.memory.units import Unit
from bagel.pipeline import BagelPipeline


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
