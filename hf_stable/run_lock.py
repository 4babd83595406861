"""One process at a time on a run's folder: two would take each other's checkpoints for litter.

`.lock` is what the system's lock is on. The file stays with the run, since a process that removed
it would take it from under another one that waits; that it is there says nothing.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CheckpointError

# Seconds to wait for who only looks whether the lock is free.
_PATIENCE = 1.0


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run's folder; the system takes the lock back when its holder dies, however.

    Raises:
        CheckpointError: when another process holds it; it names host and pid.
    """
    run.mkdir(parents=True, exist_ok=True)
    holder = run / "lock.json"
    try:
        lock = FileLock(run / ".lock", timeout=_PATIENCE)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"{run} is in use by {_describe(holder)}. Wait for it or stop it, or give another "
            "output folder."
        ) from error
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname()}
        holder.write_text(json.dumps(about) + "\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_free(run: Path) -> bool | None:
    """Return whether no process trains in a run's folder, or None where there is no lock."""
    file = run / ".lock"
    if not file.is_file():
        return None
    try:
        with FileLock(file, timeout=0):
            return True
    except Timeout:
        return False
    except OSError:  # somebody else's file
        return None


def _describe(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not said so yet
        return "another process"
