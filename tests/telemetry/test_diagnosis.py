"""Laws of diagnosis: what came first is what the records can show, and no more is said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_stable.model.configuration_stable_gpt import PRESETS, StableGPTConfig
from hf_stable.records import RunRecord, write_json
from hf_stable.telemetry.reading.diagnosis import Diagnosis, diagnose
from hf_stable.telemetry.reading.history import read_history
from hf_stable.telemetry.reading.onset import loss_moves
from hf_stable.telemetry.reading.remedies import REMEDIES, remedies
from hf_stable.telemetry.reading.rules import RULES
from tests.telemetry.runs import Change, write_diverging, write_healthy

SETTINGS = {remedy.name: remedy for group in REMEDIES.values() for remedy in group}


def rising(start: int, height: float = 3.0, width: float = 40) -> Change:
    return lambda step, loss: loss + height * (1 - math.exp(-max(0, step - start) / width))


def spike(start: int, end: int, height: float = 2.0) -> Change:
    return lambda step, loss: loss + (height if start < step <= end else 0)


def diagnosis_of(folder: Path, **fields: Any) -> Diagnosis:
    return diagnose(read_history(write_healthy(folder / "run", **fields)))


def logits(start: int, end: float = math.inf) -> dict[str, Change]:
    def change(step: int, healthy: Any) -> Any:
        return [2e3, 10.0] if start <= step <= end else healthy

    return {"layers.2.attention/max_logit": change}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("log_every", [1, 10])
def test_a_healthy_loss_never_moves(seed: int, log_every: int, tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", seed=seed, log_every=log_every, every=0)
    assert loss_moves(read_history(folder)) == []


@pytest.mark.parametrize("start", [100, 300, 450])
def test_the_move_is_found_where_the_loss_leaves_its_course(start: int, tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", loss=rising(start), every=0)
    (move,) = loss_moves(read_history(folder))
    assert abs(move.step - start) <= 30
    assert move.after == move.step - 10
    assert move.seen >= move.step
    assert not move.recovered


def test_a_rise_within_noise_is_no_move(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", loss=rising(300, height=0.15), every=0)
    assert loss_moves(read_history(folder)) == []


def test_a_spike_is_a_move_that_recovered(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run", loss=spike(300, 340), every=0)
    (move,) = loss_moves(read_history(folder))
    assert (move.step, move.recovered) == (310, True)
    assert 0.2 < move.rise <= 2.1


def test_a_loss_that_is_not_finite_is_a_move(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, loss=lambda step, loss: math.nan if step == 200 else loss)
    assert found.onset is not None
    assert (found.onset.step, found.onset.after, found.onset.recovered) == (200, 190, True)
    assert found.first == []  # the move itself is no sign of it


def test_updates_refused_in_a_row_are_a_move(tmp_path: Path) -> None:
    record = RunRecord(write_healthy(tmp_path / "run", steps=100, finished=False))
    for step in range(101, 121):
        record.append("non_finite", step, loss=3.0, grad_norm=math.nan)
    record.close()
    (move,) = loss_moves(read_history(tmp_path / "run"))
    assert (move.step, move.after, move.rise) == (101, 100, math.inf)


def test_the_first_alarm_its_layer_and_its_lead(tmp_path: Path) -> None:
    found = diagnose(read_history(write_diverging(tmp_path / "run", layer=2)))
    assert found.onset is not None
    assert {alarm.layer for alarm in found.first} == {2}
    assert {"max_logit_early"} <= {alarm.rule for alarm in found.first}
    assert found.lead == found.onset.step - found.first[0].step > 0
    assert found.lead_range is not None
    low, high = found.lead_range
    assert low <= found.lead <= high
    # A sample and a log line every 10 steps leave 20 steps open.
    assert high - low == 20
    assert f"{low} to {high} steps before the loss moved" in " ".join(found.sentences)


@pytest.mark.parametrize("every", [10, 50])
def test_the_distance_of_samples_is_stated(every: int, tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, every=every, loss=rising(450), changes=logits(300))
    assert found.first[0].step == 300
    assert found.first[0].after == 300 - every
    assert f"after step {300 - every} and by step 300" in " ".join(found.sentences)


@pytest.mark.parametrize("start", [450, 550])
def test_an_alarm_after_the_move_is_never_given_a_lead(start: int, tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, loss=rising(300), changes=logits(start))
    assert (found.first, found.lead, found.lead_range) == ([], None, None)
    assert [alarm.step for alarm in found.later] == [start]
    text = " ".join(found.sentences)
    assert "there had been no alarm" in text
    assert "after the loss had moved" in text
    assert found.remedies == []


def test_an_alarm_of_the_same_interval_has_no_order(tmp_path: Path) -> None:
    moved = diagnosis_of(tmp_path / "move", loss=rising(300))
    assert moved.onset is not None
    found = diagnosis_of(tmp_path, loss=rising(300), changes=logits(moved.onset.step))
    assert found.lead == 0
    assert "which came first is not known" in " ".join(found.sentences)


def test_an_alarm_that_had_passed_is_not_the_first(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, loss=rising(450), changes=logits(100, 150))
    assert found.first == []
    assert [alarm.step for alarm in found.passed] == [100]
    assert "no alarm stood" in " ".join(found.sentences)


def test_without_a_move_alarms_are_listed_and_nothing_is_said_to_follow(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, changes=logits(300))
    assert (found.onset, found.lead) == (None, None)
    assert [alarm.step for alarm in found.first] == [300]
    text = " ".join(found.sentences)
    assert "never rose" in text
    assert "so far" in text


def test_a_healthy_run_is_said_to_be_so(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path)
    assert found.sentences[-1] == "There is no alarm."
    assert found.remedies == []


def test_a_loss_that_recovered_is_explained_only_if_no_other_stayed(tmp_path: Path) -> None:
    def both(step: int, loss: float) -> float:
        return rising(450)(step, spike(200, 240)(step, loss))

    found = diagnosis_of(tmp_path, loss=both)
    assert found.onset is not None
    assert not found.onset.recovered
    assert found.onset.step > 440
    assert "2 times in all" in found.sentences[0]


def test_without_telemetry_the_diagnosis_says_how_to_have_it(tmp_path: Path) -> None:
    found = diagnosis_of(tmp_path, every=0, loss=rising(300))
    assert found.samples == 0
    assert "telemetry.every=" in found.sentences[-1]
    assert found.first == found.remedies == []


def test_a_run_that_never_learned_is_not_called_well(tmp_path: Path) -> None:
    folder = write_healthy(tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    for unigram, little in ((4.0, True), (12.0, False)):
        run["data"] = {"unigram_nats_per_token": unigram, "bigram_nats_per_token": 2.0}
        write_json(folder / "run.json", run)
        text = " ".join(diagnose(read_history(folder)).sentences)
        assert ("has learned little" in text) is little


@pytest.mark.parametrize(
    ("config", "words"),
    [(None, "not known which techniques are on"), ({"model_type": "llama"}, "of type llama")],
)
def test_what_is_not_known_of_the_model_is_said(
    config: dict[str, str] | None, words: str, tmp_path: Path
) -> None:
    folder = write_diverging(tmp_path / "run")
    assert words not in " ".join(diagnose(read_history(folder)).sentences)
    write_json(folder / "run.json", {} if config is None else {"model_config": config})
    assert words in " ".join(diagnose(read_history(folder)).sentences)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rule", [rule.key for rule in RULES])
def test_a_technique_that_is_on_is_never_suggested(preset: str, rule: str) -> None:
    resolved = {"model_config": StableGPTConfig.from_preset(preset).to_dict()}
    by_name = {"recipe": {"model": {"preset": preset}}}
    for run in (resolved, by_name):
        found = remedies([rule], run)
        assert found
        for remedy in found:
            assert preset not in remedy.presets
            assert all(
                resolved["model_config"][name] == value for name, value in remedy.off.items()
            )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_suggested_technique_exists_and_is_then_on(name: str) -> None:
    remedy = SETTINGS[name]
    assert set(remedy.presets) <= set(PRESETS)
    defaults = StableGPTConfig().to_dict()
    assert all(defaults[field] == off for field, off in remedy.off.items())
    pairs = [pair.split("=") for pair in remedy.setting.split() if "=" in pair]
    fields = {key: value for key, value in pairs if key.startswith("model.")}
    if not fields:
        assert remedy.room == "optimizer"
        return
    words = {"true": True, "false": False, "null": None}
    chosen = {
        key.removeprefix("model."): words[value] if value in words else _number(value)
        for key, value in fields.items()
    }
    assert remedy.is_on({"model_config": StableGPTConfig(**chosen).to_dict()})
    assert not remedy.is_on({"model_config": defaults})


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def test_every_rule_has_a_remedy() -> None:
    assert {rule.key for rule in RULES} | {"non_finite"} == set(REMEDIES)


def test_evidence_is_the_record(tmp_path: Path) -> None:
    history = read_history(write_diverging(tmp_path / "run"))
    found = diagnose(history)
    assert {row.name for row in found.evidence} == {alarm.name for alarm in found.first}
    row = next(row for row in found.evidence if row.name.endswith("max_logit"))
    series = history.series(row.name).max(axis=1)
    index = history.steps.tolist().index(found.first[0].step)
    assert (row.at_start, row.before, row.at_alarm) == (series[0], series[index - 1], series[index])
    assert row.before <= row.threshold < row.at_alarm


def test_findings_can_be_written_also_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    changes: dict[str, Change] = {"layers.0.qkv/output_l2": lambda step, healthy: math.inf}
    found = diagnosis_of(tmp_path, changes=changes, loss=rising(300))
    write_json(tmp_path / "found.json", found.to_dict())
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["first"][0]["rule"] == "non_finite"
    assert written["lead"] == found.lead
