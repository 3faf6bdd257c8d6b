"""Sessions: several turns are one sequence, what the model says and draws enters it, and nothing is lost on errors."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, load_pipeline
from PIL import Image

from bagel import Session
from bagel.generation import draw_all, read_all, write_all
from bagel.generation.writing import Decoding
from bagel.modeling import Branch, Context, Denoiser
from bagel.options import EDIT, TEXT_TO_IMAGE, make_options
from bagel.packing import Frames, LatentImage, Segment
from bagel.sampling import TextSampling, flow_timesteps, integrate
from bagel.sampling.flow import Euler

PIPE = load_pipeline("tiny")
PHOTO, OTHER = (Image.effect_noise(size, 80).convert("RGB") for size in ((70, 52), (48, 64)))
SMALL = {"height": 32, "width": 48, "num_timesteps": 3}
UNGUIDED = {"cfg_text_scale": 1.0}


def read_at_once(segments: list[Segment]) -> Context:
    """A context that has read a whole sequence in a single pass."""
    context = PIPE.model.new_context()
    with torch.inference_mode():
        PIPE.model.prefill(PIPE.processor.pack([segments]), [context])
    return context


def next_ids(context: Context, limit: int) -> list[int]:
    chooser, generators = TextSampling(), [torch.Generator()]
    rounds = Decoding(PIPE.model, PIPE.tokenizer, [context], generators, chooser=chooser, limit=limit).rounds()
    return list(rounds)[-1][0].ids


def velocity_on(context: Context, x: torch.Tensor, t: float) -> torch.Tensor:
    """The velocity of an image of 32x48 pixels on a context, without guidance."""
    target = LatentImage(torch.zeros_like(x), PIPE.processor.grid(32, 48), noisy=True)
    with torch.inference_mode():
        denoiser = Denoiser(PIPE.model, [target], [Branch(0, context)], pack=PIPE.processor.pack)
        return PIPE.model.velocity(denoiser.states(x, t, (0,))[0])


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))


def everything_read(session: Session) -> list[Segment]:
    """The segments that a session has read, noted as they pass."""
    return session.heard  # pyright: ignore


@pytest.fixture
def session(monkeypatch) -> Session:
    """A session that notes every segment that enters its full context."""
    from bagel.generation.contexts import Contexts

    session = PIPE.session(seed=3, system_prompt="be brief")
    heard: list[Segment] = []
    add = Contexts.add
    monkeypatch.setattr(Contexts, "add", lambda own, entry: heard.append(entry.segment) or add(own, entry))
    session.heard = heard  # pyright: ignore
    return session


# One sequence ---------------------------------------------------------------------------------------------------------


def test_several_turns_are_the_sequence_read_at_once(session):
    first = session.read(PHOTO, "a riddle").write(max_new_tokens=5)
    drawn = session.read("draw it").draw(**SMALL)
    answer = session.read("and now?").write(max_new_tokens=6)
    velocity = session.fork().read("again").velocity(height=32, width=48, **UNGUIDED)
    segments = everything_read(session)
    assert [type(s).__name__ for s in segments] == [
        *("Text", "LatentImage", "ViTImage", "Text"),  # system prompt, photo, text
        *("Text", "Text"),  # the answer, the next text
        *("LatentImage", "ViTImage", "Text"),  # what was drawn, the question
        *("Text", "Text"),  # the fork's: the last answer and its text
    ]
    assert segments[4].ids.tolist()[1:-1] == list(first.token_ids)
    assert torch.equal(segments[6].latents, PIPE.processor.latents(drawn.latents).latents)
    assert next_ids(read_at_once(segments[:9]), 6) == list(answer.token_ids)
    assert_close(velocity(noise(), 0.7), velocity_on(read_at_once(segments), noise(), 0.7))


def test_a_drawn_image_enters_by_its_pixels_where_that_is_asked_for():
    session = PIPE.session(seed=3, reread="pixels").read("a riddle")
    drawn = session.draw(**SMALL)
    twin = PIPE.session(generator=torch.Generator()).read("a riddle")
    twin.generator.set_state(session.generator.get_state())
    twin.read(drawn.image, "and now?")
    session.read("and now?")
    assert torch.equal(session.contexts.full.held()[0], twin.contexts.full.held()[0])
    assert torch.equal(session.generator.get_state(), twin.generator.get_state())


def test_a_session_that_only_answers_reads_no_latents():
    alone = PIPE.session(draws=False).read(PHOTO, "what?")
    wanted = PIPE.understand(PHOTO, "what?", max_new_tokens=5)
    assert alone.write(max_new_tokens=5).token_ids == wanted.token_ids
    with pytest.raises(ValueError, match="reads images only to answer"):
        alone.draw(**SMALL)


# Guidance over turns (text-dropped: without the last text; image-dropped: all texts, no images) -----------------------


def tokens_of(session: Session, **options) -> dict[str, int]:
    """Tokens in the context of each branch of a drawing."""
    velocity = session.velocity(height=32, width=48, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), **options)
    denoiser = velocity.guided.states.__self__
    (names,) = velocity.guided.branches
    return {name: denoiser.branches[index].context.length for name, index in names.items()}


LENGTH = {text: len(PIPE.tokenizer.encode(text)) + 2 for text in ("a", "a riddle", "draw it", "no", "be brief")}


def test_the_last_text_alone_is_dropped_and_texts_of_all_turns_are_kept_without_images():
    session = PIPE.session(seed=1).read("a")
    session.draw(**SMALL)
    image = 6 + 2 + PIPE.processor.see(PIPE.processor.prepare(Image.new("RGB", (48, 32)))).length
    session.read("draw it")
    found = tokens_of(session)
    assert found["full"] == LENGTH["a"] + image + LENGTH["draw it"]
    assert found["text_dropped"] == LENGTH["a"] + image
    assert found["image_dropped"] == LENGTH["a"] + LENGTH["draw it"]


def test_an_answer_is_a_text_and_goes_with_the_text_before_it():
    session = PIPE.session().read("a")
    answer = len(session.write(max_new_tokens=3).token_ids) + 2
    assert tokens_of(session)["text_dropped"] == 0
    assert tokens_of(session)["full"] == LENGTH["a"] + answer


def test_a_plan_is_left_out_of_image_dropped_until_its_turn_is_over():
    session = PIPE.session().read(OTHER, "a")
    plan = session.think(max_think_tokens=4)
    found, kept = tokens_of(session), tokens_of(session, plan_in_image_dropped=True)
    length = len(PIPE.tokenizer.encode(plan)) + 2
    assert found["image_dropped"] == LENGTH["a"]
    assert kept["image_dropped"] == LENGTH["a"] + length
    assert found["full"] - found["text_dropped"] == LENGTH["a"] + length
    assert session.draw(**SMALL).text == plan
    assert tokens_of(session.read("draw it"))["image_dropped"] == LENGTH["a"] + length + LENGTH["draw it"]


def test_an_image_after_the_text_drops_nothing_and_the_turn_drops_all_texts():
    session = PIPE.session().read("a", OTHER)
    image = tokens_of(session)["full"] - LENGTH["a"]
    assert tokens_of(session)["text_dropped"] == tokens_of(session)["full"]
    assert tokens_of(session, drop="turn")["text_dropped"] == image
    session.read("a riddle")
    assert tokens_of(session)["text_dropped"] == LENGTH["a"] + image
    assert tokens_of(session, drop="turn")["text_dropped"] == image


def test_texts_without_images_keep_their_order_whatever_follows_a_plan():
    session = PIPE.session().read(OTHER, "a")
    plan = session.think(max_think_tokens=4)
    session.read("a riddle")
    kept = held_without_images(session, plan_in_image_dropped=True)
    assert_close(kept, held_of("a", plan, "a riddle"))
    assert_close(held_without_images(session), held_of("a", "a riddle"))
    session.draw(**SMALL)
    session.read("draw it")
    assert_close(held_without_images(session), held_of("a", plan, "a riddle", "draw it"))


def held_without_images(session: Session, **options) -> torch.Tensor:
    velocity = session.velocity(height=32, width=48, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), **options)
    denoiser, (names,) = velocity.guided.states.__self__, velocity.guided.branches
    return denoiser.branches[names["image_dropped"]].context.held()[0]


def held_of(*texts: str) -> torch.Tensor:
    return PIPE.session().read(*texts).contexts.full.held()[0]


@pytest.mark.parametrize(("pieces", "wanted"), [
    (("a", "draw it"), ("a", "no")),
    (("a", OTHER), ("no", OTHER)),  # the images of the turn are read again after it
    ((OTHER, "a"), (OTHER, "no")),
    ((OTHER,), (OTHER, "no")),
], ids=["texts", "image last", "image first", "image alone"])  # fmt: skip
def test_a_negative_prompt_stands_where_the_dropped_text_began(pieces, wanted):
    """The branch holds just what reading the wanted pieces gives."""
    given = {"posterior_noise": [torch.zeros(16, 10, 8)] if any(p is OTHER for p in pieces) else None}
    session = PIPE.session().read(*pieces, **given)
    velocity = session.velocity(height=32, width=48, negative_prompt="no", cfg_interval=(0.0, 1.0))
    denoiser, (names,) = velocity.guided.states.__self__, velocity.guided.branches
    branch = denoiser.branches[names["text_dropped"]].context
    twin = PIPE.session().read(*wanted, **given).contexts.full
    assert (branch.length, branch.position) == (twin.length, twin.position)
    assert_close(branch.held()[0], twin.held()[0])


# Forks and failures ---------------------------------------------------------------------------------------------------


def test_forks_go_their_own_ways():
    trunk = PIPE.session(seed=5).read(PHOTO, "a riddle")
    one, other = trunk.fork(), trunk.fork()
    first, second = one.read("a").draw(**SMALL), other.read("draw it").draw(**SMALL)
    again = trunk.read("a").draw(**SMALL)
    alone = PIPE.session(seed=5).read(PHOTO, "a riddle").read("draw it").draw(**SMALL)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(second.latents, alone.latents)
    assert not torch.equal(first.latents, second.latents)
    assert one.write(max_new_tokens=4).token_ids == trunk.write(max_new_tokens=4).token_ids


FAILURES = {
    "read": lambda s: s.read("more", PHOTO, posterior_noise=[torch.zeros(1)]),
    "draw": lambda s: s.draw(on_step=interrupt, **SMALL),
    "late": lambda s: s.draw(think=True, max_think_tokens=3, on_step=interrupt, **SMALL),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_the_session_stays_as_it_was(failure):
    session, twin = (PIPE.session(seed=5).read(PHOTO, "a riddle") for _ in range(2))
    with pytest.raises((ValueError, KeyboardInterrupt)):
        FAILURES[failure](session)
    assert torch.equal(session.draw(**SMALL).latents, twin.draw(**SMALL).latents)
    assert session.read("a").write(max_new_tokens=3) == twin.read("a").write(max_new_tokens=3)


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_an_abandoned_stream_has_said_enters_the_session():
    session = PIPE.session().read("a riddle")
    pieces = session.stream(max_new_tokens=20)
    said = next(pieces) + next(pieces)
    pieces.close()
    session.read("a")
    whole = PIPE.session().read("a riddle").write(max_new_tokens=20)
    assert whole.text.startswith(said)
    assert session.contexts.full.length < LENGTH["a riddle"] + len(whole.token_ids) + 2 + LENGTH["a"]


def test_a_session_is_reset_when_its_block_ends():
    with PIPE.session(system_prompt="be brief") as session:
        session.read("a").write(max_new_tokens=2)
    assert session.contexts.full.length == 0
    assert session.read("a").contexts.full.length == LENGTH["be brief"] + LENGTH["a"]


# What researchers ask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [False, True])
def test_log_probabilities_of_what_was_written_are_those_of_scoring_it(draws):
    session = PIPE.session(seed=2).read("a riddle")
    sampling = {"do_sample": True, "temperature": 2.0} if draws else {}
    written = session.fork().write(max_new_tokens=6, logprobs=True, **sampling)
    scored = session.score(written.token_ids)
    assert len(scored) == len(written.token_ids) + 1
    assert scored[:-1] == pytest.approx(written.logprobs, abs=1e-4)
    assert session.score("a") == session.score(PIPE.tokenizer.encode("a"))
    assert session.contexts.full.length == LENGTH["a riddle"]


def test_a_velocity_integrated_by_hand_is_the_drawing():
    session, twin = PIPE.session(seed=4).read("a riddle"), PIPE.session(seed=4).read("a riddle")
    velocity = twin.velocity(**SMALL)
    x = integrate(Euler(), velocity, velocity.noise(), flow_timesteps(3, shift=3.0))
    drawn = session.draw(**SMALL)
    assert torch.equal(PIPE.processor.image(x, 32, 48), drawn.latents)
    assert twin.decode(x, 32, 48).tobytes() == drawn.image.tobytes()


def test_latents_that_on_step_returns_are_gone_on_with():
    target, seen = noise(9), []

    def paint(step):
        seen.append(step.latents)
        return torch.cat([target[:3], step.next_latents[3:]])

    drawn = PIPE.session(seed=4).read("a riddle").draw(on_step=paint, **SMALL)
    tokens = PIPE.processor.latents(drawn.latents).latents
    assert torch.equal(tokens[:3], target[:3])
    assert torch.equal(seen[1][:3], target[:3])


def test_frames_are_denoised_as_a_group():
    """As training sees them: one time, full attention within the group, positions by their distances."""
    cells = PIPE.processor.grid(32, 48)
    x, t = torch.cat([noise(1), noise(2)]), 0.6
    target = Frames(tuple(LatentImage(part, cells, timestep=t, noisy=True) for part in x.split(6)), (3,))
    context = PIPE.session().read("a riddle").contexts.full
    with torch.inference_mode():
        denoiser = Denoiser(PIPE.model, [target], [Branch(0, context)], pack=PIPE.processor.pack)
        found = PIPE.model.velocity(denoiser.states(x, t, (0,))[0])
        wanted = PIPE.model.velocity(PIPE.model(PIPE.processor.pack([[PIPE.processor.text("a riddle"), target]])).gen)
    assert_close(found, wanted)


# Several at once, and what carries over -------------------------------------------------------------------------------


def test_each_session_of_a_batch_remembers_its_own_answer_noise_and_negative_prompt():
    sessions = [PIPE.session(seed=seed) for seed in (1, 2)]
    twins = [PIPE.session(seed=seed) for seed in (1, 2)]
    texts, noises = ("a riddle", "draw it"), [[torch.randn(16, 10, 8)] for _ in range(2)]
    read_all(sessions, [[OTHER, text] for text in texts], posterior_noise=noises)
    written = write_all(sessions, make_options("write", {"max_new_tokens": 4}))
    read_all(sessions, [["a"], ["no"]])
    drawn = draw_all(sessions, [make_options("draw", {**SMALL, "negative_prompt": n}) for n in ("be brief", "a")])
    for twin, text, noise, last, negative, answer, image in zip(
        twins, texts, noises, ("a", "no"), ("be brief", "a"), written, drawn, strict=True
    ):
        twin.read(OTHER, text, posterior_noise=noise)
        assert twin.write(max_new_tokens=4).token_ids == answer.token_ids
        options = {**TEXT_TO_IMAGE, **SMALL, "negative_prompt": negative}
        assert_close(twin.read(last).draw(**options).latents, image.latents, relative=1e-4)


def test_each_session_of_a_batch_goes_on_from_the_image_that_it_drew():
    def go_on(session: Session) -> torch.Tensor:
        return session.read("and now").draw(num_timesteps=3).latents

    sessions, options = [], []
    for seed, height in ((1, 32), (2, 48)):
        sessions.append(PIPE.session(seed=seed).read("a riddle"))
        options.append(make_options("draw", {**SMALL, "height": height}))
    draw_all(sessions, options)
    for session, (seed, height) in zip(sessions, ((1, 32), (2, 48)), strict=True):
        twin = PIPE.session(seed=seed).read("a riddle")
        twin.draw(**{**SMALL, "height": height})
        assert_close(go_on(session), go_on(twin), relative=1e-4)  # measured: 3e-6


def test_two_images_have_posterior_noise_of_their_own():
    noises = [torch.randn(16, 10, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    both = PIPE.session().read(OTHER, OTHER, posterior_noise=noises).contexts.turn
    alone = [PIPE.session().read(OTHER, posterior_noise=[noise]).contexts.turn[0] for noise in noises]
    assert torch.equal(both[0].segment.latents, alone[0].segment.latents)
    assert torch.equal(both[2].segment.latents, alone[1].segment.latents)


def test_the_last_image_sets_the_size_of_the_next_also_after_a_text():
    session = PIPE.session(seed=1).read("a")
    session.draw(**SMALL)
    session.read("a riddle")
    assert session.draw(num_timesteps=2).image.size == (48, 32)


def test_a_second_drawing_is_guided_as_an_edit_and_has_no_plan_of_the_first():
    session, twin = (PIPE.session(seed=1).read("a") for _ in range(2))
    first = session.draw(think=True, max_think_tokens=3, **SMALL)
    twin.draw(think=True, max_think_tokens=3, **SMALL)
    second = session.draw(num_timesteps=3)
    assert first.text
    assert second.text is None
    assert torch.equal(second.latents, twin.draw(num_timesteps=3, **EDIT).latents)


def test_a_plan_that_was_answered_is_not_that_of_the_next_image():
    session = PIPE.session(seed=1).read("a riddle")
    session.think(max_think_tokens=3)
    session.write(max_new_tokens=2)
    assert session.read("draw it").draw(**SMALL).text is None


def test_branches_of_one_length_are_not_taken_for_the_same():
    session = PIPE.session().read("a")
    velocity = session.velocity(height=32, width=48, negative_prompt="c", cfg_interval=(0.0, 1.0))
    (names,) = velocity.guided.branches
    assert names["full"] != names["text_dropped"]


def test_what_sessions_that_draw_together_must_share_is_checked():
    sessions = [PIPE.session().read("a") for _ in range(2)]
    options = [make_options("draw", {**SMALL, "num_timesteps": n}) for n in (2, 9)]
    with pytest.raises(ValueError, match="share num_timesteps, got 2 and others"):
        draw_all(sessions, options)
    with pytest.raises(ValueError, match="fork it"):
        draw_all([sessions[0]] * 2, options[:1] * 2)


# Streams --------------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_still_streamed_ends_where_the_session_goes_on():
    session = PIPE.session().read("a riddle")
    pieces = session.stream(max_new_tokens=20)
    next(pieces)
    length = session.read("a").contexts.full.length
    pieces.close()
    assert session.contexts.full.length == length
    assert not session.contexts.unread
    roles = [entry.role for entry in session.contexts.turn]
    assert roles == ["text"], "the answer stands before the text, in the turn of before"


def test_a_stream_that_fails_before_a_word_leaves_the_session_as_it_was():
    session = PIPE.session().read("a riddle")
    with pytest.raises(ZeroDivisionError):
        list(session.stream(max_new_tokens=5, sampling=lambda logits, generators: 1 / 0))
    assert not session.contexts.unread
    assert (
        session.write(max_new_tokens=5).token_ids == PIPE.session().read("a riddle").write(max_new_tokens=5).token_ids
    )
