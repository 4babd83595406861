"""Runs for the tests of figures, and their figures without alarms."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_stable.telemetry.reading import figures
from hf_stable.telemetry.reading.drawing import to_svg
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.looks import dress

from .runs import Change, Plan, write_diverging, write_healthy, write_run

LAYERS, HEADS = 4, 4


def write_pair(folder: Path) -> list[History]:
    """A healthy and a diverging run of 61 samples."""
    size = {"steps": 600, "every": 10, "layers": LAYERS, "heads": HEADS}
    healthy = write_healthy(folder / "healthy", **size)
    diverging = write_diverging(folder / "diverging", **size, seed=1)
    return [read_history(healthy), read_history(diverging)]


def small(folder: Path, **fields: object) -> History:
    """A run of few samples; fields as in Plan."""
    defaults = {"steps": 40, "layers": 2, "log_every": 5}
    return read_history(write_run(folder, Plan(**{**defaults, **fields})))


def without(history: History, *quantities: str) -> History:
    """The run as if these had not been recorded."""
    kept = {n: c for n, c in history.telemetry.items() if not n.endswith(quantities)}
    return dataclasses.replace(history, telemetry=kept)


@contextlib.contextmanager
def only(*keys: str) -> Iterator[None]:
    """Render these figures only, which takes most of their time; the SVG of the others is empty."""

    def render(figure: Any, key: str) -> str:
        return to_svg(figure, key) if key in keys else ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "to_svg", render)
        yield


def drawn(histories: Sequence[History], *keys: str) -> tuple[dict[str, str], dict[str, str]]:
    """SVG by key, empty except for `keys`, and reasons by title; without alarms."""
    nothing = [[] for _ in histories], [None for _ in histories]
    with only(*keys):
        drawings, left_out = figures.draw_all(dress(histories), *nothing)
    return {each.key: each.svg for each in drawings}, {e.title: e.reason for e in left_out}


def not_a_number(after: int, instead: float = math.nan) -> Change:
    def change(step: int, value: object) -> object:
        if step < after:
            return value
        return [instead] * len(value) if isinstance(value, list) else instead

    return change
