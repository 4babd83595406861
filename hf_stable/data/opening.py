"""Open files and pipes that hold text, plain or compressed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from hf_stable.errors import DataError

_HEAD_BYTES = 8192
_BOM = b"\xef\xbb\xbf"


class _Compression(NamedTuple):
    title: str
    open: Callable[[Path], Any]


def _zstandard(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


_COMPRESSIONS = {
    ".gz": _Compression("gzip", gzip.open),
    ".bz2": _Compression("bzip2", bz2.open),
    ".xz": _Compression("xz", lzma.open),
    ".zst": _Compression("zstd", _zstandard),
    ".zstd": _Compression("zstd", _zstandard),
}


def compression_of(path: Path) -> str:
    """Return the file extension of the compression, or "" for a plain file."""
    ending = path.suffix.lower()
    return ending if ending in _COMPRESSIONS else ""


def is_pipe(path: Path) -> bool:
    """Return True if a path can be read only once, such as /dev/stdin.

    Standard input counts as a pipe, even if it is redirected from a file. Files in /dev/shm do not.
    """
    if not path.exists() or path.is_dir():
        return False
    in_memory = path.is_relative_to("/dev/shm")
    return not path.is_file() or (path.is_relative_to("/dev") and not in_memory)


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """Open a text file, positioned after its byte order mark; an empty file counts as text.

    Raises:
        DataError: If the file is binary, or if damage is found while the file is read.
    """
    ending = compression_of(path)
    title, opener = _COMPRESSIONS[ending] if ending else ("", None)
    try:
        raw: Any = opener(path) if opener else path.open("rb", buffering=0)
        with io.BufferedReader(raw, _HEAD_BYTES) as file:
            head = file.peek(_HEAD_BYTES)
            if b"\0" in head:
                raise DataError(
                    f"{path} is binary: NUL byte at offset {head.index(0)}; save it as UTF-8 text"
                )
            if head.startswith(_BOM):
                file.read(len(_BOM))
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (error.errno is not None or not ending):
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        raise DataError(
            f"{path} is truncated or not a {title} file ({error}): create or download it again"
        ) from error


def begins_with_bracket(path: Path) -> bool:
    """Return True if the first character of a text file, after white space, is `[`."""
    with open_text(path) as file:
        return file.peek(_HEAD_BYTES).lstrip().startswith(b"[")
