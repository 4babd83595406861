"""Unigram and bigram baselines: cross-entropies that a model must beat."""

from dataclasses import dataclass

import numpy as np

from hf_stable.errors import DataError

UNIGRAM_SMOOTHING = 1.0
BIGRAM_SMOOTHING = 0.1


@dataclass(frozen=True)
class NgramBaselines:
    """Cross-entropies in nats per token, over `tokens` predicted tokens of the validation text."""

    unigram: float
    bigram: float
    tokens: int


def ngram_cross_entropy(
    train: np.ndarray,
    validation: np.ndarray,
    vocab_size: int,
    *,
    boundary: int | None = None,
    max_tokens: int = 20_000_000,
) -> NgramBaselines:
    """Return the cross-entropy of counted unigrams (add-1) and bigrams (add-0.1).

    Both are averaged over the same validation tokens, those with a predecessor. Memory grows with
    the number of tokens, not with the square of the vocabulary.

    Args:
        train: Training ids, (n,) of an integer type.
        validation: Validation ids, (n,) of an integer type.
        vocab_size: Number of ids V.
        boundary: Id that begins every document. It is a context but not a label, which makes the
            numbers comparable with a perplexity over documents. None scores every token.
        max_tokens: Number of tokens used, from the start of each text.

    Raises:
        DataError: If a text has fewer than two tokens, or an id is outside [0, V).
    """
    train = _checked("train", train[:max_tokens], vocab_size)
    validation = _checked("validation", validation[:max_tokens], vocab_size)
    labels, contexts = validation[1:], validation[:-1]
    if boundary is not None:
        labels, contexts = labels[labels != boundary], contexts[labels != boundary]

    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts[labels] + UNIGRAM_SMOOTHING) / (len(train) + UNIGRAM_SMOOTHING * vocab_size)

    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = contexts * vocab_size + labels
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[places] == wanted, pair_counts[places], 0)
    context_counts = np.bincount(train[:-1], minlength=vocab_size)[contexts]
    bigram = (seen + BIGRAM_SMOOTHING) / (context_counts + BIGRAM_SMOOTHING * vocab_size)
    return NgramBaselines(
        unigram=float(-np.log(unigram).mean()),
        bigram=float(-np.log(bigram).mean()),
        tokens=len(labels),
    )


def _checked(name: str, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the ids as int64, in which the key of a pair, id * V + id, fits for V below 3e9."""
    if len(tokens) < 2:
        raise DataError(f"{name} has {len(tokens)} tokens, but n-gram baselines need at least 2")
    ids = np.asarray(tokens).astype(np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        raise DataError(
            f"{name} token {outside[0]} is id {ids[outside[0]]}, but there are {vocab_size} ids"
        )
    return ids
