"""Figures of layers and heads over the steps of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_stable.telemetry.names import ADAM_RATIO_EDGES

from .drawing import WIDTH, NotRecorded, canvas, mark_not_finite, plain_text, step_axis, thinned
from .heat import colour_bar, colour_scale, heat_map, not_finite_legend
from .looks import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAKASE = "Takase et al. 2023 (arXiv 2312.16903)"
_MOST_HEAD_MAPS = 8
_PAPER_PLACES = ("qkv", "proj", "fc1", "fc2")
Cells = tuple[np.ndarray, np.ndarray]


def _reduced(
    rest: str, over_heads: Callable[..., np.ndarray] | None = None
) -> Callable[[Run], Cells]:
    """Return a reader of (S,) steps and (S, L) cells of `layers.*.REST`."""

    def read(run: Run) -> Cells:
        steps, values = run.layers(rest)
        if over_heads is not None and values.ndim == 3:
            values = over_heads(values, axis=2)
        return steps, values

    return read


def _updates(run: Run) -> Cells:
    """Return update norms divided by the learning rate of their step, where it was above 0."""
    steps, values = run.layers("optimizer/update_l2")
    at, rates = run.logged("learning_rate")
    known = np.isfinite(rates)
    if not steps.size or not known.any():
        return steps[:0], values[:0]
    rates = np.interp(steps, at[known], rates[known])
    return steps[rates > 0], values[rates > 0] / rates[rates > 0, None]


@dataclass(frozen=True)
class LayerMap:
    """A figure with a heat map for each run, all on one color scale.

    Args:
        key: Anchor of the figure.
        title: Headline of the figure.
        caption: Text on what to look for.
        source: Paper that the figure follows.
        label: Label of the color bar.
        read: Function that returns (S,) steps and (S, L) cells of a run.
        marks: Numbers marked in the color bar.
        logarithmic: Scale of the colors; None decides from the numbers.
    """

    key: str
    title: str
    caption: str
    source: str
    label: str
    read: Callable[[Run], Cells]
    marks: tuple[float, ...] = ()
    logarithmic: bool | None = None

    def draw(self, runs: Sequence[Run]) -> "Figure":
        """Draw the figure.

        Raises:
            NotRecorded: If no run has the numbers.
        """
        found = [(run, *self.read(run)) for run in runs]
        found = [(run, steps, cells) for run, steps, cells in found if _any_number(cells)]
        if not found:
            raise NotRecorded("no run has recorded a finite number of it")
        columns = 2 if len(found) in (2, 4) else min(3, len(found))
        rows = -(-len(found) // columns)
        layers = max(cells.shape[1] for _, _, cells in found)
        figure = canvas(WIDTH, 0.35 + rows * (1.5 + 0.05 * min(layers, 40)))
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        scale = colour_scale([cells for _, _, cells in found], self.logarithmic)
        for axes, (run, steps, cells) in zip(grid, found, strict=False):
            drawn = heat_map(axes, steps, cells, scale, "block")
            axes.set_title(run.label)
            step_axis(axes)
        for axes in grid[len(found) :]:
            axes.remove()
        bar = colour_bar(figure, drawn, list(grid[: len(found)]), self.label)
        low, high = bar.get_ylim()
        for mark in self.marks:
            if low < mark < high:
                bar.axhline(mark, color="white", lw=1.6)
        if any(np.isinf(cells).any() for _, _, cells in found):
            not_finite_legend(figure)
        return figure


MAPS = (
    LayerMap(
        "max-logit",
        "Largest attention logit",
        "Before a cap, over all heads. In the paper every run whose logits were above 1e4 at step "
        "2,000 diverged; white lines in the colour bar are 1e3 and 1e4. Look for the first block "
        "to turn bright.",
        "Wortsman et al. 2023 (arXiv 2309.14322)",
        "largest logit of the heads",
        _reduced("attention/max_logit", np.max),
        marks=(1e3, 1e4),
        logarithmic=True,
    ),
    LayerMap(
        "entropy",
        "Attention entropy",
        "Mean over heads and rows; 1 is uniform attention. A block that turns dark attends to "
        "single tokens: entropy collapse, which goes with diverging training.",
        "Zhai et al. 2023 (arXiv 2303.06296)",
        "entropy / log(keys)",
        _reduced("attention/entropy", np.mean),
        logarithmic=False,
    ),
    LayerMap(
        "qkv-output",
        "Output of QKV",
        "In the paper it more than doubles well before the loss moves. Compare a block with its "
        "neighbours and with its own past.",
        "Rybakov et al. 2024 (arXiv 2410.16682), Table 1, all blocks",
        "RMS of Y's elements",
        _reduced("qkv/output_rms"),
    ),
    LayerMap(
        "update",
        "Update over learning rate",
        "Adam's step without the schedule. Before the spikes of Marin's 32B run the update norm "
        "jumped first, in the lower blocks most.",
        "marin#1368; the quantity as in google-deepmind/nanodo",
        "‖ΔW‖₂ / learning rate",
        _updates,
    ),
    LayerMap(
        "stream",
        "Standard deviation of the residual stream (σ_x)",
        "Where attention reads the stream. The Jacobian of the normalization there is 1 / σ_x: "
        "dark blocks, the first ones usually, pass on large gradients.",
        f"{TAKASE}, section 3",
        "σ_x",
        _reduced("stream/attention_std"),
    ),
    LayerMap(
        "mlp-bound",
        "Bound (15) on the Jacobian of the MLP's half of a block",
        "The nearer to 1 the safer: the product over the blocks bounds how much a gradient can "
        "grow on its way to the embedding.",
        f"{TAKASE}, equation (15) and Figure 2",
        "bound on ‖∂y/∂x′‖₂",
        _reduced("stream/mlp_bound"),
    ),
    LayerMap(
        "attention-bound",
        "Bound (20) on the Jacobian of attention's half of a block",
        "As above, for attention: it falls as σ_x grows and rises with the norm of W_O.",
        f"{TAKASE}, equation (20) and Figure 2",
        "bound on ‖∂x′/∂x‖₂",
        _reduced("stream/attention_bound"),
    ),
)


def _any_number(cells: np.ndarray) -> bool:
    return bool(np.isfinite(cells).any())


def linear_places(runs: Sequence[Run], quantities: Sequence[str]) -> list[str]:
    """Return the maps of a block with any of these quantities: the paper's four first."""
    found = set()
    for run in runs:
        for name in run.history.telemetry:
            place, _, quantity = name.removeprefix("layers.*.").partition("/")
            if name.startswith("layers.*.") and quantity in quantities:
                found.add(place)
    return [place for place in _PAPER_PLACES if place in found] + sorted(found - {*_PAPER_PLACES})


