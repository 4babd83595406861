"""Running a study: workers on this machine or through Slurm, and its progress in the terminal.

Everything that counts is in files: a study that is interrupted at any moment, however roughly, goes
on by the same command.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_stable.errors import UserError
from hf_stable.preemption import EXIT_PREEMPTED
from hf_stable.wording import counted

from .baselines import check_baselines
from .jobs import Jobs
from .plan import Plan, Planned, planned_runs, write_plan
from .rule import Thresholds, Verdict
from .worker import recipe_digest

# A worker that dies is replaced, but not for ever: it may be the machine's memory that ends.
_REPLACEMENTS = 3
_POLL_SECONDS = 1.0


def execute(
    plan: Plan,
    *,
    workers: int = 1,
    slurm: dict[str, Any] | None = None,
    thresholds: Thresholds | None = None,
) -> Path:
    """Run whatever has no result yet.

    Args:
        workers: processes on this machine, over its GPUs in turn, or jobs of Slurm.
        slurm: parameters of submitit, such as {"slurm_partition": "gpu", "timeout_min": 600};
            {"cluster": "local"} rehearses on this machine. A job that reaches its time limit is
            submitted again.
        thresholds: of the rule; the plan's unless given.

    Returns:
        The study's folder.

    Raises:
        UserError: when finished runs there are of other recipes, when the rule has no marks on the
            study's text, or when workers keep dying.
    """
    runs = planned_runs(plan)
    _check_finished(runs)
    thresholds = thresholds or plan.rule
    check_baselines(runs, thresholds)
    study = write_plan(plan, runs, thresholds)
    crew = Jobs(study, workers, slurm) if slurm is not None else _Processes(study, workers)
    console = Console(stderr=True)
    try:
        with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
            start = time.monotonic()
            while crew.is_working():
                progress = Progress(runs, time.monotonic() - start)
                live.update(progress.view(), refresh=console.is_terminal)
                time.sleep(_POLL_SECONDS)
    finally:
        crew.end()
    console.print(Progress(runs, time.monotonic() - start).view())
    if any(read_result(run) is None for run in runs):
        crew.check()
    return study


def _check_finished(runs: list[Planned]) -> None:
    """Refuse a folder whose finished runs are not the plan's: numbers of two plans would mix."""
    for run in runs:
        result = read_result(run)
        if result is not None and result["recipe"] != recipe_digest(run.recipe):
            raise UserError(
                f"{run.recipe.output} is finished, but of another recipe: give the study another "
                "--output, or delete that folder."
            )


def read_result(run: Planned) -> dict[str, Any] | None:
    """`result.json` of a run, or None while there is none."""
    file = Path(run.recipe.output) / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class _Processes:
    """Workers on this machine."""

    def __init__(self, study: Path, workers: int) -> None:
        self._study, self._died = study, 0
        self._gpus = torch.cuda.device_count()
        (study / "logs").mkdir(parents=True, exist_ok=True)
        self._workers = {number: self._start(number) for number in range(workers)}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % self._gpus)
        with (self._study / "logs" / f"worker-{number}.log").open("ab") as log:
            command = [sys.executable, "-m", "hf_stable.sweep.worker", str(self._study)]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def is_working(self) -> bool:
        """Whether any worker is left; those that died are replaced."""
        for number, process in list(self._workers.items()):
            code = process.poll()
            if code is None:
                continue
            del self._workers[number]
            if code != 0:
                self._replace(number, code)
        return bool(self._workers)

    def _replace(self, number: int, code: int) -> None:
        self._died += code != EXIT_PREEMPTED
        if self._died > _REPLACEMENTS:
            raise UserError(
                f"workers died {self._died} times, the last with exit code {code}: see "
                f"{self._study / 'logs'}. The same command goes on; --workers 1 needs less memory."
            )
        self._workers[number] = self._start(number)

    def end(self) -> None:
        """Stop the workers that are left."""
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            process.wait()

    def check(self) -> None:
        """Nothing: workers that fail are replaced, and a run without a result is another's."""


class Progress:
    """Where a study stands: results so far and what they foretell."""

    def __init__(self, runs: list[Planned], elapsed: float) -> None:
        self._runs, self._elapsed = runs, elapsed
        self._results = [read_result(run) for run in runs]

    def view(self) -> RenderableType:
        """A bar, counts, and a row of each method: stable of finished, by learning rate."""
        done = [result for result in self._results if result is not None]
        counts = Counter(result["status"] for result in done)
        verdicts = [_verdict(result) for result in done if result["status"] != "failed"]
        diverged = sum(verdict.diverged for verdict in verdicts)
        collapsed = sum(verdict.collapsed for verdict in verdicts)
        text = f"{len(done)} of {counted(len(self._runs), 'run')}: "
        text += f"{sum(map(_is_stable, done))} stable"
        text += f", {diverged} diverged" if diverged else ""
        text += f", {collapsed} collapsed or not learned" if collapsed else ""
        text += f" ({counts['stopped']} stopped early)" if counts["stopped"] else ""
        text += f", {counts['failed']} failed" if counts["failed"] else ""
        text += self._time_left(done)
        # A bar does not end its line; the table's head would be cut off behind it.
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=len(self._runs), completed=len(done)))
        return Group(Text(text), bar, self._grid())

    def _time_left(self, done: list[dict[str, Any]]) -> str:
        seconds = [result["seconds"] for result in done if "seconds" in result]
        left = len(self._runs) - len(done)
        if not seconds or not left or self._elapsed < 1:
            return ""
        return f"; a run takes {sum(seconds) / len(seconds):.0f} s"

    def _grid(self) -> Table:
        rates = sorted({run.learning_rate for run in self._runs})
        table = Table("method", *(f"{rate:g}" for rate in rates), box=None)
        cells: dict[tuple[str, float], list[dict[str, Any] | None]] = {}
        for run, result in zip(self._runs, self._results, strict=True):
            row = f"{run.method} {run.variant}".strip()
            cells.setdefault((row, run.learning_rate), []).append(result)
        for row in dict.fromkeys(row for row, _ in cells):
            table.add_row(row, *(_cell(cells.get((row, rate), [])) for rate in rates))
        return table


def _is_stable(result: dict[str, Any]) -> bool:
    """Return whether a run neither diverged nor collapsed; one that failed has shown nothing."""
    return result["status"] != "failed" and _verdict(result).stable


def _verdict(result: dict[str, Any]) -> Verdict:
    return Verdict.from_dict(result["verdict"])


def _cell(results: list[dict[str, Any] | None]) -> str:
    """Stable of finished runs, such as 2/3; a dot for each that is not finished."""
    done = [result for result in results if result is not None]
    stable = sum(_is_stable(result) for result in done)
    waiting = "." * (len(results) - len(done))
    return (f"{stable}/{len(done)}" if done else "") + waiting
