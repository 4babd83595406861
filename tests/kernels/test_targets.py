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


def _compile(*arguments: str) -> dict[str, dict[str, Any]]:
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


@pytest.mark.parametrize(("width", "forms"), [(32, 7), (64, 7), (80, 4), (128, 7), (256, 7)])
def test_attention_runs_on_tensor_cores_without_spills(width: int, forms: int) -> None:
    found = _compile("attention", str(width))
    assert len(found) == 3 * forms
    for name, measured in found.items():
        assert measured["shared"] <= SHARED_MEMORY, name
        assert measured["matrix_products"] > 0, name
        # At most 28 with Triton 3.6; another version may count a little otherwise.
        assert measured["spilled"] <= 64, f"{name}: {measured}"


@pytest.mark.parametrize("capability", [80, 100])
def test_attention_compiles_for_older_and_newer_gpus_too(capability: int) -> None:
    found = _compile("attention", "64", str(capability))
    assert len(found) == 3 * 4
    for name, measured in found.items():
        assert measured["shared"] <= 163 * 1024, name
        assert measured["matrix_products"] > 0, name


@pytest.mark.parametrize("vocab", [256_000, 50_257])
def test_the_head_keeps_its_row_in_registers_and_reads_16_bytes_at_once(vocab: int) -> None:
    for name, measured in _compile("head", str(vocab)).items():
        assert measured["spilled"] == 0, name
        # A program has 1024 threads and the multiprocessor 65,536 registers.
        assert measured["registers"] <= 64, name
        # Rows whose length is a multiple of eight are read by vectors, but for their label.
        assert (measured["vector_loads"] > 0) == (vocab % 8 == 0), name
        assert (measured["other_loads"] == 2) == (vocab % 8 == 0), name
