"""Which cells of a study are stable, under the recorded verdicts and under other thresholds.

A run is judged again from its records, so the grid under another threshold costs no training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import get_args

import numpy as np

from .report_page import Cell
from .rule import Collapse, Thresholds, judge
from .study import Result, Study

# By run id, whether it is stable.
Stable = Mapping[str, bool]
KINDS: tuple[Collapse, ...] = get_args(Collapse)


@dataclass(frozen=True)
class Count:
    """What became of the runs of one cell: (method, variant, learning rate)."""

    stable: int
    ended: int
    stopped: int
    failed: int
    missing: int

    @property
    def is_stable(self) -> bool:
        """By majority of the seeds that have ended, a failed one counting against."""
        return 2 * self.stable > self.ended

    def cell(self) -> Cell:
        """As the grid shows it, such as `2/3 s1`."""
        more = {"s": self.stopped, "f": self.failed, "w": self.missing}
        text = f"{self.stable}/{self.ended}" if self.ended else "–"
        words = [text, *(f"{letter}{number}" for letter, number in more.items() if number)]
        if not self.ended:
            return Cell(" ".join(words), "none")
        marks = {0: "bad", self.ended: "good"}
        return Cell(" ".join(words), marks.get(self.stable, "mixed"))


def recorded(study: Study) -> dict[str, bool]:
    """Stability of every ended run by the verdict in its record."""
    return {result.id: result.stable for result in study.results}


def judged(study: Study, kind: Collapse) -> dict[str, bool]:
    """The same with the collapse threshold `kind`, everything else of the rule as recorded.

    A run that failed keeps the verdict in its record, as does one whose log lines are missing (see
    `not_judged`), or whose text has no mark of this kind (see `unmarked`).
    """
    return {result.id: _is_stable(result, kind) for result in study.results}


def not_judged(study: Study) -> list[str]:
    """Ids of finished runs that cannot be judged again, for want of log lines."""
    return [each.id for each in study.results if each.status == "finished" and not _has_log(each)]


def unmarked(study: Study) -> list[Result]:
    """Runs on a text of which a bigram table knows no more than a unigram table, so that there is
    nothing between the two, and nothing that they could be degraded to."""
    counted = [each for each in study.results if np.isfinite([each.unigram, each.bigram]).all()]
    return [each for each in counted if not each.has_marks]


def _has_log(result: Result) -> bool:
    history = result.history
    return history is not None and "loss" in history.train and len(history.train["step"]) > 0


def _is_stable(result: Result, kind: Collapse) -> bool:
    if result.status != "finished" or not _has_log(result):
        return result.stable
    assert result.history is not None
    thresholds = replace(Thresholds.from_dict(result.thresholds), collapse=kind)
    if thresholds.needs_bigram and not result.has_marks:
        return result.stable
    verdict = judge(
        result.history.train,
        result.validation_loss,
        result.unigram,
        result.bigram,
        result.warmup_steps,
        thresholds,
    )
    return verdict.stable


def count(study: Study, stable: Stable, method: str, variant: str, rate: float) -> Count:
    """What became of one cell."""
    runs = study.cell(method, variant, rate)
    return Count(
        stable=sum(stable[run.id] for run in runs),
        ended=len(runs),
        stopped=sum(run.status == "stopped" for run in runs),
        failed=sum(run.status == "failed" for run in runs),
        missing=study.missing(method, variant, rate),
    )


def largest_stable(study: Study, stable: Stable, method: str, variant: str) -> float | None:
    """The largest learning rate such that it and all lower ones are stable by majority of seeds.

    0 where the lowest is not stable; None where nothing has ended, or where a cell without any
    ended run stands before the first that breaks: what was not run is not known.
    """
    largest: float | None = None
    for rate in study.rates_of(variant):
        found = count(study, stable, method, variant, rate)
        if not found.ended:
            return None
        if not found.is_stable:
            return 0.0 if largest is None else largest
        largest = rate
    return largest


def breaks(study: Study, stable: Stable, method: str, variant: str) -> dict[int, float]:
    """By seed, the largest learning rate such that its run and all at lower rates are stable.

    0 where the lowest is not; seeds with a run missing below their break are left out.
    """
    table = study.numbers(method, variant, lambda run: float(stable[run.id]))
    rates, found = study.rates_of(variant), {}
    for seed, row in zip(study.seeds, table, strict=True):
        fell = np.flatnonzero(row != 1)
        if not fell.size:
            found[seed] = rates[-1]
        elif not np.isnan(row[fell[0]]):
            found[seed] = rates[fell[0] - 1] if fell[0] else 0.0
    return found


def reversals(orders: Sequence[Mapping[str, float | None]]) -> tuple[list[str], list[str]]:
    """Pairs of methods whose order by a number depends on which of `orders` is asked.

    Returns:
        sentences on pairs that turn around, and on pairs that are apart under some and equal under
        others. A method without a number under some is in neither.
    """
    known = [name for name in orders[0] if all(order.get(name) is not None for order in orders)]
    turned, split = [], []
    for one, other in combinations(known, 2):
        signs = {int(np.sign(order[one] - order[other])) for order in orders}  # type: ignore
        if {1, -1} <= signs:
            turned.append(f"{one} and {other}")
        elif len(signs) > 1:
            high, low = (one, other) if 1 in signs else (other, one)
            split.append(f"{high} above {low}")
    return turned, split
