"""Figures of a report on a study.

A figure without numbers in the records is left out, with the reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_stable.telemetry.reading.drawing import (
    WIDTH,
    NotRecorded,
    canvas,
    exponent_text,
    plain_text,
    styled,
    to_svg,
)
from hf_stable.telemetry.reading.figures import Drawing, LeftOut

from .bootstrap import Interval
from .grid import Stable
from .report_predictors import LOGIT_LINE
from .study import BASELINE, Result, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OWN, _OTHERS, _BAD = "#0072b2", "#cfd3d8", "#d55e00"
# Okabe and Ito's palette, for variants side by side.
_VARIANTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
_COLUMNS = 5


def drawn(
    key: str, title: str, words: tuple[str, str], draw: Callable[[], "Figure"]
) -> Drawing | LeftOut:
    """Draw one figure, or return the reason why it is left out.

    Args:
        key: Anchor of the figure.
        title: Headline of the figure.
        words: Caption and source.
        draw: Function that draws it.

    Raises:
        UserError: If matplotlib is not installed.
    """
    with styled(key):
        try:
            return Drawing(key, title, *words, to_svg(draw(), key))
        except NotRecorded as reason:
            return LeftOut(title, str(reason))


def standalone(drawing: Drawing) -> str:
    """Return a figure as the content of a separate SVG file."""
    font = 'font-family="system-ui, DejaVu Sans, sans-serif"'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{drawing.svg.replace("<svg", f"<svg {font}")}'


def loss_curves(study: Study, variant: str, stable: Stable) -> "Figure":
    """Draw validation loss by learning rate: a panel per method, with all others behind it.

    Raises:
        NotRecorded: If no run has a validation loss.
    """
    rates = study.rates_of(variant)
    tables = {name: study.numbers(name, variant, _capped_loss) for name in study.methods}
    tables = {name: table for name, table in tables.items() if np.isfinite(table).any()}
    if not tables:
        raise NotRecorded("no run has a validation loss yet")
    columns = min(_COLUMNS, len(tables))
    rows = math.ceil(len(tables) / columns)
    figure = canvas(WIDTH, 1.9 * rows + 0.5)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(tables) :]:
        axes.remove()
    for axes, method in zip(grid.flat, tables, strict=False):
        for other, table in tables.items():
            look = {"color": _OTHERS, "lw": 0.7, "zorder": 1}
            if other == BASELINE != method:
                look = {"color": "#000000", "lw": 1.0, "ls": "--", "zorder": 2}
            axes.plot(rates, _middle(table), **look)
        runs = [
            run
            for run in study.results
            if (run.place.method, run.place.variant) == (method, variant)
        ]
        _curve(axes, rates, tables[method], runs, stable)
        axes.set_title(method)
    for index, axes in enumerate(grid.flat[: len(tables)]):
        _entropies(axes, study, variant)
        _rate_axis(axes, rates, label=index + columns >= len(tables))
    for row in grid:
        row[0].set_ylabel("validation loss, nats")
    _curve_legend(figure, study.methods)
    return figure


def _capped_loss(run: Result) -> float:
    return run.capped_loss


def _middle(table: np.ndarray) -> np.ndarray:
    """Return the (R,) median over the available seeds."""
    known = ~np.isnan(table)
    return np.array(
        [
            np.median(column[here]) if here.any() else np.nan
            for column, here in zip(table.T, known.T, strict=True)
        ]
    )


def _curve(
    axes: "Axes", rates: Sequence[float], table: np.ndarray, runs: list[Result], stable: Stable
) -> None:
    kept = ~np.isnan(table).all(axis=0)
    where, band = np.asarray(rates)[kept], table[:, kept]
    axes.fill_between(
        where, np.nanmin(band, axis=0), np.nanmax(band, axis=0), color=_OWN, alpha=0.2, lw=0
    )
    axes.plot(where, _middle(band), color=_OWN, lw=1.6, zorder=3)
    for mark, colour, wanted in (("o", _OWN, True), ("x", _BAD, False)):
        chosen = [run for run in runs if stable[run.id] is wanted and run.status != "failed"]
        axes.plot(
            [run.place.learning_rate for run in chosen],
            [run.capped_loss for run in chosen],
            color=colour,
            marker=mark,
            ms=3.5 if mark == "o" else 4.5,
            ls="none",
            zorder=4,
        )


def _entropies(axes: "Axes", study: Study, variant: str) -> None:
    """Draw lines at the losses of a unigram and a bigram table."""
    runs = [run for run in study.results if run.place.variant == variant]
    for style, name in (("-.", "unigram"), (":", "bigram")):
        values = [run.unigram if name == "unigram" else run.bigram for run in runs]
        values = [value for value in values if math.isfinite(value)]
        if values:
            axes.axhline(float(np.median(values)), color="#7a7f87", ls=style, lw=0.9, zorder=0)


def _rate_axis(axes: "Axes", rates: Sequence[float], label: bool) -> None:
    from matplotlib.ticker import NullLocator  # noqa: PLC0415  # optional

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(rates, labels=[plain_text(rate) for rate in rates])
    if len(rates) > 4:
        axes.tick_params(axis="x", labelrotation=60)
    if label:
        axes.set_xlabel("learning rate")
        axes.tick_params(labelbottom=True)


def _curve_legend(figure: "Figure", methods: Sequence[str]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415  # optional

    looks = [
        ("median and range of seeds", {"color": _OWN, "lw": 1.6}),
        ("stable", {"color": _OWN, "marker": "o", "ms": 3.5, "ls": "none"}),
        ("unstable", {"color": _BAD, "marker": "x", "ms": 4.5, "ls": "none"}),
        ("baseline", {"color": "#000000", "lw": 1.0, "ls": "--"}),
        ("other methods", {"color": _OTHERS, "lw": 1.2}),
        ("unigram", {"color": "#7a7f87", "ls": "-.", "lw": 0.9}),
        ("bigram", {"color": "#7a7f87", "ls": ":", "lw": 0.9}),
    ]
    looks = [each for each in looks if each[0] != "baseline" or BASELINE in methods]
    figure.legend(
        [Line2D([], [], **look) for _, look in looks],
        [name for name, _ in looks],
        loc="outside upper left",
        ncols=len(looks),
        columnspacing=1.2,
        handlelength=1.8,
    )


def sensitivity_bars(
    methods: Sequence[str],
    variants: Sequence[str],
    values: Mapping[tuple[str, str], Interval],
) -> "Figure":
    """Draw learning-rate sensitivity with its intervals.

    Args:
        methods: Methods, one row each.
        variants: Variants, one color each.
        values: Value, low and high in nats by (method, variant); low and high may be NaN.

    Raises:
        NotRecorded: If there is no value.
    """
    if not values:
        raise NotRecorded("no method has a loss at every one of two learning rates or more")
    figure = canvas(WIDTH, (0.1 + 0.12 * len(variants)) * len(methods) + 0.9)
    axes = figure.subplots()
    height = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        chosen = [(row, m) for row, m in enumerate(methods) if (m, variant) in values]
        places = np.array([row + (index - (len(variants) - 1) / 2) * height for row, _ in chosen])
        found = np.array([values[method, variant] for _, method in chosen]).reshape(-1, 3)
        colour = _VARIANTS[index % len(_VARIANTS)]
        axes.barh(places, found[:, 0], 0.9 * height, color=colour, label=f"\u200b{variant}")
        known = ~np.isnan(found).any(axis=1)  # one seed has no interval
        spread = np.abs(found[known, 1:] - found[known, :1]).T
        look = {"fmt": "none", "ecolor": "#333333", "elinewidth": 1, "capsize": 2}
        axes.errorbar(found[known, 0], places[known], xerr=spread, **look)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("learning-rate sensitivity, nats (smaller is better)")
    if any(variants):
        figure.legend(loc="outside upper left", ncols=len(variants))
    return figure


def logit_scatter(
    study: Study, variants: Sequence[str], points: dict[str, float], stable: Stable
) -> "Figure":
    """Draw the final loss against the largest attention logit, one panel per variant.

    Args:
        study: Study to draw.
        variants: Variants, one panel each.
        points: Logit by run id; numbers that are not finite are drawn at the right border.
        stable: True by run id if the run is stable.

    Raises:
        NotRecorded: If there is no point.
    """
    from matplotlib.lines import Line2D  # noqa: PLC0415  # optional

    if not points:
        raise NotRecorded("no run has recorded attention logits by then")
    figure = canvas(WIDTH, 3.5)
    row = figure.subplots(1, len(variants), sharex=True, sharey=True, squeeze=False)[0]
    rates = sorted({run.place.learning_rate for run in study.results if run.id in points})
    colours = _shades(len(rates))
    for axes, variant in zip(row, variants, strict=True):
        runs = [run for run in study.results if run.id in points and run.place.variant == variant]
        for run in runs:
            good = stable[run.id]
            colour = colours[rates.index(run.place.learning_rate)]
            _point(axes, points[run.id], run.capped_loss, colour, "o" if good else "x")
        _logit_axis(axes)
        axes.axvline(LOGIT_LINE, color=_BAD, lw=1.0, ls="--", zorder=0)
        _entropies(axes, study, variant)
        axes.set_title(f"\u200b{variant}")
    row[0].set_ylabel("validation loss, nats")
    dots = [Line2D([], [], color=colour, marker="s", ls="none", ms=5) for colour in colours]
    signs = [Line2D([], [], color="#333333", marker=mark, ls="none", ms=4.5) for mark in "ox"]
    labels = [f"learning rate {plain_text(rate)}" for rate in rates]
    figure.legend(
        [*dots, *signs], [*labels, "stable", "unstable"], loc="outside upper left", ncols=6
    )
    return figure


def _logit_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: exponent_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("largest attention logit")


def _point(axes: "Axes", logit: float, loss: float, colour: str, mark: str) -> None:
    look = {"color": colour, "marker": mark, "ls": "none", "ms": 4.5, "alpha": 0.85}
    if math.isfinite(logit) and logit > 0:
        axes.plot([logit], [loss], **look)
    else:
        side = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        axes.plot([1.0 if logit > 0 or math.isnan(logit) else 0.0], [loss], **look, **side)


def _shades(number: int) -> list[str]:
    """Return colors from low to high, all visible on white."""
    from matplotlib import colormaps  # noqa: PLC0415  # optional
    from matplotlib.colors import to_hex  # noqa: PLC0415  # optional

    return [to_hex(colormaps["plasma"](each)) for each in np.linspace(0.0, 0.82, max(1, number))]
