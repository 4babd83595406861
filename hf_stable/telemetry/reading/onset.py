"""Detect when a run's training loss moved: rose above its noise, or stopped being finite."""

import math
from dataclasses import dataclass

import numpy as np

from hf_stable.telemetry.reading.history import History

# The loss is smoothed over about five log lines: more than single batches, less than a spike.
_DECAY = 0.8
# Rows before the first judged row, and rows from which noise is estimated.
_FIRST_ROWS, _NOISE_ROWS = 5, 20
# Rise in nats: 22 % of perplexity. No paper gives a number. A move is reported while the run may
# still recover; a study needs a larger rise for a blow-up (`blow_up` in hf_stable.sweep.rule).
_RISE = 0.2
# In standard deviations of a single row; three of these are nine of the smoothed loss.
_NOISE = 3.0


@dataclass(frozen=True)
class LossMove:
    """A departure of the loss from its course.

    Args:
        step: First log line above the course of the loss, or without a finite loss.
        after: The log line before `step`; the loss moved between the two.
        seen: Log line at which the move was detected.
        rise: Largest rise of the smoothed loss above its lowest, nats; inf without a finite loss.
        recovered: True if the smoothed loss returned close to its lowest.
    """

    step: int
    after: int
    seen: int
    rise: float
    recovered: bool


def loss_moves(history: History) -> list[LossMove]:
    """Return every move of the training loss, in order.

    The loss has moved at a log line if its exponential moving average (decay 0.8 per line) exceeds
    the running minimum of the average by more than 0.2 nats and by more than three robust standard
    deviations of single lines. The deviation is estimated from the median absolute deviation of the
    last 20 differences. The move began at the first line after which no single loss was within two
    deviations of the lowest median of three lines. A loss that is not finite is a move immediately.
    So are three consecutive refused updates, whether the loss or the gradient was not finite.
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
    """Return the (T,) exponential moving average; numbers that are not finite do not change it."""
    smooth = losses.copy()
    for row in range(1, len(smooth)):
        before = smooth[row - 1]
        weight = 1 - _DECAY if math.isfinite(losses[row]) else 0.0
        smooth[row] = before + weight * (losses[row] - before) if weight else before
    return smooth


def _losses(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Return (T,) steps and losses of the log lines, with NaN where updates were refused."""
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
    """Return the row after the last that was near the lowest median of three lines.

    The median of three lines lags less than the moving average.
    """
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
    """Return the (T,) robust standard deviation of a row, from differences to remove the trend."""
    noise = np.zeros(len(losses))
    for row in range(2, len(losses)):
        steps = np.diff(losses[max(0, row - _NOISE_ROWS) : row + 1])
        noise[row] = 1.4826 * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2)
    return noise
