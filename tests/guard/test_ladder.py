"""What is done about trouble: rung by rung, to an end, and the same again from the log."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stable.guard import MAX_NON_FINITE_STEPS, Guard, Observation, replay
from hf_stable.recipes import GuardRecipe
from hf_stable.records import RunRecord, read_metrics

from .runs import ALL, actions, clean, gaussian, judged, train, with_loss

NAN = math.nan
# A window as short as it may be, so that trouble can begin early.
SHORT = {"window": 64, "lower_steps": 30, "max_skips": 8}
RUN = clean(3000, gaussian, seed=7)


def high(start: int, stop: int, by: float = 3.0) -> list[Observation]:
    return [with_loss(seen, seen.loss + by) if start <= seen.step < stop else seen for seen in RUN]


@pytest.mark.parametrize("field", ["loss", "grad_norm"])
@pytest.mark.parametrize("names", [[], ["skip"], ALL])
def test_an_update_that_is_not_finite_is_never_made(names: list, field: str) -> None:
    run = list(RUN[:400])
    for step in (1, 2, 50, 300):
        numbers = {"loss": 3.0, "grad_norm": 0.5, field: math.inf if step == 2 else NAN}
        run[step - 1] = Observation(step, **numbers)
    decisions = judged(run, GuardRecipe(actions=names, **SHORT))
    skipped = [decision.step for decision in decisions if decision.action == "skip"]
    assert skipped == [1, 2, 50, 300]
    assert all(decision.learning_rate_factor == 1 for decision in decisions)
    assert all(decision.rule == "non_finite" for decision in decisions if decision.reason)


@pytest.mark.parametrize("names", [[], ["skip"], ["lower"], ["skip", "lower"]])
def test_twenty_in_a_row_that_are_not_finite_are_the_end(names: list) -> None:
    run = [Observation(step, NAN, NAN) for step in range(1, MAX_NON_FINITE_STEPS + 1)]
    taken = actions(judged(run, GuardRecipe(actions=names)))
    assert taken == ["skip"] * (MAX_NON_FINITE_STEPS - 1) + ["give_up"]
    # One that is finite begins the count again.
    run[MAX_NON_FINITE_STEPS - 2] = Observation(MAX_NON_FINITE_STEPS - 1, 3.0, 0.5)
    assert "give_up" not in actions(judged(run, GuardRecipe(actions=names)))


def test_what_a_rollback_goes_back_to_is_known_from_the_first_alarm_on() -> None:
    """Checkpoints are kept by it, however long trouble takes from there to the rollback."""
    guard = Guard(GuardRecipe(actions=["rollback"], max_skips_in_memory=20, **SHORT))
    wanted, decision = [], None
    for seen in RUN:
        numbers = (NAN, NAN) if seen.step >= 500 and seen.step % 8 == 0 else (seen.loss, 0.5)
        decision = guard.judge(Observation(seen.step, *numbers))
        wanted.append(guard.rollback_to)
        if decision.action == "rollback":
            break
    assert decision is not None and decision.step > 650 and decision.rollback_to == 403
    assert wanted == [None] * 503 + [403] * (decision.step - 503)


@pytest.mark.parametrize("names", [["skip"], ["lower"], ALL])
@pytest.mark.parametrize("loss", [3.0, NAN])
def test_weights_that_are_not_finite_are_never_gone_on_with(names: list, loss: float) -> None:
    run = [*RUN[:199], Observation(200, loss, 0.5, math.inf)]
    decision = judged(run, GuardRecipe(actions=names, **SHORT))[-1]
    assert decision.action == ("rollback" if "rollback" in names else "give_up")
    assert decision.onset == 199  # whose update it was


def test_without_actions_no_finite_number_is_refused() -> None:
    decisions = judged(high(300, 900, by=50.0), GuardRecipe())
    assert all(decision.quiet for decision in decisions)


def test_one_bad_batch_is_skipped_and_nothing_else_happens() -> None:
    decisions = judged(high(500, 501)[:900], GuardRecipe(actions=ALL, **SHORT))
    loud = [decision for decision in decisions if not decision.quiet]
    assert [(each.step, each.action, each.rule) for each in loud] == [(500, "skip", "spike")]


def test_the_rungs_are_tried_in_order() -> None:
    decisions = judged(high(500, 2000), GuardRecipe(actions=ALL, **SHORT))
    told = [decision for decision in decisions if decision.step >= 500]
    assert actions(told[:8]) == ["skip"] * 8
    assert actions(told[8:38]) == ["accept"] * 30
    assert {decision.learning_rate_factor for decision in told[8:38]} == {0.1}
    back = told[38]
    assert back.action == "rollback"
    assert back.onset == 500
    assert (back.rollback_to, back.skip_first) == (399, 400)
    # It leaves out the trouble and what was before it (PaLM), no less than it was told to.
    assert back.skip_last == 699


def test_a_lowered_rate_returns_linearly() -> None:
    guard = GuardRecipe(actions=["lower"], **SHORT)
    decisions = judged(high(500, 510), guard)
    factors = [decision.learning_rate_factor for decision in decisions[498:570]]
    assert factors[0] == 1.0
    assert factors[1:31] == [0.1] * 30
    slopes = [after - before for before, after in itertools.pairwise(factors[30:61])]
    assert slopes == pytest.approx([0.9 / 30] * 30)
    assert factors[60:] == [1.0] * 12


def test_a_loss_that_recovers_slowly_is_given_time() -> None:
    run = [
        with_loss(seen, seen.loss + (4 * 0.97 ** (seen.step - 500) if seen.step >= 500 else 0))
        for seen in RUN[:1000]
    ]
    taken = actions(judged(run, GuardRecipe(actions=["skip", "lower"], **SHORT)))
    assert "give_up" not in taken
    assert "give_up" in actions(judged(high(500, 1000), GuardRecipe(actions=["skip"], **SHORT)))


def test_norms_alone_never_undo_or_end_a_run() -> None:
    run = [
        Observation(seen.step, seen.loss, seen.grad_norm * (30 if seen.step > 500 else 1), 1.0)
        for seen in RUN
    ]
    decisions = judged(run, GuardRecipe(actions=ALL, **SHORT))
    assert set(actions(decisions)) == {"accept", "skip"}
    # A new level is learnt in the end.
    assert all(decision.quiet for decision in decisions[-500:])


def test_an_update_that_was_too_large_lowers_the_rate_since_skipping_comes_too_late() -> None:
    run = list(RUN[:600])
    run[499] = Observation(500, run[499].loss, 0.5, 20.0)
    decision = judged(run, GuardRecipe(actions=ALL, **SHORT))[499]
    assert (decision.signal, decision.action, decision.onset) == ("update_norm", "accept", 499)
    assert decision.learning_rate_factor == 0.1


def bad_batches(first: int, last: int):
    """Batches at fault: their loss is high whenever they are read."""
    return lambda step, batch: with_loss(
        Observation(step, RUN[step - 1].loss, 0.5, 1.0),
        RUN[step - 1].loss + (3.0 if first <= batch <= last else 0.0),
    )


def bad_model(onset: int):
    """A model at fault: its loss is high whatever it reads."""
    return lambda step, batch: with_loss(
        Observation(step, RUN[step - 1].loss, 0.5, 1.0),
        RUN[step - 1].loss + (3.0 if step >= onset else 0.0),
    )


def test_a_long_stretch_of_bad_data_is_left_out_by_one_rollback() -> None:
    guard = GuardRecipe(actions=ALL, **SHORT)
    log, decisions, rollbacks = train(guard, 1500, bad_batches(800, 900))
    assert actions(decisions).count("rollback") == 1
    assert [each.to_step for each in rollbacks] == [650]
    assert log[-1].step == 1500
    # Beyond the rollback it is as if those data had never been.
    after = decisions[actions(decisions).index("rollback") + 1 :]
    assert all(decision.quiet for decision in after)


def test_trouble_of_the_model_comes_back_and_the_run_ends_by_itself() -> None:
    guard = GuardRecipe(actions=ALL, max_rollbacks=3, **SHORT)
    _, decisions, rollbacks = train(guard, 3000, bad_model(800))
    assert actions(decisions).count("rollback") == len(rollbacks) == 3
    assert decisions[-1].action == "give_up"
    undone = [each for each in decisions if each.action == "rollback"]
    lengths = [each.skip_last - each.skip_first + 1 for each in undone]
    assert lengths == [300, 600, 1200]
    # From the second on, the steps after it are made at a lower rate too.
    places = [index for index, each in enumerate(decisions) if each.action == "rollback"]
    assert [decisions[at + 1].learning_rate_factor for at in places] == [1.0, 0.1, 0.1]
    for words in ("loss stays at", "800", "rolled back", "optimizer.learning_rate"):
        assert words in decisions[-1].reason


def test_rollbacks_that_the_run_got_far_beyond_do_not_count() -> None:
    guard = GuardRecipe(actions=ALL, max_rollbacks=1, memory=400, **SHORT)

    def observe(step: int, batch: int) -> Observation:
        # A stretch at fault every thousand batches.
        return bad_batches(800, 900)(step, batch % 1000)

    _, decisions, rollbacks = train(guard, 2500, observe)
    assert len(rollbacks) >= 2
    assert decisions[-1].action != "give_up"


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.0, 0.5, 5.0, NAN, math.inf]), st.integers(1, 60)),
        min_size=1,
        max_size=12,
    ),
    st.sets(st.sampled_from(ALL)),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_every_run_ends_and_can_be_replayed_from_its_log(
    pieces: list[tuple[float, int]], names: set, seed: int
) -> None:
    extra = [0.0] * 150 + [height for height, length in pieces for _ in range(length)]
    draw = random.Random(seed)

    def observe(step: int, batch: int) -> Observation:
        height = extra[min(batch, len(extra)) - 1]
        loss = 3 + 0.05 * draw.gauss(0, 1) + height
        return Observation(step, loss, 0.5 * math.exp(0.1 * draw.gauss(0, 1)), None)

    guard = GuardRecipe(actions=sorted(names), rollback_steps=20, skip_batches=40, **SHORT)
    log, decisions, rollbacks = train(guard, len(extra), observe)
    assert len(rollbacks) <= 3
    assert log[-1].step == len(extra) or decisions[-1].action == "give_up"
    assert replay(log, guard) == decisions
    for seen, decision in zip(log, decisions, strict=True):
        if not (math.isfinite(seen.loss) and math.isfinite(seen.grad_norm)):
            assert decision.action != "accept"
        assert 0 < decision.learning_rate_factor <= 1
        assert (decision.action == "rollback") == (decision.skip_last is not None)
        if decision.action == "rollback":
            assert decision.rollback_to < decision.step <= decision.skip_last


@given(st.integers(1, 699))
@settings(max_examples=15, deadline=None)
def test_a_guard_that_went_through_json_decides_the_same(cut: int) -> None:
    run = high(500, 520)[:700]
    run[540] = Observation(541, NAN, 1.0)
    guard = GuardRecipe(actions=["skip", "lower"], **SHORT)
    first, second = Guard(guard), Guard(guard)
    start = [first.judge(seen) for seen in run[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    second.after_rollback([])
    assert start + [second.judge(seen) for seen in run[cut:]] == judged(run, guard)


def test_a_resume_in_the_log_is_not_taken_for_a_rollback() -> None:
    run = high(500, 520)[:700]
    guard = GuardRecipe(actions=ALL, **SHORT)
    whole = judged(run, guard)
    assert replay(run[:515] + run[450:], guard) == whole[:515] + whole[450:]


def test_no_step_is_judged_twice() -> None:
    guard = Guard(GuardRecipe())
    guard.judge(RUN[4])
    with pytest.raises(ValueError, match="step 5 was judged already"):
        guard.judge(RUN[4])


def test_rows_hold_what_was_decided_and_why(tmp_path) -> None:
    record = RunRecord(tmp_path)
    decisions = judged(high(500, 700), GuardRecipe(actions=ALL, **SHORT))
    bad = judged([Observation(1, NAN, 1.0)], GuardRecipe())
    loud = [each for each in decisions + bad if not each.quiet]
    for each in loud:
        record.append("guard", each.step, **each.row())
    record.close()
    rows = read_metrics(tmp_path, "guard")
    assert [row["action"] for row in rows] == actions(loud)
    assert all(row["reason"] for row in rows if row["action"] != "accept")
    assert rows[-1]["value"] == "nan"
    first = rows[0]
    assert first["usual"] < first["limit"] < first["value"]
