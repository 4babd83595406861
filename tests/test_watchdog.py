"""A process that hangs is named by the others, and none waits for it for ever."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hf_stable.errors import RecipeError
from hf_stable.training import train
from hf_stable.watchdog import (
    EXIT_HANG,
    FOLDER,
    Heartbeat,
    Phase,
    Watchdog,
    describe_hang,
    furthest_behind,
    heartbeat_file,
    read_heartbeats,
)

from .launching import PATIENCE, ROOT, WORKER, free_port, wait_until
from .training import tiny_recipe


def beat(rank: int, step: int, phase: Phase = "data", seconds_ago: float = 0) -> Heartbeat:
    return Heartbeat(rank, step, phase, time.time() - seconds_ago, 1000 + rank, "node")


def run_python(code: str) -> "subprocess.Popen[str]":
    start = "import sys; sys.argv[0] = 'hf-stable'\nimport time\n"
    start += "from pathlib import Path\nfrom hf_stable.watchdog import Watchdog\n"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", start + code], env=variables, **pipes)


def test_who_is_behind() -> None:
    assert furthest_behind([]) == []
    assert furthest_behind([beat(0, 5)]) == []
    assert furthest_behind([beat(0, 5), beat(1, 5), beat(2, 5)]) == []
    step = [beat(0, 5), beat(1, 4, "checkpoint"), beat(2, 5)]
    assert [item.rank for item in furthest_behind(step)] == [1]
    phase = [beat(0, 5, "update"), beat(1, 5, "update"), beat(2, 5, "gradients")]
    assert [item.rank for item in furthest_behind(phase)] == [2]
    two = [beat(0, 5, "update"), beat(1, 5, seconds_ago=1), beat(2, 5, seconds_ago=9)]
    assert [item.rank for item in furthest_behind(two)] == [2, 1]


def test_the_report_names_ranks_without_a_heartbeat_and_stays_short() -> None:
    text = describe_hang([beat(0, 5, "update"), beat(2, 5, "data")], 4)
    assert "without a heartbeat: 1, 3" in text
    assert "rank 2 (pid 1002 on node): 5 steps done, at data" in text
    assert "rank 0" not in text
    many = describe_hang([beat(rank, 5, "data") for rank in range(512)], 1024)
    assert len(many.splitlines()) < 15
    assert "and 504 more" in many


def test_a_heartbeat_is_readable_by_others(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 3, 4, 0) as watchdog:
        watchdog.beat(17, "gradients")
        wait_until(lambda: read_heartbeats(tmp_path, 4)[0].step == 17, "it is written", 10)
        found = read_heartbeats(tmp_path, 4)[0]
        assert (found.rank, found.phase, found.pid) == (3, "gradients", os.getpid())
    assert set(json.loads(heartbeat_file(tmp_path, 3).read_text())) == {
        *("step", "phase", "time", "pid", "host")
    }
    assert read_heartbeats(tmp_path, 4)[0].phase == "ended"
    assert read_heartbeats(tmp_path, 3) == []  # a rank of an earlier, larger world
    assert [file.name for file in tmp_path.iterdir()] == ["rank-00003.json"]


def test_an_error_leaves_the_last_place(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path, 0, 1, 0) as watchdog:
        watchdog.beat(4, "update")
        _ = 1 / 0
    assert read_heartbeats(tmp_path, 1)[0].phase == "update"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 3}', "\0"])
def test_a_damaged_heartbeat_is_none(tmp_path: Path, content: str) -> None:
    heartbeat_file(tmp_path, 0).write_text(content)
    assert read_heartbeats(tmp_path, 1) == []
    assert "without a heartbeat: 0" in describe_hang([], 1)


def test_ranks_of_a_former_start_do_not_seem_to_hang(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training__steps=2)
    stale = heartbeat_file(Path(recipe.output) / FOLDER, 5)
    stale.parent.mkdir(parents=True)
    about = asdict(beat(5, 3, seconds_ago=1000))
    del about["rank"]
    stale.write_text(json.dumps(about))
    assert [each.rank for each in read_heartbeats(stale.parent, 8)] == [5]
    train(recipe)
    assert [each.rank for each in read_heartbeats(stale.parent, 8)] == [0]


def test_a_patience_shorter_than_a_step_is_refused(tmp_path: Path) -> None:
    for seconds in (0, 60):
        assert tiny_recipe(tmp_path, training__hang_timeout=seconds)
    with pytest.raises(RecipeError, match="hang_timeout 59 is shorter than a step"):
        tiny_recipe(tmp_path, training__hang_timeout=59)


def test_a_beat_writes_no_file_itself(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "heartbeats", 0, 1, 0)
    watchdog.beat(1, "data")
    assert not list(tmp_path.iterdir())


def test_it_ends_a_silent_process_and_not_one_that_tells(tmp_path: Path) -> None:
    code = f"""
with Watchdog(Path({str(tmp_path)!r}), 0, 1, 1.0) as watchdog:
    for step in range(15):
        watchdog.beat(step, "gradients")
        time.sleep(0.1)
    print("alive", flush=True)
    def waits_for_ever(): time.sleep(300)
    waits_for_ever()
"""
    process = run_python(code)
    out, err = process.communicate(timeout=PATIENCE)
    assert out == "alive\n"
    assert process.returncode == EXIT_HANG
    stacks = (tmp_path / "hang-rank-00000.txt").read_text()
    for text in (err, stacks):
        assert "hang: rank 0 has not moved" in text
        assert "rank 0 (pid" in text and "14 steps done, at gradients" in text
        assert "in waits_for_ever" in text


def test_it_watches_on_when_it_cannot_write(tmp_path: Path) -> None:
    process = run_python(f"""
with Watchdog(Path({str(tmp_path / "gone")!r}), 0, 1, 1.0) as watchdog:
    Path({str(tmp_path / "gone")!r}).rename({str(tmp_path / "elsewhere")!r})
    watchdog.beat(1, "gradients")
    time.sleep(300)
""")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_HANG
    assert "hang: rank 0 has not moved" in err
    assert "most recent call first" in err


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    code = f"""
with Watchdog(Path({str(tmp_path)!r}), 0, 1, 2.0) as watchdog:
    print("ready", flush=True)
    for step in range(10):
        watchdog.beat(step, "gradients")
        time.sleep(0.05)
    time.sleep(0.5)
"""
    process = run_python(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")


def test_a_rank_that_waits_names_the_one_that_does_not_come(tmp_path: Path) -> None:
    (tmp_path / "stuck-1").touch()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    log_file, ranks = tmp_path / "log", []
    with log_file.open("w") as stderr:
        for rank in range(2):
            variables = {**os.environ, **place, "RANK": str(rank), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, str(WORKER), str(tmp_path), "0", "1", "0"]
            ranks.append(subprocess.Popen(command, env=variables, stderr=stderr))
    try:
        ranks[0].wait(timeout=PATIENCE)
        assert ranks[1].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    log = log_file.read_text()
    assert ranks[0].returncode == EXIT_HANG
    assert "1 of 2 ranks are ahead of:\n  rank 1 (" in log
    assert "3 steps done, at data" in log
    assert "in all_reduce" in (tmp_path / "heartbeats" / "hang-rank-00000.txt").read_text()
