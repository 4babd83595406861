"""Laws of `scripts/gpu_first.sh`: nothing finished is lost or repeated, whenever it is ended."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from . import bare

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are scripts that import their neighbours

import clocks  # noqa: E402
import first  # noqa: E402
import goals  # noqa: E402
import page  # noqa: E402
import store  # noqa: E402
import tiles  # noqa: E402
import worker  # noqa: E402

# What a rehearsal on a CPU may leave out: what is not installed or has no CPU form.
EXCUSES = (
    "ModuleNotFoundError",
    "NotImplementedError: FlexAttention",
    "RuntimeError: No viable backend",
    "not run: the hardware's tanh needs a GPU",
    "AttributeError: module 'torch.nn' has no attribute 'LinearCrossEntropyOptions'",
)
# Small enough for every run of the tests.
SMALL = ("--call", "2", "--only", "head and loss: floor")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare.make(tmp_path_factory.mktemp("bare") / "environment")


def begin(folder: Path, python: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a rehearsal as a user would, in an environment without our dependencies."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHON": str(python),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [str(ROOT / "scripts" / "gpu_first.sh"), "--dry", *options, str(folder / "results")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return whole lines of the results as they are on disk now."""
    file = folder / "results" / "results.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def end_and_check(folder: Path, python: Path, *options: str) -> list[dict[str, Any]]:
    """Let a last start finish; each case and test must have been finished once."""
    process = begin(folder, python, *options)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output + (folder / "results" / "log.txt").read_text()
    cases = records(folder, "case")
    names = [case["case"] for case in cases]
    assert len(names) == len(set(names))
    for case in cases:
        assert case["status"] == "ok", case
        for row in case["rows"]:
            assert row.get("skipped", EXCUSES[0]).startswith(EXCUSES), row
    tests = [test["test"] for test in records(folder, "test")]
    assert len(tests) == len(set(tests))
    assert "the numbers mean nothing" in (folder / "results" / "goals.md").read_text()
    return cases


def test_a_killed_rehearsal_repeats_nothing_finished(tmp_path: Path, bare_python: Path) -> None:
    process = begin(tmp_path, bare_python, *SMALL)
    while not records(tmp_path, "case") and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = records(tmp_path, "case")
    with (tmp_path / "results" / "results.jsonl").open("ab") as results:
        results.write(b'{"kind": "case", "case": "cut o')  # a line that was not written to its end
    cases = end_and_check(tmp_path, bare_python, *SMALL)
    assert cases[: len(kept)] == kept
    assert [case["case"] for case in cases] == [
        "head and loss: floor, 8k",
        "head and loss: floor, 32k",
    ]


def test_kernel_tests_collect_in_a_bare_environment(bare_python: Path) -> None:
    command = [bare_python, "-m", "pytest", "--collect-only", "-q", "tests/kernels"]
    options = ["-o", "addopts=", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_at_random_seconds_lose_nothing(tmp_path: Path, bare_python: Path) -> None:
    chance = random.Random(0)
    for number in range(10):
        kept = records(tmp_path, "case")
        begun = len(records(tmp_path, "begin"))
        process = begin(tmp_path, bare_python)
        # Every other one not before a case has begun, so that there is something to lose.
        while number % 2 and len(records(tmp_path, "begin")) == begun and process.poll() is None:
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 20))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert records(tmp_path, "case")[: len(kept)] == kept
    cases = end_and_check(tmp_path, bare_python)
    groups = {case["case"].split(":")[0] for case in cases}
    assert groups == {"attention", "head and loss", "training step", "tiles", "product"}
    assert len(records(tmp_path, "test")) > 2
    values = {goal for case in cases for goal in case["values"]}
    # Memory has no number on a CPU, and peers that are absent no ratio.
    assert {"E1", "E2", "E4", "A6", "A7", "C1", "C2", "C3", "L1 8k", "L6"} <= values


