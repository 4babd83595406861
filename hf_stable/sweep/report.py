"""Report of studies as one Markdown file and one HTML page, from records alone, without torch.

The report lists missing data. Equal records give equal bytes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.figures import WORTSMAN, Drawing, LeftOut
from hf_stable.telemetry.reading.html_kit import write_whole
from hf_stable.wording import counted

from .grid import recorded, unmarked
from .paper import TABLE_3
from .report_claims import Quality, Totals, paper_section, qualities, quality_section, strangers
from .report_figures import (
    drawn,
    logit_scatter,
    loss_curves,
    sensitivity_bars,
    standalone,
)
from .report_page import (
    Block,
    Items,
    Paragraph,
    Section,
    Table,
    to_html,
    to_markdown,
    variant_title,
)
from .report_predictors import logit_words, logits, predictor_blocks, scale_section
from .report_tables import (
    grid_section,
    highest_section,
    rejudged_section,
    sensitivities,
    sensitivity_blocks,
)
from .rule import Thresholds, rise_and_rest
from .study import BASELINE, Result, Study, read_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
# Fraction of the run at which logits are read: late enough to predict, early enough to stop.
LOGIT_FRACTION = 0.4


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write `report.md`, `report.html` and the figures as SVG files, each atomically.

    Args:
        folders: Folders of studies, finished or not.
        output: Folder to write to; it is created if needed.

    Raises:
        UserError: If no folder is given, a folder holds no study, or matplotlib is not installed.
    """
    if not folders:
        raise UserError("a report needs at least one study's folder, and none was given")
    if output.is_file():
        raise UserError(f"{output} is a file: name the folder to write the report to")
    studies = [read_study(folder) for folder in folders]
    sections = [section for number, study in enumerate(studies, 1)
                for section in chapter(study, f"study-{number}")]  # fmt: skip
    sections.append(scale_section(studies, "scales", LOGIT_FRACTION))
    title = f"Stability study: {', '.join(study.name for study in studies)}"
    drawings = [block for each in sections for block in each.blocks if isinstance(block, Drawing)]
    for drawing in drawings:
        write_whole(output / FIGURES / f"{drawing.key}.svg", standalone(drawing))
    write_whole(output / TEXT, to_markdown(title, sections, PAGE, FIGURES))
    write_whole(output / PAGE, to_html(title, sections))


def chapter(study: Study, key: str) -> list[Section]:
    """Return all sections on one study; `key` is the prefix of their anchors."""
    quality = qualities(study)
    claims, totals = [], {}
    if study.reproduces:
        section, totals = paper_section(study, f"{key}-paper", quality)
        claims = [section]
    left_out: list[LeftOut] = []
    sections = [
        grid_section(study, f"{key}-grid"),
        rejudged_section(study, f"{key}-rejudged"),
        _curves(study, f"{key}-curves", left_out),
        _sensitivity(study, f"{key}-sensitivity", left_out),
        highest_section(study, f"{key}-highest"),
        _logits(study, f"{key}-logits", left_out),
        *([quality_section(study, f"{key}-perplexity", quality)] if quality else []),
        Section(f"{key}-predictors", "What foretells instability", predictor_blocks(study)),
        *claims,
        _cost(study, f"{key}-cost"),
        _missing(study, f"{key}-missing", quality, left_out),
    ]
    return [_summary(study, key, totals), *sections]


