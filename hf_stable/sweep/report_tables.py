"""Report sections on the grid of a study: stability, sensitivity and final losses."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_stable.telemetry.reading.drawing import plain_text

from .bootstrap import Interval
from .grid import (
    KINDS,
    Stable,
    breaks,
    count,
    judged,
    largest_stable,
    not_judged,
    recorded,
    reversals,
)
from .paper import Span, span
from .report_page import (
    Block,
    Cell,
    Items,
    Name,
    Paragraph,
    Section,
    Table,
    interval_words,
    variant_title,
)
from .sensitivity import (
    Grid,
    best_rate,
    coverage_words,
    edge_of_best,
    lr_sensitivity,
    warnings,
)
from .study import BASELINE, Result, Study

KIND_WORDS = {
    "middle": "(H1 + H2) / 2",
    "bigram": "H2, the bigram's",
    "unigram-0.2": "H1 - 0.2, near the unigram's",
}


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of a method in a variant.

    Args:
        value: LR sensitivity in nats.
        best: Best learning rate.
        edge: "lowest" or "highest" if the best rate is an end of the grid, else None.
        ratio: Range of the break over that of the baseline; None without a baseline.
        seeds: Number of complete seeds.
        warnings: Sentences on the limits of these numbers.
    """

    value: Interval
    best: Interval
    edge: str | None
    ratio: Span | None
    seeds: int
    warnings: list[str]


def grid_section(study: Study, key: str) -> Section:
    """Return the section in the style of Table 3 of Rybakov et al., with seeds."""
    stable = recorded(study)
    blocks: list[Block] = [
        Paragraph(
            "Stable of ended seeds; a run that is not stable diverged or collapsed. s: stopped "
            "early as hopeless, which is unstable; f: failed with an error twice, which is neither "
            "but counts against; w: waiting, not ended. The largest stable learning rate is the "
            "largest such that at it and at all lower ones more than half of the ended seeds are "
            "stable. A method breaks between that rate and the next, or beyond the grid, so its "
            "breaking rate over the baseline's is a range; ≥ and ≤ mark an end of the grid."
        )
    ]
    blocks += [_grid_table(study, stable, variant, "", key) for variant in study.variants]
    return Section(key, "Which learning rates are stable (in the style of Table 3)", blocks)


def _grid_table(study: Study, stable: Stable, variant: str, more: str, key: str = "") -> Table:
    rates = study.rates_of(variant)
    base = largest_stable(study, stable, BASELINE, variant) if BASELINE in study.methods else None
    rows: list[list[str | Cell | Name]] = []
    for method in study.methods:
        largest = largest_stable(study, stable, method, variant)
        cells = [count(study, stable, method, variant, rate).cell() for rate in rates]
        ratio = "1" if method == BASELINE else _ratio_words(largest, base, rates)
        name = Name(method, _row_key(key, variant, method)) if key else method
        rows.append([name, *cells, _largest_words(largest, rates), ratio])
    head = ["method \\ learning rate", *map(plain_text, rates), "largest stable"]
    head += ["break ÷ baseline's"]
    return Table(variant_title(variant) + more, head, rows)


def _row_key(section: str, variant: str, method: str) -> str:
    """Return the anchor of a method's row."""
    words = (section, variant, method)
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word) for word in words if word)


def _ratio_words(largest: float | None, base: float | None, rates: Sequence[float]) -> str:
    """Return the range of the break over that of the baseline."""
    if largest is None or base is None:
        return "–"
    found = span({0: largest}, {0: base}, rates)
    return "–" if found is None else found.words


def _largest_words(largest: float | None, rates: Sequence[float]) -> str:
    if largest is None:
        return "–"
    if largest == 0:
        return "none"
    return ("≥ " if largest == rates[-1] else "") + plain_text(largest)


