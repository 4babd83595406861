"""Grid of stable cells of a study, under the recorded verdicts and under other thresholds.

Runs are judged again from their records, so a grid under another threshold needs no training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import get_args

import numpy as np

from .report_page import Cell
from .rule import Collapse, Thresholds, judge
from .study import Result, Study

# Run id -> True if the run is stable.
Stable = Mapping[str, bool]
KINDS: tuple[Collapse, ...] = get_args(Collapse)


@dataclass(frozen=True)
class Count:
    """Outcomes of the runs of one cell: (method, variant, learning rate)."""

    stable: int
    ended: int
    stopped: int
    failed: int
    missing: int

    @property
    def is_stable(self) -> bool:
        """True if most ended seeds are stable; a failed one counts as not stable."""
        return 2 * self.stable > self.ended

    def cell(self) -> Cell:
        """Return the cell of the report, such as `2/3 s1`."""
        more = {"s": self.stopped, "f": self.failed, "w": self.missing}
        text = f"{self.stable}/{self.ended}" if self.ended else "–"
        words = [text, *(f"{letter}{number}" for letter, number in more.items() if number)]
        if not self.ended:
            return Cell(" ".join(words), "none")
        marks = {0: "bad", self.ended: "good"}
        return Cell(" ".join(words), marks.get(self.stable, "mixed"))


def recorded(study: Study) -> dict[str, bool]:
    """Return the stability of every ended run by its recorded verdict."""
    return {result.id: result.stable for result in study.results}


def judged(study: Study, kind: Collapse) -> dict[str, bool]:
    """Return the stability with collapse threshold `kind` and the rest of the rule as recorded.

    A run keeps its recorded verdict if it failed, if its log lines are missing (see `not_judged`),
    or if this threshold cannot be applied to its text (see `unmarked`).
    """
    return {result.id: _is_stable(result, kind) for result in study.results}


def not_judged(study: Study) -> list[str]:
    """Return the ids of finished runs that cannot be judged again because log lines are missing."""
    return [each.id for each in study.results if each.status == "finished" and not _has_log(each)]


def unmarked(study: Study) -> list[Result]:
    """Return the runs on a text whose bigram table is no better than its unigram table.

    The thresholds that need a bigram cannot be applied to them.
    """
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
    """Return the outcomes of one cell."""
    runs = study.cell(method, variant, rate)
    return Count(
        stable=sum(stable[run.id] for run in runs),
        ended=len(runs),
        stopped=sum(run.status == "stopped" for run in runs),
        failed=sum(run.status == "failed" for run in runs),
        missing=study.missing(method, variant, rate),
    )


def largest_stable(study: Study, stable: Stable, method: str, variant: str) -> float | None:
    """Return the largest rate such that it and all lower ones are stable by majority of seeds.

    It is 0 if the lowest rate is not stable. It is None if no run has ended, or if a cell without
    ended runs precedes the first unstable one.
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
    """Return, by seed, the largest rate such that its run and all at lower rates are stable.

    It is 0 if the lowest rate is not stable. Seeds with a missing run below the first unstable one
    are left out.
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
    """Find the pairs of methods whose order differs between `orders`.

    Returns:
        Descriptions of the pairs that are reversed, and of the pairs that are different in some
        orders and equal in others. A method that lacks a number in some order is left out.
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
