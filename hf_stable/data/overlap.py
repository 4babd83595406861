"""Detect text that is read more than once, by the fingerprints of the files (`identity`)."""

from collections.abc import Sequence
from typing import Any

_NAMED = 3

Identity = dict[str, Any]


def repeated_lines(identities: Sequence[Identity], field: str) -> list[str]:
    """Return a line for each text that a recipe's field lists more than once, under any name."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for identity in identities:
        if identity.get("bytes") != 0:
            key = (*_text(identity), *_interval(identity))
            found.setdefault(key, []).append(identity["path"])
    lines = []
    for paths in found.values():
        names = list(dict.fromkeys(paths))
        if len(names) > 1:
            lines.append(f"data: {_named(names)} in {field} are the same text")
        elif len(paths) > 1:
            lines.append(f"data: {names[0]} is listed {len(paths)} times in {field}")
    return lines


def shared_text(
    train: Sequence[Identity], validation: Sequence[Identity]
) -> tuple[float, list[str]]:
    """Return the share of the validation text that is also training text, and its paths.

    Files are weighted by their bytes, or equally if one source is a `datasets` name. Parts of one
    file are compared by the shares of its documents.
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
    """Return a warning that validation text is also training text."""
    return (
        f"data: {share:.0%} of the validation text is also training text ({_named(paths)}), so "
        f"perplexity on it does not measure new text: {remedy}"
    )


def _text(identity: Identity) -> tuple[Any, ...]:
    """Return a key of the whole text of a source, however it is split into documents."""
    content = identity["content"]
    if "blake2b" not in content:
        return tuple(content[key] for key in ("dataset", "name", "version", "split", "column"))
    return content["blake2b"], None if content["format"] == "text" else content["detail"]


def _interval(identity: Identity) -> tuple[float, float]:
    """Return the range of document hashes, between 0 and 1, that a source gives."""
    part, holdout = identity["content"]["part"], identity["content"]["holdout"]
    if part == "all":
        return 0.0, 1.0
    return (0.0, holdout) if part == "validation" else (holdout, 1.0)


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (", …" if len(paths) > _NAMED else "")