def make(folder: Path, **changes: Any) -> first.First:
    options = {"folder": folder, "dry": True, "only": "", "seconds": None}
    return first.First(argparse.Namespace(**{**options, **changes}))


def test_clocks_are_those_of_the_timed_spans(tmp_path: Path, monkeypatch: Any) -> None:
    made_up = tmp_path / "nvidia-smi"
    made_up.write_text("#!/bin/sh\necho '[N/A], 1, 1, 1'\necho '1980, 3201, 650.5, 60'\n")
    made_up.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    begin = time.monotonic()
    read = clocks.Clocks()
    while not read.during([(begin, time.monotonic())]):
        time.sleep(0.01)
    assert read.during([(begin, time.monotonic())])["sm_mhz"] == [1980.0] * 3
    assert read.during([(begin - 2, begin - 1)]) == {}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert clocks.Clocks().during([(begin, time.monotonic())]) == {} == clocks.query()


def test_two_starts_on_one_folder_are_refused(tmp_path: Path) -> None:
    holder = make(tmp_path)
    with pytest.raises(store.BusyError, match=r"results\.jsonl is in use"):
        make(tmp_path)
    del holder


def test_a_closed_pipe_ends_no_measurement(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    script = "import sys; import first; first.show('a'); first.show('b'); sys.stderr.write('end')"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCH, stdout=write, stderr=subprocess.PIPE, check=True
    )
    os.close(write)
    assert answer.stderr == b"end"


def test_without_a_gpu_only_a_rehearsal_starts(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH / "first.py"), str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr == "error: no CUDA device is found; --dry rehearses on a CPU\n"


def test_a_case_that_ends_its_process_is_a_failure_and_the_rest_goes_on(tmp_path: Path) -> None:
    made = make(tmp_path)
    codes = iter([-11, 0])

    def run(command: list[str], end: float) -> int:
        asked = json.loads(command[-1])
        case = {"case": "tiles: forward", "sizes": {}, "start": asked["start"]}
        code = next(codes)
        if code:
            made.store.append("begin", made.identity, call=1, limit=45.0, **case)
        return code

    made._run = run  # type: ignore[method-assign]
    made.measure(1, time.monotonic() + 60)
    assert next(codes, None) is None
    (failed,) = records_of(made, "case")
    assert failed["status"] == "failed" and "code -11" in failed["reason"]
    assert page.failures([failed]) == [f"tiles: forward: {failed['reason']}"]


def records_of(made: first.First, kind: str) -> list[dict[str, Any]]:
    return [record for record in made.store.read() if record["kind"] == kind]


def test_a_torn_line_is_ignored_and_then_cut(tmp_path: Path) -> None:
    results = store.Store(tmp_path / "results.jsonl")
    results.append("test", {"dry": True}, test="first", outcome="passed")
    with results.path.open("ab") as file:
        file.write(b'{"kind": "te')
    assert [record["test"] for record in results.read()] == ["first"]
    results.append("test", {"dry": True}, test="second", outcome="passed")
    assert [record["test"] for record in results.read()] == ["first", "second"]


@pytest.mark.parametrize(
    ("record", "left"),
    [
        ({"status": "ok"}, ["b"]),
        ({"status": "ok", "sizes": {"n": 2}}, ["a", "b"]),
        ({"status": "failed"}, ["b", "a"]),
        ({"status": "cut"}, ["b", "a"]),
        ({"status": "failed", "start": "now"}, ["b"]),
    ],
)
def test_what_is_left_depends_on_status_sizes_and_start(
    record: dict[str, Any], left: list[str]
) -> None:
    found = {"kind": "case", "case": "a", "sizes": {"n": 1}, "start": "before", **record}
    sizes = {"a": {"n": 1}, "b": {"n": 1}}
    assert worker.todo(["a", "b"], sizes, [found], "now") == left


