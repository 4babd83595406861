"""Laws of alarms: each comes where its series crosses, in that layer, and only there."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from hf_stable.telemetry.reading.alarms import Alarm, alarms, episodes
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.rules import RULES, Thresholds
from tests.telemetry.runs import Change, write_diverging, write_healthy

LIMITS = Thresholds()
AT, LAYER = 800, 2


def history_of(folder: Path, **fields: Any) -> History:
    # After 600 steps there is little left to learn, so that the rules of growth judge.
    plan = {"steps": 1200, "every": 20, "log_every": 20, "warmup": 100, **fields}
    return read_history(write_healthy(folder / "run", **plan))


def from_step(value: Any, until: float = math.inf, at: int = AT) -> Change:
    return lambda step, healthy: value if at <= step <= until else healthy


def times(factor: float) -> Change:
    return lambda step, healthy: factor * healthy if step >= AT else healthy


def steady(value: float, factor: float) -> Change:
    """A series without noise or growth, so that its trailing median is known."""
    return lambda step, healthy: value * (factor if step >= AT else 1)


# Rule, series, how it crosses, and how it nearly does.
CROSSINGS: dict[str, tuple[str, Change, Change]] = {
    "max_logit": ("attention/max_logit", from_step([5.0, 1.01e4]), from_step([5.0, 0.99e4])),
    "max_logit_early": ("attention/max_logit", from_step([1010.0, 3.0]), from_step([990.0, 3.0])),
    "entropy": ("attention/entropy", from_step([0.0, 0.19]), from_step([0.0, 0.21])),
    "clipped_rows": ("attention/clipped_rows", from_step([0.1, 1.0]), from_step([0.0, 0.99])),
    "qkv_output": ("qkv/output_rms", steady(1.0, 2.01), steady(1.0, 1.99)),
    "proj_output": ("proj/output_rms", steady(1.0, 2.01), steady(1.0, 1.99)),
    "fc2_output": ("fc2/output_rms", steady(1.0, 2.01), steady(1.0, 1.99)),
    "qkv_input_grad": ("qkv/input_grad_l2", steady(1e-3, 5.01), steady(1e-3, 4.99)),
    "fc1_input_grad": ("fc1/input_grad_l2", steady(1e-3, 5.01), steady(1e-3, 4.99)),
    "grad_over_eps": ("optimizer/grad_rms_over_eps", from_step(9.9), from_step(10.1)),
}


def with_series(folder: Path, quantity: str, change: Change) -> History:
    def recorded(step: int, healthy: Any) -> Any:
        return change(step, [0.0, 0.0] if healthy is None else healthy)  # nothing is clipped

    return history_of(folder, changes={f"layers.{LAYER}.{quantity}": recorded})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [200, 1200])
def test_a_healthy_run_raises_no_alarm(seed: int, steps: int, tmp_path: Path) -> None:
    assert alarms(history_of(tmp_path, seed=seed, steps=steps)) == []


@pytest.mark.parametrize("rule", CROSSINGS)
def test_a_rule_fires_where_its_series_crosses(rule: str, tmp_path: Path) -> None:
    quantity, crossing, _ = CROSSINGS[rule]
    found = [
        each for each in alarms(with_series(tmp_path, quantity, crossing)) if each.rule == rule
    ]
    assert [(each.step, each.after, each.layer) for each in found] == [(AT, AT - 20, LAYER)]
    assert found[0].name == f"layers.{LAYER}.{quantity}"
    assert found[0].text.startswith(f"layer {LAYER}: ")
    assert found[0].text.endswith(f"at step {AT}")


@pytest.mark.parametrize("rule", CROSSINGS)
def test_a_rule_is_silent_on_the_other_side(rule: str, tmp_path: Path) -> None:
    quantity, _, near = CROSSINGS[rule]
    assert rule not in {each.rule for each in alarms(with_series(tmp_path, quantity, near))}


@pytest.mark.parametrize("rule", CROSSINGS)
def test_a_threshold_can_be_set(rule: str, tmp_path: Path) -> None:
    quantity, _, near = CROSSINGS[rule]
    shared = {"output": "output_growth", "grad": "input_grad_jump"}
    field = shared.get(rule.rsplit("_", 1)[-1], rule)
    now = dataclasses.asdict(LIMITS)[field]
    stricter = now * (1.2 if rule in ("entropy", "grad_over_eps") else 0.8)
    limits = dataclasses.replace(LIMITS, **{field: stricter})
    found = [a for a in alarms(with_series(tmp_path, quantity, near), limits) if a.layer == LAYER]
    assert rule in {each.rule for each in found}


@pytest.mark.parametrize(("value", "fires"), [(101.0, True), (-101.0, True), (99.0, False)])
def test_log_z_is_judged_on_both_sides(value: float, fires: bool, tmp_path: Path) -> None:
    found = alarms(history_of(tmp_path, changes={"head/log_z_mean": from_step(value)}))
    assert [(each.rule, each.layer, each.step) for each in found] == (
        [("log_z", None, AT)] if fires else []
    )


@pytest.mark.parametrize(("factor", "fires"), [(2.2, True), (1.8, False)])
def test_an_update_is_judged_for_its_learning_rate(
    factor: float, fires: bool, tmp_path: Path
) -> None:
    changes = {f"layers.{LAYER}.optimizer/update_l2": times(factor)}
    found = alarms(history_of(tmp_path, changes=changes))
    assert [(each.rule, each.layer) for each in found] == ([("update", LAYER)] if fires else [])


def test_warm_up_alone_raises_no_update_alarm(tmp_path: Path) -> None:
    """The learning rate, and with it the update, grows severalfold within each median's window."""
    history = history_of(tmp_path, steps=600, warmup=500, every=5, log_every=20)
    rates = history.train["learning_rate"]
    assert rates.max() / rates.min() > 20
    assert alarms(history) == []


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_as_a_power_of_the_step_is_healthy(power: float, tmp_path: Path) -> None:
    changes = {
        f"layers.0.{place}/output_rms": lambda step, healthy: float(step) ** power
        for place in ("qkv", "proj", "fc2")
    }
    assert alarms(history_of(tmp_path, changes=changes)) == []


