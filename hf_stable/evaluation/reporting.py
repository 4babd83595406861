"""Progress of an evaluation: a live line on a terminal, else one plain line per ten seconds."""

import math
import sys
import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.status import Status

from hf_stable.wording import significant

_SECONDS_BETWEEN_LINES = 10.0


class Reporter(AbstractContextManager["Reporter"]):
    """Writer to stderr only, which leaves stdout to the result; silent unless `on`."""

    def __init__(self, on: bool) -> None:
        console = Console(stderr=True)
        self._on = on
        self._status = Status("reading", console=console) if on and console.is_terminal else None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "Reporter":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, *, documents: int, tokens: int, nll: float) -> None:
        """Show the running perplexity; `nll` in nats over `tokens` tokens so far."""
        if not self._on:
            return
        now = time.monotonic()
        nats = nll / tokens
        line = (
            f"evaluating: {documents:,} documents, {tokens:,} tokens, "
            f"{tokens / max(now - self._started, 1e-9):,.0f} tokens/s, "
            f"perplexity per token so far {significant(math.exp(min(nats, 700.0)))}"
        )
        if self._status:
            self._status.update(line)
        elif now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            print(line, file=sys.stderr, flush=True)
