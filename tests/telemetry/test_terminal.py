"""Laws of the terminal view: it fits, it says what the records say, and it ends."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hf_stable import cli
from hf_stable.records import RunRecord
from hf_stable.run_lock import run_lock
from hf_stable.telemetry.reading.diagnosis import diagnose
from hf_stable.telemetry.reading.history import read_history
from hf_stable.telemetry.reading.terminal import (
    State,
    ending,
    is_gone,
    print_diagnosis,
    sparkline,
    view,
    watch_runs,
)
from tests.telemetry.runs import write_diverging, write_healthy


def shown(folders: list[Path], width: int) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    histories = [read_history(folder) for folder in folders]
    console.print(view([State(history, ending(history)) for history in histories], width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(width: int, tmp_path: Path) -> None:
    text = shown([write_healthy(tmp_path / "a"), write_diverging(tmp_path / "b")], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in (
        "healthy",
        "diverging",
        "step 600 of 600",
        "finished",
        "max logit",
        "no alarm",
    ):
        assert expected in text


def test_runs_stand_beside_each_other_where_there_is_room(tmp_path: Path) -> None:
    folders = [write_healthy(tmp_path / "a"), write_diverging(tmp_path / "b")]
    heights = [len(shown(folders, width).splitlines()) for width in (100, 200)]
    assert heights[1] < heights[0] * 0.75
    assert any(line.count("step 600") == 2 for line in shown(folders, 200).splitlines())


def test_the_layer_nearest_to_trouble_comes_first(tmp_path: Path) -> None:
    text = shown([write_diverging(tmp_path / "run", layers=5, layer=3)], 100)
    lines = text.splitlines()
    heading = next(index for index, line in enumerate(lines) if "nearest to a limit" in line)
    assert lines[heading + 1].split()[1] == "3"
    assert "layer 3: the largest attention logit" in text


def test_many_alarms_are_the_first_and_the_newest(tmp_path: Path) -> None:
    history = read_history(write_diverging(tmp_path / "run"))
    text = shown([history.folder], 140)
    steps = [
        int(line.split("at step ")[1].split()[0]) for line in text.splitlines() if "at step" in line
    ]
    assert "alarms; the first: layer 1" in text
    assert steps == sorted(steps)


def test_a_run_without_telemetry_shows_its_loss_and_how_to_get_the_rest(tmp_path: Path) -> None:
    text = " ".join(shown([write_healthy(tmp_path / "run", every=0)], 120).split())
    assert "step 600 of 600" in text
    assert "telemetry.every=" in text


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    record.append("started", 0)
    record.close()
    assert "step 0" in shown([tmp_path / "run"], 80)


def test_how_a_run_ended(tmp_path: Path) -> None:
    assert ending(read_history(write_healthy(tmp_path / "a", steps=40))) == "finished"
    folder = write_healthy(tmp_path / "b", steps=40, finished=False)
    assert ending(read_history(folder)) is None
    record = RunRecord(folder)
    record.append("non_finite", 41, loss=float("nan"), grad_norm=1.0)
    assert ending(read_history(folder)) is None
    record.append("diverged", 41)
    assert ending(read_history(folder)) == "diverged"
    record.append("resumed", 40)
    record.close()
    assert ending(read_history(folder)) is None


@pytest.mark.parametrize(
    ("event", "fields", "end"),
    [
        ("preempted", {"signal": "SIGTERM"}, "preempted"),
        ("preempted", {"signal": None}, "preempted"),
        ("preempted", {"signal": "SIGINT"}, "interrupted"),
        ("stopped", {}, "stopped"),
    ],
)
def test_a_run_that_was_told_to_end_has_ended_until_it_is_resumed(
    event: str, fields: dict[str, str | None], end: str, tmp_path: Path
) -> None:
    folder = write_healthy(tmp_path / "run", steps=40, finished=False)
    record = RunRecord(folder)
    record.append(event, 40, **fields)
    assert ending(read_history(folder), is_gone=True) == end
    record.append("validation", 40, loss=1.0, perplexity=2.0)
    assert ending(read_history(folder)) == end
    record.append("resumed", 40)
    record.close()
    assert ending(read_history(folder)) is None
    assert ending(read_history(folder), is_gone=True) == "died"


def test_a_finished_run_that_is_trained_on_is_running(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", steps=40)
    record = RunRecord(folder)
    record.append("resumed", 40)
    record.close()
    assert ending(read_history(folder)) is None


def test_a_run_is_gone_when_its_lock_is_free(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", finished=False)
    assert not is_gone(folder)  # no lock, and the records are fresh
    with run_lock(folder):
        os.utime(folder / "metrics.jsonl", (0, 0))
        assert not is_gone(folder)
    assert is_gone(folder)
    (folder / ".lock").unlink()
    assert is_gone(folder)  # no lock, and no word since 1970
    assert not is_gone(tmp_path / "nothing")


def test_watching_a_run_whose_process_is_gone_ends(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", finished=False)
    with run_lock(folder):
        pass
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    watch_runs([folder], console, refresh=600, once=False)
    assert "died" in console.export_text()


def test_watching_ends_when_every_run_has(tmp_path: Path) -> None:
    done, folder = write_healthy(tmp_path / "a", steps=40), tmp_path / "b"
    write_healthy(folder, steps=40, finished=False)

    def finish() -> None:
        time.sleep(0.5)
        record = RunRecord(folder)
        record.append("finished", 40)
        record.close()

    console = Console(record=True, width=100, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    other = threading.Thread(target=finish)
    other.start()
    start = time.perf_counter()
    watch_runs([done, folder], console, refresh=0.05, once=False)
    assert 0.4 < time.perf_counter() - start < 20
    other.join()
    last = console.export_text().rsplit("healthy", 2)
    assert "running" not in last[-1]


def test_a_sparkline_shows_direction_and_what_is_no_number() -> None:
    falling = sparkline(np.linspace(5, 1, 50), 20)
    assert len(falling) == 20
    assert list(falling) == sorted(falling, reverse=True)
    assert falling[0] != falling[-1]
    assert sparkline(np.array([3.0, np.nan, 1.0]), 20)[1] == "×"
    assert sparkline(np.full(5, np.nan), 20) == "×" * 5
    assert sparkline(np.array([]), 20) == ""


@pytest.mark.parametrize("width", [80, 140])
def test_a_diagnosis_is_printed_whole(width: int, tmp_path: Path) -> None:
    found = diagnose(read_history(write_diverging(tmp_path / "run")))
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    print_diagnosis(found, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for sentence in found.sentences:
        assert sentence in flat
    for remedy in found.remedies:
        assert all(setting in flat for setting in remedy.setting.split())


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_diverging(tmp_path / "run"))
    assert cli.main(["watch", run]) == 0  # captured output is no terminal, so it looks once
    assert "largest attention logit" in capsys.readouterr().out
    assert cli.main(["diagnose", run, "--json", str(tmp_path / "found.json")]) == 0
    assert "First alarm: layer 1" in capsys.readouterr().out
    assert (tmp_path / "found.json").is_file()


@pytest.mark.parametrize("command", ["watch", "diagnose"])
def test_a_folder_without_a_run_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_control_c_ends_the_watching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    run = write_healthy(tmp_path / "run", finished=False)
    assert cli.main(["watch", str(run)]) == 130
    assert "\x1b[?25h" in capsys.readouterr().out  # the cursor is back
