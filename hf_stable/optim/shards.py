"""Parameters as this process holds them, whole or sharded, and sums over those that share them."""

from collections.abc import Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

# Elements worked on together: intermediate results stay in a CPU's caches, and small on a GPU.
_PIECE = {"cpu": 2**16, "cuda": 2**26}


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; it shares the tensor's memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Flat views of the same elements of what this process holds of tensors of one shape."""
    mine = [held(tensor) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in mine):  # which have no flat view
        return iter([tuple(mine)])
    size = _PIECE.get(mine[0].device.type, _PIECE["cuda"])
    return zip(*(tensor.view(-1).split(size) for tensor in mine), strict=True)


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
