"""The one bootstrap of a study: percentiles over resampled rows."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

SAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
# Up to so many rows all resamples are taken, instead of some at random: of six there are 46,656.
_ALL = 6
# Elements of one (resamples, rows) array (32 MiB).
_CHUNK = 2**22


class Interval(NamedTuple):
    """A value with its bootstrap interval, which may be infinite on one side or NaN."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval tells the value's sign."""
        return self.low > 0 or self.high < 0


def resamples(num_rows: int, samples: int = SAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """Chunks (B, num_rows) of row numbers drawn with replacement, `samples` rows in all.

    Of up to six rows all resamples, once each: what is found then depends on no random number.
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
    """(samples, ...) of a statistic that takes (B, num_rows) row numbers to (B, ...)."""
    return np.concatenate([statistic(index) for index in resamples(num_rows, samples)])


def interval(value: float, found: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Percentile interval (Efron and Tibshirani 1993, chapter 13) of resampled values; NaN if none
    of them is a number.

    Percentiles are values that were found, none between two: these may be learning rates of a grid,
    or infinite.
    """
    tail = (1 - confidence) / 2
    found = found[~np.isnan(found)]
    if not len(found):
        return Interval(float(value), float("nan"), float("nan"))
    low = np.quantile(found, tail, method="inverted_cdf")
    # The mirror image of `low`, so that an interval of -x is that of x, mirrored.
    high = -np.quantile(-found, tail, method="inverted_cdf")
    return Interval(float(value), float(low), float(high))
