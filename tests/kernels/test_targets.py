"""What a GPU would run: every kernel compiles for sm_90, keeps registers, fits the memory.

Triton cross-compiles without a GPU, and brings its own ptxas, which counts registers. Interpreted
kernels cannot be compiled in the same process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
WORKER = Path(__file__).with_name("compile_worker.py")
# Bytes of shared memory that one program may have on sm_90 (CUDA programming guide, table 21).
SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
def test_attention_compiles_for_sm_90_without_spills(width: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, str(WORKER), str(width)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    assert len(found) == 3 * 5
    for name, measured in found.items():
        assert measured["shared"] <= SHARED_MEMORY, name
        # None at all with the ptxas of Triton 3.6; another version may count a little otherwise.
        assert measured["spilled"] <= 64, f"{name}: {measured}"
