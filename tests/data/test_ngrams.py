"""The sparse tables equal the dense definition, and know what they must know."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_stable.data import ngram_cross_entropy
from hf_stable.errors import DataError

V = 7
ids = arrays(np.uint32, st.integers(2, 60), elements=st.integers(0, V - 1))


@given(train=ids, validation=ids)
def test_equals_the_dense_definition(train, validation):
    unigrams, bigrams = np.ones(V), np.full((V, V), 0.1)
    for token in train:
        unigrams[token] += 1
    for a, b in pairwise(train):
        bigrams[a, b] += 1
    expected = np.log(unigrams / unigrams.sum()), np.log(bigrams / bigrams.sum(1, keepdims=True))
    found = ngram_cross_entropy(train, validation, V)
    assert found.tokens == len(validation) - 1
    assert found.unigram == pytest.approx(-expected[0][validation[1:]].mean())
    assert found.bigram == pytest.approx(-expected[1][validation[:-1], validation[1:]].mean())


def test_order_is_worth_something_to_the_bigram_only():
    cycle = np.tile(np.arange(100, dtype=np.uint32), 200)
    found = ngram_cross_entropy(cycle, cycle, 50_000_000)
    small = ngram_cross_entropy(cycle, cycle, 100)
    assert small.unigram == pytest.approx(np.log(100), rel=1e-6)
    assert small.bigram < 0.1 < small.unigram
    assert found.bigram < found.unigram


def test_max_tokens_uses_the_first():
    tokens = np.arange(1000) % 13
    assert ngram_cross_entropy(tokens, tokens, 13, max_tokens=100) == ngram_cross_entropy(
        tokens[:100], tokens[:100], 13
    )


@pytest.mark.parametrize(
    ("train", "validation"),
    [([0], [0, 1]), ([0, 1], []), ([0, 7], [0, 1]), ([0, 1], [0, -1])],
)
def test_too_few_tokens_or_foreign_ids_are_refused(train, validation):
    with pytest.raises(DataError):
        ngram_cross_entropy(np.array(train), np.array(validation), V)
