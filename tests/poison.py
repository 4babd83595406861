"""A pickle that leaves a trace where it is loaded."""

from collections.abc import Callable
from pathlib import Path


class Poison:
    """Touches `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)
