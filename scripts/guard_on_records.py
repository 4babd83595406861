"""What the guard would have said of runs that were trained without one, from their records.

    python scripts/guard_on_records.py                  # the two sets of records in this folder
    python scripts/guard_on_records.py FOLDER...        # runs or studies of your own

A row for each folder, learning rate and outcome: a loss that rose is one whose moving average was
once 0.5 nats above its lowest. Every update that is finite counts as made, whatever the alarm.
"""

import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_stable.guard import Detector, Observation
from hf_stable.recipes import GuardRecipe
from hf_stable.records import read_metrics, read_run
from hf_stable.sweep.rule import smoothed

HERE = Path(__file__).parent
ARCHIVES = (HERE / "instability/records.tar.xz", HERE / "studies/table3_cpu/records.tar.xz")
ROSE = 0.5


class Judged(NamedTuple):
    """One run: its length, its alarms by rule and signal, and its loss at the first about it."""

    steps: int
    alarms: Counter[str]
    rise: float
    first: int | None
    rise_then: float


def judge(rows: list[dict[str, Any]]) -> Judged:
    """Look at a run's log lines."""
    detector = Detector(GuardRecipe(actions=["skip"]))
    alarms: Counter[str] = Counter()
    first = None
    for row in rows:
        seen = Observation.from_row(row)
        alarm = detector.look(seen)
        detector.take(seen, alarm, accepted=alarm is None or alarm.rule != "non_finite")
        if alarm is not None:
            alarms[f"{alarm.rule} of {alarm.signal}"] += 1
            if first is None and alarm.signal == "loss":
                first = seen.step
    steps = np.array([row["step"] for row in rows], dtype=float)
    smooth = smoothed(steps, np.array([float(row["loss"]) for row in rows]), 0.9)
    rise = smooth - np.minimum.accumulate(smooth)
    then = np.nan if first is None else float(rise[np.searchsorted(steps, first)])
    return Judged(len(rows), alarms, float(rise.max()), first, then)


def table(folders: list[Path]) -> Iterator[str]:
    """Lines of a Markdown table."""
    groups: dict[tuple[str, float, str], list[Judged]] = defaultdict(list)
    for folder in folders:
        for file in sorted(folder.rglob("metrics.jsonl")):
            rate = read_run(file.parent)["recipe"]["optimizer"]["learning_rate"]
            run = judge(read_metrics(file.parent, "train"))
            groups[folder.name, rate, "rose" if run.rise > ROSE else "did not rise"].append(run)
    yield (
        "| records | rate | loss | runs | steps | steps with an alarm | first about the loss "
        "| rise then, nats | largest rise, nats |"
    )
    yield "|" + " --- |" * 9
    for (name, rate, kind), runs in sorted(groups.items()):
        alarms = sum((run.alarms for run in runs), Counter())
        found = [run for run in runs if run.first is not None]
        cells = [name, f"{rate:g}", kind, str(len(runs)), str(sum(run.steps for run in runs))]
        cells.append(", ".join(f"{rule}: {count}" for rule, count in alarms.items()) or "none")
        cells.append(", ".join(str(run.first) for run in found) or "-")
        cells.append(", ".join(f"{run.rise_then:.2f}" for run in found) or "-")
        cells.append(f"{max(run.rise for run in runs):.2f}")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    if len(sys.argv) > 1:
        print("\n".join(table([Path(name) for name in sys.argv[1:]])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / archive.parent.name for archive in ARCHIVES]
        for archive, folder in zip(ARCHIVES, folders, strict=True):
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
        print("\n".join(table(folders)))


if __name__ == "__main__":
    main()
