"""One sequence of tokens in many files, of which only a few are open at a time."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from hf_stable.errors import DataError

TOKEN = np.dtype("<u4")
# Tokens of every shard except the last: 1 GiB.
SHARD_TOKENS = 2**28
REMEDY = "delete this folder and run again, which rebuilds it"
# Far below the usual limit of 1024 open files. Each memory map holds one file open.
_OPEN_SHARDS = 128


class Shard(NamedTuple):
    """A file of tokens.

    `stamp` (inode, modification time) distinguishes it from a later file at the same path.
    """

    path: Path
    length: int
    stamp: tuple[int, int]


def shard_name(index: int) -> str:
    """Return the file name of shard `index` in the folder of a token file."""
    return f"tokens-{index:05d}.bin"


def find_shard(path: Path, length: int) -> Shard:
    """Return the shard at `path` after checking its size; the file is not opened.

    Raises:
        DataError: If the file is missing or does not have the size of `length` tokens.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if status.st_size != length * TOKEN.itemsize:
        raise DataError(
            f"{path} has {status.st_size} bytes, expected {length} tokens of {TOKEN.itemsize}: "
            f"{REMEDY}"
        )
    return Shard(path, length, (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=_OPEN_SHARDS)
def _mapped(shard: Shard) -> np.ndarray:
    try:
        return np.memmap(shard.path, dtype=TOKEN, mode="r", shape=(shard.length,))
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path} cannot be read ({error}): {REMEDY}") from error


class TokenShards:
    """All tokens of a token file, (num_tokens,) uint32; a slice within one shard copies nothing."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._ends = np.cumsum([shard.length for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, key: slice) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: int) -> np.uint32: ...
    def __getitem__(self, key: slice | int) -> np.ndarray | np.uint32:
        if not isinstance(key, slice):
            return self[range(len(self))[key] :][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"tokens are read in steps of 1, got {step}")
        if stop <= start:
            return np.empty(0, TOKEN)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        parts = [self._part(index, start, stop) for index in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, index: int, start: int, stop: int) -> np.ndarray:
        shard = self.shards[index]
        begin = int(self._ends[index]) - shard.length
        return _mapped(shard)[max(start - begin, 0) : max(stop - begin, 0)]


class ShardWriter:
    """Append tokens to the shards in `place` from token `start`; later tokens are removed.

    Raises:
        DataError: If the shards before `start` are incomplete.
    """

    def __init__(self, place: Path, start: int, shard_tokens: int) -> None:
        self._place = place
        self._size = shard_tokens
        self._written = start
        whole, rest = divmod(start, shard_tokens)
        for index in range(whole):
            find_shard(place / shard_name(index), shard_tokens)
        for path in place.glob("tokens-*.bin"):
            if int(path.stem.removeprefix("tokens-")) >= whole + bool(rest):
                path.unlink()
        self._file = open_at(place / shard_name(whole), rest * TOKEN.itemsize) if rest else None

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Names and numbers of tokens of all shards so far."""
        starts = range(0, self._written, self._size)
        return [
            (shard_name(index), min(self._size, self._written - start))
            for index, start in enumerate(starts)
        ]

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, (n,) uint32; a full shard is flushed to disk."""
        while len(tokens):
            whole, rest = divmod(self._written, self._size)
            if self._file is None:
                self._file = open_at(self._place / shard_name(whole), 0)
            part, tokens = tokens[: self._size - rest], tokens[self._size - rest :]
            part.tofile(self._file)
            self._written += len(part)
            if self._written % self._size == 0:
                self.sync()
                self.close()

    def sync(self) -> None:
        """Flush all tokens so far to disk."""
        if self._file is not None:
            sync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def sync(file: Any) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def open_at(path: Path, size: int) -> Any:
    """Open for appending at `size` bytes; anything an interrupted build wrote after is removed.

    Raises:
        DataError: If the file is shorter.
    """
    file = path.open("r+b" if path.exists() else "w+b")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise DataError(
            f"{path} is shorter than recorded ({size} bytes): delete {path.parent} and run again"
        )
    file.truncate(size)
    file.seek(size)
    return file
