"""Where a benchmark's numbers go: JSON and a figure on disk, tables in the terminal.

    python scripts/bench/report.py FOLDER    # all goals of a folder's results, as Markdown too

The JSON is written anew after every part, so that a run that is cut off loses its last part only.
"""

import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from common import NOT_RUN, OURS, Device, Goal, reason
from rich.console import Console
from rich.table import Table

from hf_stable.records import git_revision, versions, write_json

NOT_MEASURED = "not measured"
# Beside what every record names.
PEERS = ("triton", "flash_attn", "flash_attn_4", "liger_kernel", "cut_cross_entropy")
PEERS += ("quack_kernels", "flash_linear_attention")
BENCHMARKS = ("attention", "linear_cross_entropy", "train_step")
Part = tuple[list[dict[str, Any]], dict[str, float | None]]
"""Rows, and values by goal id."""
# Colours of the figure: ours, peers.
_COLOURS = ("#c2410c", "#64748b")


class Report:
    """One benchmark's result.

    Args:
        name: of the benchmark; its files are NAME.json and NAME.png.
        goals: what it judges; each is "not measured" until a value comes.
        folder: None prints only.
    """

    def __init__(self, name: str, goals: list[Goal], device: Device, folder: Path | None) -> None:
        self._name, self._goals, self._folder, self._device = name, goals, folder, device
        self._values: dict[str, float | None] = {}
        self._console = Console()
        self.rows: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {
            "benchmark": name,
            "dry": device.dry,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.describe(),
            "versions": {**versions(), **{name: version(name) for name in PEERS}},
            "git_revision": git_revision(),
            "gemm_tflops": {"before": device.gemm_tflops()},
        }
        self._save()

    def part(self, name: str, measure: Callable[[], Part]) -> None:
        """Measure one part and add it; a part that breaks is a failure, not the end."""
        try:
            self._device.require_time()
            rows, values = measure()
        except Exception as error:  # the other parts are still worth measuring
            traceback.print_exc()
            rows, values = [{"part": name, "case": f"{OURS}: {name}", "skipped": reason(error)}], {}
        self.add(rows, values)
        self._device.free()

    def add(self, rows: list[dict[str, Any]], values: dict[str, float | None]) -> None:
        """Add a part: print its rows, judge the goals that its values are of, and save all."""
        unknown = set(values) - {goal.id for goal in self._goals}
        assert not unknown, f"no goal has the id {unknown}"
        self.rows += rows
        self._values.update(values)
        self._console.print(rows_table(rows))
        self._save()

    def finish(self) -> int:
        """Print the goals, draw the figure; 0 when all of our own cases ran and were right."""
        self.content["gemm_tflops"]["after"] = self._device.gemm_tflops()
        self.content["device_after"] = self._device.describe()
        self._save()
        self._console.print(goals_table(self.content["goals"]))
        if self._folder is not None and self.rows:
            draw(self.content, self._folder / f"{self._name}.png")
        for failure in self.failures():
            self._console.print(f"failed: {failure}", markup=False)
        return 1 if self.failures() else 0

    def failures(self) -> list[str]:
        """Our own cases that raised, and rows whose `wrong` says that a result was wrong."""
        failed = []
        for row in self.rows:
            why = row.get("skipped", "")
            if not row["case"].startswith(OURS) or why.startswith(NOT_RUN):
                why = ""
            if why or "wrong" in row:
                failed.append(f"{row['part']}, {row['case']}: {why or row['wrong']}")
        return failed

    def _save(self) -> None:
        goals = [goal.judge(self._values.get(goal.id)) for goal in self._goals]
        self.content.update(goals=goals, rows=self.rows, failures=self.failures())
        if self._folder is not None:
            write_json(self._folder / f"{self._name}.json", self.content)


def version(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def number(value: Any) -> str:
    """A cell: three significant digits, or the text."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one part; columns are the keys that any row has."""
    hidden = {"part", "ms_quartiles", "rounds", "base", "unit"}
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    base = next((row["base"] for row in rows if "base" in row), None)
    heads = [f"/ {base}" if key == "over_base" else key for key in keys]
    table = Table(*heads, title=rows[0]["part"] if rows else None)
    for row in rows:
        table.add_row(*(number(row.get(key)) for key in keys))
    return table


def bound(goal: dict[str, Any], mark: str) -> str:
    """A goal's bar or stretch with its direction."""
    sign = ">=" if goal["at_least"] else "<="
    return "" if goal[mark] is None else f"{sign} {goal[mark]:g}"


def goals_table(goals: list[dict[str, Any]]) -> Table:
    table = Table("goal", "what", "value", "bar", "stretch", "verdict", title="goals")
    for goal in goals:
        verdict = goal["verdict"] + (", stretch too" if goal["stretch_met"] else "")
        marks = (number(goal["value"]), bound(goal, "bar"), bound(goal, "stretch"))
        table.add_row(goal["id"], goal["what"], *marks, verdict)
    return table


def goals_markdown(results: list[dict[str, Any]]) -> str:
    """The goals of several benchmarks as a Markdown table, with where they were measured."""
    lines = ["| goal | what | bar | stretch | measured | verdict |", "|---|---|---|---|---|---|"]
    for result in results:
        for goal in result["goals"]:
            value = NOT_MEASURED if goal["value"] is None else number(goal["value"])
            cells = (goal["id"], goal["what"], bound(goal, "bar"), bound(goal, "stretch"), value)
            lines.append(f"| {' | '.join(cells)} | {goal['verdict']} |")
    for result in results:
        gemm = number(result["gemm_tflops"]["before"])
        kind = "rehearsal, numbers mean nothing" if result["dry"] else f"GEMM peak {gemm} TFLOP/s"
        device, revision = result["device"]["name"], result["git_revision"]
        lines.append(f"\n{result['benchmark']}: {device}, {kind}, {result['started']}, {revision}")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars of every measured row's milliseconds, ours in colour; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path.name} not drawn: matplotlib is not installed")
        return
    from matplotlib.figure import Figure  # noqa: PLC0415  # may be absent

    parts: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if "ms" in row:
            parts.setdefault(row["part"], []).append(row)
    if not parts:
        return
    heights = [len(rows) + 2 for rows in parts.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 1), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    for axes, (part, rows) in zip(grid[:, 0], parts.items(), strict=False):
        slowest = sorted(rows, key=lambda row: row["ms"], reverse=True)
        names, times = [row["case"] for row in slowest], [row["ms"] for row in slowest]
        colours = [_COLOURS[not name.startswith(OURS)] for name in names]
        bars = axes.barh(names, times, color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("ms, median (shorter is better)", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    note = "rehearsal: numbers mean nothing" if content["dry"] else content["device"]["name"]
    figure.suptitle(f"{content['benchmark']}, {note}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    folder = Path(sys.argv[1])
    files = [
        folder / f"{name}.json" for name in ("attention", "linear_cross_entropy", "train_step")
    ]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    for result in results:
        Console().print(goals_table(result["goals"]))
    (folder / "goals.md").write_text(goals_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
