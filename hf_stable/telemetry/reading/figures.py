"""Figures of a page, each with a caption and the source it follows.

A figure without recorded numbers in any run is left out, with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import layer_figures
from .alarms import Alarm
from .drawing import (
    WIDTH,
    NotRecorded,
    canvas,
    curve,
    legend,
    step_axis,
    styled,
    to_svg,
    value_axis,
)
from .looks import Run
from .loss_figure import draw_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RYBAKOV = "Rybakov et al. 2024 (arXiv 2410.16682)"
WORTSMAN = "Wortsman et al. 2023 (arXiv 2309.14322)"
_PAPER_NAMES = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}
_NORMS = {
    "weight_l2": "‖W‖₂",
    "input_l2": "‖X‖₂",
    "output_l2": "‖Y‖₂",
    "weight_grad_l2": "‖∂L/∂W‖₂",
    "input_grad_l2": "‖∂L/∂X‖₂",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Args:
        key: Anchor of the figure.
        title: Headline of the figure.
        caption: Text on what to look for.
        source: Paper or record that the figure follows.
        svg: An <svg> element.
    """

    key: str
    title: str
    caption: str
    source: str
    svg: str


@dataclass(frozen=True)
class LeftOut:
    """A figure that was left out, and the reason."""

    title: str
    reason: str


@dataclass(frozen=True)
class _Plan:
    """A figure to draw; `draw` raises NotRecorded if there is nothing to show."""

    key: str
    title: str
    caption: str
    source: str
    draw: Callable[[], "Figure"]


def draw_all(
    runs: Sequence[Run], alarms: Sequence[Sequence[Alarm]], moves: Sequence[int | None]
) -> tuple[list[Drawing], list[LeftOut]]:
    """Draw every figure for which the runs have numbers.

    Args:
        runs: Runs to draw together.
        alarms: Alarms of each run, ordered by step.
        moves: Step at which each run's loss moved, or None.

    Raises:
        UserError: If matplotlib is not installed.
    """
    drawings: list[Drawing] = []
    left_out: list[LeftOut] = []
    sampled = [*_of_paper(runs), *_of_layers(runs)]
    if max((len(run.history.steps) for run in runs), default=0) == 1:
        # Each curve would be a single dot.
        reason = "telemetry has one sample; a course needs two (telemetry.every in the recipe)"
        left_out += [LeftOut(plan.title, reason) for plan in sampled]
        sampled = []
    for plan in [*_of_log(runs, alarms, moves), *sampled]:
        with styled(plan.key):
            try:
                svg = to_svg(plan.draw(), plan.key)
            except NotRecorded as reason:
                left_out.append(LeftOut(plan.title, str(reason)))
                continue
        drawings.append(Drawing(plan.key, plan.title, plan.caption, plan.source, svg))
    return drawings, left_out


def shown_block(runs: Sequence[Run]) -> int:
    """Return the block of the tables: the second, as in the paper, or the only one."""
    return 1 if max((run.history.num_layers for run in runs), default=0) > 1 else 0


def _of_log(
    runs: Sequence[Run], alarms: Sequence[Sequence[Alarm]], moves: Sequence[int | None]
) -> list[_Plan]:
    return [
        _Plan(
            "loss",
            "Loss and alarms",
            "Training loss (lines), validation loss (circles) and, below, when each alarm first "
            "rang in a block: one left of its run's dashed line, where the loss moved, was an "
            "early warning. A cross is a step whose loss or gradient was not finite.",
            "the runs' records; thresholds are those of the alarms above",
            lambda: draw_loss(runs, alarms, moves),
        ),
        _Plan(
            "rates",
            "Learning rate and gradient norm",
            "The norm of all gradients, before clipping. A rise that the learning rate does not "
            "explain, or spikes that grow, is the sign that the log itself gives.",
            "the runs' records",
            lambda: _panels(
                runs, {"learning_rate": "learning rate", "grad_norm": "gradient norm"}, Run.logged
            ),
        ),
    ]


