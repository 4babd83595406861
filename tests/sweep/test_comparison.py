"""Two checkpoints on the same documents: intervals, p-values, and how many documents it takes."""

import numpy as np
import pytest
from scipy import stats

from hf_stable.errors import UserError
from hf_stable.sweep.comparison import (
    Comparison,
    compare,
    holm,
    needed_documents,
    over_seeds,
    paired_difference,
)

SAMPLES = 20_000


def pair(rng: np.random.Generator, num_documents: int, gap: float = 0.02, own: float = 0.05):
    """Sums of two models. Documents differ by 0.4 nats a token, which the models share, and each
    model has `own` nats of its own; lengths are lognormal. The first is worse by `gap`."""
    tokens = np.ceil(rng.lognormal(5, 0.8, num_documents))
    shared = 2.4 + 0.4 * rng.normal(size=num_documents)
    counts = [tokens, np.ceil(tokens / 1.3), 4 * tokens]
    return tuple(
        np.stack([tokens * (shared + own * rng.normal(size=num_documents) + more), *counts], axis=1)
        for more in (gap, 0.0)
    )


@pytest.fixture
def sums():
    return pair(np.random.default_rng(0), 120)


def mirrored(interval) -> tuple[float, float, float]:
    return -interval.value, -interval.high, -interval.low


def test_the_difference_is_of_ratios_of_sums_not_of_means_of_ratios():
    # Two nats in ten tokens and five in one: 7 / 11, while the mean of ratios is 2.6.
    a = np.array([[2.0, 10, 8, 40], [5.0, 1, 1, 4]] * 3)
    b = np.array([[1.0, 10, 8, 40], [5.0, 1, 1, 4]] * 3)
    found = paired_difference(a, b)
    assert found.log_perplexity.value == pytest.approx(1 / 11)
    assert found.perplexity_a == pytest.approx(np.exp(7 / 11))
    assert found.perplexity.value == pytest.approx(np.exp(7 / 11) - np.exp(6 / 11))
    assert paired_difference(a, b, unit="word").log_perplexity.value == pytest.approx(1 / 9)
    assert paired_difference(a, b, unit="byte").log_perplexity.value == pytest.approx(1 / 44)


def test_intervals_are_scipys_percentile_intervals(sums):
    a, b = sums
    found = paired_difference(a, b, samples=SAMPLES)

    def logs(nll_a, nll_b, tokens, axis):
        return (nll_a.sum(axis) - nll_b.sum(axis)) / tokens.sum(axis)

    def perplexities(nll_a, nll_b, tokens, axis):
        totals = tokens.sum(axis)
        return np.exp(nll_a.sum(axis) / totals) - np.exp(nll_b.sum(axis) / totals)

    for mine, statistic in ((found.log_perplexity, logs), (found.perplexity, perplexities)):
        expected = stats.bootstrap(
            (a[:, 0], b[:, 0], a[:, 1]),
            statistic,
            paired=True,
            n_resamples=SAMPLES,
            method="percentile",
            rng=np.random.default_rng(7),
        ).confidence_interval
        # A percentile of 20,000 draws is off by about 1 % of the interval's width.
        assert mine[1:] == pytest.approx(tuple(expected), abs=0.04 * (mine.high - mine.low))


def test_swapping_the_two_mirrors_everything(sums):
    there, back = paired_difference(*sums), paired_difference(*sums[::-1])
    assert mirrored(there.log_perplexity) == pytest.approx(tuple(back.log_perplexity))
    assert mirrored(there.perplexity) == pytest.approx(tuple(back.perplexity))
    assert there.p_value == back.p_value
    assert (there.perplexity_a, there.perplexity_b) == (back.perplexity_b, back.perplexity_a)


def test_pairing_is_narrower_where_documents_are_hard_for_both(sums):
    a, b = sums
    paired = paired_difference(a, b).log_perplexity
    rng = np.random.default_rng(1)
    apart = []
    for _ in range(2000):
        one, other = (rng.integers(len(a), size=len(a)) for _ in range(2))
        apart.append(a[one, 0].sum() / a[one, 1].sum() - b[other, 0].sum() / b[other, 1].sum())
    low, high = np.quantile(apart, [0.025, 0.975])
    # The spread of documents is 8 times that of the models on one document.
    assert paired.high - paired.low < (high - low) / 4


def test_interval_covers_the_truth_and_p_values_are_uniform_without_a_difference():
    rng = np.random.default_rng(2)
    found = [paired_difference(*pair(rng, 80, gap=0), samples=400) for _ in range(400)]
    covered = np.mean([each.log_perplexity.low <= 0 <= each.log_perplexity.high for each in found])
    # 400 trials scatter by 1 %; the percentile interval of 80 documents is a little narrow.
    assert 0.90 <= covered <= 0.98
    p_values = [each.p_value for each in found]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_p_value_and_interval_say_the_same():
    rng = np.random.default_rng(3)
    outside = 0
    for _ in range(100):
        found = paired_difference(*pair(rng, 60, gap=0.02), samples=999)
        outside += found.log_perplexity.excludes_zero
        if abs(found.p_value - 0.05) > 0.005:
            assert (found.p_value < 0.05) == found.log_perplexity.excludes_zero
            assert found.log_perplexity.excludes_zero == found.perplexity.excludes_zero
    assert 10 < outside < 100


