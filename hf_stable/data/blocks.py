"""Blocks of equal length cut from a token file: what a model trains on."""

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_stable.data.shards import REMEDY
from hf_stable.data.token_file import TokenFile
from hf_stable.errors import DataError

IGNORED_LABEL = -100


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
        DataError: fewer tokens than one block needs; on reading, an id outside the vocabulary or
            document starts out of order.
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
        tokens = torch.from_numpy(self.token_file.read(start, start + length + 1).astype(np.int64))
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
        inside = starts[low:high] - first
        if (np.diff(inside, prepend=-1, append=self.sequence_length) <= 0).any():
            raise DataError(
                f"{self.token_file.folder / 'documents.npy'}: document starts do not increase: "
                f"{REMEDY}"
            )
        return torch.from_numpy(inside)

    def _positions(self, start: int) -> torch.Tensor:
        here = torch.arange(self.sequence_length)
        begins = torch.zeros_like(here)
        inside = self._starts_in(start)
        begins[inside] = inside
        return here - begins.cummax(0).values
