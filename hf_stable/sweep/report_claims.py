"""Report sections on perplexity against the baseline, and on the claims of the paper."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.drawing import plain_text

from . import paper
from .bootstrap import Interval
from .comparison import Comparison, holm, needed_documents, over_seeds, paired_difference
from .grid import KINDS, Stable, breaks, judged, recorded
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
from .report_tables import KIND_WORDS
from .rule import Collapse
from .study import BASELINE, Study
from .withheld import idle_caps, other_geometry

_MARKS = {"agree": "good", "disagree": "bad"}
# Question -> number of rows with each answer.
Totals = dict[str, Counter[str]]
# Seed -> document sums of one method.
Seeds = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Compared:
    """A method against the baseline at one learning rate, over their common seeds.

    Args:
        comparison: Comparison of the checkpoints, over documents.
        by_seed: Log-perplexity minus that of the baseline, nats per token.
        needed: Number of documents that would show a difference of 0.1 in perplexity.
    """

    comparison: Comparison
    by_seed: list[float]
    needed: int | None

    @property
    def over_seeds(self) -> Interval:
        """Difference in nats with its interval over seeds, which holds for the method."""
        return over_seeds(self.by_seed)


@dataclass(frozen=True)
class Quality:
    """Perplexities of a variant at one learning rate: per method, and against the baseline."""

    variant: str
    learning_rate: float
    perplexity: dict[str, float]
    seeds: dict[str, int]
    against: dict[str, Compared]
    notes: list[str]


def qualities(study: Study) -> list[Quality]:
    """Return the tables of perplexity from the records, by variant and learning rate."""
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
    """Return the ids of perplexity records without an ended run."""
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
    """Return the perplexity of the log-perplexity averaged over seeds."""
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
    """Return the section in the style of Table 4 of Rybakov et al."""
    blocks: list[Block] = [
        Paragraph(
            "Perplexity per token of held-out documents, the mean over seeds of the log. "
            "Differences are to the baseline on the same documents and seeds, in nats a token of "
            "log-perplexity. The interval over seeds is Student's t, 95 %, on the differences of "
            "paired seeds: it speaks of the method, and the verdict is by it alone, without a "
            "correction for the number of methods. The interval over documents is a paired "
            "bootstrap: it speaks of these checkpoints on other text and not of other seeds, and "
            "so does p, two-sided and corrected over each table after Holm; with fewer than 20 "
            "documents it is too narrow. The last column is how many documents would show 0.1 "
            "perplexity between such checkpoints with power 0.8."
        )
    ]
    for each in found:
        title = f"{variant_title(each.variant)}, learning rate {plain_text(each.learning_rate)}"
        head = ["method", "perplexity", "seeds", "difference, nats", "over seeds", "verdict"]
        head += ["by seed", "these checkpoints, over documents", "p over documents (Holm)"]
        head += ["documents", "needed"]
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
        return [*row, *["–"] * 8]
    comparison, seeds = found.comparison, found.by_seed
    return [
        *row,
        f"{found.over_seeds.value:+.4f}",
        _seeds_words(found.over_seeds, len(seeds)),
        _verdict(found),
        " to ".join(dict.fromkeys(f"{each:+.4f}" for each in (min(seeds), max(seeds)))),
        interval_words(comparison.log_perplexity[1:], "+.4f"),
        f"{comparison.p_adjusted:.3g}",
        f"{comparison.documents}",
        "–" if found.needed is None else f"{found.needed}",
    ]


def _seeds_words(found: Interval, seeds: int) -> str:
    return "one seed" if seeds == 1 else interval_words(found[1:], "+.4f")


def _verdict(found: Compared) -> Cell:
    """Return the verdict from the interval over seeds."""
    if len(found.by_seed) < 2:
        return Cell("one seed", "none")
    if not found.over_seeds.excludes_zero:
        return Cell("unresolved", "none")
    return Cell("worse", "bad") if found.over_seeds.value > 0 else Cell("better", "good")


def _normal(found: Sequence[Quality], variant: str) -> Quality | None:
    """Return the variant's table at its lowest evaluated learning rate, the normal one."""
    tables = [each for each in found if each.variant == variant]
    return min(tables, key=lambda each: each.learning_rate) if tables else None


