"""Figure of the loss of all runs, with its moves and, below, the alarms at the same steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .alarms import Alarm
from .drawing import WIDTH, NotRecorded, canvas, curve, legend, step_axis, value_axis
from .looks import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_loss(
    runs: Sequence[Run], alarms: Sequence[Sequence[Alarm]], moves: Sequence[int | None]
) -> "Figure":
    """Draw losses, and alarms if there are any.

    Args:
        runs: Runs to draw together.
        alarms: Alarms of each run.
        moves: Step at which each run's loss moved, or None.

    Raises:
        NotRecorded: If no run has logged a loss.
    """
    from matplotlib.lines import Line2D  # noqa: PLC0415  # optional

    if not any(run.logged("loss")[0].size for run in runs):
        raise NotRecorded("no run has logged a training loss yet")
    signs = _signs(alarms)
    heights = [3.2, 0.25 + 0.2 * len(signs)] if signs else [3.2]
    figure = canvas(WIDTH, sum(heights) + 0.6)
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes, *below = rows[:, 0]
    losses = [values for run in runs for values in _losses(axes, run)]
    value_axis(axes, np.concatenate(losses))
    axes.set_ylabel("loss, nats per token")
    for strip in below:
        _draw_alarms(strip, runs, alarms, signs)
    for run, move in zip(runs, moves, strict=True):
        for each in rows[:, 0] if move is not None else ():
            each.axvline(move, color=run.colour, ls=(0, (4, 3)), lw=0.9, gid=run.mark)
    step_axis((below or [axes])[0])
    circle = Line2D([], [], color="#555555", marker="o", ls="none", ms=4, mfc="white")
    others = [(circle, "validation")]
    if any(move is not None for move in moves):
        others.append((Line2D([], [], color="#555555", ls=(0, (4, 3)), lw=0.9), "the loss moved"))
    legend(figure, runs, others)
    return figure


def _losses(axes: "Axes", run: Run) -> list[np.ndarray]:
    """Draw the losses of one run and return the values drawn."""
    steps, values = run.logged("loss")
    curve(axes, run, steps, values)
    events = run.history.events
    rows = [row for row in events if row["event"] == "validation"]
    validated = np.array([float(row["loss"]) for row in rows])
    at = np.array([float(row["step"]) for row in rows])
    size = 4 if len(rows) < 40 else 2.5
    looks = {"linestyle": "none", "marker": "o", "markerfacecolor": "white", "markersize": size}
    curve(axes, run, at, validated, **looks, markevery=1)
    skipped = np.array([row["step"] for row in events if row["event"] == "non_finite"])
    curve(axes, run, skipped, np.full(len(skipped), np.nan))
    return [values, validated]


def _draw_alarms(
    axes: "Axes", runs: Sequence[Run], alarms: Sequence[Sequence[Alarm]], signs: Sequence[str]
) -> None:
    for run, found in zip(runs, alarms, strict=True):
        steps, places = [alarm.step for alarm in found], [signs.index(_sign(a)) for a in found]
        axes.plot(steps, places, "|", color=run.colour, ms=8, mew=1.8, gid=run.mark)
    axes.set_yticks(range(len(signs)), signs)
    axes.set_ylim(len(signs) - 0.5, -0.5)


def _sign(alarm: Alarm) -> str:
    """Return the name of an alarm without its layer."""
    if alarm.rule == "non_finite":
        return "not finite"
    parts = alarm.name.split(".", 2)
    return parts[2] if parts[0] == "layers" and len(parts) == 3 else alarm.name


def _signs(alarms: Sequence[Sequence[Alarm]]) -> list[str]:
    ordered = sorted((alarm for found in alarms for alarm in found), key=lambda alarm: alarm.step)
    return list(dict.fromkeys(map(_sign, ordered)))
