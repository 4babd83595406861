"""Telemetry in training: our loop and Transformers' Trainer write it, and nothing else changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_stable import records
from hf_stable.checkpoints import list_checkpoints
from hf_stable.errors import DivergedError
from hf_stable.telemetry import WatchCallback, names
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.terminal import ending, watch_runs
from hf_stable.training import TrainResult, train
from tests.techniques import build
from tests.training import tiny_recipe


def _train(folder: Path, name: str, **settings: Any) -> TrainResult:
    return train(tiny_recipe(folder, output=folder / name, training__log_every=1, **settings))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """20 steps, looked at in the 1st and every 3rd, with bounds after every 5th."""
    folder = tmp_path_factory.mktemp("watched")
    return _train(folder, "run", telemetry__every=3, telemetry__bounds_every=5)


@pytest.fixture(scope="module")
def history(watched: TrainResult) -> History:
    return read_history(watched.folder)


def _losses(result: TrainResult) -> list[float]:
    return [row["loss"] for row in records.read_metrics(result.folder, "train")]


def test_looking_changes_no_bit_of_a_run(watched: TrainResult, tmp_path: Path) -> None:
    plain = _train(tmp_path, "plain", telemetry__every=0)
    assert _losses(plain) == _losses(watched)
    weights, same = (
        load_file(result.folder / "model" / "model.safetensors") for result in (plain, watched)
    )
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert records.read_metrics(plain.folder, "telemetry") == []


def test_samples_come_when_the_recipe_says(history: History) -> None:
    assert history.steps.tolist() == [1, 3, 6, 9, 12, 15, 18]
    bounds = history.series("layers.1.stream/mlp_bound")
    assert [step for step, value in zip(history.steps, bounds, strict=True) if value > 1] == [
        *(1, 6, 12, 15)
    ]


def test_records_hold_the_vocabulary(history: History) -> None:
    known = [names.LINEAR, names.ATTENTION, names.STREAM, names.OPTIMIZER, names.HEAD]
    quantities = {quantity for group in known for quantity in group} | {"final_std"}
    found = {name.split("/")[1] for name in history.telemetry}
    assert found <= quantities
    # What the tiny baseline has no part in.
    off = {"gain", "clipped_rows", "max_logit_capped", "z_loss"}
    off |= {f"{name}_{what}" for name in "qk" for what in ("gain_max", "l2_before_norm")}
    assert quantities - found == off


def test_the_whole_update_is_what_the_parts_make(history: History) -> None:
    parts = [
        name for name in history.telemetry
        if name.endswith("/update_l2") and name != "optimizer/update_l2"
    ]  # fmt: skip
    columns = (history.telemetry[name].reshape(len(history.steps), -1) for name in parts)
    squares = sum((column**2).sum(1) for column in columns)
    assert squares**0.5 == pytest.approx(history.series("optimizer/update_l2"), rel=1e-4)


def test_gradients_are_those_before_clipping(history: History, watched: TrainResult) -> None:
    """All weights' gradients make the norm that the loop logs, which clipping then cuts."""
    norms = {row["step"]: row["grad_norm"] for row in records.read_metrics(watched.folder, "train")}
    places = [name for name in history.telemetry if name.endswith("/weight_grad_l2")]
    columns = (history.telemetry[name].reshape(len(history.steps), -1) for name in places)
    matrices = sum((column**2).sum(1) for column in columns) ** 0.5
    for step, norm in zip(history.steps.tolist(), matrices, strict=True):
        assert 0.9 * norms[step] < norm <= norms[step] * (1 + 1e-4)


def test_a_resumed_run_looks_where_it_would_have(history: History, tmp_path: Path) -> None:
    settings = {"training__checkpoint_every": 10, "telemetry__every": 3}
    whole = _train(tmp_path, "run", **settings)
    rows = (whole.folder / "metrics.jsonl").read_text().splitlines()
    kept = [row for row in rows if json.loads(row)["step"] <= 10]
    (whole.folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    shutil.rmtree(list_checkpoints(whole.folder)[-1])
    before = read_history(whole.folder).steps.tolist()
    again = read_history(_train(tmp_path, "run", **settings).folder)
    assert before == [1, 3, 6, 9]
    assert again.steps.tolist() == history.steps.tolist()
    name = "layers.0.qkv/output_l2"
    assert again.series(name).tolist() == history.series(name).tolist()


def test_a_run_that_gives_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_stable.guard.ladder.MAX_NON_FINITE_STEPS", 2)
    with pytest.raises(DivergedError):
        _train(
            tmp_path,
            "run",
            telemetry__every=1,
            optimizer__learning_rate=1e20,
            optimizer__weight_decay=0.0,
            optimizer__max_grad_norm="null",
            schedule__warmup=0,
        )
    history = read_history(tmp_path / "run")
    assert ending(history) == "diverged"
    assert history.non_finite


def _trainer(folder: Path, trackers: list[str] | None = None) -> tuple[Trainer, Any]:
    model = build(z_loss=1e-4).float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 61, (8, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        report_to=trackers or [],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data), model


def test_the_trainer_writes_the_same_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain, weights = _trainer(tmp_path / "plain")
    plain.train()
    trainer, same = _trainer(tmp_path / "run", ["tensorboard"])
    trainer.add_callback(WatchCallback(trainer, every=2, bounds_every=2))
    trainer.train()
    pairs = zip(weights.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    history = read_history(tmp_path / "run")
    assert history.steps.tolist() == [1, 2, 4, 6]
    assert history.train["step"].tolist() == [1, 2, 3, 4, 5, 6]
    logged = [row for row in plain.state.log_history if "loss" in row]
    assert history.train["loss"].tolist() == [row["loss"] for row in logged]
    kinds = [row["event"] for row in history.events]
    assert kinds == ["started", "validation", "validation", "finished"]
    folder = next((tmp_path / "run").rglob("events.out.tfevents*")).parent
    board = events.EventAccumulator(str(folder)).Reload()
    tracked = board.Scalars("train/telemetry/head/log_z_mean")
    assert [event.step for event in tracked] == history.steps.tolist()
    assert history.run["model_config"]["z_loss"] == 1e-4
    watch_runs([tmp_path / "run"], Console(width=100), refresh=0.1, once=True)
    assert "step 6 of 6" in capsys.readouterr().out
