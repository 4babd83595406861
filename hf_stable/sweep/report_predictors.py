"""Report sections on telemetry: predictors of instability, and logits across scales."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from hf_stable.telemetry.reading.drawing import plain_text

from .predictors import features_at, fit_power_law, foretell
from .report_page import Block, Paragraph, Section, Table, interval_words
from .study import Result, Study

FRACTIONS = (0.1, 0.2, 0.4)
# Largest attention logit above which all runs of Wortsman et al. 2023 diverged.
LOGIT_LINE = 1e4
_WORDS = {
    "max_logit": "largest attention logit",
    "entropy": "smallest attention entropy",
    "update_per_rate": "largest update ÷ learning rate",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate (reference)",
    "rate_and_bound": "learning rate, then whether logits are bounded (reference)",
    "loss": "smoothed training loss (reference)",
}


def features(study: Study, fraction: float) -> dict[str, dict[str, float]]:
    """Return, by run id, the features of ended runs after a fraction of their planned steps.

    Failed runs and runs without log lines are left out.
    """
    return {
        run.id: features_at(run.history, fraction, planned_steps(study, run), _rate(run))
        for run in study.results
        if run.status != "failed"
        and run.history is not None
        and {"step", "loss", "grad_norm"} <= set(run.history.train)
    }


def planned_steps(study: Study, run: Result) -> int:
    """Return the planned steps of a run, more than were taken if it was stopped."""
    assert run.history is not None
    steps = run.history.run.get("recipe", {}).get("training", {}).get("steps")
    return int(steps or max(each.steps for each in study.results))


def _rate(run: Result) -> float:
    return run.place.learning_rate


def logits(study: Study, fraction: float) -> dict[str, float]:
    """Return, by run id, the largest recorded attention logit over layers and heads."""
    found = {identity: each["max_logit"] for identity, each in features(study, fraction).items()}
    return {identity: logit for identity, logit in found.items() if not np.isnan(logit)}


def predictor_blocks(study: Study) -> list[Block]:
    """Return the table of AUCs of each feature for ending unstable, at fractions of the run."""
    fates = {run.id: run.unstable for run in study.results}
    rows: dict[str, list[str]] = {}
    counts = []
    for fraction in FRACTIONS:
        early = features(study, fraction)
        counts.append((len(early), sum(fates[each] for each in early)))
        for found in foretell(list(early.values()), [fates[each] for each in early]):
            row = rows.setdefault(found.feature, [_WORDS.get(found.feature, found.feature)])
            unknown = np.isnan(found.auc.value)
            row += ["–" if unknown else f"{found.auc.value:.3f}"]
            row += [interval_words(found.auc[1:], ".3f"), f"{found.unstable}/{found.runs}"]
    head = ["sign"]
    for fraction in FRACTIONS:
        head += [f"AUC at {100 * fraction:.0f} %", "over runs", "of"]
    words = (
        "The probability that a run that ends unstable (diverged or collapsed) has a worse number "
        "than one that does not: 0.5 is no sign, 1 a perfect one; of how many unstable out of how "
        "many runs. Taken from the last sample until then. The references are what telemetry has "
        "to beat: the learning rate, the same where among equal rates a model comes first whose "
        "attention logits nothing bounds (no norm of queries and keys, cap, sigma-Reparam or "
        "QK-clip), which the plan says before any run, and the loss. Intervals are 95 % of a "
        "bootstrap over runs, unstable and stable ones each among themselves. Runs of one method "
        "are alike, so they are of these methods and learning rates, not of others."
    )
    if not max(number for number, _ in counts):
        return [Paragraph("Nothing: no ended run has log lines.")]
    return [Paragraph(words), Table("Signs of instability", head, list(rows.values()))]


def logit_words(study: Study, points: Mapping[str, float]) -> str:
    """Return a sentence on the number of unstable runs on either side of the line."""
    runs = [run for run in study.results if run.id in points]
    above = [run.unstable for run in runs if points[run.id] > LOGIT_LINE]
    below = [run.unstable for run in runs if not points[run.id] > LOGIT_LINE]
    return (
        f"Of {len(above)} runs above the line at 10,000, {sum(above)} ended unstable; of "
        f"{len(below)} at or below it, {sum(below)}."
    )


def scale_section(studies: Sequence[Study], key: str, fraction: float) -> Section:
    """Return the section on the growth of logits with width at one learning rate."""
    rows = []
    for (method, variant, rate), found in sorted(_by_scale(studies, fraction).items()):
        sizes, values = zip(*found, strict=True)
        if len(set(sizes)) < 2:
            continue
        law = fit_power_law(sizes, values)
        reached = law.size_at(LOGIT_LINE)
        rows.append(
            [
                method,
                variant,
                plain_text(rate),
                ", ".join(f"{size:g}" for size in sorted(set(sizes))),
                f"{law.exponent.value:.2f}",
                interval_words(law.exponent[1:], ".2f"),
                plain_text(reached) if law.exponent.value > 0 else "never",
            ]
        )
    head = ["method", "variant", "learning rate", "widths", "exponent", "interval"]
    words = (
        "After Wortsman et al. 2023, section 3.3: the largest attention logit at "
        f"{100 * fraction:.0f} % of the run against the model's width, at one learning rate, over "
        "stable runs, by a power law; and the width at which it would be 10,000. The interval is "
        "Student's t over runs."
    )
    blocks: list[Block] = [Paragraph(words)]
    if rows:
        title = "Logits by width"
        blocks.append(Table(title, [*head, "width at 10,000"], rows, words=2))
    else:
        blocks.append(
            Paragraph(
                "Nothing: it needs runs of at least two widths at one learning rate that recorded "
                "logits and were stable. Pass the folders of studies of other widths as well."
            )
        )
    return Section(key, "Logit growth across scales", blocks, level=2)


def _by_scale(
    studies: Sequence[Study], fraction: float
) -> dict[tuple[str, str, float], list[tuple[float, float]]]:
    """Return the (width, logit) of stable runs by (method, variant, learning rate)."""
    found = defaultdict(list)
    for study in studies:
        points = logits(study, fraction)
        for run in study.results:
            width = _width(run)
            logit = points.get(run.id, np.nan)
            if width and run.stable and np.isfinite(logit) and logit > 0:
                place = run.place
                found[place.method, place.variant, place.learning_rate].append((width, logit))
    return found


def _width(run: Result) -> float | None:
    content = {} if run.history is None else run.history.run
    return content.get("model_config", {}).get("hidden_size")
