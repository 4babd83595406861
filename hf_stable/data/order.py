"""Which block comes when: a pure function of (seed, absolute position, skipped ranges).

No state, no global random numbers, no stored permutation: any step is found in constant time, for
any number of processes and workers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_stable.errors import DataError

_ROUNDS = 8


class DataOrder:
    """An endless order of blocks; each epoch is another permutation of all of them.

    A *position* counts the samples that training takes, from 0 and for ever. Its *absolute*
    position also counts the samples of the skipped ranges before it, so that a range that is
    skipped leaves all that comes before and after it where it was. Block = permutation of epoch
    (absolute // num_blocks).

    Args:
        seed: any integer of 64 bits.
        skipped: [start, stop) ranges of absolute positions to leave out; overlapping ones are
        merged.

    Raises:
        DataError: no blocks, a seed out of range, or a range that is none.
    """

    def __init__(self, seed: int, num_blocks: int, skipped: Sequence[tuple[int, int]] = ()) -> None:
        if num_blocks < 1:
            raise DataError(f"num_blocks is {num_blocks}, must be at least 1")
        if not 0 <= seed < 2**64:
            raise DataError(f"seed is {seed}, must be at least 0 and less than 2**64")
        self.seed = seed
        self.num_blocks = num_blocks
        self.skipped = _merged(skipped)
        starts = np.array([start for start, _ in self.skipped], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in self.skipped], dtype=np.int64)
        self._left_out = np.concatenate([[0], np.cumsum(lengths)])
        self._turns = starts - self._left_out[:-1]

    def absolute(self, positions: np.ndarray) -> np.ndarray:
        """Absolute positions (int64) of positions of any shape, skipped samples counted in."""
        positions = np.asarray(positions, dtype=np.int64)
        if (positions < 0).any():
            raise DataError(f"position {positions.min()} is negative")
        return positions + self._left_out[np.searchsorted(self._turns, positions, side="right")]

    def blocks(self, positions: np.ndarray) -> np.ndarray:
        """Block ids (int64, in [0, num_blocks)) at positions of any shape."""
        epochs, places = np.divmod(self.absolute(positions), self.num_blocks)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = _permute(places[here], self.num_blocks, _keys(self.seed, int(epoch)))
        return found

    def block(self, position: int) -> int:
        """Block id at one position."""
        return int(self.blocks(np.array([position]))[0])

    def with_skipped(self, start: int, stop: int) -> "DataOrder":
        """The same order that also leaves out the absolute positions [start, stop)."""
        return DataOrder(self.seed, self.num_blocks, [*self.skipped, (start, stop)])


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


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """One 64-bit key for each round of the permutation of this epoch."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def _permute(places: np.ndarray, size: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """A keyed permutation of range(size) at `places` (1-d): a Feistel network with cycle walking.

    The network permutes [0, 4**half), the smallest such range that holds `size`; what falls outside
    is sent through again until it falls inside (Black and Rogaway 2002), at most 4 times on
    average.
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
    """The finalizer of splitmix64: an input bit changes each output bit in about half the cases."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def microbatches(
    order: DataOrder,
    *,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[list[int]]:
    """Block ids of this rank's microbatches, `global_batch_size / (micro * world)` of them a step.

    Step s takes positions [s*G, (s+1)*G) for every world size. Within a step the microbatches go
    through the batch in order, each rank taking its part of every `micro_batch_size * world_size`
    samples.

    Raises:
        DataError: the sizes do not divide, or the rank is none of the world's.
    """
    together = micro_batch_size * world_size
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, must be at least 0 and less than world_size {world_size}")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % together:
        raise DataError(
            f"global_batch_size {global_batch_size} is no multiple of micro_batch_size "
            f"{micro_batch_size} * {world_size} processes = {together}: change one of them"
        )
    if start_step < 0 or num_steps < 0:
        raise DataError(f"start_step {start_step} and num_steps {num_steps} must not be negative")
    begin, end = start_step * global_batch_size, (start_step + num_steps) * global_batch_size
    return (
        order.blocks(np.arange(first, first + micro_batch_size)).tolist()
        for first in range(begin + rank * micro_batch_size, end, together)
    )


class StepSizes(TypedDict):
    """The keywords of `microbatches`."""

    start_step: int
    num_steps: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int


class _Microbatches:
    """The microbatches, as often as asked for; a generator would be empty the second time."""

    def __init__(self, order: DataOrder, sizes: StepSizes) -> None:
        self._order = order
        self._sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        return microbatches(self._order, **self._sizes)

    def __len__(self) -> int:
        sizes = self._sizes
        together = sizes["micro_batch_size"] * sizes["world_size"]
        return sizes["num_steps"] * sizes["global_batch_size"] // together


def data_loader(
    dataset: Dataset[Any], order: DataOrder, *, num_workers: int = 0, **sizes: Unpack[StepSizes]
) -> DataLoader[Any]:
    """A loader of this rank's microbatches (sizes as in `microbatches`), as stacked tensors.

    It draws from a generator of its own: the global random numbers, and with them dropout, are the
    same whether batches were loaded before or not.
    """
    microbatches(order, **sizes)
    return DataLoader(
        dataset,
        batch_sampler=_Microbatches(order, sizes),  # pyright: ignore[reportArgumentType]
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(order.seed % 2**63),
        pin_memory=torch.cuda.is_available(),
    )
