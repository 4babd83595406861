"""Data order: a pure function of (seed, absolute position, skipped ranges).

There is no state, no global random number and no stored permutation. Any step is found in constant
time, for any number of processes and workers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hf_stable.errors import DataError

_ROUNDS = 8


class Order(ABC):
    """An endless order of blocks, from which ranges can be skipped.

    A *position* counts the samples that training reads, from 0 without end. The *absolute* position
    also counts the samples of the skipped ranges before it. So skipping a range does not change the
    blocks before and after it.

    Args:
        seed: Unsigned integer of 64 bits.
        skipped: [start, stop) ranges of absolute positions to skip; overlapping ranges are merged.

    Raises:
        DataError: If the seed is out of range or a skipped range is invalid.
    """

    def __init__(self, seed: int, skipped: Sequence[tuple[int, int]] = ()) -> None:
        if not 0 <= seed < 2**64:
            raise DataError(f"seed is {seed}, must be at least 0 and less than 2**64")
        self.seed = seed
        self.skipped = _merged(skipped)
        starts = np.array([start for start, _ in self.skipped], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in self.skipped], dtype=np.int64)
        self._left_out = np.concatenate([[0], np.cumsum(lengths)])
        self._turns = starts - self._left_out[:-1]

    def absolute(self, positions: np.ndarray) -> np.ndarray:
        """Return the absolute positions (int64) of positions of any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if (positions < 0).any():
            raise DataError(f"position {positions.min()} is negative")
        return positions + self._left_out[np.searchsorted(self._turns, positions, side="right")]

    def blocks(self, positions: np.ndarray) -> np.ndarray:
        """Return block ids (int64) at positions of any shape."""
        return self._blocks_at(self.absolute(positions))

    def block(self, position: int) -> int:
        """Return the block id at one position."""
        return int(self.blocks(np.array([position]))[0])

    @abstractmethod
    def with_skipped(self, start: int, stop: int) -> "Order":
        """Return the same order that also skips the absolute positions [start, stop)."""

    @abstractmethod
    def _blocks_at(self, absolute: np.ndarray) -> np.ndarray:
        """Return block ids at absolute positions."""


class DataOrder(Order):
    """An order in which each epoch is another permutation of the blocks [0, num_blocks).

    The epoch of an absolute position is absolute // num_blocks.

    Args:
        seed: See `Order`.
        num_blocks: Number of blocks.
        skipped: See `Order`.

    Raises:
        DataError: If there are no blocks, the seed is out of range or a skipped range is invalid.
    """

    def __init__(self, seed: int, num_blocks: int, skipped: Sequence[tuple[int, int]] = ()) -> None:
        if num_blocks < 1:
            raise DataError(f"num_blocks is {num_blocks}, must be at least 1")
        super().__init__(seed, skipped)
        self.num_blocks = num_blocks

    def with_skipped(self, start: int, stop: int) -> "DataOrder":
        return DataOrder(self.seed, self.num_blocks, [*self.skipped, (start, stop)])

    def _blocks_at(self, absolute: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(absolute, self.num_blocks)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = _permute(places[here], self.num_blocks, _keys(self.seed, int(epoch)))
        return found


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if not 0 <= start < stop:
            raise DataError(f"skipped range [{start}, {stop}) must have 0 <= start < stop")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


@lru_cache(maxsize=1024)
def _keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """Return one 64-bit key for each round of the permutation of an epoch."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def _permute(places: np.ndarray, size: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """Permute `places` (1-d) within range(size), with a Feistel network and cycle walking.

    The network permutes [0, 4**half), the smallest such range that holds `size`. Values outside
    range(size) pass through it again until they fall inside (Black and Rogaway 2002), at most
    4 times on average.
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    values = _feistel(places.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finalizer: each input bit flips each output bit in half of all cases."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
