"""Terminal views: the live view of `hf-stable watch`, and a diagnosis in words."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_stable.run_lock import is_free
from hf_stable.telemetry.reading.alarms import PATIENCE, Alarm, alarms, number
from hf_stable.telemetry.reading.diagnosis import HOW_TO_WATCH, Diagnosis
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.remedies import Remedy
from hf_stable.telemetry.reading.rules import Judgement, Thresholds, judgements

# Columns of the table of layers: rule, heading, and True to show a factor.
_COLUMNS = (
    ("max_logit_early", "max logit", False),
    ("entropy", "entropy", False),
    ("qkv_output", "QKV out", True),
    ("qkv_input_grad", "QKV grad", True),
    ("update", "update", True),
)
_BARS = "▁▂▃▄▅▆▇█"
_LAYERS, _ALARMS = 6, 6
_STYLES = {"running": "cyan", "finished": "green", "diverged": "bold red", "died": "bold red"}
_PANEL_WIDTH = 78
_SILENCE = 3600.0


def watch_runs(folders: Sequence[Path], console: Console, refresh: float, once: bool) -> None:
    """Show runs once, or every `refresh` seconds until all have ended.

    Raises:
        UserError: If a folder holds no run.
    """
    watched = _Watched(folders)
    states = watched.read()
    if once:
        console.print(view(states, console.width))
        return
    with Live(view(states, console.width), console=console, auto_refresh=False) as live:
        while not all(state.ending for state in states):
            time.sleep(refresh)
            states = watched.read()
            live.update(view(states, console.width), refresh=True)


@dataclass(frozen=True)
class State:
    """Current state of a run; `ending` is how it ended, or None while it trains."""

    history: History
    ending: str | None


class _Watched:
    """Histories of folders. Records that have not grown are not read again."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._read: dict[Path, tuple[int, History]] = {}

    def read(self) -> list[State]:
        return [self._of(folder) for folder in self._folders]

    def _of(self, folder: Path) -> State:
        gone = is_gone(
            folder
        )  # check first: the last record is written before the lock is released
        history = self._history(folder)
        return State(history, ending(history, is_gone=gone))

    def _history(self, folder: Path) -> History:
        metrics = folder / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.is_file() else -1
        if folder not in self._read or self._read[folder][0] != size:
            self._read[folder] = size, read_history(folder)
        return self._read[folder][1]


