"""The kit of the figures: canvas, axes, curves, and SVG that stands inside a page.

Matplotlib is optional and imported when a figure is asked for. No number is dropped in silence:
what is not finite is marked at the border of the axes.
"""

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_stable.errors import UserError

from .looks import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of a figure, in inches.
WIDTH = 9.0
# More points than this along the steps are drawn as their mean between their extremes.
_MOST_POINTS = 400
_MOST_MARKS = 30
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: Any = {
    "axes.formatter.use_mathtext": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    # Names of runs are no formulas.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


class NotRecorded(Exception):  # noqa: N818  # no error: the page says so and goes on
    """There is nothing to draw, with the reason for the reader."""


@contextmanager
def styled(key: str) -> Iterator[None]:
    """Matplotlib's settings for a figure; `key` makes its SVG the same for the same numbers.

    Raises:
        UserError: without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install 'hf_stable[figures]'"
        )
    from matplotlib import rc_context  # noqa: PLC0415  # optional

    with rc_context({**_STYLE, "svg.hashsalt": key}):
        yield


def canvas(width: float, height: float) -> "Figure":
    """An empty figure in inches, laid out so that labels never overlap axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: "Figure", key: str) -> str:
    """The figure as an <svg> element whose ids start with `key`; raster parts are PNG inside."""
    file = StringIO()
    figure.savefig(file, format="svg", dpi=160, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(run-\d+)">', r'<g class="\1">', svg)
    # Named by their content, so that equal images would have equal ids.
    svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)
    # A page holds many figures, and each of them numbers its parts from 1.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
    # Of the style of each text only its size stays: the page has a font of its own.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(r"\n\s*", "\n", svg)


def legend(figure: "Figure", runs: Sequence[Run], others: Sequence[tuple[Any, str]] = ()) -> None:
    """Runs above the axes, where they cover nothing."""
    from matplotlib.lines import Line2D  # noqa: PLC0415  # optional

    handles = [Line2D([], [], color=run.colour, ls=run.dashes, lw=2) for run in runs]
    # Matplotlib leaves out labels that start with an underscore.
    labels = [f"\u200b{run.label}" for run in runs] + [text for _, text in others]
    handles += [handle for handle, _ in others]
    columns = max(1, 110 // (max(map(len, labels)) + 8))
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def exponent_text(value: float) -> str:
    """A power of ten as a tick has it: 10⁻³; small ones in full."""
    power = round(math.log10(value))
    if 0 <= power <= 3:
        return f"{10**power}"
    return f"10{str(power).translate(_SUPERSCRIPTS)}"


def plain_text(value: float) -> str:
    """A number as a tick or a table has it: 0.25, 2e-5, 1.5e6."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d+)", lambda found: f"e{found[1].strip('+')}{found[2]}", text)


def step_axis(axes: "Axes", label: bool = True) -> None:
    """Few whole steps, with thousands marked."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415  # optional

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if label:
        axes.set_xlabel("step")


def spans_decades(values: np.ndarray) -> bool:
    """Whether numbers are positive and more than two decades apart."""
    return bool(values.size and values.min() > 0 and values.max() > 100 * values.min())


def value_axis(axes: "Axes", values: np.ndarray) -> None:
    """Set the scale by the finite values drawn: logarithmic above two decades."""
    from matplotlib import ticker  # noqa: PLC0415  # optional

    values = values[np.isfinite(values)]
    if spans_decades(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: exponent_text(v)))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: plain_text(v)))


def _groups(count: int, most: int) -> np.ndarray:
    """First index of each of at most `most` groups of neighbours."""
    return np.arange(0, count, max(1, math.ceil(count / most)))


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and (S, N) values, the means of neighbours where there are too many to be seen."""
    starts = _groups(len(steps), _MOST_POINTS)
    counts = np.diff(np.r_[starts, len(steps)])
    return steps[starts], np.add.reduceat(values, starts) / counts[:, None]


def curve(axes: "Axes", run: Run, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draw (T,) values: a line with gaps, and crosses at the border where they are not finite.

    A long series is drawn by the means of neighbours, with a band from least to most.
    """
    if not values.size:
        return
    finite = np.where(np.isfinite(values), values, np.nan)
    starts = _groups(len(steps), _MOST_POINTS)
    counts = np.add.reduceat(np.isfinite(values).astype(float), starts)
    sums = np.add.reduceat(np.nan_to_num(finite), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    looks = {"color": run.colour, "linestyle": run.dashes, "linewidth": run.width, "gid": run.mark}
    # A line needs two neighbours; without them a number would not be seen.
    alone = np.isfinite(means) & ~np.isfinite(np.r_[np.nan, means[:-1]])
    alone &= ~np.isfinite(np.r_[means[1:], np.nan])
    dots = {"marker": "o", "markersize": 2.5, "markevery": np.flatnonzero(alone).tolist()}
    axes.plot(steps[starts], means, **{**looks, **dots, **style})
    if len(starts) < len(steps):
        band = (np.fmin.reduceat(finite, starts), np.fmax.reduceat(finite, starts))
        axes.fill_between(
            steps[starts], *band, color=run.colour, alpha=0.25, linewidth=0, gid=run.mark
        )
    mark_not_finite(axes, run, steps, values)


def mark_not_finite(axes: "Axes", run: Run, steps: np.ndarray, values: np.ndarray) -> None:
    """Crosses where (T,) values are not finite: -inf below, the others above."""
    for border, lost in ((0, np.isneginf(values)), (1, np.isnan(values) | np.isposinf(values))):
        where = steps[lost]
        if where.size:
            where = where[_groups(len(where), _MOST_MARKS)]
            axes.plot(
                where,
                np.full(len(where), border),
                transform=axes.get_xaxis_transform(),
                color=run.colour,
                linestyle="none",
                marker="x",
                markersize=4,
                clip_on=False,
                gid=run.mark,
            )
