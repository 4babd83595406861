"""Parameters as this process holds them, whole or sharded, and sums over those that share them."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

# Elements worked on together: intermediate results stay in a CPU's caches, and small on a GPU.
_PIECE = {"cpu": 2**16, "cuda": 2**26}

Pieces = tuple[list[torch.Tensor], ...]


def held(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a tensor; it shares the tensor's memory."""
    # Every step asks for all tensors, and `to_local` costs more than the rest of the step.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def batches(*columns: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], Pieces]]:
    """Return the local shards of tensors, in pieces for foreach functions.

    Small tensors come many at a time, which saves launches; large ones come in flat pieces, which
    saves memory.

    Args:
        columns: sequences of one length; tensors at one index have one shape.

    Yields:
        Of each piece the index of its tensor, in ascending order, and of each column its pieces.
    """
    owners: list[int] = []
    rows: list[tuple[torch.Tensor, ...]] = []
    room = 0
    for owner, tensors in enumerate(zip(*columns, strict=True)):
        for row in _pieces([held(tensor) for tensor in tensors]):
            room -= row[0].numel()
            if rows and (room < 0 or row[0].dtype != rows[0][0].dtype):
                yield owners, _transposed(rows)
                owners, rows = [], []
            if not rows:
                room = _limit(row[0]) - row[0].numel()
            owners.append(owner)
            rows.append(row)
    if rows:
        yield owners, _transposed(rows)


def _transposed(rows: list[tuple[torch.Tensor, ...]]) -> Pieces:
    return tuple(list(column) for column in zip(*rows, strict=True))


def _limit(tensor: torch.Tensor) -> int:
    return _PIECE.get(tensor.device.type, _PIECE["cuda"])


def _pieces(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """The same elements of tensors of one shape; none of an empty shard."""
    count, size = tensors[0].numel(), _limit(tensors[0])
    if count <= size or not all(tensor.is_contiguous() for tensor in tensors):
        return [tuple(tensors)] if count else []
    return list(zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True))


def sum_pieces(
    owners: Sequence[int], parts: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Sums over what this process holds of each tensor, 0-d float64, from those over pieces.

    Args:
        owners: by piece, the index of its tensor, in ascending order.
        parts: sums over pieces, 1-d, in as many tensors as one likes.
    """
    counts = Counter(owners)
    none = torch.zeros(0, dtype=torch.float64, device=held(tensors[0]).device)
    values = torch.cat([none, *parts]).split([counts[index] for index in range(len(tensors))])
    return [value[0] if len(value) == 1 else value.sum() for value in values]


def sum_over_shards(
    sums: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Sums over whole tensors from those over what each process holds; collective for DTensors.

    Args:
        sums: 0-d, one a tensor, all of one dtype.
        tensors: what was summed; whole copies, as in DDP, count once.
    """
    total = list(sums)
    alike: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            alike.setdefault((tensor.device_mesh, tensor.placements), []).append(index)
    for (mesh, placements), indices in alike.items():
        kinds = [Replicate() if kind.is_replicate() else Partial() for kind in placements]
        mine = torch.stack([sums[index] for index in indices])
        whole = DTensor.from_local(mine, mesh, kinds, run_check=False).full_tensor()
        whole = whole.to(mine.device)  # offloaded parameters are not on their mesh's device
        for index, value in zip(indices, whole.unbind(), strict=True):
            total[index] = value
    return total
