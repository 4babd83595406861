"""A study survives whatever happens to it: its results are those of an undisturbed one."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hf_stable.errors import UserError
from hf_stable.sweep.execute import Progress, execute
from hf_stable.sweep.plan import Plan, load_plan, planned_runs, write_plan
from hf_stable.sweep.rule import Thresholds
from hf_stable.sweep.study import read_study
from hf_stable.sweep.worker import work
from hf_stable.telemetry.reading.history import read_history
from tests.training import write_text

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
    command = [sys.executable, "-m", "hf_stable.sweep.worker", str(study)]
    moments = random.Random(0)
    for _ in range(5):
        worker = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not list((study / "runs").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
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
        command = [sys.executable, "-m", "hf_stable.sweep.worker", str(study)]
        subprocess.run(command, check=True, capture_output=True)
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


def test_hopeless_runs_are_stopped_and_counted_as_diverged(folder: Path) -> None:
    plan = plan_of(folder, "hopeless", "10.0", "optimizer.max_grad_norm=null")
    hasty = Thresholds(hopeless=0.01, hopeless_steps=2, hopeless_from=0.1)
    work(write_plan(plan, planned_runs(plan), hasty))
    for result in results(plan).values():
        assert result["status"] == "stopped"
        assert result["steps"] < 12
        assert result["verdict"]["diverged"]


def test_results_of_another_recipe_are_not_mixed_in(folder: Path, undisturbed: Plan) -> None:
    changed = plan_of(folder, "undisturbed", "1e-2, 1e-1", "optimizer.beta2=0.9")
    with pytest.raises(UserError, match="finished, but of another recipe"):
        execute(changed)


def test_progress_counts_what_is_there(undisturbed: Plan) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Progress(planned_runs(undisturbed), 10.0).view())
    text = console.export_text()
    assert "4 of 4 runs" in text
    assert "baseline" in text
