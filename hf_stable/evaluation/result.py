"""Result of an evaluation: values, intervals, and all that is needed to compare them."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from hf_stable.wording import counted, significant

from .intervals import MIN_DOCUMENTS, ratio_intervals


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval; `low` and `high` are None without an interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PerplexityResult:
    """Result of `perplexity`.

    Args:
        per_token: Perplexity per token.
        per_word: Perplexity per word.
        bits_per_byte: Bits per byte of UTF-8.
        nll_nats: Sum of the NLL over all scored tokens, in nats.
        tokens: Number of scored tokens.
        words: Number of words.
        bytes: Number of bytes of UTF-8.
        documents: Number of scored documents.
        empty_documents: Number of documents with nothing to score; in no other count.
        unscored_tokens: Number of first tokens without a bos or eos token before them.
        max_length: Tokens of one window.
        stride: Newly scored tokens per window.
        confidence: Coverage of the intervals.
        interval_note: Reason why there is no interval, or None.
        document_sums: (documents, 4) float64: NLL in nats, tokens, words, bytes, in the order of
            the scored documents. Allows a paired comparison of two models.
    """

    per_token: Estimate
    per_word: Estimate
    bits_per_byte: Estimate
    nll_nats: float
    tokens: int
    words: int
    bytes: int
    documents: int
    empty_documents: int
    unscored_tokens: int
    max_length: int
    stride: int
    confidence: float
    interval_note: str | None
    document_sums: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Return all fields except `document_sums`, as plain Python values for JSON."""
        values = asdict(self)
        del values["document_sums"]
        return values

    def table(self) -> str:
        """Return the result as lines for a terminal."""
        lines = [
            _row("perplexity per token", self.per_token, self.confidence),
            _row("perplexity per word", self.per_word, self.confidence),
            _row("bits per byte", self.bits_per_byte, self.confidence),
            f"{counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"{counted(self.words, 'word')}, {counted(self.bytes, 'byte')}; "
            f"{self.nll_nats / self.tokens:.4f} nats per token; "
            f"windows of {counted(self.max_length, 'token')}, stride {self.stride}",
        ]
        if self.empty_documents:
            lines.append(f"{counted(self.empty_documents, 'empty document')}: nothing to score")
        if self.unscored_tokens:
            lines.append(
                f"not scored: {counted(self.unscored_tokens, 'first token')}, since "
                "the tokenizer has no bos or eos token to predict them from"
            )
        if self.interval_note:
            lines.append(f"no interval: {self.interval_note}")
        return "\n".join(lines)


def _row(label: str, estimate: Estimate, confidence: float) -> str:
    row = f"{label:<22}{significant(estimate.value):>12}"
    if estimate.low is None or estimate.high is None:
        return row
    interval = f"{significant(estimate.low)} to {significant(estimate.high)}"
    return f"{row}   {100 * confidence:g} % interval {interval}"


def estimates(
    document_sums: np.ndarray, *, confidence: float, samples: int, rng: np.random.Generator
) -> tuple[list[Estimate], str | None]:
    """Estimate perplexity per token, per word, and bits per byte.

    Args:
        document_sums: (documents, 4) float64: NLL, tokens, words, bytes. NLL must be finite, tokens
            and bytes positive.
        confidence: Coverage of the intervals.
        samples: Number of resamples.
        rng: Source of the resamples.

    Returns:
        The three estimates, and a note if there is no interval.
    """
    totals = document_sums.sum(axis=0)
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * 3
    note = _no_interval(len(document_sums), totals[2])
    if note is None:
        bounds = list(
            ratio_intervals(
                document_sums[:, 0],
                document_sums[:, 1:].T,
                confidence=confidence,
                samples=samples,
                rng=rng,
            )
        )
    scales = (_exp, _exp, _bits)
    with np.errstate(divide="ignore"):
        ratios = totals[0] / totals[1:]
    found = [
        Estimate(scale(ratio), *(None if bound is None else scale(bound) for bound in pair))
        for scale, ratio, pair in zip(scales, ratios, bounds, strict=True)
    ]
    return found, note


def _no_interval(num_documents: int, words: float) -> str | None:
    if num_documents < MIN_DOCUMENTS:
        return (
            f"{MIN_DOCUMENTS} documents or more show how much documents differ, and this is "
            f"{counted(num_documents, 'document')}; pass the text in more pieces "
            "(paragraphs, lines)"
        )
    return "the text has no words" if words == 0 else None


def _exp(nats: float) -> float:
    # Text without spaces is one long word, whose nats overflow exp().
    return math.exp(nats) if nats < 700 else math.inf


def _bits(nats: float) -> float:
    return float(nats) / math.log(2)
