"""Long native calls that Ctrl-C can interrupt: they run in a thread while the main thread waits."""

import threading
from collections.abc import Callable
from typing import TypeVar

_SECONDS_BETWEEN_LOOKS = 0.2
# Time for work that checks its event to end by itself.
_SECONDS_TO_END = 0.5

T = TypeVar("T")

_left: list[threading.Thread] = []


def run_in_background(work: Callable[[threading.Event], T], waiting: Callable[[], object]) -> T:
    """Return the result of `work`, and call `waiting` about five times a second until then.

    Python handles signals only in the main thread, after native code returns to it. An interrupt
    abandons native code, which continues until the process ends.

    Args:
        work: Receives an event that is set when nobody waits any longer.
        waiting: Called while the work runs.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    is_left = threading.Event()

    def run() -> None:
        try:
            results.append(work(is_left))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="background", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_SECONDS_BETWEEN_LOOKS)
            waiting()
    except BaseException:
        _left.append(thread)
        is_left.set()
        thread.join(_SECONDS_TO_END)
        raise
    if errors:
        raise errors[0]
    return results[0]


def is_work_left() -> bool:
    """Return True if abandoned native code is still running.

    A thread that returns from it while Python shuts down aborts the process. Such a process must
    end with `os._exit`.
    """
    return any(thread.is_alive() for thread in _left)
