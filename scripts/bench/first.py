"""The first fifteen minutes on a GPU, in two calls; `scripts/gpu_first.sh` starts it.

    scripts/gpu_first.sh --call 1 FOLDER    at most 4 minutes: tests, one MFU, tiles
    scripts/gpu_first.sh --call 2 FOLDER    at most 9 minutes: winning tiles, tests again, goals
    scripts/gpu_first.sh FOLDER             both
    scripts/gpu_first.sh --apply FOLDER     only write the measured winners into the tile table
    scripts/gpu_first.sh --dry FOLDER       rehearse both on tiny shapes, on a CPU too

Start it again with the same folder after it was ended in whatever way: what is finished is not
measured again, where code, device, versions and sizes are the same. FOLDER gets four files:
`results.jsonl` (one line for everything measured, see `store.py`), `log.txt`, `goals.md` (the page:
each goal, its number, and the mark that it met), and in a rehearsal `blocks.py`. Needs torch,
Triton and Transformers; pytest for the tests. This file imports the standard library only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import page
import tiles
from store import ROOT, TABLE, BusyError, Record, Store, identify, write_file
from worker import LOST

BENCH = Path(__file__).parent
SECONDS = {1: 240, 2: 530}
TEST_SECONDS = {1: 100, 2: 80}
_DRY_SECONDS = 900  # for machines that are slow or busy
SWEPT = ("dry", "code", "device")
_LEAST = 3  # seconds that are too few to begin anything


def show(text: str) -> None:
    """Print, where somebody still reads it: a closed pipe must not end a measurement."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the end


