"""Diagnosis of a run: the alarms before its loss moved, and techniques that address them.

The first alarm is a sign, not a cause. Records show only the order of events, to within a sample.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_stable.telemetry.reading.alarms import PATIENCE, Alarm, alarms, episodes
from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.onset import LossMove, loss_moves
from hf_stable.telemetry.reading.remedies import Remedy, remedies
from hf_stable.telemetry.reading.rules import Judgement, Thresholds, judgements

HOW_TO_WATCH = (
    "No telemetry was recorded, so the layers are unknown: set telemetry.every to 100 in the "
    "recipe, or train with --set telemetry.every=100."
)


@dataclass(frozen=True)
class Evidence:
    """Values of one number at the first sample, at the one before its alarm, and at the alarm."""

    name: str
    at_start: float
    before: float
    at_alarm: float
    threshold: float


@dataclass(frozen=True)
class Diagnosis:
    """Findings on a run's instability.

    Args:
        run: Name of the run.
        last_step: Last step in the records.
        samples: Number of telemetry samples.
        onset: The move of the loss that is explained: the first without recovery, else the first;
            None if the loss never moved.
        first: The earliest of the alarms that were active at the onset, all of one sample. Without
            an onset, the earliest alarms of the run.
        lead: Steps from the first alarms to the onset, by the records. None without alarms or
            without an onset.
        lead_range: Smallest and largest lead that the distances of samples and log lines allow.
        then: The other alarms that were active at the onset. Without an onset, all other alarms.
        passed: Alarms that ended before the onset.
        later: Alarms after the onset.
        remedies: Techniques that address the first alarms and are not enabled.
        evidence: Numbers behind the first alarms.
        sentences: The whole diagnosis in words.
    """

    run: str
    last_step: int
    samples: int
    onset: LossMove | None
    first: list[Alarm]
    lead: int | None
    lead_range: tuple[int, int] | None
    then: list[Alarm]
    passed: list[Alarm]
    later: list[Alarm]
    remedies: list[Remedy]
    evidence: list[Evidence]
    sentences: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `records.write_json`."""
        return asdict(self)


def diagnose(history: History, thresholds: Thresholds | None = None) -> Diagnosis:
    """Find the alarms that were active when the loss moved, and the first of them.

    `loss_moves` defines when the loss moved. An alarm precedes the move if its sample is at or
    before the log line of the move. It is active if it did not end more than three samples before.
    """
    thresholds = thresholds or Thresholds()
    moves = loss_moves(history)
    onset = next((move for move in moves if not move.recovered), moves[0] if moves else None)
    standing, passed, later = _around(history, thresholds, onset)
    first = [alarm for alarm in standing if alarm.step == standing[0].step]
    lead, lead_range = None, None
    if onset is not None and first:
        lead = onset.step - first[0].step
        lead_range = (max(0, onset.after - first[0].step), onset.step - first[0].after)
    found = Diagnosis(
        run=history.name,
        last_step=_last_step(history),
        samples=len(history.steps),
        onset=onset,
        first=first,
        lead=lead,
        lead_range=lead_range,
        then=standing[len(first) :],
        passed=passed,
        later=later,
        remedies=remedies([alarm.rule for alarm in first], history.run) if first else [],
        evidence=_evidence(history, thresholds, first),
        sentences=[_of_loss(onset, len(moves), _last_step(history)), *_of_learning(history)],
    )
    found.sentences.extend([*_of_telemetry(found), *(_of_config(history) if first else [])])
    return found


def _around(
    history: History, thresholds: Thresholds, onset: LossMove | None
) -> tuple[list[Alarm], list[Alarm], list[Alarm]]:
    """Return the alarms active at, before and after the onset; one per rule and layer."""
    if onset is None:
        return alarms(history, thresholds), [], []
    before = history.steps[history.steps <= onset.step]
    recent = int(before[-(PATIENCE + 1) :][0]) if len(before) else 0
    groups: tuple[dict[Any, Alarm], ...] = ({}, {}, {})
    for alarm in episodes(history, thresholds):
        if alarm.name == "loss":  # the move itself
            continue
        index = 2 if alarm.step > onset.step else 0 if alarm.until >= recent else 1
        groups[index].setdefault((alarm.rule, alarm.layer), alarm)
    known = groups[0].keys() | groups[1].keys()
    later = [alarm for key, alarm in groups[2].items() if key not in known]
    return list(groups[0].values()), list(groups[1].values()), later


def _last_step(history: History) -> int:
    steps = [*history.train.get("step", []), *history.steps]
    return int(max([*steps, *(row["step"] for row in history.events)], default=0))