def chosen_layers(entropy: np.ndarray) -> list[int]:
    """Return the layers of (S, L, H) to show: all of up to eight.

    With more layers: the ends, the quarters, and the one with the lowest mean over heads at any
    step.
    """
    num_layers = entropy.shape[1]
    if num_layers <= _MOST_HEAD_MAPS:
        return list(range(num_layers))
    means = entropy.mean(axis=2)
    lowest = np.where(np.isfinite(means), means, np.inf).min(axis=0, initial=np.inf).argmin()
    return sorted({int(lowest), *(round(share * (num_layers - 1) / 4) for share in range(5))})


def chosen_text(run: Run) -> str:
    """Return a sentence on the blocks that are shown."""
    values = run.layers("attention/entropy")[1]
    num_layers = values.shape[1]
    if values.ndim != 3 or num_layers <= _MOST_HEAD_MAPS:
        return "All blocks are shown."
    chosen = ", ".join(map(str, chosen_layers(values)))
    return (
        f"Of {num_layers} blocks, {chosen} are shown: the ends, the quarters, and the one whose "
        "mean entropy was lowest."
    )


def heads(run: Run) -> "Figure":
    """Draw a heat map, heads by steps, for each chosen block."""
    steps, values = run.layers("attention/entropy")
    if values.ndim != 3:
        raise NotRecorded("the entropy of its heads was not recorded")
    chosen = [layer for layer in chosen_layers(values) if _any_number(values[:, layer])]
    if not chosen:
        raise NotRecorded("no head's entropy was finite")
    columns = min(3 if len(chosen) in (5, 6) else 4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = canvas(WIDTH, 0.4 + rows * 1.75)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    scale = colour_scale([np.array([0.0, 1.0])], logarithmic=False)
    for index, (axes, layer) in enumerate(zip(grid, chosen, strict=False)):
        label = "head" if index % columns == 0 else ""
        drawn = heat_map(axes, steps, values[:, layer], scale, label)
        axes.set_title(f"block {layer}")
        step_axis(axes, label=index + columns >= len(chosen))
    for axes in grid[len(chosen) :]:
        axes.remove()
    colour_bar(figure, drawn, list(grid[: len(chosen)]), "entropy / log(keys)")
    if np.isinf(values).any():
        not_finite_legend(figure)
    return figure


def adam_ratio(runs: Sequence[Run]) -> "Figure":
    """Draw stacked shares of the bins of |m/sqrt(v)|: a row per run, first and last block."""
    from matplotlib import colormaps  # noqa: PLC0415  # optional

    found = [(run, *run.layers("optimizer/adam_ratio")) for run in runs]
    found = [each for each in found if each[2].ndim == 3]
    if not found:
        raise NotRecorded("no run has recorded the optimizer's state")
    blocks = max(values.shape[1] for _, _, values in found)
    columns = min(2, blocks)
    colours = colormaps["cividis"](np.linspace(0, 1, len(ADAM_RATIO_EDGES) + 1))
    figure = canvas(WIDTH, 0.5 + 1.9 * len(found))
    grid = figure.subplots(len(found), columns, squeeze=False, sharey=True)
    for place, (row, (run, steps, values)) in enumerate(zip(grid, found, strict=True)):
        for axes, layer in zip(row, sorted({0, values.shape[1] - 1}), strict=False):
            at, shares = thinned(steps, values[:, layer])
            shares[~np.isfinite(shares).all(axis=1)] = np.nan
            axes.stackplot(at, shares.T, colors=colours, lw=0)
            mark_not_finite(axes, run, steps, values[:, layer].sum(axis=1))
            axes.set(xlim=(steps[0], max(steps[-1], steps[0] + 1)), ylim=(0, 1))
            axes.set_title(f"{run.label}, block {layer}")
            axes.grid(False)
            step_axis(axes, label=place == len(found) - 1)
        row[0].set_ylabel("share of elements")
    edges = [plain_text(edge) for edge in ADAM_RATIO_EDGES]
    bins = [f"≤ {edges[0]}", *(f"≤ {edge}" for edge in edges[1:]), f"> {edges[-1]}"]
    handles = axes.collections
    figure.legend(handles[::-1], bins[::-1], loc="outside right center", title="|m/√v|")
    return figure
