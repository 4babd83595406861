"""A run's folder belongs to one process."""

import os
import signal
import socket
from pathlib import Path

import pytest

from hf_stable.errors import CheckpointError
from hf_stable.run_lock import is_free, run_lock


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with run_lock(tmp_path / "run"):
            os.write(told, b"x")
            signal.pause()
    os.read(ready, 1)
    try:
        expected = f"in use by process {child} on {socket.gethostname()}"
        with pytest.raises(CheckpointError, match=expected), run_lock(tmp_path / "run"):
            pytest.fail("two hold one run")
        assert is_free(tmp_path / "run") is False
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert is_free(tmp_path / "run")
    with run_lock(tmp_path / "run"):  # the system took it back
        assert str(os.getpid()) in (tmp_path / "run" / "lock.json").read_text()
    assert not (tmp_path / "run" / "lock.json").exists()
    assert is_free(tmp_path) is None


def test_an_error_inside_frees_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass
