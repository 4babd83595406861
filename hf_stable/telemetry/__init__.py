"""Telemetry: statistics of every layer during training, in records and figures.

Reading records needs no torch, so the classes that watch a model are imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import WatchCallback
    from .watching import Watcher, watch

__all__ = ["WatchCallback", "Watcher", "watch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hf_stable.telemetry' has no attribute {name!r}")
    if name == "WatchCallback":  # importing `Trainer` takes two seconds
        from .callback import WatchCallback  # noqa: PLC0415

        return WatchCallback
    from . import watching  # noqa: PLC0415

    return vars(watching)[name]
