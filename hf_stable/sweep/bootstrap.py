"""Bootstrap of a study: percentiles over resampled rows."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

SAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
# Up to this many rows, all resamples are taken instead of random ones; six rows have 46,656.
_ALL = 6
# Elements of one (resamples, rows) array (32 MiB).
_CHUNK = 2**22


class Interval(NamedTuple):
    """A value with its bootstrap interval; an end may be infinite or NaN."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the interval determines the sign of the value."""
        return self.low > 0 or self.high < 0


def resamples(num_rows: int, samples: int = SAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """Yield chunks (B, num_rows) of row numbers drawn with replacement, `samples` in total.

    With up to six rows, every possible resample is yielded once, so no random number is used.
    """
    if num_rows <= _ALL:
        yield np.array(list(itertools.product(range(num_rows), repeat=num_rows)))
        return
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // num_rows)
    for begin in range(0, samples, chunk):
        yield rng.integers(num_rows, size=(min(chunk, samples - begin), num_rows))


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], num_rows: int, samples: int = SAMPLES
) -> np.ndarray:
    """Return (samples, ...) values of a statistic from (B, num_rows) row numbers to (B, ...)."""
    return np.concatenate([statistic(index) for index in resamples(num_rows, samples)])


def interval(value: float, found: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Return the percentile interval of resampled values (Efron and Tibshirani 1993, chapter 13).

    It is NaN if no value is a number. Percentiles are not interpolated, because values may be
    learning rates of a grid, or infinite.
    """
    tail = (1 - confidence) / 2
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(float(value), float("nan"), float("nan"))
    low = np.quantile(found, tail, method="inverted_cdf")
    # Mirrors `low`, so that the interval of -x is the mirrored interval of x.
    high = -np.quantile(-found, tail, method="inverted_cdf")
    return Interval(float(value), float(low), float(high))