def test_growth_while_the_loss_still_falls_is_learning(tmp_path: Path) -> None:
    changes = {"layers.0.proj/output_rms": times(4.0)}
    falling: Any = {"loss": lambda step, healthy: 10 - step / 200, "changes": changes}
    assert alarms(history_of(tmp_path / "falling", **falling)) == []
    assert [a.rule for a in alarms(history_of(tmp_path / "flat", changes=changes))] == [
        "proj_output"
    ]


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_relative_rules_do_not_know_units(factor: float, tmp_path: Path) -> None:
    history = read_history(write_diverging(tmp_path / "run", steps=1200, start=800))
    relative = {rule.key for rule in RULES if rule.relative}
    columns = {
        f"{place}/{rule.quantity}" for rule in RULES if rule.relative for place in rule.places
    }
    scaled = dataclasses.replace(
        history,
        telemetry={
            name: column * factor if name in columns else column
            for name, column in history.telemetry.items()
        },
    )

    def places(found: list[Alarm]) -> list[tuple[str, int | None, int]]:
        return [(each.rule, each.layer, each.step) for each in found if each.rule in relative]

    assert places(alarms(scaled)) == places(alarms(history)) != []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_alarm(value: float, tmp_path: Path) -> None:
    changes = {f"layers.{LAYER}.fc1/weight_grad_l2": from_step(value)}
    found = alarms(history_of(tmp_path, changes=changes))
    assert [(each.rule, each.layer, each.step, each.after) for each in found] == [
        ("non_finite", LAYER, AT, AT - 20)
    ]


def test_an_alarm_ends_after_quiet_samples_and_may_come_again(tmp_path: Path) -> None:
    def change(step: int, healthy: Any) -> Any:
        return [2e3, 2e3] if step in (400, 440, 480, 800) else healthy

    history = history_of(tmp_path, changes={"layers.0.attention/max_logit": change})
    assert [(each.step, each.until) for each in episodes(history)] == [(400, 480), (800, 800)]
    assert [each.step for each in alarms(history)] == [400]


def test_alarms_are_in_the_order_of_steps(tmp_path: Path) -> None:
    found = alarms(read_history(write_diverging(tmp_path / "run")))
    assert [each.step for each in found] == sorted(each.step for each in found)
    assert {each.layer for each in found} == {1}
    assert len({(each.rule, each.layer) for each in found}) == len(found) > 3


def test_a_run_that_has_just_begun_is_judged_by_numbers_only(tmp_path: Path) -> None:
    changes: dict[str, Change] = {
        f"layers.0.{place}/output_rms": lambda step, healthy: math.exp(step / 10)
        for place in ("qkv", "proj", "fc2")
    }
    assert alarms(history_of(tmp_path, steps=200, changes=changes)) == []
