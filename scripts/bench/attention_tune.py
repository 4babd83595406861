"""Tiles, warps and stages of our attention kernels, one kernel at a time.

The kernels read `BLOCKS` at every launch, so that candidates are interleaved like any other cases.
A row's ratio is over the present entry: what is below 1 by more than the noise is worth taking.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attention_cases import OWN
from common import Run, rows_of
from report import Part, Report

if TYPE_CHECKING:
    from attention import Bench

# M, N, warps, stages: what static.py predicts to be fastest at head width 64, mostly two programs a
# multiprocessor, and the one large tile whose loads from the L2 cost least.
CANDIDATES = {
    "forward": (
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
    ),
    "query": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3)),
    "key_value": ((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 3)),
}
DRY_CANDIDATES = ((16, 16, 4, 1), (16, 32, 4, 1))


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
    present = table[key]
    builders: dict[str, Callable[[], Run]] = {str(present): lambda: run}
    for values in DRY_CANDIDATES if bench.device.dry else CANDIDATES[kernel]:
        candidate = type(present)(*values)
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
