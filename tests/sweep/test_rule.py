"""The declared rule, on curves drawn by hand."""

import numpy as np
import pytest

from hf_stable.errors import UserError
from hf_stable.sweep.rule import Thresholds, Verdict, is_hopeless, judge, smoothed

UNIGRAM, BIGRAM, WARMUP, STEPS = 3.4, 2.8, 30, 300
MIDDLE = 3.1


def curve(*points: tuple[float, float], noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """(300,) losses through (step, loss) points, straight in between."""
    steps, losses = zip(*points, strict=True)
    rng = np.random.default_rng(seed)
    return np.interp(np.arange(1, STEPS + 1), steps, losses) + noise * rng.normal(size=STEPS)


def columns(losses: np.ndarray, **others: np.ndarray) -> dict[str, np.ndarray]:
    return {"step": np.arange(1.0, len(losses) + 1), "loss": losses, **others}


def verdict(losses: np.ndarray, validation_loss: float | None = None, **options) -> Verdict:
    last = float(losses[-1]) if validation_loss is None else validation_loss
    return judge(columns(losses), last, UNIGRAM, BIGRAM, WARMUP, **options)


HEALTHY = curve((1, 5.5), (100, 2.8), (300, 2.2), noise=0.05)
# Up by 4 nats in ten steps at step 150, and back within 30.
SPIKE = HEALTHY + curve((150, 0), (160, 4), (190, 0))
DRIFT = curve((1, 5.5), (100, 1.5), (300, 2.7), noise=0.05)
PLATEAU = curve((1, 5.5), (60, 3.4), (300, 3.4), noise=0.03)
DEGRADED = curve((1, 5.5), (100, 3.0), (300, 2.95), noise=0.01)


def kinds(found: Verdict) -> list[str]:
    return [reason.split(":")[0] for reason in found.reasons]


def test_healthy():
    assert verdict(HEALTHY) == Verdict(diverged=False, degraded=False, spiked=False)
    assert verdict(HEALTHY).stable


def test_a_spike_that_recovers_is_spiked_and_not_diverged():
    found = verdict(SPIKE)
    assert (found.diverged, found.degraded, found.spiked) == (False, False, True)
    assert kinds(found) == ["spike"]


def test_a_blow_up_that_stays_is_diverged_also_where_the_validation_loss_is_good():
    found = verdict(HEALTHY + curve((150, 0), (160, 4), (300, 4)), validation_loss=2.0)
    assert (found.diverged, found.spiked) == (True, False)
    assert kinds(found) == ["blow-up"]


def test_a_slow_drift_upwards_is_a_blow_up():
    assert kinds(verdict(DRIFT)) == ["blow-up"]


def test_a_rise_within_the_warm_up_does_not_count():
    losses = curve((1, 5.5), (5, 3), (12, 8), (20, 3), (300, 2), noise=0.01)
    assert verdict(losses).reasons == ()
    late = judge(columns(losses), 2.0, UNIGRAM, BIGRAM, warmup_steps=4)
    assert late.spiked


def test_the_plateau_of_a_unigram_table_is_a_collapse():
    found = verdict(PLATEAU, 3.4)
    assert (found.diverged, found.collapsed, found.degraded) == (False, True, False)
    assert kinds(found) == ["collapse"] and not found.stable


def test_a_run_that_has_not_learned_yet_is_no_divergence():
    found = verdict(curve((1, 5.5), (300, 4.9)))
    assert (found.diverged, found.collapsed) == (False, True)


def test_a_run_that_rose_is_diverged_and_not_collapsed():
    rose = verdict(HEALTHY + curve((150, 0), (160, 4), (300, 4)))
    assert kinds(rose) == ["blow-up", "collapse"]
    assert (rose.diverged, rose.collapsed) == (True, False)


@pytest.mark.parametrize("losses", [HEALTHY, PLATEAU, DEGRADED, SPIKE, DRIFT])
def test_a_verdict_is_read_back_from_its_record(losses):
    found = verdict(losses)
    assert Verdict.from_dict(found.to_dict()) == found


def test_an_older_record_is_told_apart_by_its_reasons():
    """It called every unstable run diverged."""
    for losses in (
        HEALTHY,
        PLATEAU,
        DEGRADED,
        DRIFT,
        HEALTHY + curve((150, 0), (160, 4), (300, 4)),
    ):
        found = verdict(losses)
        older = {**found.to_dict(), "diverged": not found.stable}
        del older["collapsed"]
        assert Verdict.from_dict(older) == found


def test_between_bigram_and_middle_is_degraded_and_the_borders_belong_above():
    for loss, collapsed, degraded in (
        (BIGRAM - 1e-9, False, False),
        (BIGRAM, False, True),
        (MIDDLE - 1e-9, False, True),
        (MIDDLE + 1e-9, True, False),
    ):
        found = verdict(DEGRADED, loss)
        assert (found.collapsed, found.degraded) == (collapsed, degraded), loss
    # Numbers that binary fractions hold: the middle itself is a collapse.
    assert judge(columns(DEGRADED), 3.0, unigram=3.5, bigram=2.5, warmup_steps=30).collapsed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(bad):
    losses, norms = HEALTHY.copy(), np.ones(STEPS)
    losses[49] = norms[99] = bad
    for train, words in (
        (columns(losses), "training loss at step 50,"),
        (columns(HEALTHY, grad_norm=norms), "gradient norm at step 100,"),
    ):
        found = judge(train, 2.2, UNIGRAM, BIGRAM, WARMUP)
        assert found.diverged
        assert found.reasons[0].startswith(f"non-finite: {words}")
    assert verdict(HEALTHY, bad).diverged


def test_a_run_of_nothing_but_nan_is_judged():
    assert kinds(verdict(np.full(STEPS, np.nan), np.nan)) == ["non-finite", "non-finite"]


def test_a_stopped_run_is_unstable_without_a_validation_loss_and_under_all_thresholds():
    losses = curve((1, 5.5), (100, 4.5), (300, 4.5))[:170]
    for kind in ("middle", "bigram", "unigram-0.2"):
        found = judge(
            columns(losses), None, UNIGRAM, BIGRAM, WARMUP, Thresholds(collapse=kind), stopped=True
        )
        assert kinds(found) == ["hopeless"]
        assert (found.diverged, found.collapsed) == (False, True)


def test_thresholds_judge_records_again():
    losses = curve((1, 5.5), (100, 3.1), (300, 3.0))
    for kind, limit in (("middle", MIDDLE), ("bigram", BIGRAM), ("unigram-0.2", UNIGRAM - 0.2)):
        for loss in (2.7, 2.9, 3.15, 3.3):
            found = verdict(losses, loss, thresholds=Thresholds(collapse=kind))
            assert found.collapsed == (loss >= limit), (kind, loss)
    assert verdict(SPIKE, thresholds=Thresholds(blow_up=5)).reasons == ()
    assert verdict(DRIFT, thresholds=Thresholds(remaining=2)).spiked


def test_more_is_diverged_under_a_stricter_threshold():
    rng = np.random.default_rng(0)
    for _ in range(50):
        loss = rng.uniform(2, 4)
        found = [
            verdict(HEALTHY, loss, thresholds=Thresholds(collapse=kind)).diverged
            for kind in ("unigram-0.2", "middle", "bigram")
        ]
        assert found == sorted(found)


def test_the_average_is_that_of_the_definition_and_does_not_depend_on_missing_log_lines():
    losses = np.array([4.0, 3.0, np.nan, 5.0])
    expected = [4.0, 0.9 * 4 + 0.1 * 3, 3.9, 0.81 * 3.9 + 0.19 * 5]
    np.testing.assert_allclose(smoothed(np.array([1, 2, 3, 4]), losses, 0.9), expected)
    kept = np.array([0, 1, 3])
    without = smoothed(kept + 1, losses[kept], 0.9)
    np.testing.assert_allclose(without, np.array(expected)[kept])


def stops(losses: np.ndarray, total: int | None = None) -> int | None:
    """The step at which a run is stopped."""
    total = total or len(losses)
    for step in range(1, len(losses) + 1):
        if is_hopeless(losses[:step], step, total, UNIGRAM):
            return step
    return None


def test_a_run_far_above_the_unigram_is_stopped_fifty_steps_after_two_fifths():
    above = np.full(STEPS, UNIGRAM + 0.51)
    assert stops(above) == 120 + 50
    assert stops(np.full(STEPS, UNIGRAM + 0.49)) is None
    assert stops(above, total=3000) is None


def test_a_run_that_rises_late_is_stopped_once_its_average_was_above_for_fifty_steps():
    losses = curve((1, 5.5), (100, 2.5), (200, 2.5), (201, 6), (300, 6))
    average = smoothed(np.arange(STEPS), losses, 0.9)
    first = int(np.flatnonzero((average > UNIGRAM + 0.5) & (np.arange(STEPS) > 150))[0]) + 1
    assert stops(losses) == first + 49


def test_a_loss_that_is_not_finite_stops_at_once():
    losses = HEALTHY.copy()
    losses[6] = np.nan
    assert stops(losses) == 7


def synthetic(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A run of any fate: its losses and its validation loss.

    It spikes once or not at all, by up to 8 nats, and comes back with a time constant of up to 10
    steps; a drift stays.
    """
    steps = np.arange(1, STEPS + 1)
    end, pace = rng.uniform(1.5, 4.5), rng.uniform(10, 60)
    losses = end + (5.5 - end) * np.exp(-steps / pace)
    since = steps - rng.integers(20, 260)
    height, back = rng.uniform(0, 8) * (rng.random() < 0.7), rng.uniform(1, 10)
    losses += np.where(since >= 0, height * np.exp(-np.maximum(since, 0) / back), 0)
    if rng.random() < 0.3:
        losses += np.maximum(steps - rng.integers(50, 250), 0) * rng.uniform(0, 0.05)
    losses += rng.normal(size=STEPS) * rng.uniform(0, 0.3)
    return losses, float(losses[-5:].mean())


def test_the_early_stop_never_fires_on_a_run_that_is_stable_in_the_end():
    rng = np.random.default_rng(1)
    stopped, fates = 0, {True: 0, False: 0}
    for _ in range(200):
        losses, validation = synthetic(rng)
        stable = verdict(losses, validation).stable
        fates[stable] += 1
        if any(is_hopeless(losses[:step], step, STEPS, UNIGRAM) for step in range(121, STEPS + 1)):
            stopped += 1
            assert not stable
    assert stopped > 40 and fates[True] > 60


def test_its_price_is_a_run_that_would_have_come_back_after_fifty_steps():
    losses = HEALTHY + curve((130, 0), (131, 4), (220, 4), (221, 0))
    assert verdict(losses).stable
    assert stops(losses) is not None


def test_thresholds_and_verdicts_survive_records():
    thresholds = Thresholds(collapse="bigram", blow_up=2.0)
    assert Thresholds.from_dict(thresholds.to_dict()) == thresholds
    assert Thresholds.from_dict({}) == Thresholds()
    assert verdict(SPIKE).to_dict() == {
        "diverged": False,
        "degraded": False,
        "spiked": True,
        "collapsed": False,
        "reasons": list(verdict(SPIKE).reasons),
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colapse": "middle"}, "colapse unknown"),
        ({"collapse": "trigram"}, "'trigram'; write one of middle, bigram"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"hopeless_steps": 0}, "hopeless_steps is 0"),
        ({"blow_up": float("nan")}, "blow_up is nan"),
    ],
)
def test_bad_thresholds_are_named(values, words):
    with pytest.raises(UserError, match=words):
        Thresholds.from_dict(values)


def test_what_cannot_be_judged_is_named():
    with pytest.raises(UserError, match="needs a bigram table that is better"):
        judge(columns(HEALTHY), 2.0, UNIGRAM, UNIGRAM, WARMUP)
    assert not judge(
        columns(HEALTHY), 2.0, UNIGRAM, 4.0, WARMUP, Thresholds(collapse="unigram-0.2")
    ).diverged
    with pytest.raises(UserError, match="no log lines"):
        judge({"step": np.array([])}, 2.0, UNIGRAM, BIGRAM, WARMUP)
    with pytest.raises(UserError, match="validation_loss is null"):
        judge(columns(HEALTHY), None, UNIGRAM, BIGRAM, WARMUP)
