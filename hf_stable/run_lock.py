"""Lock on a run's folder: two processes would delete each other's checkpoints as remains.

The system's lock is on the file `.lock`. The file stays in the folder, because removing it would
break the lock of a waiting process. Its existence alone means nothing.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CheckpointError

# Seconds to wait for a process that only checks whether the lock is free.
_PATIENCE = 1.0


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock on a run's folder; the system releases it whenever the process dies.

    Args:
        run: Folder of the run.

    Raises:
        CheckpointError: If another process holds it; names host and pid.
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
    """Return True if no process trains in a run's folder, or None if there is no lock."""
    file = run / ".lock"
    if not file.is_file():
        return None
    try:
        with FileLock(file, timeout=0):
            return True
    except Timeout:
        return False
    except OSError:  # a file of another user
        return None


def _describe(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock but has not written yet
        return "another process"