def sweep(**rows: dict[str, Any]) -> dict[str, Any]:
    base = {"entry": ["forward", 64, False], "base": "[1, 1, 1, 1]", "over_base": 1.0}
    made = [{**base, "case": name, "tiles": [1, 1, 1, 1], **row} for name, row in rows.items()]
    return {"kind": "case", "rows": made}


def test_the_fastest_right_tiles_beyond_noise_win() -> None:
    key = ("forward", 64, False)
    slow = {"tiles": [64, 64, 4, 3], "over_base": 0.9}
    wrong = {"tiles": [64, 32, 4, 3], "over_base": 0.5, "wrong": "relative error 1"}
    noise = {"tiles": [64, 16, 4, 3], "over_base": 0.99}
    assert tiles.winners([sweep(slow=slow, wrong=wrong)]) == {key: [64, 64, 4, 3]}
    assert tiles.winners([sweep(noise=noise)]) == {}
    assert tiles.winners([sweep(slow=slow), sweep(noise=noise)]) == {}


def test_winners_replace_their_lines_of_the_table_alone() -> None:
    table = store.TABLE.read_text()
    after = tiles.replaced(table, {("query", 64, True): [1, 2, 3, 4]})
    lines = zip(table.splitlines(), after.splitlines(), strict=True)
    (line,) = [new for old, new in lines if old != new]
    assert line == '    ("query", 64, True): Blocks(1, 2, 3, 4),'
    with pytest.raises(ValueError, match="0 lines"):
        tiles.replaced(table, {("query", 65, True): [1, 2, 3, 4]})


def test_tiles_that_break_a_test_are_taken_back(tmp_path: Path, monkeypatch: Any) -> None:
    table = tmp_path / "blocks.py"
    monkeypatch.setattr(first, "TABLE", table)
    monkeypatch.setattr(first, "identify", lambda dry: {**before, "tiles": table.read_text()})
    base = '    ("forward", 64, False): Blocks(1, 1, 1, 1),\n'
    table.write_text(base)
    before = {"dry": False, "code": "c", "device": "d", "revision": None, "tiles": base}
    made = make(tmp_path, dry=False)
    rows = sweep(**{"[1, 1, 1, 1]": {}, "new": {"tiles": [2, 2, 4, 3], "over_base": 0.5}})["rows"]
    made.store.append("case", made.identity, case="tiles: forward", status="ok", rows=rows)
    made.apply()
    assert table.read_text() == base.replace("1, 1, 1, 1", "2, 2, 4, 3")
    made.store.append("test", made.identity, test="a law", outcome="failed")
    made.take_back_if_wrong()
    assert table.read_text() == base and made.identity == before
    assert made.is_applied  # so that the next start does not take them again


def test_the_page_states_each_goal_its_number_and_its_mark() -> None:
    identity = {"dry": False, "device": "a GPU", "revision": None, "versions": {}, "tiles": "x"}
    values = {"E1": 0.5, "E2": 0.92, "A1": "nan"}
    case = {"kind": "case", "case": "made up", "identity": identity, "values": values}
    text = page.page([case], identity)
    lines = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if " | " in line}
    assert lines["| E1"][2] == "0.5" and lines["| E1"][-1] == "stretch |"
    assert lines["| E2"][-1] == "bar |" and lines["| A1"][-1] == "none |"
    total = sum(len(each) for each in goals.GOALS.values())
    assert text.count("| not measured |") >= total - 3
    assert lines["| A2"][2] == "not measured"


def test_numbers_of_another_device_or_code_are_not_on_the_page() -> None:
    identity = {"dry": False, "device": "a GPU", "code": "new", "tiles": "x"}
    for field in ("device", "code"):
        other = {**identity, field: "other"}
        case = {"kind": "case", "case": "c", "identity": other, "values": {"E1": 0.5}}
        assert page.latest([case], identity) == []
    case = {"kind": "case", "case": "c", "identity": {**identity, "tiles": "y"}}
    assert page.latest([case], identity) == [case]
