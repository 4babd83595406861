"""Kernels are held against float64, on the GPU where there is one, interpreted elsewhere."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from ..interpreter import patch_once

patch_once()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make all attention kernels use tiles of so many queries and keys."""
    from hf_stable.kernels import attention  # noqa: PLC0415 (skipped above without Triton)
    from hf_stable.kernels.blocks import Blocks  # noqa: PLC0415

    def use(queries: int, keys: int) -> None:
        chosen = Blocks(queries, keys, 4, 2)
        monkeypatch.setattr(attention, "choose_blocks", lambda *_: chosen)

    return use


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that what a kernel leaves out shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
