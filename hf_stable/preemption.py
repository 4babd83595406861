"""Signals that stop a run. They only set a flag; the loop stops after the current step.

A handler must not do more: a checkpoint is collective, and a process that saves while another
computes would wait for it forever. The loop sums `requested` over all processes together with its
loss. All of them therefore stop after the same step, whichever process received the signal.
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
# A stopped run has saved a checkpoint and can be resumed: sysexits.h calls this EX_TEMPFAIL.
EXIT_PREEMPTED = 75
# Exit status of shells for Ctrl-C, which also ends a script with several commands.
EXIT_INTERRUPTED = 130
MARKER = "preempted.json"

# Slurm signals every process of a step, and the launcher forwards its own signal, so one request
# arrives twice. Signals within this many seconds of the first one belong to it.
_SAME_REQUEST = 2.0

_entered: list["StopSignals"] = []


class StopSignals:
    """Context in which the first SIGTERM, SIGUSR1 or SIGINT sets a flag and the second one kills.

    Both work while the main thread is inside a collective or a slow write, since a separate thread
    reads them. The second signal ends the process with exit status 128 + its number, like the
    signal itself; loader workers end by themselves. A signal that was ignored before stays ignored.
    Outside the main thread, where Python allows no handlers, the context only warns.

    Attributes:
        requested: Number of the first signal, 0 before it. It is kept after the context.
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
        # Closing the pipe would not end the thread: forked loader workers also hold it open.
        os.write(self._writer, b"\0")
        self._listener.join()
        os.close(self._writer)
        os.close(self._reader)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            # None is a handler not set from Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number in self._signals:  # other signals have other handlers
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
    """Context before the first step, in which SIGTERM and SIGUSR1 end the process at once.

    There is nothing to save yet; data prepared so far is in the cache. The process exits with
    EXIT_PREEMPTED, and leaves the marker by which a batch script starts it again. Ctrl-C keeps
    Python's handler.
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
        _say(f"{signal.Signals(number).name}: ending before the first step; run it again to resume")
        os._exit(EXIT_PREEMPTED)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal: Python reports it to the listening thread only if it has a handler."""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader may have exited
        print(text, file=sys.stderr, flush=True)


def _restore_in_child() -> None:
    """Restore the handlers in a forked process, so that a signal ends it, without messages."""
    for signals in reversed(_entered):
        signals._restore()
    _entered.clear()


os.register_at_fork(after_in_child=_restore_in_child)


def ignore_signals(_worker: int = 0) -> None:
    """Ignore stop signals in a `DataLoader` worker; pass this as `worker_init_fn`.

    Launchers signal the process group of a rank, including its loader workers. A worker that died
    from the signal would end its rank before the checkpoint. The loader ends its workers itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mark_preempted(run: Path, step: int | None, number: int) -> None:
    """Record in `run/preempted.json` that the run was stopped and can be resumed.

    Launchers always exit with 1, so a batch script decides by this file. One process writes it,
    after the checkpoint and before any process leaves.

    Args:
        run: Folder of the run.
        step: Number of steps done; None before the first step of this process.
        number: `requested` of this process; 0 if another process received the signal.
    """
    name = signal.Signals(number).name if number else None
    write_json(run / MARKER, {"step": step, "signal": name, "time": time.time()})


def clear_mark(run: Path) -> None:
    """Remove the marker, since the run continues."""
    (run / MARKER).unlink(missing_ok=True)
