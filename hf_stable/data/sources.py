"""Where text comes from: files, folders, globs and `datasets` names, read as documents.

Nothing is skipped in silence: what is not handed on is counted in the `ReadReport`, by file and
number.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from hf_stable.data.formats import (
    MAX_DOCUMENT_BYTES,
    READABLE,
    Row,
    SampleBy,
    file_format,
    read_json_lines,
    read_parquet,
    read_text,
)
from hf_stable.data.report import ReadReport
from hf_stable.data.streams import DatasetRows
from hf_stable.errors import DataError

Part = Literal["all", "train", "validation"]

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One place that text comes from.

    Attributes:
        path: a file, folder or glob (.txt .md .text .jsonl .json, each also .gz; .parquet),
            relative to the current directory; anything else is the name of a dataset for
            `datasets.load_dataset`.
        column: column or JSON key that holds the text.
        sample_by: what one document is, in text files only.
        name: configuration of a `datasets` name.
        split: split of a `datasets` name.
        streaming: read a `datasets` name without downloading it first.
        part: which side of the holdout split to hand on.
        holdout: fraction of the documents, chosen by a hash of their text, that are "validation".
            The choice depends on the document alone, so both parts never share a text.

    Raises:
        DataError: a field has a value that cannot work.
    """

    path: str
    column: str = "text"
    sample_by: SampleBy = "document"
    name: str | None = None
    split: str = "train"
    streaming: bool = True
    part: Part = "all"
    holdout: float = 0.0

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("source path is empty: give a file, folder, glob or `datasets` name")
        for key, value, allowed in (
            ("sample_by", self.sample_by, get_args(SampleBy)),
            ("part", self.part, get_args(Part)),
        ):
            if value not in allowed:
                raise DataError(f"source {self.path}: {key} is {value!r}, must be one of {allowed}")
        if not 0 <= self.holdout < 1:
            raise DataError(
                f"source {self.path}: holdout is {self.holdout}, must be at least 0 and less than 1"
            )
        if self.part == "validation" and self.holdout == 0:
            raise DataError(
                f"source {self.path}: part is 'validation' but holdout is 0: set holdout to the "
                "fraction to hold out, for example 0.02"
            )


def expand(sources: Sequence[Source], report: ReadReport | None = None) -> list[Source]:
    """Replace folders and globs by one source a file, sorted by name; `datasets` names stay.

    Files that are found but are no text by their name go to `report.ignored_files`.

    Raises:
        DataError: a path matches nothing that can be read, or no source was given.
    """
    if not sources:
        raise DataError("no data sources given: name at least one file, folder or `datasets` name")
    report = ReadReport() if report is None else report
    return [found for source in sources for found in _expand_one(source, report)]


def _expand_one(source: Source, report: ReadReport) -> list[Source]:
    path = Path(source.path)
    if path.is_file():
        if file_format(path) is None:
            raise DataError(f"{path}: do not know how to read this file; readable are {READABLE}")
        return [source]
    if path.is_dir():
        candidates = [found for found in path.rglob("*") if found.is_file()]
    elif any(sign in source.path for sign in "*?["):
        anchor = Path(path.anchor)
        pattern = str(path.relative_to(anchor)) if path.anchor else source.path
        candidates = [found for found in anchor.glob(pattern) if found.is_file()]
    else:
        _check_dataset_name(source)
        return [source]
    readable = [found for found in candidates if file_format(found) is not None]
    report.ignored_files += sorted(str(found) for found in set(candidates) - set(readable))
    if not readable:
        raise DataError(
            f"{source.path} matches no readable file, {len(candidates)} others; "
            f"readable are {READABLE}"
        )
    return [replace(source, path=str(found)) for found in sorted(readable)]


def _check_dataset_name(source: Source) -> None:
    looks_like_file = file_format(Path(source.path)) is not None
    if looks_like_file or not _DATASET_NAME.fullmatch(source.path):
        raise DataError(
            f"{source.path} does not exist; relative paths start at the current directory, "
            f"{Path.cwd()}"
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
        DataError: the source is unusable as a whole (missing, empty, binary, truncated, not UTF-8,
            without the column), has no single good document, or has fewer than `skip`.
    """
    unit, found = ("row", rows) if rows else _rows(source)
    handed_on, good = 0, 0
    for row in found:
        data = _usable(row, f"{unit} {row.number}", source.path, report)
        if data is None:
            continue
        good += 1
        if not _in_part(source, data):
            report.other_part_documents += 1
            report.other_part_bytes += len(data)
            continue
        report.documents += 1
        report.text_bytes += len(data)
        handed_on += 1
        if handed_on > skip:
            yield row.text
    if not good and not (rows and rows.resumed):
        bad = "; ".join(report.bad.get(source.path, [])) or "only white space"
        raise DataError(f"{source.path} holds no usable document: {bad}")
    if handed_on < skip:
        raise DataError(
            f"{source.path} gave {handed_on} documents, but {skip} had been read before: it "
            "changed while it was read; run again in another cache folder"
        )


def _usable(row: Row, place: str, file: str, report: ReadReport) -> bytes | None:
    """The row's text as UTF-8, or None after counting why there is none."""
    if row.problem:
        report.add_bad(file, f"{place}: {row.problem}")
        return None
    if not row.text.strip():
        report.add_empty(file, place)
        return None
    try:
        data = row.text.encode("utf-8")
    except UnicodeEncodeError as error:
        report.add_bad(file, f"{place}: lone surrogate at character {error.start + 1}")
        return None
    if len(data) > MAX_DOCUMENT_BYTES:
        report.add_bad(
            file, f"{place}: {len(data)} bytes, more than {MAX_DOCUMENT_BYTES}: split it"
        )
        return None
    return data


def _in_part(source: Source, data: bytes) -> bool:
    if source.part == "all":
        return True
    value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return (value < source.holdout * 2.0**64) == (source.part == "validation")


def _rows(source: Source) -> tuple[str, Iterator[Row]]:
    """The rows of a source and what their numbers count."""
    path = Path(source.path)
    if is_dataset(source):
        _check_dataset_name(source)
        return "row", iter(DatasetRows(source))
    kind = file_format(path)
    if kind == "text":
        return "line", read_text(path, source.sample_by)
    if kind == "json":
        return "line", read_json_lines(path, source.column)
    if kind == "parquet":
        return "row", read_parquet(path, source.column)
    raise DataError(f"{path}: do not know how to read this; readable are {READABLE}")
