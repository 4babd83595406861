"""Progress on stderr: a bar on a terminal, otherwise one plain line every ten seconds."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress in bytes of text and in tokens.

    Args:
        title: Name of the work, shown first.
        total: Bytes of text in all, or None if unknown.
        tokens: Number of tokens at the start, from an earlier build that was interrupted.
        shown: Print nothing if False.
    """

    def __init__(self, title: str, total: int | None, tokens: int = 0, *, shown: bool) -> None:
        self._title = title
        self._total = total
        self._shown = shown
        self._begin = self._last_line = time.monotonic()
        self._tokens = tokens
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, tokens: int) -> None:
        """Show `done` bytes of text and `tokens` tokens, both including earlier runs."""
        speed = (tokens - self._tokens) / max(time.monotonic() - self._begin, 1e-9)
        self._show(done, f"{done / 1e6:,.1f} MB, {tokens:,} tokens, {speed:,.0f} tokens/s")

    def update_time(self, done: int) -> None:
        """Show `done` bytes of text and the time since the start."""
        seconds = time.monotonic() - self._begin
        self._show(done, f"{done / 1e6:,.1f} MB, {seconds:,.0f} s")

    def _show(self, done: int, state: str) -> None:
        now, state = time.monotonic(), f"{self._title} {state}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=state)
        elif self._shown and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            share = f" ({min(done / self._total, 1.0):.0%})" if self._total else ""
            print(state + share, file=sys.stderr, flush=True)
            self._last_line = now
