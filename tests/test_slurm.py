"""The Slurm scripts against a Slurm of four small programs: who is run again, how often, and how.

`sbatch` runs the script from a copy, as Slurm does, until nobody asks for it to be requeued; `srun`
starts one task a node; `accelerate` does what the test says, once for each start of the job.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_stable.preemption import EXIT_PREEMPTED, MARKER

from .launching import ROOT

SCRIPTS = ROOT / "recipes" / "slurm"
JOB = 123456

SBATCH = """#!/usr/bin/env bash
set -u
mkdir "$FAKE/spool"
cp "$1" "$FAKE/spool/slurm_script"
shift
export SLURM_JOB_ID=123456 SLURM_JOB_NODELIST='node[1-2]' SLURM_GPUS_ON_NODE=2
for restart in 0 1 2 3 4 5 6 7 8 9; do
    if [ "$restart" -gt 0 ]; then export SLURM_RESTART_COUNT=$restart; fi
    rm -f "$FAKE/again"
    bash "$FAKE/spool/slurm_script" "$@"
    status=$?
    if [ ! -e "$FAKE/again" ]; then exit "$status"; fi
done
"""

SRUN = """#!/usr/bin/env bash
set -u
echo "$*" >>"$FAKE/srun.log"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait "$second"
wait "$first"
"""

SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '%s\\n' $HOSTS ;;
    requeue)
        echo "$2" >>"$FAKE/requeue.log"
        if [ -e "$FAKE/refuse" ]; then exit 1; fi
        touch "$FAKE/again"
        ;;
esac
"""

