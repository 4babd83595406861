"""The page of results: each goal, its number and the mark that it met, from the records alone."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from goals import GOALS, Goal
from store import Record

OURS = "ours"  # names of our own cases begin so
NOT_RUN = "not run: "
NOT_MEASURED = "not measured"
_HIDDEN = ("part", "base", "ms_quartiles", "entry", "unit")


def page(records: list[Record], identity: Record) -> str:
    """Return the page in Markdown for the device and the code of `identity`."""
    found = latest(records, identity)
    lines = ["# Results on one device", "", *_about(found, identity), ""]
    lines += ["## Goals", "", "| goal | what | number | bar | stretch | met |", "|" + "---|" * 6]
    values = values_of(found)
    for goals in GOALS.values():
        lines += [_goal(goal, values.get(goal.id)) for goal in goals]
    failed = failures(found)
    if failed:
        lines += ["", "## Failures", "", *(f"- {each}" for each in failed)]
    absent = sorted(
        {f"{row['case']}: {row['skipped']}" for row in _rows(found) if "skipped" in row}
    )
    if absent:
        lines += ["", "## Not run", "", *(f"- {each}" for each in absent)]
    lines += ["", "## Measured"]
    for record in found:
        if record["kind"] == "case" and record.get("rows"):
            lines += ["", f"### {record['case']}", "", *_table(record["rows"]), *_clocks(record)]
    return "\n".join(lines) + "\n"


def latest(records: list[Record], identity: Record) -> list[Record]:
    """Return the last record of each case and test of this device and code, with whatever tiles."""
    fields = [field for field in identity if field != "tiles"]
    found: dict[Any, Record] = {}
    for record in records:
        if all(record["identity"].get(field) == identity[field] for field in fields):
            key = (record["kind"], record.get("case"), record.get("test"))
            found.pop(key, None)
            found[key] = record
    return list(found.values())


def _rows(records: Iterable[Record]) -> list[Record]:
    return [row for record in records for row in record.get("rows", ())]


def values_of(records: Iterable[Record]) -> dict[str, float]:
    """Return the number of each goal; of several, the one that was measured last."""
    found: dict[str, float] = {}
    for record in records:
        found |= {id: float(value) for id, value in record.get("values", {}).items()}
    return found


def failures(records: Iterable[Record]) -> list[str]:
    """Return what failed of ours: tests, whole cases, rows that raised, and wrong results."""
    failed = []
    for record in records:
        if record.get("outcome") == "failed":
            failed.append(f"test {record['test']}")
        if record.get("status") == "failed":
            failed.append(f"{record['case']}: {record.get('reason', 'the device was lost')}")
        for row in record.get("rows", ()):
            why = row.get("wrong") or row.get("skipped", "")
            if why and row["case"].startswith(OURS) and not why.startswith(NOT_RUN):
                failed.append(f"{record['case']}, {row['case']}: {why}")
    return failed


def _about(found: list[Record], identity: Record) -> list[str]:
    lines = []
    if identity["dry"]:
        lines.append("**A rehearsal on tiny shapes: the numbers mean nothing.**\n")
    versions = ", ".join(f"{name} {each}" for name, each in identity["versions"].items() if each)
    lines.append(f"{identity['device']}; revision {identity['revision']}; {versions}.")
    tests = Counter(record["outcome"] for record in found if record["kind"] == "test")
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tests.items()))
    lines.append(f"Tests of the kernels: {counted or NOT_MEASURED}.")
    applied = [record for record in found if record["kind"] == "applied"]
    if applied:
        lines.append(f"Tiles taken: {applied[-1]['tiles'] or 'none, the new ones failed'}.")
    return lines


def _goal(goal: Goal, value: float | None) -> str:
    judged = goal.judge(value)
    met = {"met": "bar", "missed": "none", NOT_MEASURED: NOT_MEASURED}[judged["verdict"]]
    if judged["stretch_met"]:
        met = "stretch"
    shown = NOT_MEASURED if value is None else number(value)
    cells = (goal.id, goal.what, shown, _bound(goal, goal.bar), _bound(goal, goal.stretch), met)
    return f"| {' | '.join(cells)} |"


def _bound(goal: Goal, mark: float | None) -> str:
    """Return a goal's bar or stretch with its direction."""
    return "" if mark is None else f"{'>=' if goal.at_least else '<='} {mark:g}"


def number(value: Any) -> str:
    """Return a cell: three significant digits, or the text."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|")


def _table(rows: list[Record]) -> list[str]:
    """Return rows as a table; columns are the keys that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in _HIDDEN))
    base = next((row["base"] for row in rows if "base" in row), None)
    heads = [f"/ {base}" if key == "over_base" else key for key in keys]
    cells = [[number(row.get(key)) for key in keys] for row in rows]
    return [f"| {' | '.join(each)} |" for each in (heads, ["---"] * len(keys), *cells)]


def _clocks(record: Record) -> list[str]:
    read = {name: [number(x) for x in each] for name, each in record.get("clocks", {}).items()}
    text = "; ".join(f"{name} {' / '.join(each)}" for name, each in read.items())
    return ["", f"Least, median, largest while it was timed: {text}."] if text else []
