"""Tools for figures: canvas, axes, curves, and SVG that can be embedded in a page.

Matplotlib is optional and imported when a figure is drawn. No number is dropped silently: values
that are not finite are marked at the border of the axes.
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

# Width of a figure in inches.
WIDTH = 9.0
# More points than this along the steps are drawn as means with a band from least to largest.
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
    # Names of runs are not formulas.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


class NotRecorded(Exception):  # noqa: N818  # not an error: the page reports it
    """Signal that there is nothing to draw, with the reason for the reader."""


@contextmanager
def styled(key: str) -> Iterator[None]:
    """Apply Matplotlib's settings for a figure; `key` makes its SVG reproducible.

    Raises:
        UserError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install 'hf_stable[figures]'"
        )
    from matplotlib import rc_context  # noqa: PLC0415  # optional

    with rc_context({**_STYLE, "svg.hashsalt": key}):
        yield


def canvas(width: float, height: float) -> "Figure":
    """Return an empty figure, size in inches, laid out so that labels never overlap axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: "Figure", key: str) -> str:
    """Return the figure as an <svg> element whose ids start with `key`; raster parts are PNG."""
    file = StringIO()
    figure.savefig(file, format="svg", dpi=160, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(run-\d+)">', r'<g class="\1">', svg)
    # These ids are hashes of the content, so equal images would have equal ids.
    svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)
    # A page holds many figures, and each numbers its parts from 1.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
    # Keep only the font size of each text: the page sets the font.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(r"\n\s*", "\n", svg)


def legend(figure: "Figure", runs: Sequence[Run], others: Sequence[tuple[Any, str]] = ()) -> None:
    """Draw the legend of runs above the axes, where it covers nothing."""
    from matplotlib.lines import Line2D  # noqa: PLC0415  # optional

    handles = [Line2D([], [], color=run.colour, ls=run.dashes, lw=2) for run in runs]
    # Matplotlib leaves out labels that start with an underscore.
    labels = [f"\u200b{run.label}" for run in runs] + [text for _, text in others]
    handles += [handle for handle, _ in others]
    columns = max(1, 110 // (max(map(len, labels)) + 8))
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def exponent_text(value: float) -> str:
    """Return a power of ten as tick text, such as 10⁻³; 1 to 1000 are written in full."""
    power = round(math.log10(value))
    if 0 <= power <= 3:
        return f"{10**power}"
    return f"10{str(power).translate(_SUPERSCRIPTS)}"


def plain_text(value: float) -> str:
    """Return a number as text for ticks and tables: 0.25, 2e-5, 1.5e6."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d+)", lambda found: f"e{found[1].strip('+')}{found[2]}", text)


def step_axis(axes: "Axes", label: bool = True) -> None:
    """Label the x axis with few whole steps and thousands separators."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415  # optional

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if label:
        axes.set_xlabel("step")


def spans_decades(values: np.ndarray) -> bool:
    """Return True if the numbers are positive and span more than two decades."""
    return bool(values.size and values.min() > 0 and values.max() > 100 * values.min())


def value_axis(axes: "Axes", values: np.ndarray) -> None:
    """Set the scale from the finite values: logarithmic above two decades."""
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
    """Return the first index of each of at most `most` groups of neighbors."""
    return np.arange(0, count, max(1, math.ceil(count / most)))


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and (S, N) values, averaged over neighbors if there are too many to see."""
    starts = _groups(len(steps), _MOST_POINTS)
    counts = np.diff(np.r_[starts, len(steps)])
    return steps[starts], np.add.reduceat(values, starts) / counts[:, None]


def curve(axes: "Axes", run: Run, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draw (T,) values as a line with gaps, with crosses at the border if not finite.

    A long series is drawn as means of neighbors, with a band from least to largest.
    """
    if not values.size:
        return
    finite = np.where(np.isfinite(values), values, np.nan)
    starts = _groups(len(steps), _MOST_POINTS)
    counts = np.add.reduceat(np.isfinite(values).astype(float), starts)
    sums = np.add.reduceat(np.nan_to_num(finite), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    looks = {"color": run.colour, "linestyle": run.dashes, "linewidth": run.width, "gid": run.mark}
    # A line needs two adjacent points; an isolated number would be invisible.
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
    """Draw crosses where (T,) values are not finite: -inf below, the others above."""
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
