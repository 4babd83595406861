"""What a GPU would run: every kernel compiles, keeps its registers, fits the shared memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are scripts that import their neighbours

import static_model  # noqa: E402

WHOLE = {"sm": 90, "kernel": "forward", "form": "plain", "spilled": 0, "local": 0}
WHOLE["programs"] = 2


def _compile(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the script, which fails where a kernel spills or loses its tensor cores."""
    file = folder / "static.json"
    answer = subprocess.run(
        [sys.executable, BENCH / "static.py", *arguments, "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(file.read_text())


def _attention(folder: Path, width: int, *arguments: str) -> dict[str, Any]:
    return _compile(folder, "--kernels", "attention", "--width", str(width), *arguments)


@pytest.mark.parametrize("width", [32, 80, 128, 256])
def test_attention_runs_on_tensor_cores_without_spills(width: int, tmp_path: Path) -> None:
    """In every branch, on the tiles of every width; 80 adds a mask to the tiles of 128."""
    found = _attention(tmp_path, width, "--capability", "90", "--forms", "branches")
    assert len(found["records"]) == 3 * 4
    assert len(found["steps"]) == 4


@pytest.mark.parametrize(
    "width", [64, *(pytest.param(width, marks=pytest.mark.slow) for width in (32, 128, 256))]
)
def test_all_forms_of_attention_keep_their_registers(width: int, tmp_path: Path) -> None:
    """Tiles were chosen by the registers of sm_90; the widest and narrowest take minutes."""
    found = _attention(tmp_path, width, "--capability", "90")
    assert len(found["records"]) == 8 + 2 * 6


@pytest.mark.parametrize("capability", [80, 100])
def test_older_and_newer_gpus_run_the_same_tiles(capability: int, tmp_path: Path) -> None:
    options = ("--capability", str(capability), "--forms", "branches")
    assert len(_attention(tmp_path, 64, *options)["records"]) == 3 * 4


def test_the_head_keeps_its_row_in_registers_and_reads_16_bytes_at_once(tmp_path: Path) -> None:
    options = ("--kernels", "head", "--vocab", "256000", "50257", "--capability", "90")
    records = _compile(tmp_path, *options)["records"]
    assert len(records) == 2 * 5
    for found in records:
        assert found["spilled"] == 0, found
        # A program has 1024 threads and the multiprocessor 65,536 registers.
        assert found["registers"] <= 64, found
        # Rows whose length is a multiple of eight are read by vectors, except for their label.
        aligned = found["vocab"] % 8 == 0
        assert (found["vector_loads"] > 0) == aligned, found
        assert (found["other_loads"] == 2) == aligned, found


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"spilled": static_model.MAX_SPILLED, "local": 1}, None),
        ({"spilled": static_model.MAX_SPILLED + 1, "local": 1}, "spills"),
        ({"spilled": static_model.MAX_SPILLED_OUTSIDE}, None),
        ({"spilled": static_model.MAX_SPILLED_OUTSIDE + 1}, "spills"),
        ({"programs": 0, "limited_by": "shared memory"}, "shared memory"),
        ({"on_tensor_cores": False}, "tensor cores"),
    ],
)
def test_a_kernel_that_spills_or_loses_its_products_fails(change, word: str | None) -> None:
    found = static_model.problems({**WHOLE, **change})
    assert (word is None and not found) or (word is not None and word in found[0])


SASS = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
.L_x_1:
        /*0010*/               @P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
        /*0050*/              @!P6 BRA `(.L_x_4) ;
.L_x_5:
        /*0060*/                   STL [R1], R3 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_5) ;
"""
PTX = """
$L__BB0_1:
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	// end inline asm
	ex2.approx.ftz.f32 %f2, %f3;
	fma.rn.f32 %f4, %f5, %f6, %f7;
	ld.global.v2.b64 {%rd3, %rd4}, [%rd5];
	st.local.b32 [%rd6], %r1;
	@%p1 bra $L__BB0_1;
"""


@pytest.mark.parametrize(
    ("text", "dialect", "instructions", "bytes_read"),
    [(SASS, static_model.SASS, 7, 16), (PTX, static_model.PTX, 6, 16)],
    ids=["SASS", "PTX"],
)
def test_a_loop_is_counted_without_what_lies_outside(
    text, dialect, instructions: int, bytes_read: int
) -> None:
    """Code that was moved behind the loop and jumps back into it makes no second loop."""
    (loop,) = static_model.read_loops(text, dialect, warps=8)
    assert loop.instructions == instructions
    assert (loop.special, loop.fp32, loop.local, loop.products) == (1, 1, 1, 1)
    assert loop.in_flight == (6 if dialect is static_model.SASS else 0)
    assert loop.flops == 2 * 64 * 128 * 16 * 2
    assert loop.bytes_read == bytes_read


def test_clocks_lie_between_overlap_and_one_after_the_other() -> None:
    spent = static_model.Clocks(tensor=100.0, issue=150.0, special=120.0, loads=130.0)
    assert spent.overlapped(1) == spent.serial == 250.0
    assert spent.overlapped(2) == 150.0
    assert replace(spent, loads=200.0).overlapped(2) == 200.0
