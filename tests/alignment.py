"""Models whose tensors lie at chosen addresses.

safetensors maps weights from a file, so that they may lie at any multiple of their item's size,
while torch allocates at multiples of 64 bytes. A BLAS may round differently by that.
"""

from typing import Any

import torch

LINE = 64
OFFSETS = range(0, LINE, 4)


def at_offset(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a copy whose address is `offset` bytes after a multiple of 64."""
    nbytes = tensor.numel() * tensor.element_size()
    raw = torch.empty(nbytes + 2 * LINE, dtype=torch.uint8)
    start = -raw.data_ptr() % LINE + offset
    copy = raw[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def place(model: Any, offset: int = 0) -> Any:
    """Move every parameter and buffer of a model, in place, to `offset`; 0 is torch's own."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = at_offset(tensor.data, offset)
    return model