def _of_paper(runs: Sequence[Run]) -> list[_Plan]:
    """Return the plans for the tables of Rybakov et al. and for the head."""
    block = shown_block(runs)
    where = f"block {block}, counted from 0"
    return [
        _Plan(
            "table-1",
            f"Norms of weights, inputs and outputs: {where}",
            "In the paper the outputs Y of QKV, Proj and FC2 are what grows most in the diverging "
            "run: QKV's to more than twice the converging run's by step 1,000.",
            f"{RYBAKOV}, Table 1, second block",
            lambda: _norms(runs, block, ("weight_l2", "input_l2", "output_l2")),
        ),
        _Plan(
            "table-2",
            f"Norms of gradients: {where}",
            "In the paper the gradient of the input explodes in the diverging run, and in QKV and "
            "FC1 only.",
            f"{RYBAKOV}, Table 2, second block",
            lambda: _norms(runs, block, ("weight_grad_l2", "input_grad_l2")),
        ),
        _Plan(
            "head",
            "Output head",
            "Log Z that drifts away from 0, or a largest logit that keeps growing, is the "
            "divergence of output logits that a z-loss counters.",
            f"{WORTSMAN}, Figure 4",
            lambda: _panels(
                runs,
                {
                    "head/log_z_mean": "mean of log Z, nats",
                    "head/log_z_max": "largest log Z, nats",
                    "head/logit_max": "largest logit",
                },
                Run.samples,
            ),
        ),
    ]


def _of_layers(runs: Sequence[Run]) -> list[_Plan]:
    plans = [
        _Plan(each.key, each.title, each.caption, each.source, lambda m=each: m.draw(runs))
        for each in layer_figures.MAPS
    ]
    for run in runs:
        plans += [
            _Plan(
                f"heads-{run.mark}",
                f"Attention entropy of every head: {run.label}",
                "A head that turns dark attends to single tokens. One such head can be healthy; a "
                "whole block that turns dark is entropy collapse. "
                + layer_figures.chosen_text(run),
                "Zhai et al. 2023 (arXiv 2303.06296), for each head",
                lambda run=run: layer_figures.heads(run),
            )
        ]
    plans.append(
        _Plan(
            "adam-ratio",
            "Adam: distribution of |m/√v|, first and last block",
            "Healthy training keeps most elements well below 1. The paper sees two humps near ±1 "
            "before a spike: here, mass that moves to the top bands.",
            "Molybog et al. 2023 (arXiv 2304.09871)",
            lambda: layer_figures.adam_ratio(runs),
        )
    )
    return plans


def _panels(
    runs: Sequence[Run],
    names: dict[str, str],
    read: Callable[[Run, str], tuple[np.ndarray, np.ndarray]],
) -> "Figure":
    """Draw one panel for each name that a run has, side by side."""
    names = {name: text for name, text in names.items() if any(read(r, name)[0].size for r in runs)}
    if not names:
        raise NotRecorded("no run has recorded these numbers")
    figure = canvas(WIDTH, 2.9)
    row = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, (name, text) in zip(row, names.items(), strict=True):
        _overlay(axes, [(run, *read(run, name)) for run in runs])
        axes.set_title(text)
        step_axis(axes)
    legend(figure, runs)
    return figure


def _overlay(axes: "Axes", series: list[tuple[Run, np.ndarray, np.ndarray]]) -> None:
    for run, steps, values in series:
        curve(axes, run, steps, values)
    value_axis(axes, np.concatenate([values for _, _, values in series]))


def _norms(runs: Sequence[Run], block: int, quantities: Sequence[str]) -> "Figure":
    """Draw quantities by maps, or maps by quantities if there are more than four maps."""
    places = layer_figures.linear_places(runs, quantities)
    if not places:
        raise NotRecorded("no run has recorded the norms of its linear maps")
    by_map = len(places) > 4
    shape = (len(places), len(quantities)) if by_map else (len(quantities), len(places))
    figure = canvas(WIDTH, 1.65 * shape[0] + 0.5)
    grid = figure.subplots(*shape, squeeze=False)
    for index, quantity in enumerate(quantities):
        for place, axes in zip(places, grid[:, index] if by_map else grid[index], strict=True):
            name = f"layers.{block}.{place}/{quantity}"
            series = [(run, *run.samples(name)) for run in runs]
            if not any(steps.size for _, steps, _ in series):
                axes.remove()
                continue
            _overlay(axes, series)
            axes.set_title(f"{_PAPER_NAMES.get(place, place)}: {_NORMS[quantity]}")
            step_axis(axes, label=axes in grid[-1])
    legend(figure, runs)
    return figure
