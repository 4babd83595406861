"""A study with a bit of everything for the tests of reports, and its tables read back."""

import re
from html import unescape

from .studies import Made

VARIANTS = ("std=0.02", "std=0.63")
STOPPED, FAILED = ("baseline", VARIANTS[0], 0.3, 0), ("soft_cap", VARIANTS[0], 0.3, 1)
MISSING = ("qkv_norm", VARIANTS[1], 0.01, 2)
MADE = Made(
    odd_limits={"soft_cap": 0.1},
    variants=VARIANTS,
    documents=40,
    reproduces=("table_3", "table_4"),
    configs={"qk_norm": {"qk_norm": "head"}},
    losses={
        **{("baseline", VARIANTS[0], 0.1, seed): 3.15 for seed in range(3)},
        **{("qk_norm", VARIANTS[0], 0.1, seed): 2.95 for seed in range(3)},
        # Logits of a run that diverges, and it does not.
        ("qk_norm", VARIANTS[0], 0.3, 0): 2.95,
    },
    statuses={STOPPED: "stopped", FAILED: "failed", MISSING: "missing"},
)
Row = dict[str, str]


def markdown_tables(text: str) -> dict[str, list[Row]]:
    """By title, rows by head."""
    found = {}
    for title, body in re.findall(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines()]
        cells = [[_words(cell) for cell in row] for row in rows]
        # Heads are not unique: later ones have their place.
        head = [name if name not in cells[0][:at] else f"{name} {at}"
                for at, name in enumerate(cells[0])]  # fmt: skip
        assert title not in found
        found[unescape(title).replace("\\", "")] = [
            dict(zip(head, row, strict=True)) for row in cells[2:]
        ]
    return found


def _words(cell: str) -> str:
    """Of a cell, without its anchor and escapes."""
    return unescape(re.sub(r'<a id="[^"]*"></a>', "", cell).strip().replace("\\", ""))


def by_method(rows: list[Row]) -> dict[str, Row]:
    return {next(iter(row.values())): row for row in rows}


def html_tables(text: str) -> dict[str, list[list[str]]]:
    found = {}
    for table in re.findall(r"<table.*?</table>", text, flags=re.DOTALL):
        title = re.search(r"<caption>(.*?)</caption>", table)
        assert title is not None
        body = table.split("<tbody>")[1]
        rows = re.findall(r"<tr>(.*?)</tr>", body)
        found[unescape(title[1])] = [
            [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows
        ]
    return found
