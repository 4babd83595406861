"""Packed tokens on disk.

The shards are one sequence of uint32 (little endian): document after document, each with the ids of
`boundary_ids`. A document may cross shards. `documents.npy` has the start of each document (int64).
`meta.json`, written last, lists the shards and records their sources.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable.data.shards import REMEDY, TokenShards, find_shard
from hf_stable.errors import DataError

FORMAT = 2
_SCANNED_AT_ONCE = 2**24


class TokenFile:
    """A finished token file, read through memory maps. Make one with `build_token_file`.

    Attributes:
        folder: Folder of the files.
        tokens: (num_tokens,) uint32; a shard is memory-mapped when it is read.
        document_starts: (num_documents,) int64, memory-mapped, strictly increasing from 0.
        meta: Content of meta.json: counts, shards, boundary ids, fingerprint, tokenizer hash,
            sources, read report.
    """

    def __init__(
        self, folder: Path, tokens: TokenShards, document_starts: np.ndarray, meta: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.tokens = tokens
        self.document_starts = document_starts
        self.meta = meta

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "TokenFile":
        """Open a folder; without `verify`, the time does not grow with the number of tokens.

        Args:
            folder: Folder of a finished token file.
            verify: Read and check every token and document start now. Otherwise ids are checked
                against the vocabulary when they are read.

        Raises:
            DataError: If a file is missing or damaged, counts differ, or an id is outside the
                vocabulary.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        shards = [find_shard(folder / name, length) for name, length in meta["shards"]]
        tokens = TokenShards(shards)
        if not len(tokens) == meta["tokens"] > 0:
            raise DataError(
                f"{folder / 'meta.json'}: shards hold {len(tokens)} tokens, "
                f"expected {meta['tokens']}: {REMEDY}"
            )
        starts = _map_starts(folder / "documents.npy", meta["documents"], meta["tokens"])
        file = cls(folder, tokens, starts, meta)
        if verify:
            for start in range(0, file.num_tokens, _SCANNED_AT_ONCE):
                file.read(start, start + _SCANNED_AT_ONCE)
            _check_starts(folder / "documents.npy", starts)
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map copies all tokens, so workers of a loader reopen the file instead.
        return _reopen, (self.folder,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop), uint32.

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        tokens = self.tokens[start:stop]
        if tokens.max() >= self.vocab_size:
            offset = int(np.argmax(tokens >= self.vocab_size))
            path, place = self._place_of(start + offset)
            raise DataError(
                f"{path}: token {place} is id {tokens[offset]}, but the vocabulary has "
                f"{self.vocab_size} ids: {REMEDY}"
            )
        return tokens

    def _place_of(self, token: int) -> tuple[Path, int]:
        """Return the shard that holds a token, and the token's place in it."""
        for shard in self.tokens.shards:
            if token < shard.length:
                return shard.path, token
            token -= shard.length
        raise AssertionError(f"{self.folder} ends before token {token}")

    def sample(self, num_tokens: int) -> np.ndarray:
        """Return the first `num_tokens` tokens, uint32."""
        return self.tokens[:num_tokens]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]


def _reopen(folder: Path) -> TokenFile:
    return TokenFile.open(folder, verify=False)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): {folder} is not a finished token file"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {REMEDY}") from error
    needed = {"format", "fingerprint", "tokens", "shards", "documents", "vocab_size"}
    needed |= {"prefix", "suffix"}
    if not isinstance(meta, dict) or "format" not in meta:
        raise DataError(f"{path} has no key 'format': {REMEDY}")
    if meta["format"] != FORMAT:
        raise DataError(
            f"{path} has format {meta['format']}, but this version reads {FORMAT}: {REMEDY}"
        )
    if not needed <= set(meta):
        raise DataError(f"{path} lacks one of {sorted(needed)}: {REMEDY}")
    return meta


def _map_starts(path: Path, expected: int, num_tokens: int) -> np.ndarray:
    try:
        starts = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}): {REMEDY}") from error
    if starts.dtype != np.int64 or starts.shape != (expected,) or not expected:
        raise DataError(
            f"{path} holds {starts.dtype} {starts.shape}, expected {expected} int64: {REMEDY}"
        )
    if starts[0] != 0 or starts[-1] >= num_tokens:
        raise DataError(f"{path} does not start at 0 or points past the last token: {REMEDY}")
    return starts


def _check_starts(path: Path, starts: np.ndarray) -> None:
    for start in range(0, len(starts), _SCANNED_AT_ONCE):
        if (np.diff(starts[start : start + _SCANNED_AT_ONCE + 1]) <= 0).any():
            raise DataError(f"{path}: document starts do not increase: {REMEDY}")
