"""Figure 3 of Rybakov et al. 2024: softmax goes one-hot as logits grow, and what a cap does to it.

    python scripts/figure3.py --output figure3.svg    # or .png; without it, only the table

One row of normal random logits is multiplied by growing scales, as training does when the norms of
queries and keys grow. Its softmax is taken as it is and after the cap of `softcap` (10, as in the
paper's figure). Three things are shown at each scale:

- the probabilities, largest first: without the cap all mass goes to one key;
- their entropy over log(keys), 1 for uniform: it falls to 0; with a cap it cannot, since no ratio
  of two probabilities exceeds exp(2 cap);
- the L2 norm of the Jacobian of the probabilities by the logits: at 0 the row learns no more. The
  cap's own derivative, sech^2(logit / cap), is part of it: a cap keeps a row from going one-hot, it
  does not keep gradients through logits that are far beyond it.

Far beyond the cap all large logits become equal, which is why its entropy rises again.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_stable.model.functional_stable_gpt import softcap
from hf_stable.telemetry.reading.drawing import canvas, styled, value_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# Of them, those whose probabilities are drawn.
_DRAWN = (1.0, 8.0, 32.0, 128.0)
# Of the softmax as it is, and after the cap.
_COLOURS = ("#d55e00", "#0072b2")


@dataclass(frozen=True)
class Row:
    """What became of the logits at one scale.

    Args:
        probs: (K,), as the logits are ordered.
        entropy: over log(K).
        gradient: Frobenius norm of d probs / d logits.
    """

    scale: float
    probs: Tensor
    entropy: float
    gradient: float


def random_logits(num_keys: int, seed: int) -> Tensor:
    """(K,) standard normal logits, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_keys, generator=generator, dtype=torch.float64)


def row_at(logits: Tensor, scale: float, cap: float | None) -> Row:
    """Softmax of scaled logits, capped if `cap` is a number.

    Args:
        logits: (K,) float64.
    """

    def probabilities(scaled: Tensor) -> Tensor:
        return softcap(scaled, cap).softmax(dim=-1)

    probs = probabilities(logits * scale)
    jacobian = torch.autograd.functional.jacobian(probabilities, logits * scale)
    assert isinstance(jacobian, Tensor)
    entropy = torch.special.entr(probs).sum() / math.log(len(probs))
    return Row(scale, probs, entropy.item(), torch.linalg.matrix_norm(jacobian).item())


def table(rows: dict[str, list[Row]]) -> Table:
    """A line for each scale."""
    shown = Table("scale", title="one row of attention as its logits grow")
    for name in rows:
        for what in ("largest", "entropy", "gradient"):
            shown.add_column(f"{name}: {what}", justify="right")
    for pair in zip(*rows.values(), strict=True):
        cells = [f"{pair[0].scale:g}"]
        for row in pair:
            cells += [f"{v:.3g}" for v in (row.probs.max().item(), row.entropy, row.gradient)]
        shown.add_row(*cells)
    return shown


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    """Write the figure: probabilities of some scales above, entropy and gradient below."""
    with styled("figure3"):
        figure = canvas(9, 5.2)
        # Four panels above two, on one grid.
        grid = figure.add_gridspec(2, 2 * len(_DRAWN))
        for place, scale in enumerate(_DRAWN):
            axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
            _draw_probabilities(axes, rows, scale)
            axes.set_ylabel("" if place else "probability")
        left = figure.add_subplot(grid[1, : len(_DRAWN)])
        right = figure.add_subplot(grid[1, len(_DRAWN) :])
        for (name, found), colour in zip(rows.items(), _COLOURS, strict=True):
            looks = {"color": colour, "marker": "o", "markersize": 3, "label": name}
            scales = [row.scale for row in found]
            left.plot(scales, [row.entropy for row in found], **looks)
            right.plot(scales, [row.gradient for row in found], **looks)
        left.set(title="entropy / log(keys)", xlabel="scale of the logits", ylim=(0, None))
        right.set(title="‖∂ probabilities / ∂ logits‖₂", xlabel="scale of the logits")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        # Below, a softmax is one-hot for every purpose.
        right.set_ylim(1e-8, 2)
        value_axis(right, torch.tensor(right.get_ylim()).numpy())
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        figure.savefig(path, dpi=160)


def _draw_probabilities(axes: "Axes", rows: dict[str, list[Row]], scale: float) -> None:
    for found, side, colour in zip(rows.values(), (-0.2, 0.2), _COLOURS, strict=True):
        row = next(row for row in found if row.scale == scale)
        largest = row.probs.sort(descending=True).values
        places = [place + side for place in range(1, len(largest) + 1)]
        axes.bar(places, largest.tolist(), width=0.4, color=colour)
    axes.set(title=f"logits × {scale:g}", xlabel="keys, largest first", ylim=(0, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="figure to write, by its ending: .svg, .png")
    parser.add_argument("--cap", type=float, default=10.0)
    parser.add_argument("--keys", type=int, default=16, help="logits of the row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.cap <= 0 or options.keys < 2:
        parser.error("--cap must be above 0, and a row needs at least two --keys")
    logits = random_logits(options.keys, options.seed)
    caps = {"softmax": None, f"capped at {options.cap:g}": options.cap}
    rows = {name: [row_at(logits, scale, cap) for scale in SCALES] for name, cap in caps.items()}
    Console().print(table(rows))
    if options.output is not None:
        draw(rows, options.output)


if __name__ == "__main__":
    main()
