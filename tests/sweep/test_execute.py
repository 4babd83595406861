"""A study survives whatever happens to it: its results are those of an undisturbed one."""

import dataclasses
import json
import os
import random
import subprocess
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalExecutor

from hf_stable.errors import UserError
from hf_stable.sweep import execute as executing
from hf_stable.sweep.execute import Progress, execute
from hf_stable.sweep.jobs import Jobs, Work
from hf_stable.sweep.plan import Plan, load_plan, planned_runs, write_plan
from hf_stable.sweep.rule import Thresholds, Verdict
from hf_stable.sweep.study import read_study
from hf_stable.sweep.worker import work
from hf_stable.telemetry.reading.history import read_history

from ..training import write_text
from ..warm import python, warm
from .test_plan import RECIPES

PLAN = """\
name: p
base: [{recipes}/base/tiny.yaml]
methods: [{recipes}/techniques/baseline.yaml, {recipes}/techniques/qk_norm.yaml]
learning_rates: [{rates}]
seeds: [0]
settings:
  - data.train=[{text}]
  - data.cache={folder}/cache
  - training.steps=12
  - training.evaluate_every=0
  - training.threads=1
  - telemetry.every=5
"""


def plan_of(folder: Path, output: str, rates: str = "1e-2, 1e-1", *settings: str) -> Plan:
    file = folder / "plan.yaml"
    text = write_text(folder)
    file.write_text(PLAN.format(recipes=RECIPES, text=text, folder=folder, rates=rates))
    return load_plan(file, list(settings), str(folder / output))


def results(plan: Plan) -> dict[str, dict[str, Any]]:
    """All results, without what time decides."""
    found = {}
    for run in planned_runs(plan):
        result = json.loads((Path(run.recipe.output) / "result.json").read_text())
        found[run.id] = {key: value for key, value in result.items() if key != "seconds"}
    return found