def gaps(found: Sequence[Quality], variant: str) -> dict[str, paper.Gap]:
    """Return the differences to the baseline at the variant's normal learning rate."""
    table = _normal(found, variant)
    against = {} if table is None else table.against
    return {
        method: paper.Gap(*each.over_seeds, len(each.by_seed)) for method, each in against.items()
    }


def paper_section(study: Study, key: str, found: Sequence[Quality]) -> tuple[Section, Totals]:
    """Return the section that compares our results with the paper's tables, and the totals."""
    rules = [f"Order. {paper.ORDER_RULE}", f"Ratio. {paper.RATIO_RULE}"]
    rules = rules if "table_3" in study.reproduces else []
    rules += [f"Table 4. {paper.TABLE_4_RULE}"] if "table_4" in study.reproduces else []
    blocks: list[Block] = [
        Paragraph(
            "Rybakov et al. 2024 (arXiv 2410.16682), one seed, against ours. "
            f"{_beforehand(study)} An answer is vacuous where what the method adds never acted. It "
            "is withdrawn where weights begin otherwise than in the paper, so that the difference "
            "need not be the method's: what it is at the paper's geometry is open."
        ),
        Items(rules),
    ]
    totals: Totals = {}
    again: dict[Collapse, Stable] = {
        kind: judged(study, kind)
        for kind in (KINDS if "table_3" in study.reproduces else ())
        if kind != study.thresholds.get("collapse")
    }
    for variant in study.variants:
        if "table_3" in study.reproduces:
            blocks += _on_table_3(study, variant, again, totals)
        if "table_4" in study.reproduces:
            blocks += _on_table_4(study, variant, found, totals)
    return Section(key, "Paper against ours", blocks), totals


def _beforehand(study: Study) -> str:
    """Return a sentence on the evidence that the claims were written before the runs."""
    revision = study.claims_revision
    if revision is None:
        return (
            "No commit of the claims and their rules is in the study's records, so nothing here "
            "shows that they were written before the runs."
        )
    if revision.endswith("-dirty"):
        return (
            f"When the study began, the claims and their rules differed from commit {revision[:-6]}"
            ", so nothing here shows that they were written before the runs."
        )
    return f"When the study began, the claims and their rules were those of commit {revision}."


def _on_table_3(
    study: Study, variant: str, again: Mapping[Collapse, Stable], totals: Totals
) -> list[Block]:
    """Return the table and its claims, which are also judged under other thresholds."""
    withheld = idle_caps(study, [run for run in study.results if run.place.variant == variant])
    rates = study.rates_of(variant)

    def claims(stable: Stable) -> list[paper.Criterion]:
        return paper.table_3_claims(_breaks(study, stable, variant), rates, withheld)

    table = _table_3(_breaks(study, recorded(study), variant), rates, variant, withheld)
    others = [claims(stable) for stable in again.values()]
    found = _claim_rows(claims(recorded(study)))
    rows = [[*row, *(each[at].answer for each in others)] for at, row in enumerate(found)]
    head = ["claim", "ours", "answer", *(f"collapse at {KIND_WORDS[kind]}" for kind in again)]
    asked = Table(f"{variant_title(variant)}: claims on Table 3", head, rows, words=2)
    _count(totals, "above the baseline", [row[-2] for row in table.rows])
    _count(totals, "ratio", [row[-1] for row in table.rows])
    _count(totals, "claims on Table 3", [row[2] for row in rows])
    return [table, *_reasons(withheld, paper.TABLE_3), asked]


