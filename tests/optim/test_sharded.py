"""The optimizer's side of two processes, DDP, FSDP2 and hybrid, is that of one with all rows."""

from typing import Any

import pytest
import torch

from ..warm import ranks
from .sharded_worker import RUNS, SHARDINGS, run
from .steps import RATE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By process: weights and numbers of each run."""
    folder = tmp_path_factory.mktemp("sharded")
    ranks(2, "-m", "tests.optim.sharded_worker", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("name", "by"), RUNS)
def test_two_processes_are_one(found: list[dict[str, Any]], name: str, by: str) -> None:
    expected = run(name, by, "alone", slice(None))
    assert (expected["numbers"][:, 5:] > 1.5).any()  # heads were clipped
    assert 0.01 < expected["numbers"][-1, 2] < 1
    for sharding in SHARDINGS:
        mine = found[0][f"{name} {sharding}"]
        torch.testing.assert_close(mine["numbers"], expected["numbers"], rtol=1e-6, atol=0)
        for key, weight in expected["weights"].items():
            difference = (mine["weights"][key] - weight).abs().max()
            assert difference < 1e-6 * RATE, (sharding, key)


def test_both_processes_have_the_same(found: list[dict[str, Any]]) -> None:
    for key, mine in found[0].items():
        assert mine["numbers"].equal(found[1][key]["numbers"])
        for name, weight in mine["weights"].items():
            assert weight.equal(found[1][key]["weights"][name])