def _evidence(history: History, thresholds: Thresholds, first: list[Alarm]) -> list[Evidence]:
    return [
        _row(judgement, alarm, history.steps)
        for judgement in judgements(history, thresholds)
        for alarm in first
        if _is_of(judgement, alarm)
    ]


def _is_of(judgement: Judgement, alarm: Alarm) -> bool:
    return alarm.rule == judgement.rule.key and alarm.name == judgement.name(alarm.layer or 0)


def _row(judgement: Judgement, alarm: Alarm, steps: np.ndarray) -> Evidence:
    values = judgement.values[:, alarm.layer or 0]
    index = int(np.flatnonzero(steps == alarm.step)[0])
    return Evidence(
        name=alarm.name,
        at_start=float(values[0]),
        before=float(values[index - 1]) if index else float("nan"),
        at_alarm=alarm.value,
        threshold=alarm.threshold,
    )


def _of_loss(onset: LossMove | None, num_moves: int, last_step: int) -> str:
    if onset is None:
        return f"The training loss never rose out of its noise, up to step {last_step}."
    when = f"between steps {onset.after} and {onset.step}"
    if math.isinf(onset.rise):
        what = f"The loss or its gradient stopped being a finite number {when}"
    else:
        what = f"The training loss began to rise {when}, by {onset.rise:.2f} nats at most"
    end = "it recovered" if onset.recovered else f"it had not recovered by step {last_step}"
    more = f" It moved {num_moves} times in all." if num_moves > 1 else ""
    return f"{what}; {end}.{more}"


def _of_learning(history: History) -> list[str]:
    """Say that a run has learned little: one that diverges early has no low loss to rise from."""
    losses = [row["loss"] for row in history.events if row["event"] == "validation"]
    data = history.run.get("data", {})
    if not losses or "bigram_nats_per_token" not in data:
        return []
    unigram, bigram = data["unigram_nats_per_token"], data["bigram_nats_per_token"]
    if float(losses[-1]) < (unigram + bigram) / 2:
        return []
    return [
        f"But it has learned little: its validation loss, {float(losses[-1]):.2f}, is nearer to a "
        f"unigram table's {unigram:.2f} than to a bigram table's {bigram:.2f}."
    ]


def _of_telemetry(found: Diagnosis) -> list[str]:
    if not found.samples:
        return [HOW_TO_WATCH]
    if found.onset is None:
        return _without_onset(found)
    sentences = [f"First alarm: {_texts(found.first)}.", *_of_order(found)] if found.first else []
    if not found.first:
        what = "no alarm stood" if found.passed else "there had been no alarm"
        sentences = [f"When it moved, {what}: the telemetry does not tell what came before."]
    for others, words in (
        (found.then, "stood when the loss moved too"),
        (found.passed, "had come and gone before"),
        (found.later, "came after the loss had moved, so cannot have led to it"),
    ):
        if others:
            sentences.append(f"{_count(others)} {words}; the first: {others[0].text}.")
    return sentences


def _of_config(history: History) -> list[str]:
    """Say why the list of remedies may not fit the run."""
    config = history.run.get("model_config")
    if config is None:
        return ["Without model_config in run.json it is not known which techniques are on already."]
    if config.get("model_type") != "stable_gpt":
        return [f"The settings are StableGPT's; this model is of type {config.get('model_type')}."]
    return []


def _without_onset(found: Diagnosis) -> list[str]:
    everything = [*found.first, *found.then]
    if not everything:
        return ["There is no alarm."]
    return [
        f"{_count(everything)} so far, and no rise of the loss after. First: {_texts(found.first)}."
    ]


def _of_order(found: Diagnosis) -> list[str]:
    first, onset = found.first[0], found.onset
    assert onset is not None
    assert found.lead_range is not None
    span = f"It was crossed after step {first.after} and by step {first.step}"
    if first.step > onset.after:
        order = f"{span}, the loss moved after step {onset.after}: which came first is not known."
    else:
        low, high = found.lead_range
        order = (
            f"{span}, {low} to {high} steps before the loss moved ({found.lead} by the records). "
            "Coming first makes it a sign, not the cause."
        )
    if len(found.first) == 1:
        return [order]
    return [order, f"These {len(found.first)} are of one sample: their own order is not known."]


def _texts(found: list[Alarm]) -> str:
    return "; ".join(alarm.text for alarm in found)


def _count(found: list[Alarm]) -> str:
    return "1 alarm" if len(found) == 1 else f"{len(found)} alarms"
