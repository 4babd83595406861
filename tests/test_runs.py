"""Files that a run leaves in its folder, and a second start of it."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers.utils import logging

from hf_stable import StableGPTForCausalLM
from hf_stable.card.evaluations import read_evaluation
from hf_stable.checksums import weights_of
from hf_stable.cli.commands import _new_tokens
from hf_stable.errors import CheckpointError, UserError
from hf_stable.optim import learning_rate_factor
from hf_stable.records import read_metrics, write_json
from hf_stable.reporting import Reporter
from hf_stable.resuming import check_length, finished_at
from hf_stable.runs import save_model
from hf_stable.training import train

from .checkpoints.faults import calls_of, die_at
from .tiny import byte_tokenizer, stable_gpt
from .training import tiny_recipe


def run_of(folder: Path, model: StableGPTForCausalLM) -> Any:
    """As much of a run as writing its model needs."""
    return SimpleNamespace(
        folder=folder, model=model, tokenizer=byte_tokenizer(), accelerator=Accelerator(cpu=True)
    )


def test_a_killed_write_of_the_final_model_leaves_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    """At every call: the model of before or the new one, never half of one and never none."""
    monkeypatch.setattr(logging, "_tqdm_active", False)  # its locks would be held in a fork
    before, after = stable_gpt(), stable_gpt()
    with torch.no_grad():
        after.lm_head.weight.add_(1.0)
    total = len(calls_of(partial(save_model, run_of(tmp_path / "whole", after))))
    assert total > 20
    seen = []
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        save_model(run_of(folder, before))
        assert die_at(partial(save_model, run_of(folder, after)), number)
        if not (folder / "model").exists():
            (folder / ".old-model").rename(folder / "model")  # as the next start does
        found = load_file(folder / "model" / "model.safetensors")["lm_head.weight"]
        seen.append(torch.equal(found, after.lm_head.weight))
        assert seen[-1] or torch.equal(found, before.lm_head.weight)
        assert {"config.json", "tokenizer.json"} < {
            path.name for path in (folder / "model").iterdir()
        }
        save_model(run_of(folder, after))
        assert [path.name for path in folder.iterdir()] == ["model"]
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `run` has finished 6 steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_recipe(folder, training__steps=6))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "topics").symlink_to(finished / "topics")
    (tmp_path / "cache").symlink_to(finished / "cache")
    return tmp_path / "run"


def state_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Everything in a folder that a start would write, with times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def recipe_like(run: Path, finished: Path, **changes: Any) -> Any:
    """The recipe of the finished run, whose output is the copy."""
    return tiny_recipe(finished, output=run, **{"training__steps": 6, **changes})


def test_a_second_start_of_a_finished_run_changes_nothing(run: Path, finished: Path) -> None:
    before = state_of(run)
    result = train(recipe_like(run, finished))
    assert (result.was_finished, result.steps) == (True, 6)
    assert result.validation_perplexity == read_metrics(run, "validation")[-1]["perplexity"]
    assert state_of(run) == before
    assert len(before) > 5


def test_a_run_without_its_model_or_its_end_has_not_finished(run: Path, finished: Path) -> None:
    recipe = recipe_like(run, finished)
    assert finished_at(recipe, "auto") is not None
    with pytest.raises(CheckpointError, match="holds a run already"):
        finished_at(recipe, "never")
    assert finished_at(recipe_like(run, finished, training__steps=8), "longer") is None
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"event": "resumed", "step": 6}\n')
    assert finished_at(recipe, "auto") is None
    shutil.rmtree(run / "model")
    assert finished_at(recipe, "auto") is None


def test_a_longer_run_takes_the_learning_rates_of_its_new_length(
    run: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    longer = recipe_like(run, finished, training__steps=9, training__log_every=1)
    with pytest.raises(CheckpointError, match="--resume longer"):
        train(longer)
    old = state_of(run / "model")
    result = train(longer, resume="longer")
    assert (result.steps, result.was_finished) == (9, False)
    assert "6 -> 9 steps" in capfd.readouterr().err
    schedule, rows = longer.schedule, read_metrics(run, "train")[-3:]
    assert [row["step"] for row in rows] == [7, 8, 9]
    for row in rows:
        factor = learning_rate_factor(
            row["step"] - 1,
            name=schedule.name,
            total_steps=9,
            warmup=longer.warmup_steps,
            min_ratio=schedule.min_ratio,
            decay_fraction=schedule.decay_fraction,
        )
        assert row["learning_rate"] == pytest.approx(factor * longer.optimizer.learning_rate)
    assert state_of(run / "model") != old
    assert train(longer, resume="longer").was_finished


def test_longer_allows_no_other_change_and_no_shorter_run(run: Path, finished: Path) -> None:
    other = recipe_like(run, finished, training__steps=9, optimizer__beta1=0.8)
    with pytest.raises(CheckpointError, match=r"optimizer\.beta1") as error:
        train(other, resume="longer")
    assert "training.steps" not in str(error.value)
    shorter = recipe_like(run, finished, training__steps=3)
    with pytest.raises(CheckpointError, match=r"6 steps, and training\.steps is 3"):
        train(shorter, resume="longer")
    before = state_of(run / "model")
    with pytest.raises(CheckpointError, match=r"at step 6, and training\.steps is 3"):
        train(shorter, resume="changed")
    assert state_of(run / "model") == before
    check_length(run, shorter, 3)


def test_an_evaluation_of_other_weights_is_refused(run: Path) -> None:
    numbers = dict.fromkeys(("documents", "tokens", "max_length", "stride"), 1)
    score = {"value": 2.0, "low": None, "high": None}
    scores = dict.fromkeys(("per_token", "per_word", "bits_per_byte"), score)
    file, weights = run / "evaluation.json", weights_of(run / "model")
    content = {"model": str(run), "data": None, "confidence": 0.95, **numbers, **scores}
    assert len(weights) == 1
    for known in (weights, None):  # None: written before weights were recorded
        write_json(file, {**content, "weights": known})
        assert read_evaluation(file, run).scores[0].value == 2.0
    write_json(file, {**content, "weights": dict.fromkeys(weights, "0" * 64)})
    with pytest.raises(UserError, match="measured on other weights"):
        read_evaluation(file, run)


@pytest.mark.parametrize(
    ("asked", "prompt", "longest", "count"),
    [
        (None, 8, 32, 24),
        (None, 31, 32, 1),
        (None, 8, 1000, 100),
        (None, 8, None, 100),
        (24, 8, 32, 24),
        (300, 8, None, 300),
    ],
)
def test_generate_fills_the_positions_that_are_left(
    asked: int | None, prompt: int, longest: int | None, count: int
) -> None:
    assert _new_tokens(asked, prompt, longest) == count


@pytest.mark.parametrize(("asked", "prompt"), [(None, 32), (None, 40), (25, 8), (1, 32)])
def test_generate_refuses_what_has_no_position(asked: int | None, prompt: int) -> None:
    with pytest.raises(UserError, match="exceed the model's 32 positions"):
        _new_tokens(asked, prompt, 32)


def test_a_log_line_has_the_total_and_the_time_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(tmp_path, Accelerator(cpu=True), 3000, 0)
    numbers = {"loss": 7.0, "learning_rate": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0}
    reporter.event("started", 0, "begins")
    reporter.train(10, numbers)
    reporter.train(3000, numbers)
    reporter.close()
    begins, on_the_way, last = capfd.readouterr().err.splitlines()
    assert begins == "step 0/3,000  begins"
    assert on_the_way.startswith("step 10/3,000  loss 7.0000")
    assert on_the_way.endswith(" left")
    assert last.startswith("step 3,000/3,000")
    assert "left" not in last
