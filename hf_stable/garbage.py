"""When Python's garbage collector looks at objects.

Imports of torch, Transformers and this package create 400,000 objects that stay. With CPython's
thresholds the collector takes a fifth of the time of a short command to look at them, and 0.4 s of
a training step in every full collection.
"""

import atexit
import gc

# Allocations between two collections of the youngest objects; CPython's own are 700, 10, 10.
_WHILE_IMPORTING = (100_000, 20, 50)

_usual: list[tuple[int, int, int]] = []


def defer() -> None:
    """Collect seldom until `resume`, and not at exit; for the process of a command."""
    _usual[:] = [gc.get_threshold()]
    gc.set_threshold(*_WHILE_IMPORTING)
    atexit.register(gc.freeze)


def resume() -> None:
    """After `defer`, collect as often as before it, but only objects created from here on."""
    if _usual:
        gc.collect()  # what nobody needs any longer must not stay for good
        gc.freeze()
        gc.set_threshold(*_usual.pop())
