"""Kill a run at random moments, start it again until it ends, and compare it with one left alone.

    python scripts/survival/kill.py --trials 40 --processes 1 --output results.json

A trial is one run that is killed by SIGKILL up to five times, all of its processes at once or, with
two processes that have met and every other time, one of them. Every other trial writes its
checkpoints in the background. What must be equal in the end, bit by bit: weights, optimizer,
generators, what the loop itself keeps, and every number of every row of the log that a reader takes
as in force (clocks apart). Processes are forked from one that has torch loaded, so that a trial
takes seconds.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.distributed as dist

from hf_stable import records
from hf_stable.checkpoints import list_checkpoints
from hf_stable.recipes import Recipe, load_recipe
from hf_stable.telemetry.reading.history import read_history
from hf_stable.training import train

BASE = Path(__file__).parents[2] / "recipes" / "base" / "tiny.yaml"
KILLS = 5
# What a run does besides its steps, so that kills fall into all of it.
SETTINGS = {
    "data.sequence_length": 16,
    "model.attention_dropout": 0.1,
    "training.steps": 60,
    "training.checkpoint_every": 7,
    "training.evaluate_every": 20,
    "training.log_every": 1,
    "training.threads": 1,
    "telemetry.every": 10,
    "telemetry.bounds_every": 0,
}
# After a rank is killed the other one must end by itself within this many seconds.
PATIENCE = 60
CLOCKS = {"tokens_per_second"}
ASYNCHRONOUS = "training.asynchronous_checkpoints"


@dataclass(frozen=True)
class Case:
    """What is run: how many processes, and settings over SETTINGS."""

    folder: Path
    text: Path
    processes: int
    settings: dict[str, Any]

    def recipe(self, name: str) -> Recipe:
        places = {"data.train": [str(self.text)], "data.cache": str(self.folder / "cache")}
        places["output"] = str(self.folder / name)
        chosen = {**SETTINGS, **self.settings, **places}
        return load_recipe(BASE, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])


def start(case: Case, name: str) -> list[int]:
    """Fork the processes of a run; each is the leader of a group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(case.processes):
        _met(case, name, rank).unlink(missing_ok=True)
    for rank in range(case.processes):
        child = os.fork()
        if child == 0:
            _live(case, name, rank, port)
        children.append(child)
    return children


def _live(case: Case, name: str, rank: int, port: int) -> None:
    """Train as one process of a launcher's would, and leave without ever returning."""
    os.setpgid(0, 0)
    if case.processes > 1:
        size = str(case.processes)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    log = os.open(case.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    meet = dist.init_process_group

    def init_process_group(*arguments: Any, **options: Any) -> None:
        meet(*arguments, **options)
        _met(case, name, rank).touch()

    dist.init_process_group = init_process_group
    try:
        train(case.recipe(name))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _met(case: Case, name: str, rank: int) -> Path:
    """There when a process has met the others; it waits for one that dies before until a launcher
    ends it, and then is told of a death by its connection."""
    return case.folder / f"{name}-{rank}.met"


def wait(children: list[int], seconds: float) -> list[int | None]:
    """Exit codes of children after at most so many seconds, None for those that still live."""
    codes: list[int | None] = [None] * len(children)
    deadline = time.monotonic() + seconds
    while None in codes and time.monotonic() < deadline:
        for index, child in enumerate(children):
            if codes[index] is None:
                done, status = os.waitpid(child, os.WNOHANG)
                codes[index] = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.01)
    return codes


def kill(children: list[int], one: bool) -> float:
    """Kill all, or one and then wait for the others; returns how long these took to end."""
    for child in children[:1] if one else children:
        os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    if None in wait(children, PATIENCE):
        raise SystemExit(f"a process outlived its peer by {PATIENCE} seconds")
    return time.monotonic() - start


