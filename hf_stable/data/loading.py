"""Turn an order of blocks into the microbatches of each rank, for any number of ranks."""

from collections.abc import Iterator
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_stable.data.order import Order
from hf_stable.errors import DataError
from hf_stable.preemption import ignore_signals


def microbatches(
    order: Order,
    *,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[list[int]]:
    """Return the block ids of this rank's microbatches.

    There are `global_batch_size / (micro_batch_size * world_size)` microbatches per step. Step s
    covers positions [s*G, (s+1)*G), with G the global batch size, for every world size. Within a
    step, each rank takes its part of every `micro_batch_size * world_size` consecutive samples.

    Raises:
        DataError: If the sizes do not divide, or the rank is not below the world size.
    """
    together = micro_batch_size * world_size
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, must be at least 0 and less than world_size {world_size}")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % together:
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
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
    """Keyword arguments of `microbatches`."""

    start_step: int
    num_steps: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int


class _Microbatches:
    """Microbatches that can be iterated more than once, unlike a generator."""

    def __init__(self, order: Order, sizes: StepSizes) -> None:
        self._order = order
        self._sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        return microbatches(self._order, **self._sizes)

    def __len__(self) -> int:
        sizes = self._sizes
        together = sizes["micro_batch_size"] * sizes["world_size"]
        return sizes["num_steps"] * sizes["global_batch_size"] // together


def data_loader(
    dataset: Dataset[Any], order: Order, *, num_workers: int = 0, **sizes: Unpack[StepSizes]
) -> DataLoader[Any]:
    """Return a loader of this rank's microbatches as stacked tensors; sizes as in `microbatches`.

    The loader has a separate random generator: loading batches does not change the global random
    numbers, and so does not change dropout.
    """
    microbatches(order, **sizes)
    return DataLoader(
        dataset,
        batch_sampler=_Microbatches(order, sizes),  # pyright: ignore[reportArgumentType]
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(order.seed % 2**63),
        pin_memory=torch.cuda.is_available(),
    )
