"""Choice of the fastest tiles, and their entry in the table of `hf_stable/kernels/blocks.py`.

The table stays Python source: one entry a line, replaced in place. Standard library only.
"""

import re
from collections.abc import Iterable

from store import Record

Key = tuple[str, int, bool]
"""Kernel, head width and whether it clips, as in the table."""

MARGIN = 0.98  # of the present entry's time; what is closer to it is noise


def winners(records: Iterable[Record]) -> dict[Key, list[int]]:
    """Return the fastest right tiles of every swept entry that is clearly faster than the present.

    Of several sweeps of an entry, the last one counts.
    """
    found: dict[Key, list[int]] = {}
    for record in records:
        rows = [row for row in record.get("rows", ()) if "tiles" in row]
        if not rows:
            continue
        key: Key = tuple(rows[0]["entry"])
        found.pop(key, None)
        right = [row for row in rows if "wrong" not in row and row.get("over_base") is not None]
        best = min(right, key=lambda row: row["over_base"], default=None)
        if best is not None and best["over_base"] <= MARGIN:
            found[key] = best["tiles"]
    return found


def replaced(table: str, entries: dict[Key, list[int]]) -> str:
    """Return the table's source with other entries.

    Raises:
        ValueError: when it does not have an entry on one line.
    """
    for (kernel, width, clips), tiles in entries.items():
        entry = f'("{kernel}", {width}, {clips})'
        pattern = rf"^(    {re.escape(entry)}: Blocks\()[^()]*(\),)$"
        numbers = ", ".join(map(str, tiles))
        table, count = re.subn(pattern, rf"\g<1>{numbers}\g<2>", table, flags=re.M)
        if count != 1:
            raise ValueError(f"the tile table has {count} lines with the entry {entry}, not one")
    return table


def former(records: Iterable[Record]) -> dict[Key, list[int]]:
    """Return the entries that the sweeps found in the table."""
    found: dict[Key, list[int]] = {}
    for record in records:
        for row in record.get("rows", ()):
            if "tiles" in row and row["case"] == row.get("base"):
                found[tuple(row["entry"])] = row["tiles"]
    return found
