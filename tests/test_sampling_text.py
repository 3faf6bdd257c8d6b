"""TaylorSeer against an independent twin, and the choice of the next token."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_close
from torch import Tensor

from bagel.sampling import (
    Guidance,
    GuidedVelocity,
    TaylorSeer,
    TaylorSeries,
    TextSampling,
)

# TaylorSeer -----------------------------------------------------------------------------------------------------------

FULL = [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31]


def seer_twin(values: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The rule as it is stated, with a dictionary of orders, in float64: results and the indices computed in full."""
    cache: dict[int, Tensor] = {}
    out, full, last = [], [], 0
    for i, value in enumerate(values):
        if i < 5 or i - last > 2:
            new = {0: value.double()}
            for k in range(6):
                if k in cache and i > 3:
                    new[k + 1] = (new[k] - cache[k]) / (i - last)
            cache, last = new, i
            full.append(i)
            out.append(new[0])
        else:
            out.append(sum(d * (i - last) ** k / math.factorial(k) for k, d in cache.items()))
    return out, full


def follow(seer: TaylorSeries, values: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    out, full = [], []
    for i, value in enumerate(values):
        if seer.due:
            full.append(i)
            seer.record(value)
            out.append(value)
        else:
            out.append(seer.predict())
    return out, full


def test_taylorseer_agrees_with_its_twin_over_32_evaluations():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 2, generator=generator) for _ in range(32)]
    found, full = follow(TaylorSeer().start(), values)
    wanted, twin_full = seer_twin(values)
    assert full == twin_full == FULL
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, relative=2e-5)


def test_taylorseer_keeps_orders_up_to_six():
    seer = TaylorSeer().start()
    counts = []
    for index in range(32):
        if seer.due:
            seer.record(torch.tensor([float(index)]))
            counts.append(len(seer.derivatives))
        else:
            seer.predict()
    assert counts == [1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7]


def test_taylorseer_predicts_a_line_exactly():
    values = [torch.tensor([2.0 - 0.5 * i, float(i)], dtype=torch.float64) for i in range(20)]
    found, full = follow(TaylorSeer().start(), values)
    assert full == FULL[:10]
    for one, exact in zip(found, values, strict=True):
        torch.testing.assert_close(one, exact, rtol=0, atol=1e-9)


def test_taylorseer_of_a_parabola_by_hand():
    seer = TaylorSeer().start()
    for i in range(5):
        seer.record(torch.tensor(float(i * i)))
    # At 4: D0 = 16, D1 = (16 - 9) / 1; nothing more before order one has an old value.
    assert [seer.predict().item(), seer.predict().item()] == [16 + 7, 16 + 14]
    seer.record(torch.tensor(49.0))
    # At 7: D1 = (49 - 16) / 3 = 11, D2 = (11 - 7) / 3.
    assert seer.predict().item() == pytest.approx(49 + 11 + 4 / 3 / 2, abs=1e-5)
    assert seer.predict().item() == pytest.approx(49 + 22 + 4 / 3 * 2, abs=1e-5)


def test_taylorseer_of_other_numbers_computes_and_keeps_accordingly():
    values = [torch.tensor([float(i)]) for i in range(20)]
    seer = TaylorSeer(first=2, interval=5, max_order=1).start()
    assert follow(seer, values)[1] == [0, 1, 6, 11, 16]
    assert len(seer.derivatives) == 2


@pytest.mark.parametrize("bad", [{"first": 0}, {"interval": 0}, {"max_order": -1}], ids=str)
def test_taylorseer_out_of_range_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least"):
        TaylorSeer(**bad)


def test_a_branch_that_sleeps_does_not_advance():
    asked = []

    def states(x: Tensor, t: float, branches: tuple[int, ...]) -> list[Tensor]:
        asked.append((times.index(t), branches))
        return [x * (branch + 1) for branch in branches]

    times = torch.linspace(1, 0.1, 12).tolist()
    guidance = Guidance(cfg_text_scale=4.0, cfg_interval=(0.0, times[4]))  # evaluations 4 and on
    branches = [{"full": 0, "text_dropped": 1}]
    run = GuidedVelocity(states, lambda s: s, [2], branches, guidance, TaylorSeer())
    for t in times:
        run(torch.ones(2, 1), t)
    full, dropped = ([i for i, branches in asked if branch in branches] for branch in (0, 1))
    assert full == [0, 1, 2, 3, 4, 7, 10]
    assert dropped == [4, 5, 6, 7, 8, 11]
    assert run.cached[0] is not run.cached[1]


def test_a_cache_of_ones_own_decides_what_is_computed():
    class EverySecond:
        """Repeats each computed value once."""

        def start(self):
            return Repeated()

    class Repeated:
        due = True

        def record(self, value: Tensor) -> None:
            self.value, self.due = value, False

        def predict(self) -> Tensor:
            self.due = True
            return self.value

    asked = []

    def states(x: Tensor, t: float, branches: tuple[int, ...]) -> list[Tensor]:
        asked.append((t, branches))
        return [x * t for _ in branches]

    caching = EverySecond()
    for _ in range(2):  # each generation has states of its own
        run = GuidedVelocity(states, lambda s: s, [2], [{"full": 0}], Guidance(cfg_text_scale=1.0), caching)
        found = [run(torch.ones(2, 1), t)[0].item() for t in (1.0, 0.75, 0.5)]
        assert found == [1.0, 1.0, 0.5]
    assert asked == [(1.0, (0,)), (0.5, (0,))] * 2


