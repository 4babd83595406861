"""Rows of one column of a parquet or Arrow file; a nested field is named with dots."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_stable.data.formats import Row, check_value, not_utf8
from hf_stable.errors import DataError

_BATCH_ROWS = 256
# Spark and Impala write text as bytes. Rows that are not UTF-8 are counted as bad.
_TEXT_TYPES = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
)


def read_table(path: Path, column: str) -> Iterator[Row]:
    """Read one column, with a few hundred rows in memory at a time.

    Raises:
        DataError: If the file is damaged or lacks this column of text.
    """
    number = 0
    batches = _parquet if path.name.lower().endswith(".parquet") else _arrow
    try:
        for values in batches(path, column):
            for value in values:
                number += 1
                yield _row(number, value)._replace(unit="row")
    except (pa.ArrowException, OSError) as error:
        kind = path.suffix.lower().removeprefix(".")
        raise DataError(
            f"{path} is not a complete {kind} file (failed after row {number}: {error}): "
            "create or download it again"
        ) from error


def _parquet(path: Path, column: str) -> Iterator[Any]:
    with pq.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, column)
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
            yield _values(batch, column)


def _arrow(path: Path, column: str) -> Iterator[Any]:
    """Read Arrow's stream format, which `datasets` writes, or its file format."""
    with pa.memory_map(str(path)) as file:
        try:
            batches: Any = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            file.seek(0)
            reader = pa.ipc.open_file(file)
            _check_column(path, reader.schema, column)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            _check_column(path, batches.schema, column)
        for batch in batches:
            yield _values(batch, column)


def _values(batch: Any, column: str) -> Any:
    if column in batch.schema.names:
        return batch.column(column)
    first, *inner = column.split(".")
    values = batch.column(first)
    for name in inner:
        # Unlike `field`, `flatten` gives null where the structure is null.
        values = values.flatten()[values.type.get_field_index(name)]
    return values


def _check_column(path: Path, schema: Any, column: str) -> None:
    kind = _type_of(path, schema, column)
    if kind is None:
        raise DataError(
            f"{path} has no column {column!r}; it has {schema.names}: set the source's `column`"
        )
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(is_text(text) for is_text in _TEXT_TYPES):
        return
    hint = ""
    if pa.types.is_struct(kind):
        hint = f", for example to {column}.{kind.field(0).name}" if kind.num_fields else ""
    raise DataError(
        f"{path}: column {column!r} holds {kind}, not text: set the source's `column`{hint}"
    )


def _type_of(path: Path, schema: Any, column: str) -> Any:
    """Return the type of a column or of a nested field, or None if there is none."""
    first, *inner = [column] if column in schema.names else column.split(".")
    if schema.names.count(first) > 1:
        raise DataError(
            f"{path} has {schema.names.count(first)} columns with the name {first!r}: write "
            "the file again with different names"
        )
    if first not in schema.names:
        return None
    kind = schema.field(first).type
    for name in inner:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _row(number: int, value: Any) -> Row:
    try:
        return check_value(number, value.as_py())
    except UnicodeDecodeError as error:
        return Row(number, "", not_utf8(error))
