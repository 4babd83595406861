"""Text that is read more than once, found by the identities of the files (`identity`)."""

from collections.abc import Sequence
from typing import Any

_NAMED = 3

Identity = dict[str, Any]


def repeated_lines(identities: Sequence[Identity], field: str) -> list[str]:
    """Return a line for each file that a recipe's field lists more than once, under any name."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for identity in identities:
        if identity.get("bytes") != 0:
            key = (*_text(identity), *_interval(identity))
            found.setdefault(key, []).append(identity["path"])
    lines = []
    for paths in found.values():
        names = list(dict.fromkeys(paths))
        if len(names) > 1:
            lines.append(f"data: {_named(names)} are the same text, all of them in {field}")
        elif len(paths) > 1:
            lines.append(f"data: {names[0]} is listed {len(paths)} times in {field}")
    return lines


def shared_text(
    train: Sequence[Identity], validation: Sequence[Identity]
) -> tuple[float, list[str]]:
    """Return the share of the validation text that is training text too, and the paths.

    Weights are bytes of the files, or equal where one is the name of a dataset. Parts of one file
    are compared by the shares of its documents that they hold.
    """
    known: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for identity in train:
        known.setdefault(_text(identity), []).append(_interval(identity))
    have_bytes = all("bytes" in identity for identity in validation)
    shared, total, paths = 0.0, 0.0, []
    for identity in validation:
        low, high = _interval(identity)
        weight = identity["bytes"] if have_bytes else 1
        common = [min(high, end) - max(low, begin) for begin, end in known.get(_text(identity), [])]
        total += weight * (high - low)
        if weight and max(common, default=0.0) > 0:
            shared += weight * max(common)
            paths.append(identity["path"])
    return (shared / total if total else 0.0), list(dict.fromkeys(paths))


def shared_line(share: float, paths: Sequence[str], remedy: str) -> str:
    """Return a line that says what validation text is training text too."""
    return (
        f"data: {share:.0%} of the validation text is training text too ({_named(paths)}), so "
        f"perplexity on it is not that of new text: {remedy}"
    )


def _text(identity: Identity) -> tuple[Any, ...]:
    """Name the whole text of a source; of a text file, however it is cut into documents."""
    content = identity["content"]
    if "blake2b" not in content:
        return tuple(content[key] for key in ("dataset", "name", "version", "split", "column"))
    return content["blake2b"], None if content["format"] == "text" else content["detail"]


def _interval(identity: Identity) -> tuple[float, float]:
    """Return which of a source's documents it gives, by their hashes between 0 and 1."""
    part, holdout = identity["content"]["part"], identity["content"]["holdout"]
    if part == "all":
        return 0.0, 1.0
    return (0.0, holdout) if part == "validation" else (holdout, 1.0)


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (", …" if len(paths) > _NAMED else "")
