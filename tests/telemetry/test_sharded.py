"""Numbers of two processes, DDP and FSDP2, are those of one that has the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .reference import Adam, Reference
from .sharded_worker import MODELS, SHARDINGS, part, steps
from .steps import assert_numbers, exact_copy, tiny

Numbers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Numbers]]:
    """By process: numbers of each step of each run."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "tests.telemetry.sharded_worker", str(folder)]
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _expected(name: str) -> Numbers:
    """By the definition, with the whole batch."""
    preset, fields = MODELS[name]
    model = tiny(preset, **fields)
    reference = Reference(exact_copy(model), Adam())
    first, second = steps()
    numbers = reference.step(first)
    # Each process linearises attention at the first sequence that it has; the factor is the mean.
    alone = [
        Reference(exact_copy(model), Adam()).step([part(batch, rank) for batch in first])
        for rank in range(2)
    ]
    for bound in [each for each in numbers if each.endswith("attention_bound")]:
        spread = bound.replace("_bound", "_std")
        factor = sum((one[bound] - 1) * one[spread] for one in alone) / 2
        numbers[bound] = 1 + factor / numbers[spread]
    return [numbers, reference.step(second, with_bounds=False)]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_tell_what_one_tells(found: list[dict[str, Numbers]], name: str) -> None:
    expected = _expected(name)
    for sharding in SHARDINGS:
        for numbers, truth in zip(found[0][f"{name} {sharding}"], expected, strict=True):
            assert_numbers(numbers, truth, 1e-9)


def test_both_processes_tell_the_same(found: list[dict[str, Numbers]]) -> None:
    assert found[0] == found[1]
    assert set(found[0]) == {f"{name} {sharding}" for name in MODELS for sharding in SHARDINGS}
