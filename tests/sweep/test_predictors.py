"""What foretells divergence: AUC against scipy, features by hand, power laws that are recovered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_stable.errors import UserError
from hf_stable.sweep.predictors import (
    FEATURES,
    auc,
    auc_interval,
    features_at,
    fit_power_law,
    foretell,
)
from hf_stable.telemetry.reading.history import History


def scores(rng: np.random.Generator, num_runs: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    diverged = rng.random(num_runs) < 0.4
    values = rng.normal(size=num_runs) + 0.8 * diverged
    return (np.round(2 * values) if ties else values), diverged


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_mann_whitney(ties):
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, diverged = scores(rng, 40, ties)
        bad, good = values[diverged], values[~diverged]
        expected = stats.mannwhitneyu(bad, good).statistic / (len(bad) * len(good))
        assert auc(values, diverged) == pytest.approx(expected)


def test_auc_by_hand():
    assert auc(np.array([1, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert auc(np.array([1, 2, 3, 4]), np.array([True, True, False, False])) == 0
    assert auc(np.ones(4), np.array([True, False, False, True])) == 0.5
    # Of the four pairs one is lost, two are won and one is a tie.
    assert auc(np.array([1.0, 3, 1, 2]), np.array([True, True, False, False])) == 0.625
    assert auc(np.array([np.inf, 5, -np.inf]), np.array([True, False, False])) == 1
    assert np.isnan(auc(np.arange(3), np.ones(3)))


def test_auc_does_not_change_under_a_rising_map_and_flips_under_a_falling_one():
    values, diverged = scores(np.random.default_rng(1), 50, ties=True)
    expected = auc(values, diverged)
    assert auc(np.exp(values), diverged) == pytest.approx(expected)
    assert auc(-values, diverged) == pytest.approx(1 - expected)
    assert auc(values, ~diverged) == pytest.approx(1 - expected)


def test_interval_of_auc_is_scipys_percentile_interval():
    values, diverged = scores(np.random.default_rng(2), 60, ties=False)

    def statistic(bad, good, axis):
        return (bad[..., :, None] > good[..., None, :]).mean(axis=(-2, -1))

    expected = stats.bootstrap(
        (values[diverged], values[~diverged]),
        statistic,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = auc_interval(values, diverged, samples=10_000)
    assert found.value == auc(values, diverged)
    assert found[1:] == pytest.approx(tuple(expected), abs=0.05 * (found.high - found.low))


def test_interval_of_auc_covers_the_truth():
    rng = np.random.default_rng(3)
    truth = stats.norm.cdf(0.8 / np.sqrt(2))
    hits = 0
    for _ in range(300):
        found = auc_interval(*scores(rng, 60, ties=False), samples=400)
        hits += found.low <= truth <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def history() -> History:
    """20 steps of two layers of two heads, sampled at steps 5, 10, 15; the last sample is of
    another kind."""
    steps = np.arange(1.0, 21)
    logits = np.array([[[1, 2], [3, 4]], [[5, 80], [7, np.nan]], [[900, 9], [9, 9]]])
    return History(
        folder=Path("run"),
        run={},
        train={
            "step": steps,
            "loss": np.where(steps < 11, 3.0, 9.0),
            "grad_norm": steps,
            "learning_rate": 0.01 * steps,
        },
        steps=np.array([5, 10, 15]),
        telemetry={
            "layers.*.attention/max_logit": logits,
            "layers.*.attention/entropy": 1 / logits,
            "layers.*.optimizer/update_l2": np.array([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]]),
        },
        events=[],
    )


def test_features_are_of_the_last_sample_until_then():
    found = features_at(history(), 0.25, 40, peak_rate=0.3)
    assert set(found) == set(FEATURES)
    assert found["max_logit"] == 80
    assert found["entropy"] == pytest.approx(1 / 80)
    assert found["update_per_rate"] == pytest.approx(6 / 0.1)
    assert found["grad_norm"] == 10
    assert found["loss"] == pytest.approx(3)
    assert found["learning_rate"] == 0.3
    assert features_at(history(), 0.374, 40, 0.3)["max_logit"] == 80
    assert features_at(history(), 0.375, 40, 0.3)["max_logit"] == 900


def test_features_see_nothing_of_what_comes_later():
    whole, cut = history(), history()
    for columns in (cut.train, cut.telemetry):
        for name, column in columns.items():
            columns[name] = column[: 10 if columns is cut.train else 2]
    early = History(cut.folder, {}, cut.train, cut.steps[:2], cut.telemetry, [])
    assert features_at(whole, 0.5, 20, 0.3) == features_at(early, 0.5, 20, 0.3)


def test_features_of_a_run_without_samples_are_no_numbers():
    found = features_at(history(), 0.1, 20, peak_rate=0.3)
    assert [name for name in FEATURES if np.isnan(found[name])] == [
        "max_logit",
        "entropy",
        "update_per_rate",
    ]
    bare = History(Path("run"), {}, {**history().train}, np.array([]), {}, [])
    assert np.isnan(features_at(bare, 1, 20, 0.3)["max_logit"])
    with pytest.raises(UserError, match=r"fraction is 0"):
        features_at(history(), 0, 20, 0.3)


@pytest.mark.parametrize(
    ("model", "optimizer", "bounded"),
    [
        ({}, {}, False),
        ({"qk_norm": None, "sigma_reparam": False}, {"qk_clip": None}, False),
        ({"qk_norm": "head"}, {}, True),
        ({"attn_logit_softcapping": 50.0}, {}, True),
        ({"sigma_reparam": True}, {}, True),
        ({}, {"qk_clip": 100.0}, True),
    ],
)
def test_the_plans_reference_breaks_ties_of_the_rate_by_bounds(model, optimizer, bounded):
    def reference(rate: float, **run: object) -> float:
        return features_at(replace(history(), run=run), 0.5, 20, rate)["rate_and_bound"]

    free = reference(0.1)
    own = reference(0.1, model_config=model, recipe={"optimizer": optimizer})
    assert (own < free) == bounded and own <= free
    # A larger rate is worse whatever bounds the logits.
    assert reference(0.10001, model_config={"qk_norm": "head"}) > free


def test_foretelling_knows_which_side_is_bad_and_leaves_out_what_has_no_number():
    diverged = [True, True, False, False, False]
    runs = [
        {"max_logit": logit, "entropy": entropy, "learning_rate": 0.1}
        for logit, entropy in ((9e4, 0.1), (2e4, 0.2), (50, 0.9), (np.nan, 0.8), (20, 0.7))
    ]
    found = {each.feature: each for each in foretell(runs, diverged)}
    assert list(found) == list(FEATURES)
    assert found["max_logit"].auc == (1, 1, 1)
    assert (found["max_logit"].runs, found["max_logit"].unstable) == (4, 2)
    assert found["entropy"].auc.value == 1
    assert found["learning_rate"].auc.value == 0.5
    assert found["loss"].runs == 0
    assert np.isnan(found["loss"].auc).all()


def test_no_fate_but_one_has_no_auc():
    found = foretell([{"loss": 1.0}, {"loss": 2.0}], [False, False])
    assert np.isnan([each.auc.value for each in found]).all()


def test_a_power_law_is_recovered_and_extrapolated():
    sizes = np.array([64, 128, 256, 512.0])
    law = fit_power_law(sizes, 3.0 * sizes**1.7)
    assert (law.coefficient, *law.exponent) == pytest.approx((3.0, 1.7, 1.7, 1.7))
    assert law.residual == pytest.approx(0, abs=1e-12)
    assert law.at(4096) == pytest.approx(3.0 * 4096**1.7)
    assert law.at(law.size_at(1e4)) == pytest.approx(1e4)


def test_the_exponent_and_its_interval_are_those_of_a_linear_regression():
    rng = np.random.default_rng(0)
    sizes = np.array([64, 64, 128, 128, 256, 256, 512.0])
    values = 2 * sizes**0.8 * np.exp(0.2 * rng.normal(size=len(sizes)))
    line = stats.linregress(np.log(sizes), np.log(values))
    reach = stats.t.ppf(0.975, len(sizes) - 2) * line.stderr
    law = fit_power_law(sizes, values)
    assert law.exponent == pytest.approx((line.slope, line.slope - reach, line.slope + reach))
    assert law.coefficient == pytest.approx(np.exp(line.intercept))


def test_its_interval_covers_the_exponent():
    rng = np.random.default_rng(1)
    sizes = np.array([64, 128, 256, 512.0])
    laws = [
        fit_power_law(sizes, sizes**1.2 * np.exp(0.3 * rng.normal(size=4))) for _ in range(1000)
    ]
    covered = np.mean([law.exponent.low <= 1.2 <= law.exponent.high for law in laws])
    assert covered == pytest.approx(0.95, abs=0.03)


def test_two_sizes_have_a_law_and_no_interval_and_no_growth_reaches_nothing():
    law = fit_power_law([64, 128], [10, 20])
    assert law.exponent.value == pytest.approx(1)
    assert np.isnan(law.exponent[1:]).all()
    for values in ([10, 10], [10, 9], [10, 10.001]):
        assert fit_power_law([64, 128], values).size_at(1e4) == np.inf


@pytest.mark.parametrize(
    ("sizes", "values", "words"),
    [
        ([64, 64], [1, 2], "at least two sizes, found 1"),
        ([64, 128], [0, 2], "above 0"),
        ([64, 128], [1, np.nan], "finite"),
    ],
)
def test_what_has_no_law_is_named(sizes, values, words):
    with pytest.raises(UserError, match=words):
        fit_power_law(sizes, values)
