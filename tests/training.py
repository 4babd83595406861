"""A recipe that trains in a second or two on text that every Python has."""

import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

from hf_stable.recipes import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def write_text(folder: Path) -> Path:
    """The shorter ones of Python's help texts (technical English), a document for each topic."""
    place = folder / "topics"
    if place.exists():  # another process may be reading it
        return place
    place.mkdir()
    for name, text in topics.topics.items():
        if len(text) < 8000:
            (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return place


def tiny_recipe(folder: Path, **overrides: Any) -> Recipe:
    """recipes/base/tiny.yaml on the help texts, everything inside `folder`.

    Args:
        overrides: dotted keys with "__" for the dot.
    """
    text = write_text(folder)
    settings = {
        "data.train": f"[{text}]",
        "data.cache": folder / "cache",
        "output": folder / "run",
        "training.threads": 1,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return load_recipe(
        RECIPES / "base" / "tiny.yaml", [f"{key}={value}" for key, value in settings.items()]
    )


def unfinish(run: Path) -> None:
    """Leave a finished run as a kill just before its end leaves it."""
    file = run / "metrics.jsonl"
    *lines, last = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert json.loads(last)["event"] == "finished"
    file.write_text("".join(lines), encoding="utf-8")