ACCELERATE = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
fake, start = Path(os.environ["FAKE"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
node, run = int(os.environ["SLURM_NODEID"]), Path(sys.argv[sys.argv.index("--output") + 1])
names = {{name: value for name, value in os.environ.items() if name.startswith("PET_")}}
(fake / f"launch-{{start}}-{{node}}.json").write_text(json.dumps([sys.argv[1:], names]))
outcome = (fake / "outcomes").read_text().split()[start]
if outcome == "preempted" and node == 0:
    (run / "{MARKER}").touch()
sys.exit(0 if outcome == "finished" else 1)
"""


def write_program(place: Path, text: str) -> None:
    place.write_text(text)
    place.chmod(0o755)


class Cluster:
    """A repository with the scripts, and a PATH on which the four programs are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fake = folder, folder / "fake"
        self.run = folder / "runs" / "x"
        shutil.copytree(SCRIPTS, folder / "recipes" / "slurm")
        self.run.mkdir(parents=True)
        self.fake.mkdir()
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name, text in {
            "sbatch": SBATCH,
            "srun": SRUN,
            "scontrol": SCONTROL,
            "accelerate": ACCELERATE,
        }.items():
            write_program(self.programs / name, text)

    def submit(self, *outcomes: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Submit a job of which each start ends as told, and wait until nothing more is run."""
        (self.fake / "outcomes").write_text(" ".join(outcomes))
        environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "FAKE": str(self.fake),
            "HOSTS": "node1 node2",
            **variables,
        }
        script = "recipes/slurm/train.sh"
        return subprocess.run(
            ["sbatch", script, "runs/x", "recipe.yaml", "--set", "data.train=[a b.txt]"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def requeues(self) -> list[str]:
        file = self.fake / "requeue.log"
        return file.read_text().split() if file.exists() else []

    def starts(self) -> int:
        return len(list(self.fake.glob("launch-*-0.json")))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("outcomes", "requeues", "status"),
    [
        (["finished"], 0, 0),
        (["failed"], 0, 1),
        (["preempted", "finished"], 1, 0),
        (["preempted", "failed"], 1, 1),
        (["preempted", "preempted", "preempted", "finished"], 3, 0),
    ],
)
def test_a_job_is_run_again_once_for_every_preemption(
    cluster: Cluster, outcomes: list[str], requeues: int, status: int
) -> None:
    finished = cluster.submit(*outcomes)
    assert cluster.requeues() == [str(JOB)] * requeues
    assert cluster.starts() == len(outcomes)
    assert finished.returncode == status, finished.stderr


def test_there_is_a_limit(cluster: Cluster) -> None:
    finished = cluster.submit(*["preempted"] * 9, MAX_REQUEUES="2")
    assert len(cluster.requeues()) == 2
    assert cluster.starts() == 3
    assert finished.returncode == EXIT_PREEMPTED
    assert "submit again to go on" in finished.stderr


def test_the_marker_of_a_former_attempt_counts_for_nothing(cluster: Cluster) -> None:
    (cluster.run / MARKER).touch()
    assert cluster.submit("failed").returncode == 1
    assert cluster.requeues() == []


def test_a_refused_requeue_is_said(cluster: Cluster) -> None:
    (cluster.fake / "refuse").touch()
    finished = cluster.submit("preempted")
    assert len(cluster.requeues()) == 1
    assert finished.returncode == EXIT_PREEMPTED
    assert "could not be requeued" in finished.stderr


@pytest.mark.parametrize("config", ["", "recipes/accelerate/fsdp2_nodes.yaml"])
def test_every_node_gets_a_launcher_of_its_own(cluster: Cluster, config: str) -> None:
    cluster.submit("finished", ACCELERATE_CONFIG=config)
    launches = [json.loads((cluster.fake / f"launch-0-{n}.json").read_text()) for n in range(2)]
    for node, (arguments, variables) in enumerate(launches):
        options = dict(itertools.pairwise(arguments))
        assert arguments[0] == "launch"
        assert options["--num_machines"] == "2"
        assert options["--machine_rank"] == str(node)
        assert options["--num_processes"] == "4"
        assert options["--main_process_ip"] == "node1"
        assert 1024 < int(options["--main_process_port"]) < 32768
        assert options["--log_dir"] == f"runs/x/logs/{JOB}-0/node-{node}"
        assert options.get("--config_file", "") == config
        assert ("--multi_gpu" in arguments) == (not config)
        training = arguments[arguments.index("-m") :]
        assert training == [
            *("-m", "hf_stable", "train", "recipe.yaml"),
            *("--set", "data.train=[a b.txt]", "--output", "runs/x"),
        ]
        assert {"SIGTERM", "SIGUSR1"} <= set(variables["PET_SIGNALS_TO_HANDLE"].split(","))
        assert int(variables["PET_SHUTDOWN_TIMEOUT"]) >= 120
    ports = {arguments[arguments.index("--main_process_port") + 1] for arguments, _ in launches}
    assert len(ports) == 1
    assert "--kill-on-bad-exit=1" in (cluster.fake / "srun.log").read_text()


@pytest.mark.slow
def test_every_rank_has_a_log(cluster: Cluster) -> None:
    """With the real launcher, and a training that only says who it is."""
    package = cluster.folder / "hf_stable"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], sys.argv[1:])\n"
    )
    write_program(
        cluster.programs / "accelerate",
        f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n',
    )
    finished = cluster.submit(HOSTS="127.0.0.1 127.0.0.1", ACCELERATE_USE_CPU="true")
    assert finished.returncode == 0, finished.stderr
    logs = cluster.run.glob(f"logs/{JOB}-0/node-*/{JOB}_*/attempt_0/*/stdout.log")
    words = [f"rank {rank} of 4" for rank in range(4)]
    found = sorted(log.read_text() for log in logs)
    assert [text[: len(words[0])] for text in found] == words
    assert "'data.train=[a b.txt]', '--output', 'runs/x'" in found[0]
    # The job's own log shows the first rank of each node.
    assert [word in finished.stdout for word in words] == [True, False, True, False]


def test_help_and_misuse_need_no_slurm(tmp_path: Path) -> None:
    def start(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(SCRIPTS / "train.sh"), *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    shown = start("--help")
    assert shown.returncode == 0
    assert "MAX_REQUEUES" in shown.stdout
    assert "set -euo" not in shown.stdout
    assert start().returncode == 2
    without = start("runs/x", "recipe.yaml")
    assert (without.returncode, "sbatch" in without.stderr) == (2, True)
    elsewhere = start("runs/x", "recipe.yaml", SLURM_JOB_ID="1")
    assert (elsewhere.returncode, "hf-stable recipes copy slurm" in elsewhere.stderr) == (2, True)


def _lint() -> Callable[[Path], list[str]]:
    if shutil.which("shellcheck"):
        return lambda script: ["shellcheck", str(script)]
    return lambda script: ["bash", "-n", str(script)]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert os.access(script, os.X_OK)
    checked = subprocess.run(_lint()(script), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_slurm_signals_the_processes_and_not_the_shell() -> None:
    """`B:` would signal the batch shell alone, which would die of it."""
    options = [
        line for line in (SCRIPTS / "train.sh").read_text().splitlines() if line[:7] == "#SBATCH"
    ]
    assert [line for line in options if "--signal" in line] == ["#SBATCH --signal=USR1@120"]
    assert "#SBATCH --requeue" in options
