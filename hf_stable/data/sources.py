"""Sources of text, and their documents one by one.

Nothing is skipped in silence: what is not handed on is counted in the `ReadReport`, by file and
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
    """One place that text comes from.

    Attributes:
        path: a file, folder or glob (`READABLE` has the endings), relative to the current
            directory, or a pipe; anything else is the name of a dataset for
            `datasets.load_dataset`. A folder that is a dataset is read as `datasets` reads it.
        column: column or JSON key that holds the text; "a.b" is the field b inside a, unless there
            is a column of that name.
        sample_by: what one document is, in text files only.
        name: configuration of a `datasets` name or folder.
        split: split of a `datasets` name or folder; None is "train".
        streaming: read a `datasets` name without downloading it first.
        part: which side of the holdout split to hand on.
        holdout: fraction of the documents, chosen by a hash of their text, that are "validation".
            The choice depends on the document alone, so both parts never share a text.
        holdout_by: "tail" holds out the end of each document instead, for texts of so few documents
            that whole ones leave a part empty (`data.holdout`).
        max_bad_share: share of a file's documents, the empty ones aside, that may be unusable and
            left out; a file with more is refused.

    Raises:
        DataError: a field has a value that cannot work.
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
    """Whether an expanded source is a `datasets` name rather than a file."""
    return not Path(source.path).exists()


def read_documents(
    source: Source, report: ReadReport, skip: int = 0, rows: DatasetRows | None = None
) -> Iterator[str]:
    """Read the documents of one expanded source, in order, and count all that happens in `report`.

    Args:
        skip: leave out the first documents that would be handed on, for a second, resumed reading.
            They are counted all the same, so that the report of a resumed reading equals that of
            one in a go.
        rows: of a `datasets` name, where the caller wants to know or choose their place.

    Raises:
        DataError: the source is unusable as a whole (missing, binary, truncated, not UTF-8,
            without the column), too many of its documents are, or it has fewer than `skip`. A
            source without any text counts as an empty document.
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
            f"{source.path} gave {handed_on} documents, but {skip} had been read before: it "
            "changed while it was read; run again in another cache folder"
        )


def _usable(row: Row, file: str, report: ReadReport, tally: Tally) -> bytes | None:
    """The row's text as UTF-8, or None after counting why there is none."""
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
        examples += ' (JSON is one object a line, which "jq -c ." writes, or one array of objects)'
    if not tally.good:
        raise DataError(f"{path} holds no usable document: {examples}")
    raise DataError(
        f"{path}: {tally.bad} of {total} documents cannot be used, a larger share than "
        f"max_bad_share, {source.max_bad_share}: {examples}; repair the file, set the source's "
        "column, or raise max_bad_share to leave them out"
    )


def part_of_document(source: Source, text: str, data: bytes) -> str:
    """Return what of a document belongs to the source's part; `data` is its text as UTF-8."""
    if source.part == "all":
        return text
    if source.holdout_by == "tail":
        at = _tail_start(text, source.holdout)
        return text[at:] if source.part == "validation" else text[:at]
    value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return text if (value < source.holdout * 2.0**64) == (source.part == "validation") else ""


def _tail_start(text: str, holdout: float) -> int:
    """Return where the last `holdout` of a text begins, at the next line or word if one is near."""
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
    raise DataError(f"{path}: do not know how to read this; readable are {READABLE}")
