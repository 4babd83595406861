"""Signals that ask a run to stop. They only set a flag; the loop stops after the step it is at.

Nothing else may happen in a handler: a checkpoint is collective, and a process that saves while
another computes waits for it for ever. The loop sums `requested` over all processes together with
its loss, so that all of them stop after the same step, whoever was told to.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, Self

from .records import write_json

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A run that was told to stop has saved and can go on: sysexits.h calls it EX_TEMPFAIL.
EXIT_PREEMPTED = 75
# What shells give for Ctrl-C, by which a script with several commands ends too.
EXIT_INTERRUPTED = 130
MARKER = "preempted.json"

# Slurm signals every process of a step, and the launcher passes its own signal on: one request
# comes twice. What comes within so many seconds of the first signal is part of it.
_SAME_REQUEST = 2.0

_entered: list["StopSignals"] = []


class StopSignals:
    """Context in which the first SIGTERM, SIGUSR1 or SIGINT sets a flag and the second one kills.

    Both work while the main thread is inside a collective or a slow write, since a thread of their
    own reads them. The second signal ends the process as the signal itself would, but for loader
    workers, which see to their own end: exit status 128 + its number. A signal that was ignored
    before stays ignored. Outside the main thread, where Python allows no handlers, this warns and
    does nothing.

    Attributes:
        requested: number of the first signal, 0 before it; it stays when the context is left.
    """

    _signals: tuple[signal.Signals, ...] = SIGNALS

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "Training does not run in the main thread, so a signal to stop ends it "
                "without a checkpoint.",
                stacklevel=2,
            )
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, _do_nothing)
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in _entered:
            return
        _entered.remove(self)
        self._restore()
        # Closing the pipe would not end the thread: forked loader workers hold it open too.
        os.write(self._writer, b"\0")
        self._listener.join()
        os.close(self._writer)
        os.close(self._reader)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            # None stands for a handler that was not Python's; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number in self._signals:  # others have handlers of somebody else
                self._receive(number)

    def _receive(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.requested:
            self.requested, self._since = number, now
            _say(f"{name}: stopping after this step, with a checkpoint; a second signal ends all")
        elif now - self._since > _SAME_REQUEST:
            _say(f"{name}: the second signal, ending at once")
            os._exit(128 + number)


class Preparation(StopSignals):
    """Context before the first step, where there is nothing to save: SIGTERM and SIGUSR1 end it.

    They end the process at once with EXIT_PREEMPTED, and leave the mark by which a batch script
    runs it again; what was prepared so far is in the cache. Ctrl-C is Python's.
    """

    _signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run = run

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        return super().__enter__() if is_main else self  # training will warn

    def _receive(self, number: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            self._run.mkdir(parents=True, exist_ok=True)
            mark_preempted(self._run, None, number)
        _say(f"{signal.Signals(number).name}: ending before the first step; run it again to go on")
        os._exit(EXIT_PREEMPTED)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Python tells the thread of a signal only if it has a handler."""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


def _restore_in_child() -> None:
    """A forked process that is told to end must end, and not speak for its parent."""
    for signals in reversed(_entered):
        signals._restore()
    _entered.clear()


os.register_at_fork(after_in_child=_restore_in_child)


def ignore_signals(_worker: int = 0) -> None:
    """For `DataLoader(worker_init_fn=...)`: a loader's workers live until the loader ends them.

    Launchers signal the process group of a rank, its loader workers included. A worker that dies
    of it would take its rank along before the checkpoint.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mark_preempted(run: Path, step: int | None, number: int) -> None:
    """Say in `run/preempted.json` that the run was told to stop and can go on from a checkpoint.

    Launchers end with 1 whatever happened, so a batch script decides by this file. To be written
    by one process, after the checkpoint and before any process leaves.

    Args:
        step: that was done; None before the first of this process.
        number: `requested` of this process; 0 if it was another one that was told.
    """
    name = signal.Signals(number).name if number else None
    write_json(run / MARKER, {"step": step, "signal": name, "time": time.time()})


def clear_mark(run: Path) -> None:
    """Remove the file, since the run goes on."""
    (run / MARKER).unlink(missing_ok=True)
