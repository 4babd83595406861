"""Sections of a report on claims: perplexity against the baseline, and the paper against ours."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.drawing import plain_text

from . import paper
from .comparison import Comparison, holm, needed_documents, paired_difference
from .grid import breaks, recorded
from .report_page import (
    Block,
    Cell,
    Items,
    Paragraph,
    Section,
    Table,
    interval_words,
    variant_title,
)
from .study import BASELINE, Study

_MARKS = {"agree": "good", "disagree": "bad", "unresolved": "none"}
# Sums of one method by seed.
Seeds = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Compared:
    """A method against the baseline at one learning rate, over the seeds that both have."""

    comparison: Comparison
    by_seed: list[float]
    needed: int | None


@dataclass(frozen=True)
class Quality:
    """Perplexities of a variant at one learning rate: of every method, and against the baseline."""

    variant: str
    learning_rate: float
    perplexity: dict[str, float]
    seeds: dict[str, int]
    against: dict[str, Compared]
    notes: list[str]


def qualities(study: Study) -> list[Quality]:
    """What the perplexity records say, by variant and learning rate."""
    places = {result.id: result.place for result in study.results}
    tables: dict[tuple[int, float], dict[str, dict[int, np.ndarray]]] = {}
    for identity, sums in study.perplexities.items():
        place = places.get(identity)
        if place is not None:
            row = study.variants.index(place.variant), place.learning_rate
            tables.setdefault(row, {}).setdefault(place.method, {})[place.seed] = sums
    return [
        _quality(study, study.variants[variant], rate, tables[variant, rate])
        for variant, rate in sorted(tables)
    ]


def strangers(study: Study) -> list[str]:
    """Ids of perplexity records that are no ended run's."""
    return sorted(set(study.perplexities) - {result.id for result in study.results})


def _quality(study: Study, variant: str, rate: float, found: Mapping[str, Seeds]) -> Quality:
    methods = [method for method in study.methods if method in found]
    against: dict[str, Compared] = {}
    notes: list[str] = []
    for method in methods:
        if method != BASELINE and BASELINE in found:
            try:
                against[method] = _compared(found[method], found[BASELINE])
            except UserError as error:
                notes.append(f"{method}: {error}")
    adjusted = holm([each.comparison.p_value for each in against.values()])
    for (method, each), p in zip(list(against.items()), adjusted, strict=True):
        against[method] = replace(each, comparison=replace(each.comparison, p_adjusted=float(p)))
    return Quality(
        variant=variant,
        learning_rate=rate,
        perplexity={method: _perplexity(found[method]) for method in methods},
        seeds={method: len(found[method]) for method in methods},
        against=against,
        notes=notes,
    )


def _perplexity(seeds: Seeds) -> float:
    """Of the mean over seeds of the log."""
    logs = [sums[:, 0].sum() / sums[:, 1].sum() for sums in seeds.values()]
    return float(np.exp(np.mean(logs)))


def _compared(own: Seeds, base: Seeds) -> Compared:
    shared = sorted(set(own) & set(base))
    if not shared:
        raise UserError(f"no seed in common with the {BASELINE}: evaluate both")
    pairs = [(own[seed], base[seed]) for seed in shared]
    if len({sums.shape for pair in pairs for sums in pair}) > 1:
        raise UserError("seeds were evaluated on different documents: evaluate all on the same")
    sums = [np.sum(each, axis=0) for each in zip(*pairs, strict=True)]
    logs = [[each[:, 0].sum() / each[:, 1].sum() for each in pair] for pair in pairs]
    return Compared(
        paired_difference(sums[0], sums[1]),
        [float(mine - other) for mine, other in logs],
        needed_documents(sums[0], sums[1]),
    )


def quality_section(study: Study, key: str, found: Sequence[Quality]) -> Section:
    """The table in the style of Rybakov et al.'s Table 4."""
    blocks: list[Block] = [
        Paragraph(
            "Perplexity per token of held-out documents, the mean over seeds of the log. "
            "Differences are to the baseline on the same documents and seeds, with 95 % intervals "
            "by a paired bootstrap over documents: they speak of these checkpoints on other text, "
            "and the range over seeds beside them of other seeds. p is two-sided, corrected over "
            "each table after Holm. The last column is how many documents would show 0.1 "
            "perplexity with power 0.8. With fewer than 20 documents the intervals are too narrow."
        )
    ]
    for each in found:
        title = f"{variant_title(each.variant)}, learning rate {plain_text(each.learning_rate)}"
        head = ["method", "perplexity", "seeds", "difference", "interval", "nats: by seed"]
        head += ["p (Holm)", "verdict", "documents", "needed"]
        rows = [_quality_row(method, each) for method in each.perplexity]
        blocks.append(Table(title, head, rows))
        blocks += [Items(each.notes)] if each.notes else []
        if BASELINE not in each.perplexity:
            blocks.append(Paragraph(f"{title}: the {BASELINE} was not evaluated, no differences."))
    return Section(key, "Perplexity (in the style of Table 4)", blocks)