def rejudged_section(study: Study, key: str) -> Section:
    """Return the section on the grid and the order of methods under every collapse threshold."""
    grids = {kind: judged(study, kind) for kind in KINDS}
    blocks: list[Block] = [
        Paragraph(
            "Every run judged again from its log, with another validation loss from which a run "
            "counts as collapsed: H1 is the unigram's cross-entropy of the same text and H2 the "
            "bigram's. All else of the rule is as recorded."
        )
    ]
    if lost := not_judged(study):
        names = ", ".join(lost)
        blocks.append(Paragraph(f"Without log lines, so with the verdict recorded: {names}."))
    blocks.append(Paragraph(_as_recorded(study)))
    for variant in study.variants:
        orders = [
            {
                method: largest_stable(study, grids[kind], method, variant)
                for method in study.methods
            }
            for kind in KINDS
        ]
        rows = [
            [method, *(_largest_words(order[method], study.rates_of(variant)) for order in orders)]
            for method in study.methods
        ]
        head = ["largest stable learning rate", *(KIND_WORDS[kind] for kind in KINDS)]
        blocks.append(Table(f"{variant_title(variant)}: by threshold", head, rows))
        blocks.append(Paragraph(_order_words(variant, orders)))
    for kind in KINDS:
        for variant in study.variants if kind != study.thresholds.get("collapse") else ():
            changed = _changed(study, grids[kind], variant)
            words = f": collapse at {KIND_WORDS[kind]}; judged otherwise: {changed or 'none'}"
            blocks.append(_grid_table(study, grids[kind], variant, words))
    return Section(key, "Does the order depend on the rule?", blocks)


def _changed(study: Study, stable: Stable, variant: str) -> int:
    runs = [run for run in study.results if run.place.variant == variant]
    return sum(run.stable != stable[run.id] for run in runs)


def _as_recorded(study: Study) -> str:
    kind = study.thresholds.get("collapse", KINDS[0])
    again, before = judged(study, kind), recorded(study)
    differ = [identity for identity in before if before[identity] != again[identity]]
    if differ:
        return f"Judged again as recorded, these have another verdict: {', '.join(differ)}."
    return f"Judged again as recorded ({kind}), all {len(before)} ended runs have their verdict."


def _order_words(variant: str, orders: Sequence[dict[str, float | None]]) -> str:
    turned, split = reversals(orders)
    name = variant_title(variant)
    words = (
        f"{name}: no pair of methods changes its order with the threshold."
        if not turned
        else f"{name}: the order of these pairs turns around: {'; '.join(turned)}."
    )
    if split:
        words += f" Apart under some and equal under others: {'; '.join(split)}."
    unknown = [method for method in orders[0] if any(order[method] is None for order in orders)]
    return words + (f" Not known yet: {', '.join(unknown)}." if unknown else "")


def sensitivities(study: Study, variant: str) -> dict[str, Sensitivity]:
    """Return the sensitivity of each method with a seed whose loss is known at two rates."""
    if len(study.rates_of(variant)) < 2:
        return {}
    grids = {method: complete(study, method, variant) for method in study.methods}
    stable, rates, found = recorded(study), study.rates_of(variant), {}
    base = breaks(study, stable, BASELINE, variant) if BASELINE in study.methods else {}
    for method, grid in grids.items():
        if grid is None:
            continue
        own = breaks(study, stable, method, variant)
        configs = [
            run.model_config
            for run in study.results
            if (run.place.method, run.place.variant) == (method, variant)
        ]
        found[method] = Sensitivity(
            value=lr_sensitivity(grid.losses, grid.initial),
            best=best_rate(grid),
            edge=edge_of_best(grid),
            ratio=span(own, base, rates),
            seeds=grid.num_seeds,
            warnings=warnings(
                grid,
                sigma_reparam=any(config.get("sigma_reparam") for config in configs),
                layer_rates=any(map(_has_layer_rates, configs)),
            ),
        )
    return found


def _has_layer_rates(config: Mapping[str, Any]) -> bool:
    """Return True if layers have factors on the learning rate: muP away from its base width."""
    return config.get("mup_base_width") not in (None, config.get("hidden_size"))


def complete(study: Study, method: str, variant: str) -> Grid | None:
    """Return the seeds of a method with an ended run at every learning rate; None without any."""
    status = study.numbers(method, variant, lambda run: float(run.status != "failed"))
    seeds = (status == 1).all(axis=1)
    if not seeds.any() or not study.rates_of(variant):
        return None
    parts = [
        study.numbers(method, variant, number)[seeds]
        for number in (lambda run: run.validation_loss, lambda run: run.initial_loss, _unstable)
    ]
    return Grid(
        rates=np.array(study.rates_of(variant)),
        losses=parts[0],
        initial=parts[1][:, 0],
        unstable=parts[2] == 1,
    )


def _unstable(run: Result) -> float:
    return float(run.unstable)


