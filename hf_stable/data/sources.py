"""Sources of text, and a reader of their documents.

Nothing is skipped silently: the `ReadReport` counts every document that is left out, by file and
number.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hf_stable.data.formats import (
    MAX_DOCUMENT_BYTES,
    READABLE,
    Row,
    SampleBy,
    file_format,
    read_rows,
)
from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport, Tally
from hf_stable.data.streams import DatasetRows
from hf_stable.data.tables import read_table
from hf_stable.errors import DataError

Part = Literal["all", "train", "validation"]
HoldoutBy = Literal["document", "tail"]


@dataclass(frozen=True)
class Source:
    """A source of text.

    Attributes:
        path: File, folder or glob (`READABLE` lists the extensions), relative to the current
            directory, or a pipe. Anything else is a dataset name for `datasets.load_dataset`. A
            folder that is a dataset is read as `datasets` reads it.
        column: Column or JSON key that holds the text. "a.b" is the field b inside a, unless there
            is a column of that name.
        sample_by: Unit of one document, in text files only.
        name: Configuration of a `datasets` name or folder.
        split: Split of a `datasets` name or folder; None means "train".
        streaming: Read a `datasets` name without downloading it first.
        part: Part of the holdout split to read.
        holdout: Fraction of the documents, chosen by a hash of their text, that are "validation".
            The choice depends only on the document, so the two parts never share a text.
        holdout_by: "tail" holds out the end of each document instead. It is used if there are too
            few documents to hold out whole ones (`data.holdout`).
        max_bad_share: Share of a file's non-empty documents that may be unusable and left out. A
            file with more raises an error.

    Raises:
        DataError: If a field has an invalid value.
    """

    path: str
    column: str = "text"
    sample_by: SampleBy = "document"
    name: str | None = None
    split: str | None = None
    streaming: bool = True
    part: Part = "all"
    holdout: float = 0.0
    holdout_by: HoldoutBy = "document"
    max_bad_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("source path is empty: give a file, folder, glob or `datasets` name")
        for key, value, allowed in (
            ("sample_by", self.sample_by, get_args(SampleBy)),
            ("part", self.part, get_args(Part)),
            ("holdout_by", self.holdout_by, get_args(HoldoutBy)),
        ):
            if value not in allowed:
                raise DataError(f"source {self.path}: {key} is {value!r}, must be one of {allowed}")
        if not 0 <= self.holdout < 1:
            raise DataError(
                f"source {self.path}: holdout is {self.holdout}, must be at least 0 and less than 1"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise DataError(
                f"source {self.path}: max_bad_share is {self.max_bad_share}, must be from 0 to 1"
            )
        if self.part == "all" and self.holdout:
            raise DataError(
                f"source {self.path}: holdout {self.holdout} has no effect while part is 'all': "
                "set part to 'train' or 'validation', or remove holdout"
            )
        if self.part == "validation" and self.holdout == 0:
            raise DataError(
                f"source {self.path}: part is 'validation' but holdout is 0: set holdout to the "
                "fraction to hold out, for example 0.02"
            )


def is_dataset(source: Source) -> bool:
    """Return True if an expanded source is a `datasets` name rather than a file."""
    return not Path(source.path).exists()


def read_documents(
    source: Source, report: ReadReport, skip: int = 0, rows: DatasetRows | None = None
) -> Iterator[str]:
    """Yield the documents of one expanded source in order, and update the counts in `report`.

    A source without any text counts as one empty document.

    Args:
        source: Expanded source.
        report: Receives the counts.
        skip: Number of documents to skip when reading resumes. They are counted nevertheless, so a
            resumed reading gives the same report as an uninterrupted one.
        rows: Rows of a `datasets` name, if the caller reads or sets their position.

    Raises:
        DataError: If the source is unusable as a whole (missing, binary, truncated, not UTF-8,
            without the column), if too many documents are unusable, or if there are fewer than
            `skip` documents.
    """
    tally = rows.tally if rows else Tally()
    handed_on = 0
    for row in rows or _rows(source):
        tally.rows += 1
        data = _usable(row, source.path, report, tally)
        if data is None:
            continue
        tally.good += 1
        text = part_of_document(source, row.text, data)
        size = len(data) if text == row.text else len(text.encode("utf-8"))
        report.other_part_bytes += len(data) - size
        if not text.strip():
            report.other_part_documents += 1
            continue
        report.documents += 1
        report.text_bytes += size
        handed_on += 1
        if handed_on > skip:
            yield text
    if not tally.rows:
        report.add_empty(source.path, "nothing in it")
    _refuse_mostly_bad(source, report, tally)
    if handed_on < skip:
        raise DataError(
            f"{source.path} gave {handed_on} documents, but {skip} were read before: it "
            "changed while it was read; run again in another cache folder"
        )


def _usable(row: Row, file: str, report: ReadReport, tally: Tally) -> bytes | None:
    """Return the row's text as UTF-8, or None after counting the reason."""
    problem, data = row.problem, b""
    if not problem and not row.text.strip():
        report.add_empty(file, f"{row.unit} {row.number}")
        return None
    try:
        data = row.text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"lone surrogate at character {error.start + 1}"
    if len(data) > MAX_DOCUMENT_BYTES:
        problem = f"{len(data)} bytes, more than {MAX_DOCUMENT_BYTES}: split it"
    if problem:
        tally.bad += 1
        report.add_bad(file, f"{row.unit} {row.number}: {problem}")
        return None
    return data


def _refuse_mostly_bad(source: Source, report: ReadReport, tally: Tally) -> None:
    total = tally.good + tally.bad
    if not tally.bad or (tally.good and tally.bad <= source.max_bad_share * total):
        return
    path, examples = Path(source.path), "; ".join(report.bad[source.path])
    if file_format(path) == "json":
        examples += ' (use one JSON object per line, as "jq -c ." writes, or one array of objects)'
    if not tally.good:
        raise DataError(f"{path} holds no usable document: {examples}")
    raise DataError(
        f"{path}: {tally.bad} of {total} documents cannot be used, more than "
        f"max_bad_share {source.max_bad_share} allows: {examples}; repair the file, set the "
        "source's column, or raise max_bad_share to leave them out"
    )


def part_of_document(source: Source, text: str, data: bytes) -> str:
    """Return the text of a document that is in the source's part; `data` is the text as UTF-8."""
    if source.part == "all":
        return text
    if source.holdout_by == "tail":
        at = _tail_start(text, source.holdout)
        return text[at:] if source.part == "validation" else text[:at]
    value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return text if (value < source.holdout * 2.0**64) == (source.part == "validation") else ""


def _tail_start(text: str, holdout: float) -> int:
    """Return the start of the last `holdout` of a text, at the next line or word if near."""
    at = round(len(text) * (1 - holdout))
    near = (at + len(text)) // 2
    for mark in ("\n", " "):
        if (found := text.find(mark, at, near)) >= 0:
            return found + 1
    return at


def _rows(source: Source) -> Iterator[Row]:
    path = Path(source.path)
    if is_dataset(source):
        return iter(DatasetRows(source))
    kind = file_format(path)
    if kind == "table":
        return read_table(path, source.column)
    if kind or is_pipe(path):
        return read_rows(path, source.column, source.sample_by)
    raise DataError(f"{path}: cannot read this kind of file; readable are {READABLE}")
