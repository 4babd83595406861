"""Laws of reading a study: every result is where its record says, and what is missing is named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hf_stable.errors import UserError
from hf_stable.sweep import grid
from hf_stable.sweep.report_predictors import features
from hf_stable.sweep.study import Place, read_study

from .studies import (
    BIGRAM,
    LIMITS,
    STEPS,
    UNIGRAM,
    Made,
    final_loss,
    identity,
    max_logit,
    places,
    write_study,
)

ONE = ("qk_norm", "std=0.02 (a)", 0.1, 1)


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def result_file(folder: Path, place: tuple[str, str, float, int]) -> Path:
    return folder / "runs" / identity(place) / "result.json"


def test_every_result_is_where_its_record_says(tmp_path: Path) -> None:
    made = Made(variants=("", "std=0.02 (a)"), odd_limits={"baseline": 0.01})
    study = read_study(write_study(tmp_path, made))
    assert not study.unfinished and not study.notes
    assert len(study.results) == len(places(made))
    for place in places(made):
        method, variant, rate, seed = place
        (found,) = (run for run in study.cell(method, variant, rate) if run.place.seed == seed)
        assert found.id == identity(place) and found.place == Place(*place)
        assert found.validation_loss == final_loss(made, place)
        assert (found.unigram, found.bigram) == (UNIGRAM, BIGRAM)
        assert found.history is not None and len(found.history.train["loss"]) == found.steps
        table = study.numbers(method, variant, lambda run: run.validation_loss)
        row, column = made.seeds.index(seed), made.rates.index(rate)
        assert table[row, column] == final_loss(made, place)


def test_unfinished_runs_are_named_and_have_their_cell(tmp_path: Path) -> None:
    made = Made(variants=("", "std=0.02 (a)"), statuses={ONE: "missing"})
    study = read_study(write_study(tmp_path, made))
    assert study.unfinished == [identity(ONE)]
    assert study.awaited == [Place(*ONE)]
    assert study.missing(*ONE[:3]) == 1 and study.missing("qk_norm", "", 0.1) == 0
    assert [run.place.seed for run in study.cell(*ONE[:3])] == [0, 2]
    table = study.numbers("qk_norm", ONE[1], lambda run: run.validation_loss)
    assert np.argwhere(np.isnan(table)).tolist() == [[1, 2]]


def test_a_study_that_has_only_a_plan_can_be_read(tmp_path: Path) -> None:
    made = Made(statuses=dict.fromkeys(places(Made()), "missing"))
    study = read_study(write_study(tmp_path, made))
    assert study.unfinished == [identity(place) for place in places(made)]
    assert study.rates_of("") == list(made.rates)
    stable = grid.recorded(study)
    assert grid.largest_stable(study, stable, "baseline", "") is None
    assert grid.breaks(study, stable, "baseline", "") == {}


def test_stopped_is_unstable_and_failed_is_neither(tmp_path: Path) -> None:
    stopped, failed = ("baseline", "", 0.3, 0), ("baseline", "", 0.01, 1)
    made = Made(statuses={stopped: "stopped", failed: "failed"})
    study = read_study(write_study(tmp_path, made))
    runs = {run.id: run for run in study.results}
    assert runs[identity(stopped)].unstable and not runs[identity(stopped)].stable
    assert not runs[identity(failed)].unstable and not runs[identity(failed)].stable
    assert math.isnan(runs[identity(failed)].capped_loss)
    assert not study.notes
    found = grid.count(study, grid.recorded(study), "baseline", "", 0.01)
    assert (found.stable, found.ended, found.failed) == (2, 3, 1) and found.is_stable


@pytest.mark.parametrize(
    ("loss", "capped"), [(3.0, 3.0), (9.9, 6.2), (math.nan, 6.2), (math.inf, 6.2)]
)
def test_no_loss_counts_for_more_than_that_at_the_start(
    loss: float, capped: float, tmp_path: Path
) -> None:
    made = Made(losses={("baseline", "", 0.01, 0): loss})
    study = read_study(write_study(tmp_path, made))
    assert study.cell("baseline", "", 0.01)[0].capped_loss == capped


def test_a_damaged_log_is_noted_and_the_result_kept(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Made(losses={("baseline", "", 0.01, 0): 3.15}))
    place = ("baseline", "", 0.01, 0)
    (result_file(folder, place).parent / "metrics.jsonl").write_text("{\n{}\n", encoding="utf-8")
    study = read_study(folder)
    assert len(study.notes) == 1 and identity(place) in study.notes[0]
    assert str(tmp_path) not in study.notes[0]
    run = study.cell("baseline", "", 0.01)[0]
    assert run.history is None and run.collapsed and not run.diverged
    assert grid.not_judged(study) == [run.id]
    # Without a log the verdict recorded stays, though H1 - 0.2 is above this loss.
    assert not grid.judged(study, "unigram-0.2")[run.id]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "other"}, "method 'other' is not in plan.json"),
        ({"seed": 9}, "seed 9 is not in plan.json"),
        ({"status": "half"}, "known are finished, stopped, failed"),
        ({"learning_rate": None}, "delete the file"),
    ],
)
def test_a_result_that_cannot_be_placed_is_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = write_study(tmp_path)
    file = result_file(folder, ("baseline", "", 0.01, 0))
    edit(file, **change)
    with pytest.raises(UserError, match=words) as caught:
        read_study(folder)
    assert str(file) in str(caught.value)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no plan\.json"):
        read_study(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'runs'"):
        read_study(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_study(tmp_path)


def test_perplexity_records_that_are_no_sums_are_noted(tmp_path: Path) -> None:
    folder = write_study(tmp_path, Made(documents=6))
    files = sorted((folder / "perplexity").iterdir())
    edit(files[0], documents=[[1, 2, 3]])
    study = read_study(folder)
    assert len(study.perplexities) == len(files) - 1 == 3 * len(LIMITS) - 1
    assert files[0].name in study.notes[0]


@pytest.mark.parametrize("loss", [2.79, 2.81, 3.09, 3.11, 3.19, 3.21])
def test_judging_again_changes_exactly_the_runs_between_the_thresholds(
    loss: float, tmp_path: Path
) -> None:
    place = ("baseline", "", 0.01, 0)
    study = read_study(write_study(tmp_path, Made(losses={place: loss})))
    limits = {"bigram": BIGRAM, "middle": (UNIGRAM + BIGRAM) / 2, "unigram-0.2": UNIGRAM - 0.2}
    before = grid.recorded(study)
    assert grid.judged(study, "middle") == before
    for kind, limit in limits.items():
        changed = {run for run, good in grid.judged(study, kind).items() if good != before[run]}
        between = (loss < limit) != (loss < limits["middle"])
        assert changed == ({identity(place)} if between else set())


def test_the_largest_stable_rate_ends_at_the_first_break(tmp_path: Path) -> None:
    high = {("baseline", "", 0.3, seed): 2.3 for seed in range(3)}
    study = read_study(write_study(tmp_path, Made(losses=high, odd_limits={"qk_norm": 0.01})))
    stable = grid.recorded(study)
    # Stable again above a break does not count, and one seed of three is no majority.
    assert grid.largest_stable(study, stable, "baseline", "") == 0.03
    assert grid.largest_stable(study, stable, "qk_norm", "") == 0.1
    assert grid.largest_stable(study, stable, "qkv_norm", "") == 0.3
    assert grid.breaks(study, stable, "qk_norm", "") == {0: 0.1, 1: 0.01, 2: 0.1}


def test_nothing_is_said_of_rates_above_a_cell_that_was_not_run(tmp_path: Path) -> None:
    gone = {("qk_norm", "", 0.03, seed): "missing" for seed in range(3)}
    bad = {("baseline", "", 0.01, seed): 3.3 for seed in range(3)}
    study = read_study(write_study(tmp_path, Made(statuses=gone, losses=bad)))
    stable = grid.recorded(study)
    assert grid.largest_stable(study, stable, "qk_norm", "") is None
    assert grid.breaks(study, stable, "qk_norm", "") == {}
    assert grid.largest_stable(study, stable, "baseline", "") == 0
    assert grid.breaks(study, stable, "baseline", "") == {0: 0, 1: 0, 2: 0}


def test_pairs_turn_around_or_are_split() -> None:
    orders = [{"a": 1.0, "b": 2.0, "c": 2.0, "d": None}, {"a": 2.0, "b": 1.0, "c": 1.5, "d": 1.0}]
    turned, split = grid.reversals(orders)
    assert turned == ["a and b", "a and c"]
    assert split == ["c above b"]


def test_half_of_the_seeds_is_no_majority(tmp_path: Path) -> None:
    made = Made(seeds=(0, 1), odd_limits={"qk_norm": 0.01})
    study = read_study(write_study(tmp_path, made))
    assert grid.largest_stable(study, grid.recorded(study), "qk_norm", "") == 0.01


def test_a_fraction_is_of_the_planned_steps(tmp_path: Path) -> None:
    """Also where every run was stopped."""
    made = Made(limits={"baseline": 0.03}, seeds=(0,))
    folder = write_study(tmp_path, made)
    for file in folder.glob("runs/*/result.json"):
        edit(file, steps=STEPS // 2)
    study = read_study(folder)
    for run in study.results:
        place = ("baseline", "", run.place.learning_rate, 0)
        found = features(study, 0.4)[run.id]["max_logit"]
        assert found == pytest.approx(max_logit(made, place, round(0.4 * STEPS)))
