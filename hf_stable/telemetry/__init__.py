"""Seeing instability: what every layer does while a model trains, in records and in pictures.

Looking at records needs no torch, so what watches a model is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import WatchCallback
    from .watching import Watcher, watch

__all__ = ["WatchCallback", "Watcher", "watch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hf_stable.telemetry' has no attribute {name!r}")
    if name == "WatchCallback":  # its `Trainer` takes two seconds to import
        from .callback import WatchCallback  # noqa: PLC0415

        return WatchCallback
    from . import watching  # noqa: PLC0415

    return vars(watching)[name]
