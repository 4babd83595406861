"""Alarms: samples at which a run's telemetry crosses the limit of a rule.

An alarm is a sign that preceded divergence in other runs. Records cannot show that it is the cause
in this run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.rules import Judgement, Thresholds, judgements

# Up to this many consecutive samples within the limit do not end an alarm, because batches differ.
PATIENCE = 2

_NAMES = {"qkv": "QKV", "proj": "Proj", "fc1": "FC1", "fc2": "FC2"}


@dataclass(frozen=True)
class Alarm:
    """A crossed limit.

    Args:
        step: First sampled step beyond the limit.
        layer: Index of the block, from 0, or None outside of blocks.
        name: Name of the number, e.g. `layers.1.qkv/output_rms`; the rule reduces over heads.
        value: Number at `step`.
        threshold: Limit at `step`, in the units of `value`; NaN for a number that is not finite.
        text: Sentence for the reader.
        rule: Key of the rule.
        after: Last earlier sampled step that was judged and within the limit, else 0. The crossing
            was between `after` and `step`.
        until: Last sampled step beyond the limit.
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
    """Return the first alarm of each rule in each layer, in step order."""
    first: dict[tuple[str, int | None], Alarm] = {}
    for alarm in episodes(history, thresholds):
        first.setdefault((alarm.rule, alarm.layer), alarm)
    return list(first.values())


def episodes(history: History, thresholds: Thresholds | None = None) -> list[Alarm]:
    """Return every alarm, from crossing a limit to returning within it, in step order."""
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
    """Format a number with three digits: 1,505 or 0.0873 or 2.1e+07."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def _non_finite(history: History) -> Iterator[Alarm]:
    """Yield one alarm for each layer, at its first number that is not finite."""
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