def test_the_same_checkpoint_twice_is_no_difference(sums):
    found = paired_difference(sums[0], sums[0])
    assert found.log_perplexity == found.perplexity == (0, 0, 0)
    assert found.p_value == 1
    assert needed_documents(sums[0], sums[0]) is None


def test_p_value_is_never_zero():
    found = paired_difference(*pair(np.random.default_rng(0), 100, gap=1.0), samples=999)
    assert found.p_value == pytest.approx(2 / 1000)


def test_the_interval_over_seeds_is_scipys_t_interval():
    values = [-0.057, -0.0435, -0.02, -0.05]
    found = over_seeds(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found == pytest.approx((np.mean(values), *expected))
    assert over_seeds([0.3]).value == 0.3 and np.isnan(over_seeds([0.3])[1:]).all()


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_over_seeds_covers_as_it_is_called(num_seeds):
    rng = np.random.default_rng(0)
    found = [over_seeds(rng.normal(0.1, 0.3, num_seeds)) for _ in range(2000)]
    covered = np.mean([each.low <= 0.1 <= each.high for each in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_holm_is_the_table_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, never falling.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.2]), [0.2])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1, 1])
    assert holm([]).shape == (0,)


def test_holm_rejects_what_its_step_down_procedure_rejects():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = rng.uniform(size=6) ** 3
        rejected = np.zeros(6, dtype=bool)
        for place, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (6 - place):
                break
            rejected[index] = True
        assert ((holm(p_values) <= 0.05) == rejected).all()


def test_a_table_is_adjusted_for_its_size(sums):
    a, b = sums
    rng = np.random.default_rng(5)
    worse = a.copy()
    worse[:, 0] += 0.3 * a[:, 1] * (1 + rng.normal(size=len(a)))
    found = compare({"a": a, "same": b, "worse": worse}, b)
    assert list(found) == ["a", "same", "worse"]
    p_values = [each.p_value for each in found.values()]
    assert [each.p_adjusted for each in found.values()] == pytest.approx(holm(p_values))
    assert isinstance(found["a"], Comparison)
    assert found["a"].log_perplexity == paired_difference(a, b).log_perplexity
    assert found["a"].p_adjusted >= found["a"].p_value


@pytest.mark.parametrize("power", [0.5, 0.8])
def test_needed_documents_have_the_power_they_were_asked_for(power):
    rng = np.random.default_rng(4)
    gap = 0.02
    pilot = pair(rng, 20_000, gap)
    wanted = paired_difference(*pilot, samples=10).perplexity.value
    needed = needed_documents(*pilot, wanted=wanted, power=power)
    assert needed > 20
    seen = [
        paired_difference(*pair(rng, needed, gap), samples=400).perplexity.excludes_zero
        for _ in range(400)
    ]
    # 400 trials scatter by 2.5 %; the percentile interval finds a little more than it should.
    assert np.mean(seen) == pytest.approx(power, abs=0.08)


def test_needed_documents_go_with_the_square_of_what_is_wanted(sums):
    coarse, fine = (needed_documents(*sums, wanted=wanted) for wanted in (0.02, 0.002))
    assert fine / coarse == pytest.approx(100, rel=0.02)
    assert needed_documents(*sums, power=0.95) >= needed_documents(*sums, power=0.8)
    assert needed_documents(*sums, wanted=1e6) == 5


def test_more_documents_are_needed_where_models_share_less():
    rng = np.random.default_rng(6)
    alike, unlike = (needed_documents(*pair(rng, 500, own=own)) for own in (0.05, 0.2))
    assert unlike > 8 * alike


def test_documents_without_words_are_no_trouble(sums):
    a, b = (each.copy() for each in sums)
    a[:60, 2] = b[:60, 2] = 0
    found = paired_difference(a, b, unit="word")
    assert np.isfinite([*found.log_perplexity, *found.perplexity]).all()


def test_resamples_without_any_word_are_left_out():
    a = np.array([[2.0, 4, 3, 16], *[[1.0, 2, 0, 8]] * 4])
    found = paired_difference(a, a - [[0.5, 0, 0, 0]], unit="word")
    # Of 5 ** 5 resamples 4 ** 5 lack the one document with words.
    assert found.p_value == pytest.approx(2 / (5**5 - 4**5 + 1))


def test_what_cannot_be_compared_is_named(sums):
    a, b = sums
    other = b.copy()
    other[7, 1] += 1
    changed, broken, wordless = b.copy(), b.copy(), a.copy()
    changed[3, 3] += 1
    broken[0, 0] = np.nan
    wordless[:, 2] = 0
    for pair_, options, words in (
        ((a, other), {}, "document 7 has .* tokens .* unit"),
        ((a, changed), {"unit": "word"}, "document 3 has .* bytes"),
        ((a, b[:-1]), {}, "120 documents against 119"),
        ((a[:4], b[:4]), {}, "at least 5 documents"),
        ((a[:, :3], b), {}, r"\(documents, 4\)"),
        ((a, broken), {}, "not finite"),
        ((a, b), {"unit": "line"}, "'line'; write one of token, word, byte"),
        ((wordless, wordless), {"unit": "word"}, "no words"),
    ):
        with pytest.raises(UserError, match=words):
            paired_difference(*pair_, **options)
    # Other tokens do not matter by word.
    assert paired_difference(a, other, unit="word").unit == "word"
    with pytest.raises(UserError, match="wanted 0"):
        needed_documents(a, b, wanted=0)
