"""Fingerprints of the content of sources, independent of their paths."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from hf_stable.data.formats import file_format
from hf_stable.data.opening import begins_with_bracket, compression_of, is_pipe
from hf_stable.data.sources import Source
from hf_stable.data.streams import DEFAULT_SPLIT
from hf_stable.errors import DataError
from hf_stable.records import write_json


def identify(sources: Sequence[Source], memory: Path) -> list[dict[str, Any]]:
    """Return one mapping per expanded source, with its "path" and its "content".

    "content" holds everything that determines the documents of the source. Hashes of files are
    cached in `memory` (JSON) and reused while size and modification time are unchanged.

    Raises:
        DataError: If a file cannot be read or a dataset cannot be found.
    """
    with FileLock(f"{memory}.lock"):
        known = _load(memory)
        found = [_identify_one(source, known) for source in sources]
        if known != _load(memory):
            write_json(memory, known)
    return found


def _load(memory: Path) -> dict[str, Any]:
    """Return the cached hashes; a damaged cache costs only the time to compute them again."""
    try:
        return json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _identify_one(source: Source, known: dict[str, Any]) -> dict[str, Any]:
    path = Path(source.path)
    choice: dict[str, Any] = {"part": source.part, "holdout": source.holdout}
    if source.holdout_by != "document":
        choice["holdout_by"] = source.holdout_by
    if is_pipe(path):
        raise DataError(
            f"{path} is a pipe, which can be read only once, but training reads its text several "
            "times: save the text to a file"
        )
    if not path.is_file():
        return {"path": source.path, "content": {**_identify_dataset(source), **choice}}
    try:
        status = path.stat()
        stamp = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        place = str(path.resolve())
        if place not in known or {**known[place], **stamp} != known[place]:
            known[place] = {**stamp, "blake2b": _hash(path)}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    kind = file_format(path)
    detail = source.sample_by if kind == "text" else source.column
    # The order of the keys is part of the fingerprints.
    content = {
        "format": path.suffix.lower().removeprefix(".") if kind == "table" else kind,
        "detail": detail,
        "blake2b": known[place]["blake2b"],
        **choice,
        **_packing(path),
    }
    return {"path": source.path, **stamp, "content": content}


def _packing(path: Path) -> dict[str, Any]:
    """Return keys for compression and arrays.

    No key is added for files that earlier versions read in the same way.
    """
    compression = compression_of(path)
    packing: dict[str, Any] = {"gzip": compression == ".gz"}
    if compression not in ("", ".gz"):
        packing["compression"] = compression
    # Earlier versions read each line of an array as a record.
    if file_format(path) == "json" and begins_with_bracket(path):
        packing["array"] = True
    return packing


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _identify_dataset(source: Source) -> dict[str, Any]:
    # Imported here: it takes half a second, which readers of files need not wait.
    import datasets  # noqa: PLC0415
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    try:
        builder = datasets.load_dataset_builder(source.path, source.name)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source.path} is neither a file nor a folder here, nor a dataset that can be loaded "
            f"(name={source.name}): {error}"
        ) from error
    return {
        "dataset": source.path,
        "name": builder.config.name,
        "version": str(builder.config.version),
        # The commit of the repository on the Hub.
        "hash": str(builder.hash),
        "split": source.split or DEFAULT_SPLIT,
        "column": source.column,
    }


def estimated_bytes(source: Source) -> int | None:
    """Return the approximate bytes of text in a source, for a progress bar; None if unknown."""
    path = Path(source.path)
    if not path.is_file() or compression_of(path):
        return None
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        # Reading the file later raises an error with the remedy.
        return None
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == source.column)
