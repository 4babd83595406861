"""Laws of reading records: what was written comes back, whatever happened to the run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hf_stable.errors import UserError
from hf_stable.records import RunRecord
from hf_stable.telemetry import names
from hf_stable.telemetry.reading.history import read_history
from tests.telemetry.runs import Plan, numbers_at, sampled_steps, write_healthy


def test_every_number_comes_back_under_its_name(tmp_path: Path) -> None:
    plan = Plan(steps=40, every=10)
    history = read_history(write_healthy(tmp_path / "run", steps=40, every=10))
    assert history.steps.tolist() == sampled_steps(plan) == [1, 10, 20, 30, 40]
    assert history.num_layers == plan.layers
    assert history.non_finite == []
    for name in numbers_at(plan, 1, np.random.default_rng(0)):
        heads = (plan.heads,) if np.ndim(history.series(name)) == 2 else ()
        bins = (8,) if name.endswith("adam_ratio") else heads
        assert history.series(name).shape == (5, *bins), name
        assert np.isfinite(history.series(name)[0]).all(), name


def test_numbers_recorded_in_some_samples_are_nan_in_the_others(tmp_path: Path) -> None:
    history = read_history(write_healthy(tmp_path / "run", steps=60, every=10, bounds_every=5))
    there = np.isfinite(history.series("layers.1.stream/mlp_bound"))
    assert history.steps[there].tolist() == [1, 50]


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", steps=40, finished=False)
    whole = read_history(folder)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "telemetry", "step": 50, "layers.*.qkv/outp')
    cut = read_history(folder)
    assert cut.steps.tolist() == whole.steps.tolist()
    assert cut.train["step"].tolist() == whole.train["step"].tolist()


def test_what_a_resumed_run_took_back_does_not_count(tmp_path: Path) -> None:
    def wild(step: int, value: float) -> float:
        return math.nan if step > 20 else value

    folder = write_healthy(
        tmp_path / "run", steps=40, finished=False, changes={"layers.0.qkv/output_rms": wild}
    )
    assert read_history(folder).non_finite
    other = write_healthy(tmp_path / "other", steps=60)
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    record = RunRecord(folder)
    record.append("resumed", 20)
    for row in rows:
        if row["step"] > 20:
            record.append(**row)
    record.close()
    history = read_history(folder)
    assert history.steps.tolist() == [1, 10, 20, 30, 40, 50, 60]
    assert history.train["step"].tolist() == [10, 20, 30, 40, 50, 60]
    assert history.non_finite == []


def test_numbers_that_are_not_finite_are_told_from_missing_ones(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    sample = {
        "layers.0.attention/max_logit": [1.0, math.inf],
        "layers.1.attention/max_logit": [1.0, 2.0],
        "layers.2.qkv/output_rms": math.nan,
        "head/log_z_mean": -math.inf,
    }
    record.append("telemetry", 7, **names.pack(sample))
    record.append("train", 10, loss=math.nan, learning_rate=1e-3, grad_norm=1.0)
    record.append("non_finite", 11, loss=2.0, grad_norm=math.inf)
    record.close()
    history = read_history(tmp_path / "run")
    assert history.non_finite == [
        (7, "layers.0.attention/max_logit"),
        (7, "layers.2.qkv/output_rms"),
        (7, "head/log_z_mean"),
        (10, "loss"),
        (11, "grad_norm"),
    ]
    assert history.series("layers.0.attention/max_logit").tolist() == [[1.0, math.inf]]
    assert history.series("head/log_z_mean").tolist() == [-math.inf]
    assert np.isnan(history.series("layers.0.qkv/output_rms")).all()


def test_a_run_without_telemetry_has_its_losses(tmp_path: Path) -> None:
    history = read_history(write_healthy(tmp_path / "run", steps=40, every=0))
    assert (len(history.steps), history.num_layers) == (0, 0)
    assert len(history.train["loss"]) == 4


@pytest.mark.parametrize("content", [None, '{"event": \n{"event": "finished", "step": 1}\n'])
def test_a_folder_that_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_history(tmp_path)
