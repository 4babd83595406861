"""Alarms: the samples at which a run's telemetry goes beyond a rule's limit.

An alarm is a sign that was seen before divergence elsewhere; that it is the cause here, no record
can show.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.rules import Judgement, Thresholds, judgements

# So many samples in a row within the limit do not end an alarm: batches differ.
PATIENCE = 2

_NAMES = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}


@dataclass(frozen=True)
class Alarm:
    """A limit was crossed.

    Args:
        step: the first sampled step beyond the limit.
        layer: the block, from 0; None where it is about none.
        name: what was measured, e.g. `layers.1.qkv/output_rms`; heads are reduced by the rule.
        value: the number at `step`.
        threshold: the limit at `step`, in the units of `value`; NaN where not being finite is all.
        text: a sentence.
        rule: the key of the rule.
        after: the last sampled step before it that was judged and within the limit, else 0; the
            crossing was between the two.
        until: the last sampled step beyond the limit.
    """

    step: int
    layer: int | None
    name: str
    value: float
    threshold: float
    text: str
    rule: str
    after: int
    until: int


def alarms(history: History, thresholds: Thresholds | None = None) -> list[Alarm]:
    """The first alarm of each rule in each layer, in the order of steps."""
    first: dict[tuple[str, int | None], Alarm] = {}
    for alarm in episodes(history, thresholds):
        first.setdefault((alarm.rule, alarm.layer), alarm)
    return list(first.values())


def episodes(history: History, thresholds: Thresholds | None = None) -> list[Alarm]:
    """Every alarm, each from where a limit is crossed to where it holds again, in step order."""
    found = list(_non_finite(history))
    for judgement in judgements(history, thresholds or Thresholds()):
        for layer in np.flatnonzero(judgement.crossed.any(axis=0)):
            found += _of_layer(judgement, int(layer), history.steps)
    return sorted(found, key=lambda alarm: alarm.step)


def _of_layer(judgement: Judgement, layer: int, steps: np.ndarray) -> Iterator[Alarm]:
    quiet = judgement.within[:, layer]
    crossed = np.flatnonzero(judgement.crossed[:, layer])
    breaks = np.flatnonzero(np.diff(crossed) > PATIENCE + 1)
    for begin, end in zip([0, *(breaks + 1)], [*breaks, len(crossed) - 1], strict=True):
        first, last = int(crossed[begin]), int(crossed[end])
        yield Alarm(
            step=int(steps[first]),
            layer=layer if "*" in judgement.column else None,
            name=judgement.name(layer),
            value=float(judgement.values[first, layer]),
            threshold=float(judgement.limits[first, layer]),
            text=_sentence(judgement, layer, first, int(steps[first])),
            rule=judgement.rule.key,
            after=int(max(steps[:first][quiet[:first]], default=0)),
            until=int(steps[last]),
        )


def _sentence(judgement: Judgement, layer: int, sample: int, step: int) -> str:
    rule, value = judgement.rule, judgement.values[sample, layer]
    limit, side = judgement.limits[sample, layer], "below" if rule.below else "above"
    where = f"layer {layer}: " if "*" in judgement.column else ""
    place = judgement.column.rsplit(".", 1)[-1].split("/")[0]
    words = rule.words.format(place=_NAMES.get(place, place))
    if judgement.usual is None:
        return f"{where}{words} is {number(value)}, {side} {number(limit)}, at step {step}"
    usual = judgement.usual[sample, layer]
    return (
        f"{where}{words} is {value / usual:.3g} times its trailing median, {side} "
        f"{limit / usual:.3g}, at step {step}"
    )


def number(value: float) -> str:
    """Three digits for people: 1,505 and 0.0873 and 2.1e+07."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def _non_finite(history: History) -> Iterator[Alarm]:
    """One alarm for each layer, at its first number that is not finite."""
    places: dict[int | None, list[tuple[int, str]]] = {}
    for step, name in history.non_finite:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        places.setdefault(layer, []).append((step, name))
    for layer, found in places.items():
        step, name = found[0]
        others = len({other for at, other in found if at == step}) - 1
        where = "" if layer is None else f"layer {layer}: "
        what = name.split(".", 2)[-1].replace("_", " ").replace("/", "'s ")
        more = f", nor are {others} other numbers" if others else ""
        earlier = [*history.steps, *history.train.get("step", [])]
        yield Alarm(
            step=step,
            layer=layer,
            name=name,
            value=math.nan,
            threshold=math.nan,
            text=f"{where}{what} is not a finite number{more}, at step {step}",
            rule="non_finite",
            after=int(max((other for other in earlier if other < step), default=0)),
            until=found[-1][0],
        )
