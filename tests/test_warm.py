"""A process that has torch when it starts is otherwise what `sys.executable` would be."""

import subprocess
import sys
from pathlib import Path

import pytest

from .launching import running, wait_until
from .warm import python, ranks

FILE = "import sys; print(__name__, sys.argv, sys.path[0])"
COMMANDS: dict[str, list[str]] = {
    "streams": ["-c", "import sys; print(input()); print(sys.argv, file=sys.stderr)", "a b"],
    "place": ["-c", "import os; print(os.getcwd(), os.environ['HERE'], sorted(os.environ))"],
    "code": ["-c", "raise SystemExit(3)"],
    "words": ["-c", "import sys; sys.exit('bad')"],
    "error": ["-c", "print('before'); 1 / 0"],
    "warning": ["-W", "error", "-c", "import warnings; warnings.warn('bad')"],
    "interrupt": ["-c", "raise KeyboardInterrupt"],
    "signal": ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
    "at exit": ["-u", "-c", "import atexit; atexit.register(print, 'last')"],
    "thread": ["-c", "import threading; threading.Timer(0.1, print, 'late').start()"],
    "file": ["file.py", "-x"],
    "module": ["-m", "file", "-x"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(FILE)
    ours, plain = (
        subprocess.run(
            [interpreter, *COMMANDS[name]],
            env={"HERE": "there", "LC_CTYPE": "C.UTF-8"},
            cwd=tmp_path,
            input="said\n",
            capture_output=True,
            text=True,
            check=False,
        )
        for interpreter in (python(), sys.executable)
    )
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    if name != "interrupt":  # which is silent here
        assert ours.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


def test_it_ends_with_who_waits_for_it() -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    waiting = subprocess.Popen([python(), "-c", program], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    pid = int(waiting.stdout.readline())
    assert pid != waiting.pid and running(pid)
    waiting.kill()
    waiting.communicate()
    wait_until(lambda: not running(pid), "the process is gone", 20)


def test_torch_is_there_and_transformers_is_not() -> None:
    program = "import sys; print([name in sys.modules for name in ('torch', 'transformers')])"
    found = subprocess.run([python(), "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[True, False]\n"


def test_ranks_that_fail_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "fail.py"
    file.write_text("import os; assert os.environ['RANK'] == '0', 'rank 1 fails'")
    with pytest.raises(RuntimeError, match="rank 1 fails"):
        ranks(2, file)
