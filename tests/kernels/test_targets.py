"""What a GPU would run: every kernel compiles, keeps its registers, fits the shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Bytes of shared memory that one program may have on sm_90 (CUDA programming guide).
SHARED_MEMORY = 227 * 1024


def _compile(*arguments: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by size, what is measured of each kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-m", "tests.kernels.targets", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout)


def _assert_runs_on_tensor_cores(found: dict[str, dict[str, Any]], shared_memory: int) -> None:
    for name, measured in found.items():
        assert measured["shared"] <= shared_memory, name
        assert measured["matrix_products"] > 0, name


def _assert_without_spills(found: dict[str, dict[str, Any]]) -> None:
    _assert_runs_on_tensor_cores(found, SHARED_MEMORY)
    for name, measured in found.items():
        # At most 28 with Triton 3.6; another version may count a little otherwise.
        assert measured["spilled"] <= 64, f"{name}: {measured}"


@pytest.mark.parametrize("width", [32, 80, 128, 256])
def test_attention_runs_on_tensor_cores_without_spills(width: int) -> None:
    """In every branch, on the tiles of every width; 80 adds a mask to the tiles of 128."""
    found = _compile("attention", str(width))[str(width)]
    assert len(found) == 3 * 4
    _assert_without_spills(found)


@pytest.mark.parametrize(
    "width", [64, *(pytest.param(width, marks=pytest.mark.slow) for width in (32, 128, 256))]
)
def test_all_forms_of_attention_keep_their_registers(width: int) -> None:
    """Tiles were chosen by the registers of sm_90; the widest and narrowest take minutes."""
    found = _compile("attention", str(width), "90", "all")[str(width)]
    assert len(found) == 7 + 2 * 6
    _assert_without_spills(found)


@pytest.mark.parametrize("capability", [80, 100])
def test_attention_compiles_for_older_and_newer_gpus_too(capability: int) -> None:
    found = _compile("attention", "64", str(capability))["64"]
    assert len(found) == 3 * 4
    _assert_runs_on_tensor_cores(found, 163 * 1024)


def test_the_head_keeps_its_row_in_registers_and_reads_16_bytes_at_once() -> None:
    for vocab, found in _compile("head", "256000,50257").items():
        for name, measured in found.items():
            assert measured["spilled"] == 0, (vocab, name)
            # A program has 1024 threads and the multiprocessor 65,536 registers.
            assert measured["registers"] <= 64, (vocab, name)
            # Rows whose length is a multiple of eight are read by vectors, except for their label.
            aligned = int(vocab) % 8 == 0
            assert (measured["vector_loads"] > 0) == aligned, (vocab, name)
            assert (measured["other_loads"] == 2) == aligned, (vocab, name)