def _summary(study: Study, key: str, totals: Totals) -> Section:
    """Return a summary of the study in a few lines."""
    results = study.results
    planned, ended = len(results) + len(study.unfinished), len(results)
    lines = [
        f"{ended} of {counted(planned, 'run')} {'has' if planned == 1 else 'have'} ended: "
        f"{counted(len(study.methods), 'method')}, {counted(len(study.rates), 'learning rate')}, "
        f"{counted(len(study.seeds), 'seed')}, {counted(len(study.variants), 'variant')}.",
        *_fates(results),
        f"Validation text, nats per token: unigram {_span([run.unigram for run in results])}, "
        f"bigram {_span([run.bigram for run in results])}; loss at the start "
        f"{_span([run.initial_loss for run in results])}.",
    ]
    lines += [
        f"Against the paper, {asked}: "
        f"{', '.join(f'{number} {answer}' for answer, number in sorted(answers.items()))}."
        for asked, answers in totals.items()
    ]
    if bare := unmarked(study):
        lines.append(
            f"Warning: {len(bare)} of them ran on text of which a bigram table knows no more than "
            "a unigram table (too little text, or too large a vocabulary). The middle of the two "
            "marks nothing there, and neither does the bigram's: verdicts by them, recorded or "
            "judged again, say nothing; only the threshold near the unigram's does."
        )
    rule = ", ".join(f"{name} {value}" for name, value in study.thresholds.items())
    lines += [f"The rule's thresholds: {rule}."] if rule else []
    return Section(key, f"Study {study.name}", [Items(lines)], level=2)


def _fates(results: Sequence[Result]) -> list[str]:
    """Return lines on how the finished runs ended."""
    counts = Counter(result.status for result in results)
    stable = [run for run in results if run.stable]
    lines = [
        f"{len(stable)} stable, {sum(run.diverged for run in results)} diverged, "
        f"{sum(run.collapsed for run in results)} collapsed or not learned, "
        f"{counts['failed']} failed; {counts['stopped']} were stopped early.",
        "Diverged is a number that is not finite, or a smoothed training loss that rose and stayed "
        "up. Collapsed is a final validation loss near that of a unigram table, of a run whose "
        f"loss need not have risen. {_rise_words(results)}",
    ]
    if stable:
        degraded = sum(run.verdict.degraded for run in stable)
        words = "stable runs are no better than a bigram table."
        lines.append(f"{degraded} of the {len(stable)} {words}")
    return lines


def _rise_words(results: Sequence[Result]) -> str:
    """Return a sentence on the largest rise of a smoothed training loss."""
    rises = [
        rise_and_rest(run.history.train, run.warmup_steps, _decay(run))[0]
        for run in results
        if run.history is not None and "loss" in run.history.train
    ]
    if not rises:
        return "No run has log lines."
    return f"The largest rise after warm-up in any of {len(rises)} runs was {max(rises):.2f} nats."


def _decay(run: Result) -> float:
    return Thresholds.from_dict(run.thresholds).decay