def _on_table_4(
    study: Study, variant: str, found: Sequence[Quality], totals: Totals
) -> list[Block]:
    normal = _normal(found, variant)
    runs = [
        run
        for run in study.results
        if normal is not None
        and (run.place.variant, run.place.learning_rate) == (variant, normal.learning_rate)
    ]
    withheld = {**other_geometry(study, runs), **idle_caps(study, runs)}
    known = gaps(found, variant)
    table = _table_4(known, variant, withheld)
    rows = _claim_rows(paper.table_4_claims(known, withheld))
    title = f"{variant_title(variant)}: claims on Table 4"
    asked = Table(title, ["claim", "ours", "answer"], rows, words=2)
    _count(totals, "Table 4", [row[-1] for row in table.rows])
    _count(totals, "claims on Table 4", [row[2] for row in rows])
    return [table, *_reasons(withheld, paper.TABLE_4), asked]


def _breaks(study: Study, stable: Stable, variant: str) -> dict[str, paper.Breaks]:
    return {method: breaks(study, stable, method, variant) for method in study.methods}


def _count(totals: Totals, asked: str, cells: Sequence[object]) -> None:
    """Add a table's answers to the totals."""
    answers = totals.setdefault(asked, Counter())
    answers.update(cell.text for cell in cells if isinstance(cell, Cell))


def _reasons(withheld: Mapping[str, paper.Withheld], table: Mapping[str, float]) -> list[Block]:
    lines = [
        f"{method} is {each.answer}: {each.reason}."
        for method, each in withheld.items()
        if method in table
    ]
    return [Items(lines)] if lines else []


def _claim_rows(found: Sequence[paper.Criterion]) -> list[list[str | Cell]]:
    return [[each.claim, each.ours, _answer(each.answer)] for each in found]


def _answer(answer: paper.Answer) -> Cell:
    return Cell(answer, _MARKS.get(answer, "none"))


def _table_3(
    ours: Mapping[str, paper.Breaks],
    rates: Sequence[float],
    variant: str,
    withheld: Mapping[str, paper.Withheld],
) -> Table:
    rows: list[list[str | Cell]] = []
    base = ours.get(BASELINE, {})
    for method, largest in paper.TABLE_3.items():
        if method == BASELINE:
            continue
        theirs = paper.paper_span(method)
        mine = paper.span(ours.get(method, {}), base, rates)
        seeds = len(set(ours.get(method, {})) & set(base))
        answers = (paper.above_baseline(ours, method), paper.ratio_answer(mine, theirs, seeds))
        if method in withheld:
            answers = (withheld[method].answer, withheld[method].answer)
        row: list[str | Cell] = [method, plain_text(largest)]
        row += [f"{largest / paper.TABLE_3[BASELINE]:.3g}", theirs.words]
        row += ["–" if mine is None else mine.words, str(seeds), *map(_answer, answers)]
        rows.append(row)
    head = ["method", "paper: stable at", "÷ baseline", "its grid allows"]
    head += ["our grid and seeds allow", "seeds", "above baseline", "ratio"]
    return Table(f"{variant_title(variant)}: Table 3", head, rows)


def _table_4(
    known: Mapping[str, paper.Gap], variant: str, withheld: Mapping[str, paper.Withheld]
) -> Table:
    rows: list[list[str | Cell]] = []
    base = paper.TABLE_4[BASELINE]
    for method, value in paper.TABLE_4.items():
        if method == BASELINE:
            continue
        gap = known.get(method)
        row: list[str | Cell] = [method, f"{value:.2f}", f"{math.log(value / base):+.4f}"]
        row += ["–", "–", "0"] if gap is None else [
            f"{gap.value:+.4f}",
            _seeds_words(Interval(gap.value, gap.low, gap.high), gap.seeds),
            str(gap.seeds),
        ]  # fmt: skip
        answer = (
            withheld[method].answer if method in withheld else paper.table_4_answer(method, gap)
        )
        rows.append([*row, _answer(answer)])
    head = ["method", f"paper (baseline {base:.2f})", "paper: nats", "ours: nats", "over seeds"]
    head += ["seeds", "answer"]
    return Table(f"{variant_title(variant)}: Table 4", head, rows)