def sensitivity_blocks(study: Study, found: dict[str, dict[str, Sensitivity]]) -> list[Block]:
    """Return the blocks on LR sensitivity by variant and method, with warnings."""
    blocks: list[Block] = [
        Paragraph(
            "Wortsman et al. 2023, section 2.2: the mean over the grid of min(loss, loss at the "
            "start), less the smallest; in nats. Intervals are 95 % percentiles of the bootstrap "
            "over seeds. A seed counts that has a loss at every learning rate. The last column is "
            "what the grid allows for the breaking rate over the baseline's, over all seeds."
        )
    ]
    seeds = [each.seeds for methods in found.values() for each in methods.values()]
    if words := coverage_words(seeds):
        blocks.append(Paragraph(f"Intervals over seeds. {words}"))
    for variant in study.variants:
        if len(study.rates_of(variant)) == 1:
            words = f"{variant_title(variant)}: one learning rate has no sensitivity."
            blocks.append(Paragraph(words))
            continue
        rows = [_sensitivity_row(method, each) for method, each in found[variant].items()]
        head = ["method", "seeds", "sensitivity", "over seeds", "best rate", "over seeds"]
        head += ["break ÷ baseline's"]
        if rows:
            blocks.append(Table(f"{variant_title(variant)}: sensitivity", head, rows))
        lacking = [method for method in study.methods if method not in found[variant]]
        if lacking:
            names = ", ".join(lacking)
            text = f"{variant_title(variant)}: no seed has all learning rates yet: {names}."
            blocks.append(Paragraph(text))
        if words := _one_sided(found[variant]):
            blocks.append(Paragraph(f"{variant_title(variant)}: {words}"))
        blocks.append(Items(_warning_lines(variant, found[variant])))
    return [block for block in blocks if not isinstance(block, Items) or block.lines]


def _one_sided(found: dict[str, Sensitivity]) -> str:
    """Return a sentence on the methods with their best learning rate at an end of the grid."""
    parts = []
    for edge in ("lowest", "highest"):
        own = sum(each.edge == edge for each in found.values())
        if own:
            parts.append(
                f"{own} of {len(found)} methods have their best learning rate at the grid's "
                f"{edge}: their sensitivity is one-sided."
            )
    return " ".join(parts)


def _warning_lines(variant: str, found: dict[str, Sensitivity]) -> list[str]:
    """Return each warning once, with the methods that it concerns."""
    about: dict[str, list[str]] = {}
    for method, each in found.items():
        for words in each.warnings:
            about.setdefault(words, []).append(method)
    name = variant_title(variant)
    return [f"{name}, {', '.join(methods)}: {words}" for words, methods in about.items()]


def _sensitivity_row(method: str, found: Sensitivity) -> list[str]:
    row = [method, str(found.seeds)]
    for each, form in ((found.value, ".3f"), (found.best, ".3g")):
        ends = "one seed" if found.seeds == 1 else interval_words(each[1:], form)
        row += [f"{each[0]:{form}}", ends]
    if method == BASELINE:
        return [*row, "1"]
    return [*row, "–" if found.ratio is None else found.ratio.words]


def highest_section(study: Study, key: str) -> Section:
    """Return the section on the loss at a very high learning rate, which separates methods best."""
    blocks: list[Block] = []
    for variant in study.variants:
        rates = study.rates_of(variant)
        ended = [r for r in rates if all(study.cell(m, variant, r) for m in study.methods)]
        if not ended:
            name = variant_title(variant)
            blocks.append(Paragraph(f"{name}: no learning rate has a run of every method yet."))
            continue
        rows = [_loss_row(study, method, variant, ended[-1]) for method in study.methods]
        rows.sort(key=lambda row: (math.isnan(row[1]), row[1]))
        shown = [[row[0], *(f"{each:.3f}" for each in row[1:4]), str(row[4])] for row in rows]
        head = ["method, best first", "median", "least", "largest", "seeds"]
        title = f"{variant_title(variant)}: validation loss at {plain_text(ended[-1])}, nats"
        blocks.append(Table(title, head, shown))
    words = (
        "At the highest learning rate that every method has run at; over seeds. A loss above that "
        "at the start, or not finite, counts as that at the start; failed runs have none."
    )
    return Section(key, "Loss at a very high learning rate", [Paragraph(words), *blocks])


def _loss_row(
    study: Study, method: str, variant: str, rate: float
) -> tuple[str, float, float, float, int]:
    losses = [run.capped_loss for run in study.cell(method, variant, rate)]
    losses = [loss for loss in losses if not math.isnan(loss)]
    if not losses:
        return method, math.nan, math.nan, math.nan, 0
    return method, float(np.median(losses)), min(losses), max(losses), len(losses)