def view(states: Sequence[State], width: int) -> RenderableType:
    """Return all runs, side by side if the width has room for two or more panels."""
    beside = max(1, min(len(states), width // _PANEL_WIDTH))
    grid = Table.grid(expand=True)
    for _ in range(beside):
        grid.add_column(ratio=1)
    panels = [run_panel(state, width // beside) for state in states]
    for start in range(0, len(panels), beside):
        grid.add_row(*panels[start : start + beside])
    return grid


def ending(history: History, *, is_gone: bool = False) -> str | None:
    """Return how a run ended, or None while it may still train.

    Args:
        history: Records of the run.
        is_gone: True if its process is known to have exited, whatever the records say.
    """
    end: str | None = None
    for row in history.events:
        if row["event"] in ("started", "resumed", "rolled_back"):
            end = None
        elif row["event"] in ("finished", "diverged", "stopped"):
            end = row["event"]
        elif row["event"] == "preempted":
            end = "interrupted" if row.get("signal") == "SIGINT" else "preempted"
    return end or ("died" if is_gone else None)


def is_gone(folder: Path) -> bool:
    """Return True if no process trains in a run's folder any more.

    The run's lock decides. Without a lock, as under `transformers.Trainer` or in a copy of the
    records, a run counts as gone if its records have not grown for an hour.
    """
    free = is_free(folder)
    metrics = folder / "metrics.jsonl"
    if free is not None or not metrics.is_file():
        return bool(free)
    return time.time() - metrics.stat().st_mtime > _SILENCE


def run_panel(state: State, width: int) -> Panel:
    """Return the panel of one run: progress, loss, the layers nearest to a limit, alarms."""
    history = state.history
    found = alarms(history)
    parts: list[RenderableType] = [_progress(state), _numbers(history, width - 4)]
    if len(history.steps):
        parts += [Text(), _layers(history), Text(), *_alarm_lines(history, found)]
    else:
        parts += [Text(), Text(HOW_TO_WATCH, style="dim")]
    standing = [alarm for alarm in found if _stands(alarm, history)]
    colour = "red" if standing else "yellow" if found else "green"
    return Panel(
        Group(*parts),
        title=Text(history.name, style="bold"),
        subtitle=Text(str(history.folder), style="dim"),
        border_style=colour,
        box=box.ROUNDED,
    )


def _last_step(history: History) -> int:
    return int(max([*history.train.get("step", [])[-1:], *history.steps[-1:]], default=0))


def _total_steps(history: History) -> int | None:
    recipe = history.run.get("recipe", {})
    training = recipe.get("training", {})
    if training.get("steps") is not None:
        return training["steps"]
    if training.get("tokens") is None:
        return None
    batch = training["global_batch_size"] * recipe["data"]["sequence_length"]
    return training["tokens"] // batch


def _progress(state: State) -> RenderableType:
    step, total = _last_step(state.history), _total_steps(state.history)
    word = state.ending or "running"
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column()
    row.add_column(ratio=1)
    row.add_column(justify="right")
    of_total = "" if total is None else f" of {total:,}"
    bar = Text() if total is None else ProgressBar(total=total, completed=step)
    row.add_row(
        Text(f"step {step:,}{of_total}"), bar, Text(word, style=_STYLES.get(word, "yellow"))
    )
    return row


def _numbers(history: History, width: int) -> RenderableType:
    validations = [row for row in history.events if row["event"] == "validation"]
    perplexity = f"{float(validations[-1]['perplexity']):.4g}" if validations else "-"
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    headings = ("loss", "learning rate", "gradient norm", "tokens/s", "validation ppl")
    row.add_row(*(Text(heading, style="dim") for heading in headings))
    row.add_row(
        Text(_latest(history, "loss", ".4f"), style="bold"),
        _latest(history, "learning_rate", ".2e"),
        _latest(history, "grad_norm", ".3g"),
        _latest(history, "tokens_per_second", ",.0f"),
        perplexity,
    )
    losses = history.train.get("loss", np.array([]))
    return Group(row, Text(sparkline(losses, width), style="cyan"))


def _latest(history: History, name: str, form: str) -> str:
    values = history.train.get(name, np.array([]))
    return format(values[-1], form) if len(values) else "-"


def sparkline(values: np.ndarray, width: int) -> str:
    """Return at most `width` bars, each the mean of an equal part; × if not finite.

    The scale ignores the first tenth, which would flatten the rest.
    """
    if not len(values):
        return ""
    parts = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    rest = np.array(parts[len(parts) // 10 :])
    finite = rest[np.isfinite(rest)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    span = max(high - low, 1e-9)
    shares = [(part - low) / span if np.isfinite(part) else np.nan for part in parts]
    return "".join(
        "×" if np.isnan(share) else _BARS[int(min(share, 1) * (len(_BARS) - 1) + 0.5)]
        for share in shares
    )


def _layers(history: History) -> RenderableType:
    """Return the table of layers nearest to a limit in their last sample, nearest first."""
    judged = [
        judgement for judgement in judgements(history, Thresholds()) if "*" in judgement.column
    ]
    nearest: dict[int, tuple[float, Judgement]] = {}
    for judgement in judged:
        for layer, share in enumerate(judgement.closeness[-1]):
            if share > nearest.get(layer, (-1.0, None))[0]:
                nearest[layer] = float(share), judgement
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("layer")
    for _, heading, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("nearest to a limit", no_wrap=True)
    ordered = sorted(nearest.items(), key=lambda item: -item[1][0])
    for layer, (share, judgement) in ordered[:_LAYERS]:
        cells = [_cell(judged, key, layer, factor) for key, _, factor in _COLUMNS]
        table.add_row(str(layer), *cells, _gauge(share, judgement.rule.key))
    return table


def _cell(judged: Sequence[Judgement], key: str, layer: int, factor: bool) -> Text:
    for judgement in judged:
        if judgement.rule.key != key or layer >= judgement.values.shape[1]:
            continue
        value, share = judgement.values[-1, layer], judgement.closeness[-1, layer]
        if factor and judgement.usual is not None:
            value = value / judgement.usual[-1, layer]
        if np.isnan(value):
            return Text("·", style="dim")
        shown = f"{value:,.2f}x" if factor else number(value)
        return Text(shown, style=_colour(share))
    return Text("-", style="dim")


def _gauge(share: float, key: str) -> Text:
    filled = round(10 * min(share, 1.0))
    words = key.replace("_early", "").replace("_", " ")
    return Text.assemble(
        ("━" * filled, _colour(share)), ("╌" * (10 - filled), "bright_black"), f" {words}"
    )


def _colour(share: float) -> str:
    return "bold red" if share >= 1 else "yellow" if share >= 0.6 else "green"


def _stands(alarm: Alarm, history: History) -> bool:
    return alarm.until >= history.steps[-(PATIENCE + 1) :].min(initial=alarm.until)


def _alarm_lines(history: History, found: Sequence[Alarm]) -> list[RenderableType]:
    if not found:
        return [Text("no alarm", style="green")]
    lines: list[RenderableType] = []
    if len(found) > _ALARMS:
        lines.append(Text(f"{len(found)} alarms; the first: {found[0].text}", style="yellow"))
    for alarm in found[-_ALARMS:]:
        stands = _stands(alarm, history)
        passed = "" if stands else f" (until step {alarm.until})"
        lines.append(Text(f"{alarm.text}{passed}", style="red" if stands else "dim"))
    return lines


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis: sentences, evidence and remedies from the papers."""
    console.print(Text(diagnosis.run, style="bold"))
    for sentence in diagnosis.sentences:
        console.print(Text(sentence))
    if diagnosis.evidence:
        console.print(_evidence_table(diagnosis))
    if diagnosis.remedies:
        console.print(Text("\nTechniques against it in the papers that this run does not use:"))
        table = Table(box=box.SIMPLE, pad_edge=False, header_style="dim")
        table.add_column("group")
        table.add_column("set in the recipe", no_wrap=True)
        table.add_column("why")
        for remedy in diagnosis.remedies:
            table.add_row(remedy.room, _setting(remedy), Text(remedy.why))
        console.print(table)


def _setting(remedy: Remedy) -> Text:
    """Return the setting with one key per line."""
    keys = "=" in remedy.setting
    return Text(remedy.setting.replace(" ", "\n") if keys else remedy.setting)


def _evidence_table(diagnosis: Diagnosis) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, header_style="dim")
    table.add_column("evidence", no_wrap=True)
    for heading in ("at start", "before", "at alarm", "limit"):
        table.add_column(heading, justify="right")
    for row in diagnosis.evidence:
        values = (row.at_start, row.before, row.at_alarm, row.threshold)
        table.add_row(Text(row.name), *(number(value) for value in values))
    return table
