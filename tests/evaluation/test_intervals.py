"""An interval over documents: when it tells the truth, and when there is none."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from hf_stable.evaluation import perplexity
from hf_stable.evaluation.result import estimates
from tests.tiny import TEXTS


def synthetic(rng: np.random.Generator, num_documents: int) -> np.ndarray:
    """Documents of lognormal length around 55 tokens with 3 nats a token in expectation."""
    tokens = np.ceil(rng.lognormal(4, 0.5, num_documents))
    noise = 0.4 * tokens * rng.normal(size=num_documents)
    noise += 2 * np.sqrt(tokens) * rng.normal(size=num_documents)
    nll = np.maximum(3 * tokens + noise, 0)
    return np.stack([nll, tokens, np.ceil(tokens / 1.3), 4 * tokens], axis=1)


def per_token_interval(sums: np.ndarray, rng: np.random.Generator, samples: int = 400):
    (per_token, _, _), note = estimates(sums, confidence=0.95, samples=samples, rng=rng)
    assert note is None
    return math.log(per_token.low), math.log(per_token.high)


@pytest.mark.parametrize("num_documents", [12, 60])
def test_interval_covers_the_truth_about_95_times_in_100(num_documents):
    rng = np.random.default_rng(num_documents)
    trials = 500
    hits = 0
    for _ in range(trials):
        low, high = per_token_interval(synthetic(rng, num_documents), rng)
        hits += low <= 3 <= high
    # An interval of true coverage 0.93 to 0.96 fails one of these once in a thousand.
    assert binom.ppf(0.001, trials, 0.93) <= hits <= binom.ppf(0.999, trials, 0.96)


def test_interval_shrinks_as_one_over_the_root_of_the_number_of_documents():
    rng = np.random.default_rng(0)

    def width(num_documents: int) -> float:
        intervals = [per_token_interval(synthetic(rng, num_documents), rng) for _ in range(30)]
        return float(np.mean([high - low for low, high in intervals]))

    assert width(100) / width(1600) == pytest.approx(4, rel=0.12)


def test_interval_reaches_further_to_the_side_of_the_long_tail():
    rng = np.random.default_rng(2)
    arms = np.zeros(2)
    for _ in range(50):
        sums = synthetic(rng, 30)
        # A few documents much harder than the others: a sample without them is too optimistic.
        sums[:, 0] = sums[:, 1] * rng.exponential(3, 30)
        ratio = sums[:, 0].sum() / sums[:, 1].sum()
        low, high = per_token_interval(sums, rng)
        arms += ratio - low, high - ratio
    assert arms[1] > 1.2 * arms[0]


def test_interval_of_many_documents_is_the_normal_one():
    rng = np.random.default_rng(1)
    sums = synthetic(rng, 3000)
    nll, tokens = sums[:, 0], sums[:, 1]
    ratio = nll.sum() / tokens.sum()
    error = np.sqrt(((nll - ratio * tokens) ** 2).sum()) / tokens.sum()
    low, high = per_token_interval(sums, rng, samples=2000)
    assert (ratio - low) / error == pytest.approx(1.96, rel=0.1)
    assert (high - ratio) / error == pytest.approx(1.96, rel=0.1)


def test_interval_contains_the_value_grows_with_confidence_and_is_remade_by_its_seed(
    tokenizer, llama
):
    def bounds(**options):
        found = perplexity(llama, tokenizer, TEXTS, **options).bits_per_byte
        assert found.low < found.value < found.high
        return found.low, found.high

    assert bounds(seed=3) == bounds(seed=3) != bounds(seed=4)
    wide, narrow = bounds(confidence=0.99), bounds(confidence=0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("num_documents", [1, 4])
def test_too_few_documents_have_no_interval_and_it_says_why(tokenizer, llama, num_documents):
    result = perplexity(llama, tokenizer, TEXTS[:num_documents])
    assert result.per_token.value > 1
    for found in (result.per_token, result.per_word, result.bits_per_byte):
        assert found.low is found.high is None
    assert f"{num_documents} document" in result.interval_note
    assert "no interval" in result.table()
    assert "no interval" not in perplexity(llama, tokenizer, TEXTS).table()