def _quality_row(method: str, table: Quality) -> list[str | Cell]:
    row: list[str | Cell] = [method, f"{table.perplexity[method]:.3f}", str(table.seeds[method])]
    found = table.against.get(method)
    if found is None:
        return [*row, *["–"] * 7]
    comparison, seeds = found.comparison, found.by_seed
    return [
        *row,
        f"{comparison.perplexity.value:+.3f}",
        interval_words(comparison.perplexity[1:], "+.3f"),
        " to ".join(dict.fromkeys(f"{each:+.4f}" for each in (min(seeds), max(seeds)))),
        f"{comparison.p_adjusted:.3g}",
        _verdict(found),
        f"{comparison.documents}",
        "–" if found.needed is None else f"{found.needed}",
    ]


def _verdict(found: Compared) -> Cell:
    """Over documents, and only where all seeds say the same."""
    comparison = found.comparison
    signs = {each > 0 for each in found.by_seed}
    if comparison.p_adjusted >= 0.05 or len(signs) > 1:
        return Cell("unresolved", "none")
    if len(found.by_seed) < 2:
        return Cell("one seed", "none")
    return Cell("worse", "bad") if signs == {True} else Cell("better", "good")


def gaps(study: Study, found: Sequence[Quality], variant: str) -> dict[str, paper.Gap]:
    """Differences at the variant's lowest evaluated learning rate, which is the normal one."""
    tables = [each for each in found if each.variant == variant]
    if not tables:
        return {}
    lowest = min(tables, key=lambda each: each.learning_rate)
    return {
        method: paper.Gap(*each.comparison.log_perplexity, each.comparison.p_adjusted, each.by_seed)
        for method, each in lowest.against.items()
    }


def paper_section(
    study: Study, key: str, found: Sequence[Quality]
) -> tuple[Section, dict[str, int]]:
    """Paper against ours, row by row; and how many rows have each answer."""
    blocks: list[Block] = [
        Paragraph(
            "Rybakov et al. 2024 (arXiv 2410.16682), one seed, against ours. What was asked, and "
            "how an answer is found, was fixed before any run."
        ),
        Items([f"Order. {paper.ORDER_RULE}", f"Ratio. {paper.RATIO_RULE}",
               f"Table 4. {paper.TABLE_4_RULE}"]),
    ]  # fmt: skip
    totals: dict[str, int] = defaultdict(int)
    for variant in study.variants:
        stable = recorded(study)
        ours = {method: breaks(study, stable, method, variant) for method in study.methods}
        known = gaps(study, found, variant)
        rates = study.rates_of(variant)
        tables = [_table_3(ours, rates, variant), _table_4(known, variant)]
        asked = paper.criteria(ours, rates, known)
        rows = [[each.claim, each.ours, _answer(each.answer)] for each in asked]
        title = f"{variant_title(variant)}: asked beforehand"
        tables.append(Table(title, ["claim", "ours", "answer"], rows, words=2))
        blocks += tables
        for cell in (cell for table in tables for row in table.rows for cell in row):
            if isinstance(cell, Cell):
                totals[cell.text] += 1
    return Section(key, "Paper against ours", blocks), dict(totals)


def _answer(answer: paper.Answer) -> Cell:
    return Cell(answer, _MARKS[answer])


def _table_3(ours: Mapping[str, paper.Breaks], rates: Sequence[float], variant: str) -> Table:
    rows: list[list[str | Cell]] = []
    base = ours.get(BASELINE, {})
    for method, largest in paper.TABLE_3.items():
        if method == BASELINE:
            continue
        theirs = paper.paper_span(method)
        mine = paper.span(ours.get(method, {}), base, rates)
        seeds = len(set(ours.get(method, {})) & set(base))
        row: list[str | Cell] = [method, plain_text(largest), f"{theirs.low:.3g}"]
        row += [f"{theirs.span_low:.3g} to {theirs.span_high:.3g}", *_span_words(mine), str(seeds)]
        row += [_answer(paper.above_baseline(ours, method))]
        row += [_answer(paper.ratio_answer(mine, theirs, seeds))]
        rows.append(row)
    head = ["method", "paper: stable at", "÷ baseline", "its grid allows", "ours: ÷ baseline"]
    head += ["our grid and seeds allow", "seeds", "above baseline", "ratio"]
    return Table(f"{variant_title(variant)}: Table 3", head, rows)


def _span_words(found: paper.Spanned | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    one = f"{found.low:.3g}"
    values = one if found.low == found.high else f"{one} to {found.high:.3g}"
    top = "any" if found.span_high == float("inf") else f"{found.span_high:.3g}"
    return values, f"{found.span_low:.3g} to {top}"


def _table_4(known: Mapping[str, paper.Gap], variant: str) -> Table:
    rows: list[list[str | Cell]] = []
    base = paper.TABLE_4[BASELINE]
    for method, value in paper.TABLE_4.items():
        if method == BASELINE:
            continue
        gap = known.get(method)
        row: list[str | Cell] = [method, f"{value:.2f}", f"{np.log(value / base):+.4f}"]
        row += ["–", "–", "0"] if gap is None else [
            f"{gap.value:+.4f}", interval_words((gap.low, gap.high), "+.4f"), str(len(gap.by_seed)),
        ]  # fmt: skip
        rows.append([*row, _answer(paper.table_4_answer(method, gap))])
    head = ["method", f"paper (baseline {base:.2f})", "paper: nats", "ours: nats", "interval"]
    head += ["seeds", "answer"]
    return Table(f"{variant_title(variant)}: Table 4", head, rows)
