"""A signal stops a run at a step's end, with a checkpoint, through the launchers of the README."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_stable.preemption import (
    EXIT_PREEMPTED,
    MARKER,
    StopSignals,
    clear_mark,
    ignore_signals,
    mark_preempted,
)

from .launching import ROOT, SIGNALS, accelerate_launch, launched, torchrun, wait_until

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def told(stop: StopSignals, number: int) -> None:
    """Send this process a signal and wait for the flag."""
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.requested, "the flag is set", 10)


def run_python(code: str) -> "subprocess.Popen[str]":
    """Python on the code, with the package at hand and without Transformers."""
    start = "import sys; sys.argv[0] = 'hf-stable'\n"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", start + code], env=variables, **pipes)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(item) for item in NUMBERS]
    with StopSignals() as stop:
        assert stop.requested == 0
        told(stop, number)
    assert stop.requested == number
    assert [signal.getsignal(item) for item in NUMBERS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_no_thread_and_no_file_is_left(tmp_path: Path) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with StopSignals() as stop:
            told(stop, signal.SIGUSR1)
    assert count() == before


def test_signals_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_launcher_repeats_is_one_request() -> None:
    with StopSignals() as stop:
        told(stop, signal.SIGUSR1)
        for number in NUMBERS:
            os.kill(os.getpid(), number)
        time.sleep(0.2)
        assert stop.requested == signal.SIGUSR1


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert stop.requested == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_warns_and_does_nothing() -> None:
    caught = []

    def enter() -> None:
        with pytest.warns(UserWarning, match="main thread"), StopSignals() as stop:
            caught.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught == [(0, before)]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_second_signal_ends_at_once_even_inside_a_call(number: signal.Signals) -> None:
    # A mutex that it holds itself keeps the main thread in C for ever, as a collective may do; a
    # handler in Python would have to wait for it.
    process = run_python(
        "import ctypes, os\n"
        "from hf_stable import preemption\n"
        "preemption._SAME_REQUEST = 0.1\n"
        "with preemption.StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    mutex, lock = (ctypes.c_char * 256)(), ctypes.CDLL(None).pthread_mutex_lock\n"
        "    lock(mutex), lock(mutex)\n"
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "a second signal ends all" in process.stderr.readline()
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert time.monotonic() - start < 5
    process.communicate()


def test_a_forked_process_dies_of_a_signal_and_does_not_stop_its_parent() -> None:
    reader, writer = os.pipe()
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            os.write(writer, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.2)
        assert stop.requested == 0
    os.close(reader)
    os.close(writer)


def test_a_loader_worker_ignores_what_is_meant_for_its_rank() -> None:
    child = os.fork()
    if child == 0:
        ignore_signals()
        for number in NUMBERS:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_marker_says_what_happened_and_goes(tmp_path: Path) -> None:
    clear_mark(tmp_path)
    mark_preempted(tmp_path, 12, signal.SIGUSR1)
    content = json.loads((tmp_path / MARKER).read_text())
    assert (content["step"], content["signal"]) == (12, "SIGUSR1")
    assert abs(content["time"] - time.time()) < 60
    mark_preempted(tmp_path, 13, 0)
    assert json.loads((tmp_path / MARKER).read_text())["signal"] is None
    clear_mark(tmp_path)
    assert not list(tmp_path.iterdir())


PREPARING = """
import sys, time
from pathlib import Path
from hf_stable.preemption import Preparation

with Preparation(Path(sys.argv[1])):
    print("preparing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "rank", "status"),
    [
        (signal.SIGUSR1, "0", EXIT_PREEMPTED),
        (signal.SIGTERM, "1", EXIT_PREEMPTED),
        (signal.SIGINT, "0", -signal.SIGINT),  # as Python ends by an interrupt that nobody catches
    ],
)
def test_a_preemption_before_the_first_step_ends_it_at_once_and_marks_the_run(
    tmp_path: Path, number: signal.Signals, rank: str, status: int
) -> None:
    """There is nothing to save, but a batch script is to run it again; Ctrl-C is no preemption."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARING, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RANK": rank},
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "preparing\n"
    process.send_signal(number)
    assert process.wait(20) == status
    marked = number is signal.SIGUSR1
    assert (tmp_path / "run" / MARKER).exists() is marked
    if marked:
        about = json.loads((tmp_path / "run" / MARKER).read_text())
        assert (about["step"], about["signal"]) == (None, "SIGUSR1")


def test_torchrun_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    with launched(torchrun(), tmp_path, 1.0, 2, loader_workers=1, **SIGNALS) as run:
        # First one rank alone is told, and the other one stops too, both go on to a second round.
        os.kill(run.rank(1), signal.SIGUSR1)
        wait_until(lambda: len(run.ends()) == 2, "both ranks have stopped")
        first = sorted(run.ends(), key=lambda end: end["rank"])
        assert [end["signal"] for end in first] == [0, signal.SIGUSR1]
        assert first[0]["step"] == first[1]["step"]
        # Then as Slurm does: every process is told, and the launcher passes it on. Loader workers
        # are told by the launcher, as they are in their rank's process group.
        for file in tmp_path.glob("rank-*.pid"):
            file.unlink()
        ranks = [run.rank(0), run.rank(1)]
        for pid in [run.process.pid, *ranks]:
            os.kill(pid, signal.SIGTERM)
        log = run.finish()
        assert "DataLoader worker" not in log
        second = run.ends()[2:]
        assert [end["signal"] for end in second] == [signal.SIGTERM] * 2
        assert second[0]["step"] == second[1]["step"]
        assert json.loads((tmp_path / MARKER).read_text())["step"] == second[0]["step"]
        assert run.process.returncode == 1  # whatever its ranks end with: hence the marker
        assert run.orphans() == []


@pytest.mark.parametrize("seconds", [2, pytest.param(35, marks=pytest.mark.slow)])
def test_accelerate_launch_waits_for_the_checkpoint(tmp_path: Path, seconds: float) -> None:
    """Without the two variables SIGUSR1 orphans the ranks, and after 30 s the launcher kills."""
    with launched(accelerate_launch(), tmp_path, seconds, **SIGNALS) as run:
        run.signal(signal.SIGUSR1)
        run.finish()
        assert [end["signal"] for end in run.ends()] == [signal.SIGUSR1] * 2
        assert json.loads((tmp_path / MARKER).read_text())["signal"] == "SIGUSR1"
        assert run.orphans() == []


def test_a_second_signal_to_the_launcher_ends_the_checkpoint(tmp_path: Path) -> None:
    with launched(torchrun(), tmp_path, 300, **SIGNALS) as run:
        run.signal(signal.SIGINT)
        wait_until(lambda: len(list(tmp_path.glob("saving-*"))) == 2, "both ranks save")
        time.sleep(2.2)  # beyond what counts as the same request
        start = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        run.finish()
        assert time.monotonic() - start < 20
        assert run.ends() == []
        assert not (tmp_path / MARKER).exists()
        assert run.orphans() == []


def test_the_exit_code_is_sysexits_own() -> None:
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL
