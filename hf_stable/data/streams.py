"""Rows of `datasets` names, from any row on: a stream is told its place, not read again."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hf_stable.data.formats import Row, check_record
from hf_stable.data.report import Tally
from hf_stable.errors import DataError

if TYPE_CHECKING:
    from hf_stable.data.sources import Source

DEFAULT_SPLIT = "train"


class DatasetRows:
    """The rows of a `datasets` name in their order, numbered from 1.

    A table is entered at a row by its number; a stream by the state that `datasets` gives, with
    which files that were read are not opened again and the current one is read from its begin, or
    by reading all rows again where the stream is made by code without files.

    Attributes:
        tally: counts of the rows so far, those of an earlier reading included.

    Args:
        place: what `place()` returned in an earlier reading of the same data, to go on from there.
    """

    def __init__(self, source: "Source", place: dict[str, Any] | None = None) -> None:
        self._source = source
        self._begin = self._number = place["row"] if place else 0
        self._stream_state = place["stream"] if place else None
        # A place that an earlier version recorded has no counts.
        known = {"rows": self._begin, "good": self._begin}
        self.tally = Tally(**(place or {}).get("tally", known))
        self._rows: Any = None

    def place(self) -> dict[str, Any]:
        """JSON-able: where the reading stands, right behind the last row."""
        stream = self._rows.state_dict() if self._source.streaming else None
        return {"row": self._number, "stream": stream, "tally": asdict(self.tally)}

    def __iter__(self) -> Iterator[Row]:
        """
        Raises:
            DataError: the dataset cannot be loaded or read, or lacks the source's column.
        """
        # Half a second that readers of files need not wait.
        from datasets.exceptions import DatasetsError  # noqa: PLC0415

        source = self._source
        try:
            self._rows = self._load()
            for record in self._rows:
                self._number += 1
                yield check_record(self._number, record, source.column)._replace(unit="row")
        except DataError:
            raise
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{source.path} is no file or folder here, and as a dataset it failed "
                f"(name={source.name}, split={source.split or DEFAULT_SPLIT}, "
                f"after row {self._number}): {error}"
            ) from error

    def _load(self) -> Any:
        """The dataset's rows behind the place to go on from."""
        import datasets  # noqa: PLC0415 (as above)

        source = self._source
        rows: Any = datasets.load_dataset(
            source.path,
            source.name,
            split=source.split or DEFAULT_SPLIT,
            streaming=source.streaming,
        )
        columns = rows.column_names
        if columns is not None and not {source.column, source.column.split(".")[0]} & {*columns}:
            raise DataError(
                f"dataset {source.path} has no column {source.column!r}; it has {columns}: "
                "set the source's `column`"
            )
        if self._stream_state is not None:
            rows.load_state_dict(self._stream_state)
            return rows
        return rows.skip(self._begin) if self._begin else rows