class First:
    """One start of the program on one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder.resolve()
        self.store = Store(self.folder / "results.jsonl")
        self.store.lock()
        self.log = (self.folder / "log.txt").open("a", encoding="utf-8", buffering=1)
        self.start = f"{time.time():.3f} {os.getpid()}"
        self.identity = identify(options.dry)
        self.broken: list[str] = []
        self.say(f"{self.identity['device']}, revision {self.identity['revision']}, {self.folder}")

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        show(text)
        self.log.write(f"== {text}\n")

    def call(self, number: int) -> None:
        """Run one call within its time."""
        dry, begin = self.options.dry, time.monotonic()
        seconds = self.options.seconds or (_DRY_SECONDS if dry else SECONDS[number])
        end = begin + seconds
        self.say(f"call {number}, at most {seconds:.0f} s")
        if number == 2 and not self.is_applied:
            self.apply()
        if self.options.only in ("", "tests"):
            self.test(number, "half", min(end, begin + (seconds if dry else TEST_SECONDS[number])))
            if number == 2:
                self.take_back_if_wrong()
        if self.options.only != "tests":
            self.measure(number, end)
        if number == 2 and not self.options.only and not dry:
            self.test(number, "all", end)
        self.write_page()
        self.say(f"call {number} took {time.monotonic() - begin:.0f} s")

    def test(self, number: int, select: str, end: float) -> None:
        """Run the kernels' tests; every verdict is in the results at once."""
        if find_spec("pytest") is None:
            self.say("tests are not run: pytest is not installed; see scripts/wheels.py")
            return
        if end - time.monotonic() < _LEAST:
            return
        asked = self._asked(number) | {"select": select, "most": 2 if self.options.dry else None}
        command = ["-m", "pytest", "-v", "-p", "verdicts", "-m", "not slow and not wide_fp32"]
        command += ["-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--ignore", "tests/kernels/test_targets.py"]  # needs no GPU, but minutes
        if find_spec("xdist") is not None:
            workers = 0 if self.options.dry else min(8, os.cpu_count() or 1)
            command += ["-n", str(workers)]
        code = self._run([*command, "tests/kernels"], end, FIRST_TESTS=json.dumps(asked))
        counts = Counter(each["outcome"] for each in self._records("test"))
        self.say(f"tests: {dict(counts)}{', out of time' if code is None else ''}")
        if code not in (None, 0, 1, 5):  # 1: failed tests, which have records; 5: nothing was left
            self.broken.append(f"pytest ended with code {code}; see log.txt")

    def measure(self, number: int, end: float) -> None:
        """Have workers measure what is left, a new one after each that a case took down."""
        while (left := end - time.monotonic()) > _LEAST:
            asked = self._asked(number) | {"seconds": left, "only": self.options.only}
            code = self._run([str(BENCH / "worker.py"), json.dumps(asked)], end + 5)
            self.write_page()
            if code == 0 or (code != LOST and not self._blame(code, number, end)):
                break

    def _blame(self, code: int | None, number: int, end: float) -> bool:
        """Record the case that ended its worker as failed; False when none did."""
        begun: Record | None = None
        for record in self.store.read(self.identity):
            if record.get("start") == self.start and record["kind"] in ("begin", "case"):
                begun = record if record["kind"] == "begin" else None
        if begun is None:
            self.broken.append(f"the worker of call {number} ended with code {code}; see log.txt")
            return False
        if code is None or time.monotonic() >= end - 1:
            return False  # the call's time is over, which is no failure of the case
        reason = f"its process ended with code {code} (limit {begun['limit']:.0f} s); see log.txt"
        about = {key: begun[key] for key in ("start", "call", "case", "sizes")}
        self.store.append("case", self.identity, **about, status="failed", reason=reason)
        self.say(f"failed: {begun['case']}: {reason}")
        return True

    def apply(self, same: tuple[str, ...] = SWEPT) -> None:
        """Write the measured winners into the tile table; in a rehearsal, into a copy.

        Args:
            same: fields of the identity under which the tiles must have been measured.
        """
        found = tiles.winners(self._records("case", same))
        before = TABLE.read_text(encoding="utf-8")
        try:
            after = tiles.replaced(before, found)
        except ValueError as error:  # what is left to measure needs no winners
            self.broken.append(f"tiles are not applied: {error}")
            return
        if after == before:
            self.say("no tiles are faster than the table's by more than noise")
            return
        write_file(self.folder / "blocks.py" if self.options.dry else TABLE, after)
        entries = [[*key, numbers] for key, numbers in found.items()]
        self.move(entries, identify(self.options.dry))
        self.say(f"tiles applied: {entries}")

    def move(self, entries: list[Any], identity: Record) -> None:
        """Record that the table has changed, and go on under the identity that it makes."""
        self.store.append("applied", self.identity, tiles=entries, after=identity)
        self.identity = identity

    @property
    def is_applied(self) -> bool:
        """Return True if a start of this program made the present table."""
        return any(each["after"] == self.identity for each in self._records("applied", ()))

    def take_back_if_wrong(self) -> None:
        """Put the former tiles back when a test fails with the new ones that did not without."""
        made = [each for each in self._records("applied", ()) if each["after"] == self.identity]
        if not made or not made[-1]["tiles"] or self.options.dry:
            return
        before = made[-1]["identity"]
        failed = [
            {each["test"] for each in self.store.read(identity) if each.get("outcome") == "failed"}
            for identity in (before, self.identity)
        ]
        if not failed[1] - failed[0]:
            return
        former = tiles.former(self._records("case", SWEPT))
        write_file(TABLE, tiles.replaced(TABLE.read_text(encoding="utf-8"), former))
        self.move([], before)
        self.broken.append(
            f"the new tiles are taken back: {sorted(failed[1] - failed[0])[:3]} failed"
        )
        self.say(self.broken[-1])

    def write_page(self) -> str:
        """Rewrite `goals.md` and return it."""
        text = page.page(self.store.read(), self.identity)
        write_file(self.folder / "goals.md", text)
        return text

    def finish(self) -> int:
        """Print the page's goals; return 1 when something of ours failed."""
        show(self.write_page().split("\n## Measured")[0])
        failures = [*self.broken, *page.failures(page.latest(self.store.read(), self.identity))]
        for failure in failures:
            self.say(f"failed: {failure}")
        return 1 if failures else 0

    def _asked(self, number: int) -> Record:
        """Return what a child has to know."""
        known = {"folder": str(self.folder), "dry": self.options.dry, "start": self.start}
        known["parent"] = os.getpid()
        return {**known, "call": number, "identity": self.identity}

    def _records(self, kind: str, same: tuple[str, ...] | None = None) -> list[Record]:
        """Return records of a kind whose identity is this one, or this one in the fields `same`."""
        fields = self.identity.keys() if same is None else same
        return [
            each
            for each in self.store.read()
            if each["kind"] == kind
            and all(each["identity"][field] == self.identity[field] for field in fields)
        ]

    def _run(self, command: list[str], end: float, **variables: str) -> int | None:
        """Run Python with its output in the log; return its exit code, None when time ended it."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **variables}
        paths = [str(ROOT), str(BENCH), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of it can be ended at once
        )
        try:
            return process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(
        prog="gpu_first.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "runs" / "gpu_first"
    options.add_argument(
        "folder", nargs="?", type=Path, default=default, help="default: %(default)s"
    )
    options.add_argument("--call", type=int, choices=(1, 2), help="only this call")
    options.add_argument("--apply", action="store_true", help="write the winning tiles, no more")
    options.add_argument("--dry", action="store_true", help="tiny shapes: a rehearsal")
    options.add_argument(
        "--only", default="", metavar="START", help="cases whose name begins so, or `tests`"
    )
    options.add_argument("--seconds", type=float, help="for each call; 240 and 530 by default")
    return options.parse_args()


def main() -> int:
    options = parse()
    try:
        first = First(options)
    except BusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.apply:  # also where the results have come from another machine
        first.apply(("dry", "code"))
        return 1 if first.broken else 0
    if first.identity["device"] == "cpu" and not options.dry:
        print("error: no CUDA device is found; --dry rehearses on a CPU", file=sys.stderr)
        return 2
    for number in (options.call,) if options.call else (1, 2):
        if number == 2 or options.call == 1 or not first.is_applied:
            first.call(number)
    return first.finish()


if __name__ == "__main__":
    raise SystemExit(main())
