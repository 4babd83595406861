"""The README's commands: two processes are stopped, go on, are killed, and one ends the run.

With the real launchers and the real training; tests/test_preemption.py has the fast version.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hf_stable import records
from hf_stable.checkpoints import list_checkpoints
from hf_stable.checkpoints.directory import step_of
from hf_stable.preemption import EXIT_PREEMPTED, MARKER
from hf_stable.telemetry.reading.history import History, read_history

from .launching import (
    PATIENCE,
    ROOT,
    SIGNALS,
    accelerate_launch,
    family,
    running,
    torchrun,
    wait_until,
)
from .training import RECIPES, write_text

STEPS = 240
SETTINGS = {
    "training.threads": 1,
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.evaluate_every": 60,
    "training.checkpoint_every": 20,
    # At the tiny recipe's own rate, ten times that, what one process rounds otherwise would grow.
    "optimizer.learning_rate": 1e-3,
}
TWO = ["training.sharding=fsdp2", "training.micro_batch_size=4"]
# Launcher, what it is told with, its variables (the README's one, and those of the Slurm recipe),
# and settings that change no number.
MORE = ["data.num_workers=2", "training.asynchronous_checkpoints=true"]
LAUNCHERS: dict[str, tuple[Callable[[], list[str]], signal.Signals, dict[str, str], list[str]]] = {
    "torchrun": (torchrun, signal.SIGTERM, {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}, []),
    "accelerate": (accelerate_launch, signal.SIGUSR1, SIGNALS, MORE),
}


def _command(launcher: list[str], output: Path, *more: str) -> list[str]:
    """`hf-stable train` under a launcher, or with Python alone."""
    places = {"data.train": f"[{write_text(output.parent)}]", "data.cache": output.parent / "cache"}
    settings = {**SETTINGS, **places, "output": output}
    chosen = [f"{key}={value}" for key, value in settings.items()]
    recipe = str(RECIPES / "base" / "tiny.yaml")
    return [*launcher, "-m", "hf_stable", "train", recipe, "--set", *chosen, *more]


@contextmanager
def _started(command: list[str], output: Path, **variables: str) -> "Iterator[subprocess.Popen]":
    """The command in a process group of its own; whatever is left at the end is killed."""
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment, log = {**os.environ, **common, **variables}, output.with_suffix(".log")
    with log.open("a") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        _kill_all(process, output)


def _kill_all(process: "subprocess.Popen[bytes]", output: Path) -> None:
    """SIGKILL to all: ranks lead process groups of their own, which outlive their launcher."""
    killed = family(output)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(running, killed)), "all are gone")


def _wait_for(step: int, output: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until the log has so many steps."""

    def there() -> bool:
        assert process.poll() is None, output.with_suffix(".log").read_text()
        rows = records.read_metrics(output, "train") if (output / "metrics.jsonl").exists() else []
        return bool(rows) and rows[-1]["step"] >= step

    wait_until(there, f"step {step}")


def _stop(process: "subprocess.Popen[bytes]", number: int, output: Path) -> tuple[int, int]:
    """Send the signal and wait; the exit code, and the step of the marker and a checkpoint."""
    process.send_signal(number)
    process.wait(timeout=PATIENCE)
    step = json.loads((output / MARKER).read_text())["step"]
    assert step_of(list_checkpoints(output)[-1]) == step < STEPS
    assert not (output / "model").exists()
    wait_until(lambda: not family(output), "all are gone", 20)
    return process.returncode, step


def _finish(command: list[str], output: Path) -> History:
    with _started(command, output) as process:
        code = process.wait(timeout=PATIENCE)
        assert code == 0, output.with_suffix(".log").read_text()
    assert not (output / MARKER).exists()
    assert (output / "model" / "model.safetensors").is_file()
    assert step_of(list_checkpoints(output)[-1]) == STEPS
    return read_history(output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Two processes that nobody stops."""
    output = tmp_path_factory.mktemp("restarts") / "undisturbed"
    return _finish(_command(torchrun(), output, *TWO), output)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_stopped_killed_and_ended_by_one_process_is_the_undisturbed_one(
    undisturbed: History, name: str
) -> None:
    launcher, number, variables, more = LAUNCHERS[name]
    output = undisturbed.folder.parent / name
    with _started(_command(launcher(), output, *TWO, *more), output, **variables) as process:
        _wait_for(10, output, process)
        code, first = _stop(process, number, output)
        assert code == 1  # launchers say so, whatever their ranks end with
    with _started(_command(launcher(), output, *TWO, *more), output) as process:
        _wait_for(first + 50, output, process)
        assert not (output / MARKER).exists()
        _kill_all(process, output)
    killed_at = records.read_metrics(output, "train")[-1]["step"]
    alone = _command([sys.executable], output, *more)
    with _started(alone, output) as process:
        _wait_for(killed_at + 10, output, process)
        code, last = _stop(process, number, output)
        assert code == EXIT_PREEMPTED
    found = _finish(alone, output)
    resumed = [row["step"] for row in records.read_metrics(output, "resumed")]
    took_over = resumed[1]
    assert resumed == [first, took_over, last]
    # One that is still being written in the background is not there yet.
    assert killed_at - 40 <= took_over <= killed_at and took_over % 20 == 0
    assert found.run["processes"] == 1 and undisturbed.run["processes"] == 2
    for column in ("step", "learning_rate"):
        assert np.array_equal(found.train[column], undisturbed.train[column])
    assert found.train["step"].tolist() == list(range(1, STEPS + 1))
    for column in ("loss", "grad_norm"):
        left, right = found.train[column], undisturbed.train[column]
        assert np.array_equal(left[:took_over], right[:took_over]), column
    left, right = found.train["loss"][took_over:], undisturbed.train["loss"][took_over:]
    assert left == pytest.approx(right, rel=1e-4)
