"""Heat maps of layers or heads by steps, with one color scale for all runs of a figure.

Numbers that are not finite have a separate color.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import exponent_text, plain_text, spans_decades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

NOT_FINITE = "#e6007e"


def edges(centres: np.ndarray) -> np.ndarray:
    """Return the (N + 1,) borders of cells around (N,) ascending centers."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.r_[2 * centres[0] - middles[0], middles, 2 * centres[-1] - middles[-1]]


def colour_scale(cells: Sequence[np.ndarray], logarithmic: bool | None = None) -> "Normalize":
    """Return one color scale for several heat maps; None is logarithmic above two decades."""
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415  # optional

    values = np.concatenate([each[np.isfinite(each)] for each in cells])
    if logarithmic is None:
        logarithmic = spans_decades(values)
    values = values[values > 0] if logarithmic else values
    low, high = (values.min(), values.max()) if values.size else (1.0, 1.0)
    # A single value has no scale.
    high = high if high > low else low + max(abs(low), 1e-12) * 0.1
    return (LogNorm if logarithmic else Normalize)(low, high, clip=True)


def heat_map(
    axes: "Axes", steps: np.ndarray, cells: np.ndarray, scale: "Normalize", row: str
) -> Any:
    """Draw (S, N) numbers as N rows of S cells: NaN stays white, inf marks a non-finite number.

    Returns:
        The mesh, for a color bar.
    """
    from matplotlib.colors import ListedColormap  # noqa: PLC0415  # optional
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  # optional

    borders = (edges(steps), np.arange(cells.shape[1] + 1) - 0.5)
    lost = np.isinf(cells).T
    numbers = np.ma.masked_invalid(cells.T)
    drawn = axes.pcolormesh(*borders, numbers, norm=scale, cmap="cividis", rasterized=True)
    if lost.any():
        marks = np.ma.masked_where(~lost, lost)
        axes.pcolormesh(*borders, marks, cmap=ListedColormap([NOT_FINITE]), rasterized=True)
    axes.set_ylim(-0.5, cells.shape[1] - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_ylabel(row)
    axes.grid(False)
    return drawn


def colour_bar(figure: "Figure", drawn: Any, axes: Any, label: str) -> "Axes":
    """Add one color bar for all axes and return its axes."""
    from matplotlib import ticker  # noqa: PLC0415  # optional

    bar = figure.colorbar(drawn, ax=axes, label=label, pad=0.015, aspect=25)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    bar.outline.set_linewidth(0.5)
    logarithmic = type(drawn.norm).__name__ == "LogNorm"
    text: Callable[[float], str] = exponent_text if logarithmic else plain_text
    if logarithmic and drawn.norm.vmax < 10 * drawn.norm.vmin:
        bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        text = plain_text
        bar.ax.yaxis.set_major_locator(ticker.MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))
    return bar.ax


def not_finite_legend(figure: "Figure") -> None:
    """Add a legend for the color of cells that are not finite."""
    from matplotlib.patches import Patch  # noqa: PLC0415  # optional

    patch = Patch(color=NOT_FINITE)
    figure.legend([patch], ["not a finite number"], loc="outside upper right")
