"""When a run's training loss moved: rose out of its noise, or was no number any more."""

import math
from dataclasses import dataclass

import numpy as np

from hf_stable.telemetry.reading.history import History

# The loss is smoothed over about five log lines, long enough for single batches, short for spikes.
_DECAY = 0.8
# Rows before the first that is judged, and rows that noise is estimated from.
_FIRST_ROWS, _NOISE_ROWS = 5, 20
# In nats: 22 % of perplexity. No paper gives a number. A study calls five times as much a blow-up
# (`blow_up` in hf_stable.sweep.rule), but a move is reported while the run may still recover.
_RISE = 0.2
# In standard deviations of a single row, which is nine of the smoothed loss.
_NOISE = 3.0


@dataclass(frozen=True)
class LossMove:
    """The loss left its course.

    Args:
        step: the first log line above the loss's course, or without a finite loss.
        after: the log line before; the loss moved between the two.
        seen: the log line at which the move was beyond doubt.
        rise: largest rise of the smoothed loss above its lowest, nats; inf for no finite loss.
        recovered: whether the smoothed loss came back close to its lowest.
    """

    step: int
    after: int
    seen: int
    rise: float
    recovered: bool


def loss_moves(history: History) -> list[LossMove]:
    """Every move of the training loss, in order.

    The loss has moved at a log line where its exponential moving average (decay 0.8 a line) is
    above the average's running minimum by more than 0.2 nats and by more than three robust standard
    deviations of single lines (from the median absolute deviation of the last 20 differences). The
    move began at the first line since which no single loss was within two of these deviations of
    the lowest median of three lines. A loss that is not finite is a move at once, and so are three
    refused updates in a row, whichever of loss and gradient was not finite.
    """
    steps, losses = _losses(history)
    finite = np.isfinite(losses)
    moves = _rises(steps[finite], losses[finite])
    broken = steps[~finite]
    if len(broken):
        first = int(broken[0])
        after = int(max(steps[steps < first], default=0))
        moves.append(LossMove(first, after, first, math.inf, recovered=bool(finite[-1])))
    return sorted(moves, key=lambda move: move.step)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """(T,) exponential moving average, which a number that is not finite leaves as it is."""
    smooth = losses.copy()
    for row in range(1, len(smooth)):
        before = smooth[row - 1]
        weight = 1 - _DECAY if math.isfinite(losses[row]) else 0.0
        smooth[row] = before + weight * (losses[row] - before) if weight else before
    return smooth


def _losses(history: History) -> tuple[np.ndarray, np.ndarray]:
    """(T,) steps and losses of the log lines, and NaN where training stood still."""
    found = dict(zip(history.train.get("step", []), history.train.get("loss", []), strict=True))
    found |= {step: math.nan for step, name in history.non_finite if name == "loss"}
    refused = {row["step"] for row in history.events if row["event"] == "non_finite"}
    for step in refused:
        if {step + 1, step + 2} <= refused:
            found |= {step: math.nan, step + 1: math.nan, step + 2: math.nan}
    steps = sorted(found)
    return np.array(steps, dtype=float), np.array([found[step] for step in steps], dtype=float)


def _rises(steps: np.ndarray, losses: np.ndarray) -> list[LossMove]:
    moves: list[LossMove] = []
    smooth, noise = smoothed(losses), _noise(losses)
    lowest, begun = math.inf, None
    for row, value in enumerate(smooth):
        if begun is None:
            lowest = min(lowest, value)
            if row >= _FIRST_ROWS and value - lowest > max(_RISE, _NOISE * noise[row]):
                begun = _begin(losses[: row + 1], noise[row]), row
        elif value - lowest <= max(_RISE / 4, noise[row]):
            moves.append(_move(steps, smooth, lowest, (*begun, row)))
            begun = None
    if begun is not None:
        moves.append(_move(steps, smooth, lowest, (*begun, None)))
    return moves


def _begin(losses: np.ndarray, noise: float) -> int:
    """The row after the last that was near the lowest three, which lag less than the average."""
    threes = np.median(np.lib.stride_tricks.sliding_window_view(losses, 3), axis=1)
    return int(np.flatnonzero(losses <= threes.min() + 2 * noise)[-1]) + 1


def _move(
    steps: np.ndarray, smooth: np.ndarray, lowest: float, rows: tuple[int, int, int | None]
) -> LossMove:
    begin, seen, end = rows
    begin = min(begin, seen)
    return LossMove(
        step=int(steps[begin]),
        after=int(steps[begin - 1]) if begin else 0,
        seen=int(steps[seen]),
        rise=float(max(smooth[seen:end]) - lowest),
        recovered=end is not None,
    )


def _noise(losses: np.ndarray) -> np.ndarray:
    """(T,) robust standard deviation of a single row, from differences, which have no trend."""
    noise = np.zeros(len(losses))
    for row in range(2, len(losses)):
        steps = np.diff(losses[max(0, row - _NOISE_ROWS) : row + 1])
        noise[row] = 1.4826 * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2)
    return noise
