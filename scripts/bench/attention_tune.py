"""Tiles, warps and stages of our attention kernels, one kernel at a time.

The kernels read `BLOCKS` at every launch, so that candidates are interleaved like any other cases.
A row's ratio is over the present entry: what is below 1 by more than the noise is worth taking.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attention_cases import OWN
from common import Run, rows_of
from report import Part, Report

if TYPE_CHECKING:
    from attention import Bench

GRID = {"M": (32, 64, 128), "N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
DRY_GRID = {"M": (16,), "N": (16, 32), "num_warps": (4,), "num_stages": (1,)}


def tune(bench: "Bench", report: Report) -> None:
    """One part for every entry of the table that belongs to this head width."""
    from hf_stable.kernels.blocks import BLOCKS  # noqa: PLC0415  # needs Triton

    for key in [key for key in BLOCKS if key[1] == max(32, bench.shape.width)]:
        name = "tiles of " + ", ".join(map(str, key))
        report.part(name, partial(sweep, bench, BLOCKS, key, name))


def sweep(bench: "Bench", table: dict[Any, Any], key: Any, part: str) -> Part:
    """Time each candidate of one entry: the forward alone, the backward ones in a whole step."""
    kernel, _, clips = key
    case = OWN["ours, cap, clip dense" if clips else "ours, cap"]
    run = bench.run(case, backward=kernel != "forward")
    present, grid = table[key], DRY_GRID if bench.device.dry else GRID
    builders: dict[str, Callable[[], Run]] = {str(present): lambda: run}
    for values in itertools.product(*grid.values()):
        candidate = type(present)(**dict(zip(grid, values, strict=True)))
        builders[str(candidate)] = lambda blocks=candidate: partial(
            replaced, run, table, key, blocks
        )
    _, times, skipped = bench.device.measure(builders, seconds=10, warm_ups=2)
    rows = rows_of(times, skipped, part, str(present))
    rows.sort(key=lambda row: row.get("ms", float("inf")))
    return rows, {}


def replaced(run: Run, table: dict[Any, Any], key: Any, blocks: Any, number: int) -> object:
    """One call with another entry of the table."""
    before = table[key]
    table[key] = blocks
    try:
        return run(number)
    finally:
        table[key] = before