def test_a_cache_of_a_wrong_form_is_refused():
    class Repeats:
        due = False

        def start(self):
            return self

        def record(self, value: Tensor) -> None:
            raise AssertionError

        def predict(self):
            return 0.0

    class Nothing:
        def start(self):
            return None

    for caching, message in (
        (Nothing(), "an object with due, record"),
        (Repeats(), r"return a tensor, got float 0\.0"),
    ):
        states = [{"full": 0}]
        run = GuidedVelocity(lambda *_: [], lambda s: s, [2], states, Guidance(cfg_text_scale=1.0), caching)
        with pytest.raises(TypeError, match=message):
            run(torch.ones(2, 1), 1.0)


# The next token -------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int, logits: Tensor, sampling: TextSampling, generator: torch.Generator) -> list[int]:
    return [int(sampling(logits[None], [generator])) for _ in range(count)]


@pytest.mark.parametrize(
    "sampling", [TextSampling(), *(TextSampling(do_sample=True, temperature=t) for t in (0.0, 1e-40))]
)
def test_greedy_and_temperature_zero_take_the_likeliest_and_draw_nothing(sampling):
    generator = seeded()
    state = generator.get_state()
    token = sampling(LOGITS[None], [generator])
    assert (token.tolist(), token.dtype) == ([1], torch.int64)
    sampling.discard(5, generator)
    assert torch.equal(generator.get_state(), state)


def test_sampling_is_a_multinomial_draw_at_the_temperature():
    sampling, twin = TextSampling(do_sample=True, temperature=0.7), seeded(3)
    wanted = [int(torch.multinomial(torch.softmax(LOGITS / 0.7, -1), 1, generator=twin)) for _ in range(50)]
    assert draws(50, LOGITS, sampling, seeded(3)) == wanted
    assert len(set(wanted)) > 2


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_rows_of_a_batch_are_drawn_each_by_its_own_generator(top_p):
    sampling, logits = TextSampling(do_sample=True, temperature=0.9, top_p=top_p), torch.stack([LOGITS, LOGITS.flip(0)])
    generators = [seeded(1), seeded(2)]
    found = [sampling(logits, generators).tolist() for _ in range(30)]
    rows = [draws(30, row, sampling, seeded(i)) for i, row in enumerate(logits, 1)]
    assert found == [list(pair) for pair in zip(*rows, strict=True)]


def test_as_many_generators_as_texts_are_needed():
    with pytest.raises(ValueError, match="2 texts need as many generators, got 1"):
        TextSampling(do_sample=True)(torch.stack([LOGITS, LOGITS]), [seeded()])


def test_samples_follow_the_softmax():
    counts = torch.tensor(draws(4000, LOGITS, TextSampling(do_sample=True, temperature=1.5), seeded())).bincount(
        minlength=5
    )
    expected = torch.softmax(LOGITS / 1.5, -1)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.29, [1]), (0.31, [1, 3]), (0.57, [1, 3]), (0.59, [1, 3, 0]), (0.94, [1, 3, 0, 4])]
)
def test_top_p_keeps_the_least_set_that_reaches_it_and_its_proportions(top_p, kept):
    probabilities = torch.tensor([0.2, 0.3, 0.05, 0.28, 0.17])
    sampling = TextSampling(do_sample=True, temperature=1.0, top_p=top_p)
    found = torch.tensor(draws(3000, probabilities.log(), sampling, seeded())).bincount(minlength=5)
    assert found.nonzero().flatten().tolist() == sorted(kept)
    share = probabilities[kept] / probabilities[kept].sum()
    assert ((found[kept] / 3000 - share).abs() <= 5 * (share * (1 - share) / 3000).sqrt()).all()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_generator_makes_draws_reproducible_and_no_other_state_is_touched(top_p):
    sampling = TextSampling(do_sample=True, temperature=1.0, top_p=top_p)
    state = torch.random.get_rng_state()
    assert draws(20, LOGITS, sampling, seeded(5)) == draws(20, LOGITS, sampling, seeded(5))
    assert draws(20, LOGITS, sampling, seeded(5)) != draws(20, LOGITS, sampling, seeded(6))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("vocab", [5, 448, 1000])
def test_a_discarded_draw_advances_exactly_like_a_draw(vocab):
    sampling, one, other = TextSampling(do_sample=True, temperature=0.5), seeded(), seeded()
    sampling(torch.randn(1, vocab, generator=seeded(1)), [one])
    sampling.discard(vocab, other)
    assert torch.equal(one.get_state(), other.get_state())
    assert not torch.equal(one.get_state(), seeded().get_state())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
    ],
)
def test_text_sampling_out_of_range_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TextSampling(**bad)
