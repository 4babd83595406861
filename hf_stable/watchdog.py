"""Heartbeats of every process, and a watchdog that aborts a process whose main thread hangs.

One hung process makes all others wait silently in a collective. Each process therefore writes its
progress to its heartbeat file, and watches its main thread by its local clock. When that thread has
made no progress for too long, the watchdog reads all files, reports the ranks that the others wait
for, writes the stacks of its threads and exits with EXIT_HANG. Standard library only.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from . import durable

EXIT_HANG = 76
FOLDER = "heartbeats"

# Phases of a step, in their order. The step is the number of completed steps.
Phase = Literal[
    "start", "data", "gradients", "update", "telemetry", "validation", "checkpoint", "ended"
]
_PHASES = get_args(Phase)
_INTERVAL = 1.0  # seconds between writes of a file
_SHOWN = 8  # ranks named in a report


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a process at its last heartbeat.

    Args:
        rank: Rank of the process.
        step: Number of completed optimizer steps.
        phase: Phase of the current step.
        time: Time of the heartbeat in seconds since the epoch, by the clock of `host`.
        pid: Process id.
        host: Host name.
    """

    rank: int
    step: int
    phase: Phase
    time: float
    pid: int
    host: str

    @property
    def place(self) -> tuple[int, int]:
        """Sort key of the progress; larger for a process that is further ahead."""
        return self.step, _PHASES.index(self.phase)

    def __str__(self) -> str:
        age = time.time() - self.time
        return (
            f"rank {self.rank} (pid {self.pid} on {self.host}): "
            f"{self.step} steps done, at {self.phase}, {age:.0f} s ago"
        )


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return a rank's heartbeat file in the folder of heartbeats."""
    return folder / f"rank-{rank:05d}.json"


def read_heartbeats(folder: Path, world_size: int) -> list[Heartbeat]:
    """Read the heartbeats of all ranks below `world_size` that have a readable one."""
    beats = []
    for rank in range(world_size):
        try:
            content = json.loads(heartbeat_file(folder, rank).read_text(encoding="utf-8"))
            beats.append(Heartbeat(rank=rank, **content))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def clear_heartbeats(folder: Path) -> None:
    """Remove the heartbeats of an earlier start, before any process of this start writes.

    Ranks that no longer exist would seem to hang.
    """
    for file in folder.glob("rank-*.json"):
        file.unlink(missing_ok=True)


def furthest_behind(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Return the ranks that the others wait for, the longest silent first.

    The result is empty if all ranks are at the same place, so that none waits for another.
    """
    earliest = min((beat.place for beat in beats), default=None)
    behind = [beat for beat in beats if beat.place == earliest]
    return [] if len(behind) == len(beats) else sorted(behind, key=lambda beat: beat.time)


def describe_hang(beats: Sequence[Heartbeat], world_size: int) -> str:
    """Describe in a few lines which ranks are behind."""
    lines = []
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    if missing:
        lines.append(f"ranks without a heartbeat: {_first(missing)}")
    if behind := furthest_behind(beats):
        lines.append(f"{len(beats) - len(behind)} of {world_size} ranks are ahead of:")
    else:
        lines.append("no rank is behind the others; the longest silent first:")
        behind = sorted(beats, key=lambda beat: beat.time)
    lines += [f"  {beat}" for beat in behind[:_SHOWN]]
    if len(behind) > _SHOWN:
        lines.append(f"  and {len(behind) - _SHOWN} more")
    return "\n".join(lines)


def _first(ranks: Sequence[int]) -> str:
    more = ", ..." if len(ranks) > _SHOWN else ""
    return ", ".join(str(rank) for rank in ranks[:_SHOWN]) + more


class Watchdog:
    """Context in which a process reports its progress, and is aborted when it stops reporting.

    Args:
        folder: Folder of all heartbeats of the run; every rank must have access to it.
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: Seconds without progress of the main thread after which the process exits with
            EXIT_HANG; 0 disables this. Must be longer than the longest step, validation or
            checkpoint. Time in which the whole process was stopped (SIGSTOP, a suspended job) does
            not count.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout = timeout
        self._interval = min(_INTERVAL, timeout / 4) if timeout else _INTERVAL
        self._host = socket.gethostname()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat(0, "start")

    def beat(self, step: int, phase: Phase) -> None:
        """Report the progress of the main thread. Cheap: the watchdog's thread writes the file.

        Args:
            step: Number of completed optimizer steps.
            phase: Phase that begins now.
        """
        self._newest = (step, phase, time.time())

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        self._thread.join()
        if kind is None:
            self.beat(self._newest[0], "ended")
        self._write()

    def _watch(self) -> None:
        seen, silent, last = self._newest, 0.0, time.monotonic()
        while not self._left.wait(self._interval):
            now = time.monotonic()
            # A longer interval than requested means that all threads of the process were stopped.
            silent += min(now - last, 2 * self._interval)
            last = now
            if self._newest is not seen:
                seen, silent = self._newest, 0.0
                self._write()
            if self._timeout and silent > self._timeout:
                self._end(silent)

    def _write(self) -> None:
        step, phase, when = self._newest
        beat = Heartbeat(self._rank, step, phase, when, os.getpid(), self._host)
        content = asdict(beat)
        del content["rank"]  # it is in the name of the file
        file = heartbeat_file(self._folder, self._rank)
        text = json.dumps(content) + "\n"
        # A full disk must end neither the run nor the watchdog.
        with contextlib.suppress(OSError):
            durable.write_file(file, text.encode(), survives_crash=False)

    def _end(self, silent: float) -> None:
        """Report which ranks are behind, write all stacks, and end the process."""
        try:
            beats = read_heartbeats(self._folder, self._world_size)
            stacks = self._folder / f"hang-rank-{self._rank:05d}.txt"
            text = (
                f"hang: rank {self._rank} has not moved for {silent:.0f} s "
                f"(training.hang_timeout is {self._timeout:g})\n"
                f"{describe_hang(beats, self._world_size)}\n"
            )
            print(f"{text}The stacks are in {stacks}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            with stacks.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file)
                os.fsync(file.fileno())
        finally:
            os._exit(EXIT_HANG)
