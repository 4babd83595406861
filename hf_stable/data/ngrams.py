"""What tables of single tokens and of pairs know about a text: marks a model must beat."""

from dataclasses import dataclass

import numpy as np

from hf_stable.errors import DataError

UNIGRAM_SMOOTHING = 1.0
BIGRAM_SMOOTHING = 0.1


@dataclass(frozen=True)
class NgramBaselines:
    """Cross entropies in nats a token, over `tokens` predicted tokens of the validation text."""

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
    """Cross entropy of counted unigrams (add-1) and bigrams (add-0.1) on the same tokens.

    Both are averaged over the validation tokens that have a predecessor. Memory
    goes with the number of tokens, not with the square of the vocabulary.

    Args:
        train, validation: ids, (n,) of an integer type; only the first `max_tokens` of each are
            used.
        vocab_size: number of ids V.
        boundary: id that begins every document; it is a context but no label, so that the numbers
            are comparable with a perplexity over documents. None scores every token.

    Raises:
        DataError: less than two tokens, or an id outside [0, V).
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
    """The ids as int64 (a pair's key, id * V + id, fits for any V below 3e9)."""
    if len(tokens) < 2:
        raise DataError(f"{name} has {len(tokens)} tokens, n-gram baselines need at least 2")
    ids = np.asarray(tokens).astype(np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        raise DataError(
            f"{name} token {outside[0]} is id {ids[outside[0]]}, but there are {vocab_size} ids"
        )
    return ids
