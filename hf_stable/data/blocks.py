"""Training blocks of equal length, cut from a token file."""

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_stable.data.shards import REMEDY
from hf_stable.data.token_file import TokenFile
from hf_stable.errors import DataError

IGNORED_LABEL = -100


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Block i is tokens[i*S : i*S + S + 1]: S inputs and the S tokens that follow them as labels.

    Every token except the first is a label exactly once. The last tokens, which do not fill a
    block, are unused (`num_unused_tokens`). If documents end with a separate end token, the label
    after it, the first token of the next document, is -100: the text does not determine it.

    Args:
        sequence_length: Number of inputs S in a block.
        separate_documents: Add position_ids that restart at 0 at each document. The attention mask
            uses them to keep the documents of a block apart.

    Raises:
        DataError: If the file has fewer tokens than one block needs. On reading, if an id is
            outside the vocabulary or the document starts do not increase.
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
        """Return `input_ids`, `shift_labels` and optionally `position_ids`, (S,) int64 each."""
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
        """Return the document starts among the S tokens from `first`, relative to `first`."""
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
