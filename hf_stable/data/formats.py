"""Readers of one file each: bytes become numbered rows, a row that is no text becomes a reason.

A file that as a whole cannot be used raises `DataError`; nothing is ever dropped without a word.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from hf_stable.errors import DataError

SampleBy = Literal["document", "line", "paragraph"]

TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_SUFFIXES = (".jsonl", ".json")
READABLE = "*.txt *.md *.text *.jsonl *.json (each also .gz) and *.parquet"
# Measured: a fast tokenizer takes 140 bytes of memory for each byte of a document; this is 4.7 GB.
MAX_DOCUMENT_BYTES = 32 * 2**20
_HEAD_BYTES = 8192
_PARQUET_ROWS = 256


class Row(NamedTuple):
    """A line, paragraph, record or file: its number from 1, and its text or why it is unusable."""

    number: int
    text: str
    problem: str | None = None


def file_format(path: Path) -> Literal["text", "json", "parquet"] | None:
    """The format by the file's name, None when it is not one that we read."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    name = name.removesuffix(".gz")
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    return "json" if name.endswith(JSON_SUFFIXES) else None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain or gzip file that looks like text; damage met while reading is a `DataError`."""
    try:
        with (
            gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file
        ):
            head = file.read(_HEAD_BYTES)
            if not head:
                raise DataError(f"{path} is empty (0 bytes): remove it from the data or replace it")
            if b"\0" in head:
                raise DataError(
                    f"{path} is binary: NUL byte at offset {head.index(0)}; save it as UTF-8 text"
                )
            file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is truncated or no gzip file ({error}): make or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes) -> str:
    """Decode UTF-8; ValueError with a short reason when it is not, or when it holds a NUL byte."""
    if b"\0" in data:
        raise ValueError(f"NUL byte at byte {data.index(0) + 1}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = data[error.start]
        raise ValueError(f"not UTF-8: 0x{found:02x} at byte {error.start + 1}") from error


def _whole_file(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, the most that one document may be: "
            "set sample_by to 'paragraph' or 'line', or split it"
        )
    try:
        text = _decode(data)
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read as one document: {error}; convert it to UTF-8, or set "
            "sample_by to 'line' to leave out and count the bad lines only"
        ) from error
    yield Row(1, text)


def _lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Row(number, _decode(line.rstrip(b"\r\n")))
            except ValueError as error:
                yield Row(number, "", str(error))


def _paragraphs(path: Path) -> Iterator[Row]:
    """Runs of lines between blank lines; a bad line makes its paragraph bad, under its number."""
    start, lines, problem = 0, [], None
    for line in _lines(path):
        if line.text.strip() or line.problem:
            start = start if lines else line.number
            lines.append(line.text)
            problem = problem or (line if line.problem else None)
        elif lines:
            yield problem or Row(start, "\n".join(lines))
            lines, problem = [], None
    if lines:
        yield problem or Row(start, "\n".join(lines))


def read_text(path: Path, sample_by: SampleBy) -> Iterator[Row]:
    """Rows of a text file; numbers are line numbers (1 for a whole file)."""
    reader = {"document": _whole_file, "line": _lines, "paragraph": _paragraphs}[sample_by]
    return reader(path)


def check_value(number: int, value: Any) -> Row:
    """The row for one value of a column: text, or the reason why it is none."""
    if isinstance(value, str):
        return Row(number, value)
    reason = "null" if value is None else f"{type(value).__name__} where text is expected"
    return Row(number, "", reason)


def check_record(number: int, record: Any, column: str) -> Row:
    """The row for one mapping of columns to values."""
    if not isinstance(record, dict):
        return Row(
            number, "", f"{type(record).__name__} where an object with {column!r} is expected"
        )
    if column not in record:
        return Row(number, "", f"no column {column!r}; it has {sorted(map(str, record))}")
    return check_value(number, record[column])


def read_json_lines(path: Path, column: str) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; blank lines are empty rows."""
    for line in _lines(path):
        if line.problem or not line.text.strip():
            yield line
            continue
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            yield Row(line.number, "", f"not one JSON object a line: {error}")
            continue
        yield check_record(line.number, record, column)


def read_parquet(path: Path, column: str) -> Iterator[Row]:
    """Rows of one column of a parquet file, a few hundred held at a time."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    yield _parquet_row(number, value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a whole parquet file (failed after row {number}: {error}): "
            "make or download it again"
        ) from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path} has no column {column!r}; it has {schema.names}: set the source's `column`"
        )
    kind = schema.field(column).type
    if str(kind) not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{path}: column {column!r} holds {kind}, not text: set the source's `column`"
        )


def _parquet_row(number: int, value: Any) -> Row:
    try:
        return check_value(number, value.as_py())
    except UnicodeDecodeError as error:
        return Row(number, "", f"not UTF-8: {error.reason} at byte {error.start + 1}")
