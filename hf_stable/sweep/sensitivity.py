"""Learning-rate sensitivity, best learning rate and largest stable learning rate.

Rows are seeds and columns are learning rates. Intervals are percentiles of the bootstrap over
seeds, which resamples whole rows. With three seeds, the interval is about their range, which covers
the truth three times in four, not nineteen in twenty (`coverage_words`). One seed has no interval.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_stable.errors import UserError

from .bootstrap import CONFIDENCE, SAMPLES, Interval, interval, resampled

# Fewer seeds do not show the spread, and a majority of two seeds would need both.
MIN_SEEDS = 3
# Up to this many seeds, the bootstrap's 95 % interval of a mean is their range: with three seeds,
# one resample in 27 takes the lowest seed three times, which is more than 2.5 %.
_RANGE = 3
# From this many seeds on, the bootstrap's interval has about its nominal coverage.
_MANY = 20


@dataclass(frozen=True)
class Grid:
    """Runs of one method, without the seeds that have a missing or failed run.

    Args:
        rates: (R,) peak learning rates, ascending.
        losses: (S, R) final validation losses, nats per token. A loss that is not finite counts as
            the initial loss.
        initial: (S,) or one number: loss before the first update, nats per token.
        unstable: (S, R) bool, True if a run diverged or collapsed, by the rule.

    Raises:
        UserError: If shapes disagree, rates are not ascending or an initial loss is not finite.
    """

    rates: np.ndarray
    losses: np.ndarray
    initial: np.ndarray
    unstable: np.ndarray

    def __post_init__(self) -> None:
        for name, kind in (("rates", float), ("losses", float), ("unstable", bool)):
            object.__setattr__(self, name, np.asarray(self.__dict__[name], dtype=kind))
        shape = self.losses.shape
        if len(shape) != 2 or not all(shape) or self.unstable.shape != shape:
            raise UserError(
                f"losses are {shape} and unstable {self.unstable.shape}; both have to be "
                "(seeds, learning rates), with at least one of each"
            )
        if self.rates.shape != shape[1:] or not (np.diff(self.rates) > 0).all():
            raise UserError(f"learning rates {self.rates.tolist()}: give {shape[1]}, ascending")
        object.__setattr__(self, "initial", _initial(self.initial, len(self.losses)))

    @property
    def num_seeds(self) -> int:
        return len(self.losses)

    @property
    def capped(self) -> np.ndarray:
        """(S, R) losses, capped at the initial loss."""
        return _capped(self.losses, self.initial)


def lr_sensitivity(
    losses: np.ndarray,
    initial: np.ndarray | float,
    *,
    samples: int = SAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the LR sensitivity in nats (Wortsman et al. 2023, section 2.2).

    It is the mean over learning rates of min(loss, initial), minus the smallest. The capped losses
    are first averaged over seeds, so that all seeds share one best learning rate. A separate best
    rate per seed would count noise as sensitivity.

    Args:
        losses: (S, R) final validation losses. A loss that is not finite counts as the initial one.
        initial: (S,) or one number: loss before the first update.
        samples: Number of resamples.
        confidence: Confidence of the interval.

    Raises:
        UserError: If shapes disagree or an initial loss is not finite.
    """
    losses = np.asarray(losses, dtype=float)
    if losses.ndim != 2 or not losses.size:
        raise UserError(f"losses are {losses.shape}; they have to be (seeds, learning rates)")
    return _over_seeds(
        _capped(losses, _initial(initial, len(losses))), _sensitivity, samples, confidence
    )


