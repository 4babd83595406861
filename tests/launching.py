"""Starting tests/preemption_worker.py under real launchers, and looking at what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "preemption_worker.py"
SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "600"}
PATIENCE = 120.0  # seconds: for a machine on which much else runs


def wait_until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun() -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--nproc_per_node=2", f"--master_port={free_port()}"]


def accelerate_launch() -> list[str]:
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--dynamo_backend=no"]
    return [*module, *options, "--mixed_precision=no", f"--main_process_port={free_port()}"]


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def family(folder: Path) -> list[int]:
    """Processes that have the folder on their command line: launcher, ranks and loader workers."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and running(int(place.name)):
            found.append(int(place.name))
    return found


class Launched:
    """A launcher, its two ranks and the folder that they write to."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder, self.process = folder, process

    def rank(self, rank: int) -> int:
        """The rank's pid, when it works."""
        file = self.folder / f"rank-{rank}.pid"
        wait_until(
            lambda: (file.exists() and file.read_text()) or self.process.poll() is not None,
            f"rank {rank} works",
        )
        return int(file.read_text())

    def signal(self, number: signal.Signals) -> None:
        self.rank(0), self.rank(1)
        self.process.send_signal(number)

    def finish(self) -> str:
        """Wait for the launcher; what it and its ranks wrote to stderr."""
        self.process.wait(timeout=PATIENCE)
        return (self.folder / "log").read_text()

    def ends(self) -> list[dict[str, int]]:
        """What the ranks wrote after their checkpoints, in order."""
        file = self.folder / "ends.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def orphans(self) -> list[int]:
        """Processes that outlive the launcher by more than a moment."""
        end = time.monotonic() + 10
        while (left := family(self.folder)) and time.monotonic() < end:
            time.sleep(0.1)
        return left


@contextmanager
def launched(
    launcher: list[str],
    folder: Path,
    seconds: float,
    rounds: int = 1,
    loader_workers: int = 0,
    **variables: str,
) -> Iterator[Launched]:
    """The worker under a launcher; whatever of it is left at the end is killed."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        **variables,
    }
    options = [str(folder), str(seconds), str(rounds), str(loader_workers)]
    command = [*launcher, str(WORKER), *options]
    # A file: a pipe would stay open until the loader workers have seen that their rank is gone.
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    try:
        yield Launched(folder, process)
    finally:
        for pid in family(folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()
