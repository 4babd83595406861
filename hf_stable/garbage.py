"""Control over Python's garbage collector.

Imports of torch, Transformers and this package create 400,000 permanent objects. With CPython's
default thresholds, scanning them, also at exit, takes a third of the CPU time of a short command,
and every full collection takes 0.4 s of a training step.
"""

import atexit
import gc

# Allocations between two collections of the youngest objects; CPython's defaults are 700, 10, 10.
_WHILE_IMPORTING = (100_000, 20, 50)

_usual: list[tuple[int, int, int]] = []


def defer() -> None:
    """Collect rarely until `resume`, and not at exit; for the process of a command."""
    _usual[:] = [gc.get_threshold()]
    gc.set_threshold(*_WHILE_IMPORTING)
    atexit.register(gc.freeze)


def resume() -> None:
    """Restore the thresholds from before `defer`, for objects created from here on."""
    if _usual:
        gc.collect()  # garbage must not be kept forever
        gc.freeze()
        gc.set_threshold(*_usual.pop())
