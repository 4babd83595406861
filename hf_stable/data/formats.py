"""Read the rows of one text or JSON file: each is a text, or the reason why it is unusable.

A file that is unusable as a whole raises `DataError`. Nothing is dropped silently.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from hf_stable.data.opening import compression_of, open_text
from hf_stable.errors import DataError

SampleBy = Literal["document", "line", "paragraph"]
Format = Literal["text", "json", "table"]

TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow")
READABLE = (
    "*.txt *.md *.text *.jsonl *.ndjson *.json (each also .gz .bz2 .xz .zst .zstd), *.parquet and "
    "*.arrow"
)
# Measured: a fast tokenizer takes 140 bytes of memory per byte of a document, so 4.7 GB here.
MAX_DOCUMENT_BYTES = 32 * 2**20
# A JSON array is parsed as a whole, which takes about ten times its size in memory.
_MAX_ARRAY_BYTES = 2**30


class Row(NamedTuple):
    """A line, paragraph, record or file.

    It has a number, counted from 1, and either its text or the reason why it is unusable.
    """

    number: int
    text: str
    problem: str | None = None
    unit: str = "line"
    """Unit that `number` counts: line, row or record."""


def file_format(path: Path) -> Format | None:
    """Return the format from the file's name, or None if it is not supported."""
    name = path.name.lower()
    if name.endswith(TABLE_SUFFIXES):
        return "table"
    name = name.removesuffix(compression_of(path))
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    return "json" if name.endswith(JSON_SUFFIXES) else None


def read_rows(path: Path, column: str, sample_by: SampleBy) -> Iterator[Row]:
    """Read a text or JSON file.

    Rows are numbered by line, by position in a JSON array, or 1 for a whole file. A pipe has no
    file extension: it is read as JSON if it begins with a brace or bracket.
    """
    with open_text(path) as file:
        kind = file_format(path)
        if kind is None:
            kind = "json" if file.peek().lstrip()[:1] in (b"{", b"[") else "text"
        if kind == "json":
            yield from _json(path, file, column)
        elif sample_by == "document":
            yield _whole(path, file)
        else:
            yield from _lines(file) if sample_by == "line" else _paragraphs(file)


def _decode(data: bytes) -> str:
    """Decode UTF-8 and remove byte order marks, also inside files that were concatenated.

    Raises:
        ValueError: If the bytes are not UTF-8 or contain a NUL byte, with a short reason.
    """
    if b"\0" in data:
        raise ValueError(f"NUL byte at byte {data.index(0) + 1}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error
    return re.sub(r"^\ufeff", "", text, flags=re.MULTILINE) if "\ufeff" in text else text


def _whole(path: Path, file: BinaryIO) -> Row:
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, the limit for one document: "
            "set sample_by to 'paragraph' or 'line', or split the file"
        )
    try:
        return Row(1, _decode(data))
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read as one document: {error}; convert it to UTF-8, or set "
            "sample_by to 'line' to leave out only the bad lines"
        ) from error


def _lines(lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Row(number, _decode(line.rstrip(b"\r\n")))
        except ValueError as error:
            yield Row(number, "", str(error))


def _paragraphs(file: Iterable[bytes]) -> Iterator[Row]:
    """Yield runs of lines between blank lines; a bad line makes its whole paragraph bad."""
    start, lines, problem = 0, [], None
    for line in _lines(file):
        if line.text.strip() or line.problem:
            start = start if lines else line.number
            lines.append(line.text)
            problem = problem or (line if line.problem else None)
        elif lines:
            yield problem or Row(start, "\n".join(lines))
            lines, problem = [], None
    if lines:
        yield problem or Row(start, "\n".join(lines))


def _json(path: Path, file: io.BufferedReader, column: str) -> Iterator[Row]:
    """Yield the records of a JSON array, or of a file with one object per line."""
    lead: list[bytes] = []
    while not (lead and lead[-1].strip()) and (line := file.readline()):
        lead.append(line)
    if not lead or not lead[-1].lstrip().startswith(b"["):
        yield from _json_lines(chain(lead, file), column)
        return
    data = b"".join(lead) + file.read(_MAX_ARRAY_BYTES)
    if len(data) > _MAX_ARRAY_BYTES:
        raise DataError(
            f"{path} is one JSON array of more than {_MAX_ARRAY_BYTES} bytes, too large to parse "
            f"at once: write one object per line, for example with jq -c '.[]'"
        )
    try:
        records = json.loads(data)
    except (ValueError, RecursionError):
        yield from _json_lines(io.BytesIO(data), column)
        return
    for number, record in enumerate(records, start=1):
        yield check_record(number, record, column)._replace(unit="record")


def _json_lines(lines: Iterable[bytes], column: str) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line; blank lines are empty rows."""
    for line in _lines(lines):
        if line.problem or not line.text.strip():
            yield line
            continue
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            yield Row(line.number, "", f"not one JSON object per line: {error}")
            continue
        yield check_record(line.number, record, column)


def check_value(number: int, value: Any) -> Row:
    """Return the row for one value of a column: its text, or the reason why it is unusable."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return Row(number, "", not_utf8(error))
    if isinstance(value, str):
        return Row(number, value)
    reason = "null" if value is None else f"{type(value).__name__} where text is expected"
    return Row(number, "", reason)


def check_record(number: int, record: Any, column: str) -> Row:
    """Return the row for one record; a dot in `column` selects a nested field."""
    if not isinstance(record, dict):
        return Row(
            number, "", f"{type(record).__name__} where an object with {column!r} is expected"
        )
    found = record
    for name in [column] if column in record else column.split("."):
        if not isinstance(found, dict) or name not in found:
            return Row(number, "", f"no column {column!r}; it has {sorted(map(str, record))}")
        found = found[name]
    return check_value(number, found)


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return a short reason why the bytes are not text."""
    return f"not UTF-8: 0x{error.object[error.start]:02x} at byte {error.start + 1}"