def _span(values: Sequence[float], form: str = ".3f") -> str:
    """Return one number, or the smallest and largest; numbers that are not finite are left out."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "not recorded"
    low, high = f"{min(known):{form}}", f"{max(known):{form}}"
    return low if low == high else f"{low} to {high}"


def _figure(found: Drawing | LeftOut, left_out: list[LeftOut]) -> list[Block]:
    if isinstance(found, Drawing):
        return [found]
    left_out.append(found)
    return [Paragraph(f"Left out: {found.reason}.")]


def _curves(study: Study, key: str, left_out: list[LeftOut]) -> Section:
    stable, blocks = recorded(study), []
    for number, variant in enumerate(study.variants, 1):
        words = (
            "A panel a method: median over seeds, band from least to largest, every run a mark. "
            "Losses above that at the start are drawn there. Behind it the baseline and all other "
            "methods, and what tables of single words and of pairs of words would have.",
            "after Wortsman et al. 2023 (arXiv 2309.14322), Figure 1",
        )
        title = f"Loss by learning rate: {variant_title(variant)}"

        def draw(variant: str = variant) -> "Figure":
            return loss_curves(study, variant, stable)

        blocks += _figure(drawn(f"{key}-{number}", title, words, draw), left_out)
    return Section(key, "Loss by learning rate", blocks)


def _sensitivity(study: Study, key: str, left_out: list[LeftOut]) -> Section:
    found = {variant: sensitivities(study, variant) for variant in study.variants}
    values = {
        (method, variant): each.value
        for variant, methods in found.items()
        for method, each in methods.items()
    }
    words = (
        "Small is robust only where the curve above it is low: a method that always fails has a "
        "sensitivity near 0. Whiskers are the intervals over seeds of the table. See the warnings.",
        WORTSMAN,
    )
    figure = drawn(
        f"{key}-bars",
        "Learning-rate sensitivity",
        words,
        lambda: sensitivity_bars(study.methods, study.variants, values),
    )
    blocks = [*_figure(figure, left_out), *sensitivity_blocks(study, found)]
    return Section(key, "Learning-rate sensitivity", blocks)


def _logits(study: Study, key: str, left_out: list[LeftOut]) -> Section:
    points, stable = logits(study, LOGIT_FRACTION), recorded(study)
    part = f"{100 * LOGIT_FRACTION:.0f} %"
    words = (
        f"Every run: its largest attention logit, over layers and heads and before a cap, at the "
        f"last sample until {part} of the run, against its final loss. All runs of Wortsman et al. "
        "whose first block was above the dashed line at 10,000 at step 2,000 diverged.",
        f"after {WORTSMAN}",
    )
    figure = drawn(
        f"{key}-scatter",
        f"Largest attention logit at {part} of the run",
        words,
        lambda: logit_scatter(study, study.variants, points, stable),
    )
    blocks = _figure(figure, left_out)
    blocks += [Paragraph(logit_words(study, points))] if points else []
    return Section(key, "Attention logits and the final loss", blocks)


def _cost(study: Study, key: str) -> Section:
    """Return the section on hours, FLOPs and versions."""
    results = study.results
    timed = [run.seconds for run in results if math.isfinite(run.seconds)]
    with_flops = [run.flops for run in results if run.flops is not None]
    runs = [run.history.run for run in results if run.history is not None]
    rows = [
        ["runs ended", f"{len(results)}, retried {sum(run.attempts > 1 for run in results)}"],
        ["hours of runs", f"{sum(timed) / 3600:.2f} over {counted(len(timed), 'run')}"],
        ["training FLOPs", f"{sum(with_flops):.3g} over {counted(len(with_flops), 'run')}"],
        ["steps of a run", _span([run.steps for run in results if run.steps], ",.0f")],
        ["parameters", _span([run.parameters for run in results if run.parameters], ",.0f")],
        ["device", _tally([run.get("device") for run in runs])],
        ["revision", _tally([run.get("git_revision") for run in runs])],
        *([name, _tally([run.get("versions", {}).get(name) for run in runs])]
          for name in ("torch", "transformers", "numpy")),
    ]  # fmt: skip
    return Section(key, "What it cost", [Table("All ended runs", ["", "found"], rows, words=2)])


def _tally(values: Sequence[str | None]) -> str:
    """Return every value, with its number of runs if there are several values."""
    counts = Counter(value or "not recorded" for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return (
        ", ".join(f"{value} ({counted(number, 'run')})" for value, number in sorted(counts.items()))
        or "–"
    )


def _missing(
    study: Study, key: str, quality: Sequence[Quality], left_out: Sequence[LeftOut]
) -> Section:
    """Return the section on everything that the report could not show."""
    lines = [f"not finished: {identity}" for identity in study.unfinished]
    lines += [
        f"failed: {run.id}, {run.attempts} attempts: {run.error or 'no error recorded'}"
        for run in study.results
        if run.status == "failed"
    ]
    lines += [f"figure left out: {each.title}: {each.reason}" for each in left_out]
    if not quality:
        lines.append("no table of perplexity: the study has no perplexity records of ended runs")
    lines += [f"perplexity record of no ended run: {each}" for each in strangers(study)]
    if BASELINE not in study.methods:
        lines.append(f"no ratios and differences: no method of the study is named {BASELINE}")
    absent = [method for method in TABLE_3 if method not in study.methods]
    if absent and study.reproduces:
        lines.append(f"methods of the paper that the study lacks: {', '.join(absent)}")
    lines += study.notes
    return Section(key, "What is missing", [Items(lines or ["Nothing."])])
