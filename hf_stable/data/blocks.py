"""Packed tokens on disk, and blocks of equal length cut from them.

`tokens.bin` is one run of uint32 (little endian), document after document with the boundary ids of
`boundary_ids`; `documents.npy` has each document's start (int64); `meta.json` says what it was made
of.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_stable.errors import DataError

FORMAT = 1
TOKEN = np.dtype("<u4")
IGNORED_LABEL = -100
_SCANNED_AT_ONCE = 2**24


class TokenFile:
    """A finished token file, read through memory maps. Make one with `build_token_file`.

    Attributes:
        folder: where the three files are.
        tokens: (num_tokens,) uint32, memory-mapped.
        document_starts: (num_documents,) int64, memory-mapped, strictly increasing from 0.
        meta: content of meta.json: counts, boundary ids, fingerprint, tokenizer hash, sources, read
            report.
    """

    def __init__(
        self, folder: Path, tokens: np.ndarray, document_starts: np.ndarray, meta: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.tokens = tokens
        self.document_starts = document_starts
        self.meta = meta

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "TokenFile":
        """Open a folder; `verify` also reads every token once and compares it with the vocabulary.

        Raises:
            DataError: a file is missing or damaged, counts differ, or an id is outside the
                vocabulary.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        tokens = _map_tokens(folder / "tokens.bin", meta["tokens"])
        starts = _map_starts(folder / "documents.npy", meta["documents"], meta["tokens"])
        file = cls(folder, tokens, starts, meta)
        if verify:
            _check_ids(folder / "tokens.bin", tokens, file.vocab_size)
            _check_starts(folder / "documents.npy", starts)
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map is a copy of all tokens; workers of a loader open the file instead.
        return _reopen, (self.folder,)

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
            f"{path} cannot be read ({error.strerror}): no finished token file"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {_REMEDY}") from error
    needed = {"format", "fingerprint", "tokens", "documents", "vocab_size", "prefix", "suffix"}
    if not isinstance(meta, dict) or not needed <= set(meta):
        raise DataError(f"{path} lacks one of {sorted(needed)}: {_REMEDY}")
    if meta["format"] != FORMAT:
        raise DataError(
            f"{path} has format {meta['format']}, this version reads {FORMAT}: {_REMEDY}"
        )
    return meta


_REMEDY = "delete this folder and run again, it is made anew"


def _map_tokens(path: Path, expected: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size % TOKEN.itemsize or size != expected * TOKEN.itemsize:
            raise DataError(
                f"{path} has {size} bytes where {expected} tokens of {TOKEN.itemsize} belong: "
                f"{_REMEDY}"
            )
        return np.memmap(path, dtype=TOKEN, mode="r")
    except (OSError, ValueError) as error:
        raise error if isinstance(error, DataError) else _unreadable(path, error) from error


def _map_starts(path: Path, expected: int, num_tokens: int) -> np.ndarray:
    try:
        starts = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    if starts.dtype != np.int64 or starts.shape != (expected,) or not expected:
        raise DataError(
            f"{path} holds {starts.dtype} {starts.shape} where {expected} int64 belong: {_REMEDY}"
        )
    if starts[0] != 0 or starts[-1] >= num_tokens:
        raise DataError(f"{path} does not start at 0 or points behind the last token: {_REMEDY}")
    return starts


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error}): {_REMEDY}")


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(tokens), _SCANNED_AT_ONCE):
        part = tokens[start : start + _SCANNED_AT_ONCE]
        if part.max() >= vocab_size:
            offset = int(np.argmax(part >= vocab_size))
            raise DataError(
                f"{path}: token {start + offset} is id {part[offset]}, but the vocabulary has "
                f"{vocab_size} ids: {_REMEDY}"
            )


def _check_starts(path: Path, starts: np.ndarray) -> None:
    for start in range(0, len(starts), _SCANNED_AT_ONCE):
        if (np.diff(starts[start : start + _SCANNED_AT_ONCE + 1]) <= 0).any():
            raise DataError(f"{path}: document starts do not increase: {_REMEDY}")


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Block i is tokens[i*S : i*S + S + 1]: S inputs and the S tokens that follow them as labels.

    Every token but the first is a label exactly once, and the last tokens that fill no block
    (`num_unused_tokens`) are not used. A label that is the first token of a document whose
    predecessor ended with a token of its own is -100: what comes there is not in the text.

    Args:
        sequence_length: S.
        separate_documents: add position_ids that restart at 0 at each document, by which the
            attention mask keeps the documents of a block apart.

    Raises:
        DataError: fewer tokens than one block needs.
    """

    def __init__(
        self, token_file: TokenFile, sequence_length: int, *, separate_documents: bool = False
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}, must be at least 1")
        predicted = token_file.num_tokens - 1
        if predicted < sequence_length:
            raise DataError(
                f"{token_file.folder} has {token_file.num_tokens} tokens, too few for one block of "
                f"sequence_length {sequence_length}: use at most {max(predicted, 0)}, or more text"
            )
        self.token_file = token_file
        self.sequence_length = sequence_length
        self.separate_documents = separate_documents
        self.num_unused_tokens = predicted % sequence_length
        self._has_suffix = bool(token_file.meta["suffix"])

    def __len__(self) -> int:
        return (self.token_file.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `shift_labels` and perhaps `position_ids`, (S,) int64 each."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start, length = index * self.sequence_length, self.sequence_length
        tokens = torch.from_numpy(
            self.token_file.tokens[start : start + length + 1].astype(np.int64)
        )
        block = {"input_ids": tokens[:-1], "shift_labels": tokens[1:].clone()}
        if self._has_suffix:
            block["shift_labels"][self._starts_in(start + 1)] = IGNORED_LABEL
        if self.separate_documents:
            block["position_ids"] = self._positions(start)
        return block

    def _starts_in(self, first: int) -> torch.Tensor:
        """Document starts among the S tokens from `first`, relative to it."""
        starts = self.token_file.document_starts
        low, high = np.searchsorted(starts, [first, first + self.sequence_length])
        return torch.from_numpy(starts[low:high] - first)

    def _positions(self, start: int) -> torch.Tensor:
        here = torch.arange(self.sequence_length)
        begins = torch.zeros_like(here)
        inside = self._starts_in(start)
        begins[inside] = inside
        return here - begins.cummax(0).values
