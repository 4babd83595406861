"""Runs as figures show them: with a label, a color, and series without missing numbers.

Needs only the standard library and numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .history import History

# Okabe and Ito's palette without its yellow, which is invisible on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """A run with its style, which is the same in all figures.

    Args:
        history: Records of the run.
        label: Label, unique among the runs of a page.
        mark: Class of its curves in the SVG, with which a page hides them.
        colour: Matplotlib color.
        dashes: Matplotlib line style.
        width: Line width in points. Later runs are thinner, so that equal runs are both visible.
        lost: (step, name) of all numbers that are not finite.
    """

    history: History
    label: str
    mark: str
    colour: str
    dashes: str
    width: float
    lost: frozenset[tuple[int, str]]

    def samples(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the (S',) steps at which a name was recorded, and its (S',) or (S', H) values.

        Both are empty if it was never recorded. A NaN among the values was recorded as NaN.
        """
        steps = self.history.steps
        try:
            values = self.history.series(name)
        except (KeyError, IndexError, ValueError):
            return steps[:0], np.empty(0)
        kept = _has_numbers(values) | self._lost_at(name)
        return steps[kept], values[kept]

    def layers(self, rest: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (S',) steps and (S', L) or (S', L, H) values of `layers.*.REST`.

        NaN marks a number that a layer lacks. A number recorded as not finite is inf.
        """
        steps = self.history.steps
        values = self.history.telemetry.get(f"layers.*.{rest}")
        if values is None:
            return steps[:0], np.empty((0, 0))
        names = [f"layers.{layer}.{rest}" for layer in range(values.shape[1])]
        lost = np.stack([self._lost_at(name) for name in names], axis=1)
        lost = lost.reshape(lost.shape + (1,) * (values.ndim - 2))
        values = np.where(lost & ~np.isfinite(values), np.inf, values)
        kept = _has_numbers(values)
        return steps[kept], values[kept]

    def logged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (T,) steps and values of a column of the log; empty if there is none."""
        train = self.history.train
        if name not in train:
            return np.empty(0), np.empty(0)
        kept = ~np.isnan(train[name])
        kept |= np.array([(step, name) in self.lost for step in train["step"].tolist()], dtype=bool)
        return train["step"][kept], train[name][kept]

    def _lost_at(self, name: str) -> np.ndarray:
        return np.array([(step, name) in self.lost for step in self.history.steps], dtype=bool)


def dress(histories: Sequence[History]) -> list[Run]:
    """Assign each run a color and a label: its name, and its folder if names are equal."""
    names = [history.name for history in histories]
    runs = []
    for index, history in enumerate(histories):
        label = history.name
        if names.count(label) > 1:
            label = f"{label} ({index + 1}: {history.folder.name})"
        dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        colour = _COLOURS[index % len(_COLOURS)]
        lost = frozenset(history.non_finite)
        width = 2.2 - 1.2 * (index + 1) / len(histories)
        runs.append(Run(history, label, f"run-{index}", colour, dashes, width, lost))
    return runs


def _has_numbers(values: np.ndarray) -> np.ndarray:
    """Return (S,) bool, True if a sample has any number."""
    return np.any(~np.isnan(values.reshape(len(values), -1)), axis=1)