def best_rate(grid: Grid, *, samples: int = SAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """Return the learning rate with the lowest mean capped loss, the smaller one of a tie.

    It is NaN if no run of the grid is better than before training.
    """
    return _over_seeds(grid.capped, _best(grid), samples, confidence)


def stable_by_majority(unstable: np.ndarray) -> np.ndarray:
    """Return (..., R) bool, True if more than half of the seeds of (..., S, R) are stable."""
    return np.asarray(unstable).mean(axis=-2) < 0.5


def largest_stable(
    grid: Grid, *, samples: int = SAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """Return the largest learning rate such that most seeds are stable at it and all lower ones.

    0 means that it is less than the lowest of the grid. The highest rate of the grid means "this or
    more", for which there is a warning (`warnings`).
    """
    return _over_seeds(grid.unstable.astype(float), _largest(grid), samples, confidence)


def coverage_words(seeds: Collection[int]) -> str:
    """Return sentences on the real coverage of the bootstrap's 95 % intervals over these seeds.

    With up to three seeds, the interval of a mean is their range. It misses the truth only if all
    seeds lie on one side of it.
    """
    few = sorted({number for number in seeds if 1 < number <= _RANGE})
    parts = [
        f"over {number} seeds they cover the truth about {100 - 200 / 2**number:.0f} % of the time"
        for number in few
    ]
    if any(_RANGE < number < _MANY for number in seeds):
        parts.append(f"over fewer than {_MANY} seeds they are too narrow")
    words = [f"Their real coverage is less than 95 %: {'; '.join(parts)}."] if parts else []
    words += ["One seed has no interval."] if 1 in seeds else []
    return " ".join(words)


def warnings(grid: Grid, *, sigma_reparam: bool = False, layer_rates: bool = False) -> list[str]:
    """Return sentences on the limits of these numbers (after Wortsman et al. 2023, appendix B).

    Wortsman et al. treat the sensitivity of muP as comparable, but not its learning rates.

    Args:
        grid: Runs of the method.
        sigma_reparam: True if weights are divided by their spectral norm.
        layer_rates: True if layers have factors on the learning rate: muP away from its base width.
    """
    found = []
    if sigma_reparam:
        found.append(
            "Sigma-Reparam divides weights by their spectral norm: their size does not matter and "
            "the learning rate means another step, so sensitivity and ratios compare unlike things."
        )
    if layer_rates:
        found.append(
            "Layers have factors of their own on the learning rate (muP), so its value means "
            "another step than in other methods: ratios depend on that factor."
        )
    if grid.num_seeds < MIN_SEEDS:
        found.append(
            f"There are only {grid.num_seeds} complete seed(s): with fewer than {MIN_SEEDS}, "
            "intervals do not show how much seeds differ."
        )
    return found + _about_fate(grid)


def _about_fate(grid: Grid) -> list[str]:
    stable = stable_by_majority(grid.unstable)
    if not stable.any():
        return [
            "It fails at every learning rate: a sensitivity near 0 means that it is always bad, "
            "not that it is robust."
        ]
    found = []
    if side := edge_of_best(grid):
        best = grid.rates[0 if side == "lowest" else -1]
        found.append(
            f"The best learning rate is the grid's {side}, {best:g}: a better one may lie beyond, "
            "and sensitivity is measured over one side of the optimum only."
        )
    if stable.all():
        found.append(
            f"It is stable up to the grid's highest learning rate, {grid.rates[-1]:g}: the largest "
            "stable one and its ratios are lower bounds."
        )
    elif stable[np.argmin(stable) :].any():
        found.append(
            "It is stable at a learning rate above one where it is not: the largest stable one is "
            "taken below the first failure."
        )
    return found


def edge_of_best(grid: Grid) -> Literal["lowest", "highest"] | None:
    """Return the end of the grid at which the best learning rate lies; None inside the grid."""
    best = float(_best(grid)(grid.capped.mean(axis=0)))
    if best == grid.rates[0]:
        return "lowest"
    return "highest" if best == grid.rates[-1] else None


def _initial(initial: np.ndarray | float, num_seeds: int) -> np.ndarray:
    initial = np.asarray(initial, dtype=float)
    if initial.shape not in ((), (num_seeds,)) or not np.isfinite(initial).all():
        raise UserError(
            f"initial losses are {initial.tolist()}; give a finite number, or one for each of "
            f"{num_seeds} seeds"
        )
    return np.broadcast_to(initial, (num_seeds,))


def _capped(losses: np.ndarray, initial: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(losses), np.minimum(losses, initial[:, None]), initial[:, None])


def _sensitivity(means: np.ndarray) -> np.ndarray:
    """Return (...,) sensitivities of mean capped losses (..., R)."""
    # Subtract first, so that a method with a constant loss has exactly 0.
    return (means - means.min(axis=-1, keepdims=True)).mean(axis=-1)


def _best(grid: Grid) -> Callable[[np.ndarray], np.ndarray]:
    ceiling = grid.initial.max()

    def best(means: np.ndarray) -> np.ndarray:
        trained = means.min(axis=-1) < ceiling
        return np.where(trained, grid.rates[means.argmin(axis=-1)], np.nan)

    return best


def _largest(grid: Grid) -> Callable[[np.ndarray], np.ndarray]:
    with_none = np.concatenate([[0.0], grid.rates])

    def largest(parts: np.ndarray) -> np.ndarray:
        """Return the rate from the share of unstable seeds, (..., R)."""
        return with_none[np.logical_and.accumulate(parts < 0.5, axis=-1).sum(axis=-1)]

    return largest


def _over_seeds(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    samples: int,
    confidence: float,
) -> Interval:
    """Return the interval of a statistic of (S, R) rows' mean over seeds; NaN ends with one."""
    if len(rows) == 1:
        return Interval(float(statistic(rows[0])), np.nan, np.nan)
    found = resampled(lambda index: statistic(rows[index].mean(axis=1)), len(rows), samples)
    return interval(float(statistic(rows.mean(axis=0))), found, confidence)