def losses(plan: Plan) -> dict[str, list[float]]:
    return {
        run.id: read_history(Path(run.recipe.output)).train["loss"].tolist()
        for run in planned_runs(plan)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Plan:
    plan = plan_of(folder, "undisturbed")
    work(write_plan(plan, planned_runs(plan), Thresholds()))
    return plan


def test_a_result_says_what_the_records_do(undisturbed: Plan) -> None:
    found = results(undisturbed)
    assert len(found) == 4
    for run in planned_runs(undisturbed):
        result = found[run.id]
        history = read_history(Path(run.recipe.output))
        assert result["status"] == "finished"
        assert result["steps"] == 12
        assert result["initial_loss"] == history.train["loss"][0]
        assert result["flops"] == history.run["flops_per_token"] * 12 * run.recipe.tokens_per_step
        assert (result["method"], result["learning_rate"]) == (run.method, run.learning_rate)
        assert not (Path(run.recipe.output) / "model").exists()


def test_a_study_killed_again_and_again_has_the_same_results(
    folder: Path, undisturbed: Plan
) -> None:
    plan = plan_of(folder, "killed")
    study = write_plan(plan, planned_runs(plan), Thresholds())
    command = [python(), "-m", "hf_stable.sweep.worker", str(study)]
    moments = random.Random(0)
    for _ in range(3):
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list((study / "runs").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        worker.kill()
        worker.wait()
        for lock in (study / "locks").iterdir():  # until the system has taken them back
            with FileLock(lock, timeout=60):
                pass
    work(study)
    assert results(plan) == results(undisturbed)
    assert losses(plan) == losses(undisturbed)


def test_finished_models_are_scored_on_the_same_documents(folder: Path) -> None:
    plan = plan_of(folder, "scored", "1e-2", "data.holdout=0.2")
    plan = dataclasses.replace(plan, perplexity_documents=6)
    work(write_plan(plan, planned_runs(plan), Thresholds()))
    sums = read_study(plan.folder).perplexities
    assert sums.keys() == {run.id for run in planned_runs(plan)}
    baseline, qk_norm = sums.values()
    assert baseline.shape == (6, 4)
    assert (baseline[:, 1:] == qk_norm[:, 1:]).all()
    assert (baseline[:, 0] != qk_norm[:, 0]).all()
    for run in planned_runs(plan):
        loss = json.loads((Path(run.recipe.output) / "result.json").read_text())["validation_loss"]
        nll, tokens, *_ = sums[run.id].sum(axis=0)
        assert nll / tokens == pytest.approx(loss, abs=0.5)  # other windows of much the same text


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that have torch when they start; a job's id is its controller's pid."""
    warm(monkeypatch, executing)
    jobs = partialmethod(LocalExecutor.__init__, python=python())
    monkeypatch.setattr(LocalExecutor, "__init__", jobs)


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_share_the_runs(folder: Path, undisturbed: Plan) -> None:
    plan = plan_of(folder, "shared")
    study = execute(plan, workers=2)
    assert results(plan) == results(undisturbed)
    begun = [
        line.split(":")[0]
        for log in (study / "logs").glob("*.log")
        for line in log.read_text().splitlines()
        if line.endswith(": attempt 1")
    ]
    assert sorted(begun) == sorted(run.id for run in planned_runs(plan))


def test_a_run_that_somebody_has_is_left_alone(folder: Path) -> None:
    plan = plan_of(folder, "locked", "1e-2")
    study = write_plan(plan, planned_runs(plan), Thresholds())
    mine = planned_runs(plan)[0]
    (study / "locks").mkdir()
    with FileLock(study / "locks" / f"{mine.id}.lock"):
        work(study)  # another file description: to the lock it is another process
    done = [
        run.id for run in planned_runs(plan) if (Path(run.recipe.output) / "result.json").exists()
    ]
    assert done == [run.id for run in planned_runs(plan) if run.id != mine.id]


def test_what_fails_twice_is_recorded_and_the_rest_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, "failing", "1e-2")
    broken = planned_runs(plan)[0]
    tried = []

    def fail(recipe: Any, **_: Any) -> Any:
        tried.append(recipe.name)
        if recipe.name == broken.method:
            raise RuntimeError("no more memory")
        return original(recipe, **_)

    from hf_stable.sweep import worker  # noqa: PLC0415

    original = worker.train
    monkeypatch.setattr(worker, "train", fail)
    work(write_plan(plan, planned_runs(plan), Thresholds()))
    found = results(plan)
    assert tried.count(broken.method) == found[broken.id]["attempts"] == 2
    assert found[broken.id]["status"] == "failed"
    assert found[broken.id]["error"] == "RuntimeError: no more memory"
    assert [result["status"] for name, result in found.items() if name != broken.id] == ["finished"]


def test_hopeless_runs_are_stopped_and_counted_as_unstable(folder: Path) -> None:
    wild = ("optimizer.max_grad_norm=null", "optimizer.weight_decay=0.0")
    plan = plan_of(folder, "hopeless", "10.0", *wild)
    hasty = Thresholds(hopeless=0.01, hopeless_steps=2, hopeless_from=0.1)
    work(write_plan(plan, planned_runs(plan), hasty))
    for result in results(plan).values():
        assert result["status"] == "stopped"
        assert result["steps"] < 12
        assert not Verdict.from_dict(result["verdict"]).stable


@pytest.mark.usefixtures("warm_workers")
def test_jobs_of_submitit_have_the_results_of_workers(folder: Path, undisturbed: Plan) -> None:
    plan = plan_of(folder, "jobs", "1e-2")
    study = execute(plan, workers=2, slurm={"cluster": "local", "timeout_min": 5})
    wanted, trained = results(undisturbed), losses(undisturbed)
    found = results(plan)
    assert len(found) == 2
    assert found == {name: wanted[name] for name in found}
    assert losses(plan) == {name: trained[name] for name in found}
    assert len(list((study / "slurm").glob("*_result.pkl"))) == 2


def test_the_end_of_a_job_is_no_failure_of_its_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_stable.sweep import worker  # noqa: PLC0415

    def end(*_: Any, **__: Any) -> None:
        raise UncompletedJobError("at its time limit")

    plan = plan_of(folder, "ended", "1e-2")
    study = write_plan(plan, planned_runs(plan), Thresholds())
    monkeypatch.setattr(worker, "train", end)
    again = Work().checkpoint(study)
    with pytest.raises(UncompletedJobError):
        again.function(*again.args, **again.kwargs)
    assert not (study / "failures").exists()
    assert not list((study / "runs").glob("*/result.json"))


@pytest.mark.usefixtures("warm_workers")
def test_jobs_that_fail_are_said_to(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 1, {"cluster": "local", "timeout_min": 5})  # there is no plan
    while jobs.is_working():
        time.sleep(0.1)
    with pytest.raises(UserError, match=r"1 of 1 jobs failed.*plan\.json.*same command to resume"):
        jobs.check()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cluster": "pbs"}, "pbs"),
        ({"cluster": "local", "colour": 3}, "colour"),
        ({"cluster": "local", "timeout_min": "long"}, "timeout_min"),
    ],
)
def test_parameters_that_submitit_refuses_are_named(
    tmp_path: Path, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"--slurm.*{words}"):
        Jobs(tmp_path, 1, parameters)


def test_a_text_without_marks_is_refused_before_anything_is_trained(folder: Path) -> None:
    text, letters = folder / "letters", random.Random(0)
    text.mkdir()
    for number in range(12):  # no letter tells the next one
        drawn = letters.choices("abcdefghijklmnopqrstuvwxyz", k=2000)
        (text / f"{number}.txt").write_text("".join(drawn))
    settings = [f"data.train=[{text}]", "tokenizer.vocab_size=260", "data.holdout=0.3"]
    plan = plan_of(folder, "unmarked", "1e-2", *settings)
    with pytest.raises(UserError, match=r"lr-0\.01_seed-0: .* bigram table that is better"):
        execute(plan)
    assert not (plan.folder / "plan.json").exists()


def test_results_of_another_recipe_are_not_mixed_in(folder: Path, undisturbed: Plan) -> None:
    changed = plan_of(folder, "undisturbed", "1e-2, 1e-1", "optimizer.beta2=0.9")
    with pytest.raises(UserError, match="finished run of another recipe"):
        execute(changed)


def test_progress_counts_what_is_there(undisturbed: Plan) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Progress(planned_runs(undisturbed), 10.0).view())
    text = console.export_text()
    assert "4 of 4 runs" in text
    assert "baseline" in text
    assert [line.split() for line in text.splitlines() if "method" in line] == [
        ["method", "0.01", "0.1"]
    ]