def digest(folder: Path) -> dict[str, str]:
    """Hashes of what a run has left, by what it is."""
    newest = list_checkpoints(folder)[-1]
    files = [file for file in sorted(newest.rglob("*")) if file.is_file()]
    found = {
        str(file.relative_to(newest)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in ("manifest.json", "state.json")  # they name the output folder
    }
    found["state.json"] = hashlib.sha256(_loop_state(newest).encode()).hexdigest()
    found["model"] = hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest()
    history = read_history(folder)
    columns = {**history.train, **history.telemetry}
    for name in sorted(columns.keys() - CLOCKS):
        found[f"log {name}"] = hashlib.sha256(columns[name].tobytes()).hexdigest()
    return found


def _loop_state(checkpoint: Path) -> str:
    """state.json without what names a run, and the setting in which trials differ."""
    content = json.loads((checkpoint / "state.json").read_text())
    scalars = content["scalars"]
    del scalars["tracker_run"], scalars["recipe"]["output"]
    del scalars["recipe"]["training"]["asynchronous_checkpoints"]
    return json.dumps(content)


def trial(case: Case, name: str, whole: float, moments: random.Random) -> dict[str, Any]:
    """One run with its kills; `whole` is how long it takes undisturbed, in seconds."""
    kills, resumed_at, longest = 0, [], 0.0
    while True:
        children = start(case, name)
        at = moments.uniform(0, 0.6 * whole) if kills < KILLS else PATIENCE * 10
        codes = wait(children, at)
        if None not in codes:
            break
        met = all(_met(case, name, rank).exists() for rank in range(case.processes))
        one = case.processes > 1 and kills % 2 == 1 and met
        living = [child for child, code in zip(children, codes, strict=True) if code is None]
        longest = max(longest, kill(living, one))
        kills += 1
    run = case.folder / name
    resumed_at = [row["step"] for row in records.read_metrics(run, "resumed")]
    return {"kills": kills, "codes": codes, "resumed_at": resumed_at, "peer_seconds": longest}


def study(case: Case, trials: int, seed: int) -> dict[str, Any]:
    """All trials of a case against the undisturbed run."""
    wait(start(case, "warm-up"), 600)  # data are cached, as on any start but the first
    begin = time.monotonic()
    codes = wait(start(case, "undisturbed"), 600)
    whole = time.monotonic() - begin
    if codes != [0] * case.processes:
        raise SystemExit((case.folder / "undisturbed.log").read_text())
    expected, moments, found = digest(case.folder / "undisturbed"), random.Random(seed), []
    for number in range(trials):
        name = f"trial-{number}"
        chosen = {ASYNCHRONOUS: number % 2 == 1, **case.settings}
        result = trial(replace(case, settings=chosen), name, whole, moments)
        result["asynchronous"] = chosen[ASYNCHRONOUS]
        ended = result["codes"] == [0] * case.processes
        got = digest(case.folder / name) if ended else {}
        keys = expected.keys() | got.keys()
        result["different"] = sorted(key for key in keys if got.get(key) != expected.get(key))
        found.append(result)
        print(f"{name}: {result}", file=sys.stderr, flush=True)
    return {
        "processes": case.processes,
        "settings": {**SETTINGS, **case.settings},
        "seconds_undisturbed": whole,
        "compared": len(expected),
        "trials": len(found),
        "asynchronous": sum(each["asynchronous"] for each in found),
        "kills": sum(each["kills"] for each in found),
        "resumes": sum(len(each["resumed_at"]) for each in found),
        "failed": sum(each["codes"] != [0] * case.processes for each in found),
        "different": sum(bool(each["different"]) for each in found),
        "longest_peer_seconds": max((each["peer_seconds"] for each in found), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--text", type=Path, help="training text; Python's help texts unless given")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before the first fork: threads do not survive it
    pairs = (each.partition("=") for each in arguments.set)
    settings = {key: json.loads(value) for key, _, value in pairs}
    if arguments.processes > 1:
        settings = {"training.micro_batch_size": 2, "training.sharding": "fsdp2", **settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = Case(folder, arguments.text or _help_texts(folder), arguments.processes, settings)
        result = study(case, arguments.trials, arguments.seed)
    result |= {"versions": records.versions(), "git_revision": records.git_revision()}
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        records.write_json(arguments.output, result)
    raise SystemExit(result["failed"] + result["different"] > 0)


def _help_texts(folder: Path) -> Path:
    """Text that every Python has: its own help, a document a topic."""
    place = folder / "topics"
    place.mkdir()
    for topic, text in topics.topics.items():
        (place / f"{topic}.txt").write_text(text, encoding="utf-8")
    return place


if __name__ == "__main__":
    main()
