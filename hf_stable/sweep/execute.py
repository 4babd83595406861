"""Run a study with workers on this machine or through Slurm, and show its progress.

All state is in files: a study that is interrupted or killed at any moment is resumed by the same
command.
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

# A worker that dies is replaced a limited number of times, because memory may be exhausted.
_REPLACEMENTS = 3
_POLL_SECONDS = 1.0


def execute(
    plan: Plan,
    *,
    workers: int = 1,
    slurm: dict[str, Any] | None = None,
    thresholds: Thresholds | None = None,
) -> Path:
    """Run all runs of a plan that have no result yet.

    Args:
        plan: Plan of the study.
        workers: Number of processes on this machine, spread over its GPUs, or of Slurm jobs.
        slurm: Parameters of submitit, such as {"slurm_partition": "gpu", "timeout_min": 600}.
            {"cluster": "local"} is a trial on this machine. A job that reaches its time limit is
            submitted again.
        thresholds: Thresholds of the rule; by default those of the plan.

    Returns:
        The study's folder.

    Raises:
        UserError: If finished runs in the folder have other recipes, if the rule cannot be applied
            to the study's text, or if workers keep dying.
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
    """Raise an error if finished runs have other recipes, which would mix two plans."""
    for run in runs:
        result = read_result(run)
        if result is not None and result["recipe"] != recipe_digest(run.recipe):
            raise UserError(
                f"{run.recipe.output} holds a finished run of another recipe: give the study "
                "another --output, or delete that folder."
            )


def read_result(run: Planned) -> dict[str, Any] | None:
    """Return the content of a run's `result.json`, or None if it does not exist yet."""
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
        """Return True while any worker runs; workers that died are replaced."""
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
                f"{self._study / 'logs'}. Rerun the same command to resume; --workers 1 needs less "
                "memory."
            )
        self._workers[number] = self._start(number)

    def end(self) -> None:
        """Stop the remaining workers."""
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            process.wait()

    def check(self) -> None:
        """Do nothing: failed workers are replaced, and another process may train the other runs."""


class Progress:
    """Progress of a study: results so far and the time per run."""

    def __init__(self, runs: list[Planned], elapsed: float) -> None:
        self._runs, self._elapsed = runs, elapsed
        self._results = [read_result(run) for run in runs]

    def view(self) -> RenderableType:
        """Return a bar, counts, and per method the stable of finished runs by learning rate."""
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
        # A bar does not end its line, which would cut off the head of the table.
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
    """Return True if a run neither diverged nor collapsed nor failed."""
    return result["status"] != "failed" and _verdict(result).stable


def _verdict(result: dict[str, Any]) -> Verdict:
    return Verdict.from_dict(result["verdict"])


def _cell(results: list[dict[str, Any] | None]) -> str:
    """Return stable of finished runs, such as 2/3, and a dot for each unfinished run."""
    done = [result for result in results if result is not None]
    stable = sum(_is_stable(result) for result in done)
    waiting = "." * (len(results) - len(done))
    return (f"{stable}/{len(done)}" if done else "") + waiting
