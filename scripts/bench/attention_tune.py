"""Tiles, warps and stages of our attention kernels, one entry of the table at a time.

The kernels read `BLOCKS` at every launch, so that candidates are interleaved like any other cases.
A row's ratio is over the present entry; `tiles.py` says which candidate wins and writes it down.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attention_cases import OWN
from common import Part, Run, rows_of

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


def sweep(bench: "Bench", kernel: str, clips: bool) -> Part:
    """Time each candidate of one entry: the forward alone, the backward ones in a whole step."""
    from hf_stable.kernels.blocks import BLOCKS, Blocks  # noqa: PLC0415  # needs Triton

    key = (kernel, max(32, bench.shape.width), clips)
    case = OWN["ours, cap, clip dense" if clips else "ours, cap"]
    run, step = (bench.run(case, backward) for backward in (kernel != "forward", True))
    tried = DRY_CANDIDATES if bench.device.dry else CANDIDATES[kernel]
    candidates = list(dict.fromkeys([BLOCKS[key], *(Blocks(*each) for each in tried)]))
    names = {str(list(vars(blocks).values())): blocks for blocks in candidates}
    builders: dict[str, Callable[[], Run]] = {
        name: lambda blocks=blocks: partial(replaced, run, BLOCKS, key, blocks)
        for name, blocks in names.items()
    }
    ready, times, skipped = bench.device.measure(builders, seconds=5, warm_ups=2)
    base = next(iter(names))
    rows = rows_of(times, skipped, f"tiles of {', '.join(map(str, key))}", base)
    for row in rows:
        blocks = names[row["case"]]
        row.update(entry=list(key), tiles=list(vars(blocks).values()))
        if row["case"] in ready:  # a tile that is fast and wrong must not win
            row.update(bench.errors(case, replaced(step, BLOCKS, key, blocks, 0)))
    return sorted(rows, key=lambda row: row.get("ms", math.inf)), {}


def replaced(run: Run, table: dict[Any, Any], key: Any, blocks: Any, number: int) -> Any:
    """Make one call with another entry of the table."""
    before = table[key]
    table[key] = blocks
    try:
        return run(number)
    finally:
        table[key] = before
