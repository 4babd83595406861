"""Tile sizes of the attention kernels, by kernel, head width, clip, dtype and device."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Blocks:
    """Tile sizes (queries M, keys N) and launch parameters of one kernel."""

    M: int
    N: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return vars(self)


# By kernel, head width rounded up to a power of two, and whether it clips. Chosen by
# scripts/bench/static.py, not by time: up to width 128 two programs fit a multiprocessor, so that
# one computes its softmax while the other uses the tensor cores; elsewhere, and under most clips,
# the largest tiles of sm_90 that spill at most a few registers.
BLOCKS: dict[tuple[str, int, bool], Blocks] = {
    ("forward", 32, False): Blocks(64, 64, 4, 3),
    ("forward", 64, False): Blocks(64, 64, 4, 3),
    ("forward", 128, False): Blocks(64, 64, 4, 3),
    ("forward", 256, False): Blocks(64, 32, 8, 2),
    ("forward", 32, True): Blocks(64, 64, 4, 3),
    ("forward", 64, True): Blocks(64, 64, 4, 3),
    ("forward", 128, True): Blocks(64, 64, 8, 3),
    ("forward", 256, True): Blocks(32, 64, 8, 2),
    ("query", 32, False): Blocks(64, 64, 4, 3),
    ("query", 64, False): Blocks(64, 64, 4, 3),
    ("query", 128, False): Blocks(64, 32, 4, 3),
    ("query", 256, False): Blocks(64, 32, 8, 2),
    ("query", 32, True): Blocks(64, 32, 4, 3),
    ("query", 64, True): Blocks(64, 32, 4, 3),
    ("query", 128, True): Blocks(64, 32, 8, 3),
    ("query", 256, True): Blocks(32, 32, 8, 2),
    ("key_value", 32, False): Blocks(64, 64, 4, 2),
    ("key_value", 64, False): Blocks(64, 64, 4, 2),
    ("key_value", 128, False): Blocks(32, 64, 4, 2),
    ("key_value", 256, False): Blocks(64, 32, 8, 2),
    ("key_value", 32, True): Blocks(64, 64, 8, 3),
    ("key_value", 64, True): Blocks(32, 64, 4, 3),
    ("key_value", 128, True): Blocks(64, 32, 8, 2),
    ("key_value", 256, True): Blocks(64, 32, 8, 2),
}

# For fp32, whose tiles are twice as large, and for GPUs with little shared memory.
_SMALL_BLOCKS = {32: Blocks(64, 32, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 4, 2)}
_SMALLEST_BLOCKS = Blocks(16, 16, 4, 1)
# Bytes that one program may have on sm_80; BLOCKS need no more for half precision.
_LARGE_SHARED_MEMORY = 163 * 1024


@cache
def _is_small(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return memory < _LARGE_SHARED_MEMORY


def choose_blocks(
    name: str, width: int, clip: bool, dtype: torch.dtype, device: torch.device
) -> Blocks:
    """Tiles of a kernel ("forward", "query" or "key_value") for heads of `width`."""
    columns = max(32, 1 << (width - 1).bit_length())
    if dtype == torch.float32 or _is_small(device):
        return _SMALL_BLOCKS.get(columns, _SMALLEST_BLOCKS)
    return BLOCKS[name, columns, clip]
