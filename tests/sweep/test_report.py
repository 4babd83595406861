"""Laws of the report: every number is that of the records, and what is missing is named."""

import itertools
import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_stable.records import write_json
from hf_stable.sweep.comparison import compare
from hf_stable.sweep.grid import judged, recorded, unmarked
from hf_stable.sweep.report import write_report
from hf_stable.sweep.study import read_study

from .reports import FAILED, MADE, MISSING, VARIANTS, Row, by_method, markdown_tables
from .studies import (
    BIGRAM,
    INITIAL,
    LIMITS,
    RATES,
    STEPS,
    UNIGRAM,
    Made,
    final_loss,
    identity,
    max_logit,
    places,
    write_study,
)


def is_stable(made: Made, place: tuple[str, str, float, int], limit: float) -> bool:
    """By what was made: with loss below the limit, trained to the end."""
    return place not in made.statuses and final_loss(made, place) < limit


def direct_cell(limit: float, method: str, variant: str, rate: float) -> str:
    cell = [(method, variant, rate, seed) for seed in MADE.seeds]
    states = [MADE.statuses.get(place) for place in cell]
    ended = len(cell) - states.count("missing")
    words = f"{sum(is_stable(MADE, place, limit) for place in cell)}/{ended}"
    for name, letter in (("stopped", "s"), ("failed", "f"), ("missing", "w")):
        words += f" {letter}{states.count(name)}" if name in states else ""
    return words


def direct_largest(limit: float, method: str, variant: str) -> float:
    largest = 0.0
    for rate in RATES:
        stable, ended = direct_cell(limit, method, variant, rate).split(" ")[0].split("/")
        if 2 * int(stable) <= int(ended):
            return largest
        largest = rate
    return largest


def direct_ratio(method: str, largest: float, base: float) -> str:
    """Return the ratio of two breaks, each between the largest stable rate and the next."""
    if method == "baseline":
        return "1"
    after = dict(itertools.pairwise(RATES))
    if base == RATES[-1]:
        return "–" if largest == base else f"≤ {after[largest] / base:.3g}"
    if largest == RATES[-1]:
        return f"≥ {largest / after[base]:.3g}"
    return f"{largest / after[base]:.3g} to {after[largest] / base:.3g}"


@pytest.mark.parametrize(
    ("title", "limit"),
    [
        ("{}", (UNIGRAM + BIGRAM) / 2),
        ("{}: collapse at H2, the bigram's; judged otherwise: {}", BIGRAM),
        ("{}: collapse at H1 - 0.2, near the unigram's; judged otherwise: {}", UNIGRAM - 0.2),
    ],
)
def test_the_grid_counts_what_is_stable(
    title: str, limit: float, tables: dict[str, list[Row]]
) -> None:
    for variant in VARIANTS:
        middle = (UNIGRAM + BIGRAM) / 2
        own = [place for place in places(MADE) if place[1] == variant and place != MISSING]
        changed = sum(is_stable(MADE, p, limit) != is_stable(MADE, p, middle) for p in own)
        assert limit == middle or bool(changed) == (variant == VARIANTS[0])
        rows = by_method(tables[title.format(variant, changed or "none")])
        base = direct_largest(limit, "baseline", variant)
        assert list(rows) == list(LIMITS)
        for method, row in rows.items():
            for rate in RATES:
                assert row[f"{rate:g}"] == direct_cell(limit, method, variant, rate)
            largest = direct_largest(limit, method, variant)
            more = "≥ " if largest == RATES[-1] else ""
            assert row["largest stable"] == f"{more}{largest:g}"
            assert row["break ÷ baseline's"] == direct_ratio(method, largest, base)


def test_an_order_that_depends_on_the_threshold_is_said(tmp_path: Path) -> None:
    """The baseline loses to soft_cap by H2 only, and wins by the two others."""
    write_report([write_study(tmp_path / "one", MADE)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"{VARIANTS[1]}: no pair of methods changes its order" in text
    turning = {("baseline", "", rate, seed): 2.9 for rate in (0.03, 0.1) for seed in range(3)}
    write_report([write_study(tmp_path / "two", Made(losses=turning))], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "turns around: baseline and soft_cap." in text


def test_sensitivity_is_the_mean_over_the_grid(tables: dict[str, list[Row]]) -> None:
    for variant in VARIANTS:
        rows = by_method(tables[f"{variant}: sensitivity"])
        for method, row in rows.items():
            cells = [[(method, variant, rate, seed) for rate in RATES] for seed in MADE.seeds]
            whole = [seed for seed in cells if not {FAILED, MISSING} & set(seed)]
            losses = np.array([[final_loss(MADE, place) for place in seed] for seed in whole])
            means = np.minimum(losses, INITIAL).mean(axis=0)
            assert row["seeds"] == str(len(whole))
            assert row["sensitivity"] == f"{means.mean() - means.min():.3f}"
            assert float(row["best rate"]) == RATES[int(means.argmin())]


def test_the_loss_at_the_highest_rate(tables: dict[str, list[Row]]) -> None:
    for variant in VARIANTS:
        rows = tables[f"{variant}: validation loss at 0.3, nats"]
        middles = [float(row["median"]) for row in rows]
        assert middles == sorted(middles) and len(rows) == len(LIMITS)
        for method, row in by_method(rows).items():
            cell = [(method, variant, 0.3, seed) for seed in MADE.seeds]
            losses = [final_loss(MADE, place) for place in cell if place != FAILED]
            words = [f"{each:.3f}" for each in (np.median(losses), min(losses), max(losses))]
            assert list(row.values())[1:] == [*words, str(len(losses))]


def test_the_logits_are_those_at_the_fraction(written: Path) -> None:
    runs = [place for place in places(MADE) if place not in (FAILED, MISSING)]
    middle = (UNIGRAM + BIGRAM) / 2
    sides: dict[bool, list[bool]] = {True: [], False: []}
    for place in runs:
        above = max_logit(MADE, place, round(0.4 * STEPS)) > 1e4
        sides[above].append(not is_stable(MADE, place, middle))
    text = (written / "report.md").read_text(encoding="utf-8")
    assert len(sides[True]) and sum(sides[True]) < len(sides[True])
    assert (
        f"Of {len(sides[True])} runs above the line at 10,000, {sum(sides[True])} ended unstable; "
        f"of {len(sides[False])} at or below it, {sum(sides[False])}." in text
    )


def test_auc_is_the_part_of_pairs_in_the_right_order(tables: dict[str, list[Row]]) -> None:
    runs = [place for place in places(MADE) if place not in (FAILED, MISSING)]
    bad = [place for place in runs if not is_stable(MADE, place, (UNIGRAM + BIGRAM) / 2)]
    good = [place for place in runs if place not in bad]
    rows = by_method(tables["Signs of instability"])

    def auc(score: dict[tuple[str, str, float, int], float]) -> float:
        pairs = [np.sign(score[b] - score[g]) for b, g in itertools.product(bad, good)]
        return float(np.mean(pairs) / 2 + 0.5)

    for fraction, step in (("10 %", 5), ("20 %", 10), ("40 %", 20)):
        logit = {place: max_logit(MADE, place, step) for place in runs}
        assert rows["largest attention logit"][f"AUC at {fraction}"] == f"{auc(logit):.3f}"
        rate = {place: place[2] for place in runs}
        assert rows["learning rate (reference)"][f"AUC at {fraction}"] == f"{auc(rate):.3f}"
        # Of these models only qk_norm bounds its logits.
        known = {place: place[2] * (0.999 if place[0] == "qk_norm" else 1) for place in runs}
        name = "learning rate, then whether logits are bounded (reference)"
        assert rows[name][f"AUC at {fraction}"] == f"{auc(known):.3f}" != f"{auc(rate):.3f}"
    assert rows["largest attention logit"]["of"] == f"{len(bad)}/{len(runs)}"


def test_perplexities_are_those_of_the_sums(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", MADE)
    write_report([folder], tmp_path / "out")
    found = markdown_tables((tmp_path / "out" / "report.md").read_text(encoding="utf-8"))
    rows = by_method(found[f"{VARIANTS[0]}, learning rate 0.01"])
    logs, summed = {}, dict.fromkeys(LIMITS, 0.0)
    for method in LIMITS:
        for seed in MADE.seeds:
            name = identity((method, VARIANTS[0], 0.01, seed))
            sums = np.array(read_json(folder / "perplexity" / f"{name}.json")["documents"])
            logs[method, seed] = sums[:, 0].sum() / sums[:, 1].sum()
            summed[method] = summed[method] + sums
    base = summed.pop("baseline")
    compared = compare(summed, base)
    for method, row in rows.items():
        own = [logs[method, seed] for seed in MADE.seeds]
        assert row["seeds"] == "3"
        assert float(row["perplexity"]) == pytest.approx(math.exp(np.mean(own)), abs=2e-3)
        if method != "baseline":
            gaps = [logs[method, seed] - logs["baseline", seed] for seed in MADE.seeds]
            assert row["by seed"] == f"{min(gaps):+.4f} to {max(gaps):+.4f}"
            seeds = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
            assert row["over seeds"] == f"{seeds.low:+.4f} to {seeds.high:+.4f}"
            assert row["difference, nats"] == f"{np.mean(gaps):+.4f}"
            checkpoints = compared[method].log_perplexity
            words = f"{checkpoints.low:+.4f} to {checkpoints.high:+.4f}"
            assert row["these checkpoints, over documents"] == words
            assert row["p over documents (Holm)"] == f"{compared[method].p_adjusted:.3g}"
            assert row["verdict"] == ("better" if seeds.high < 0 else
                                      "worse" if seeds.low > 0 else "unresolved")  # fmt: skip
    assert rows["qk_norm"]["verdict"] == "better"
    # The other variant's qkv_norm has a seed that has not ended, so its record is no run's.
    other = by_method(found[f"{VARIANTS[1]}, learning rate 0.01"])
    assert other["qkv_norm"]["seeds"] == "2"


def read_json(file: Path) -> dict[str, list[list[float]]]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_cost_is_the_sum_over_the_runs(tables: dict[str, list[Row]]) -> None:
    runs = len(places(MADE)) - 2
    rows = {row[""]: row["found"] for row in tables["All ended runs"]}
    assert rows["runs ended"] == f"{runs + 1}, retried 1"
    assert rows["hours of runs"] == f"{36 * runs / 3600:.2f} over {runs} runs"
    assert rows["training FLOPs"] == f"{runs * 1e12:.3g} over {runs} runs"
    assert rows["device"] == "cpu (1 threads)" and rows["revision"] == "0123456789abcdef"
    assert rows["steps of a run"] == str(STEPS) and rows["torch"] == "2.13.0"


def test_what_is_missing_is_named(written: Path) -> None:
    text = unescape((written / "report.md").read_text(encoding="utf-8"))
    missing = text.split("### What is missing")[1]
    assert f"not finished: {identity(MISSING)}" in missing
    assert f"failed: {identity(FAILED)}, 2 attempts: RuntimeError: <out of memory>" in missing
    assert "methods of the paper that the study lacks: soft_temp, soft_clip" in missing
    assert f"{len(places(MADE)) - 1} of {len(places(MADE))} runs have ended" in text


def test_a_study_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    made = Made(statuses=dict.fromkeys(places(Made()), "missing"))
    write_report([write_study(tmp_path / "study", made)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("- not finished: ") == len(places(made))
    assert "figure left out: Learning-rate sensitivity: " in text
    assert "figure left out: Loss by learning rate: no variant: " in text
    assert "figure left out: Largest attention logit" in text
    assert "no table of perplexity" in text and "No run has log lines" in text
    assert not list((tmp_path / "out").glob("figures/*"))


def test_runs_without_telemetry_and_without_a_baseline(tmp_path: Path) -> None:
    made = Made(limits={"qk_norm": 0.1}, telemetry=False)
    write_report([write_study(tmp_path / "study", made)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "no method of the study is named baseline" in text
    row = by_method(markdown_tables(text)["Signs of instability"])["largest attention logit"]
    assert set(list(row.values())[1:]) == {"–", "0/0"}


def test_several_studies_and_the_law_over_widths(tmp_path: Path) -> None:
    """Logits that go with the square of the width."""
    folders = []
    for width in (32, 64, 128):
        made = Made(name=f"width-{width}", limits={"baseline": 0.3}, rates=(0.1,), seeds=(0,))
        folder = write_study(tmp_path / made.name, made)
        run = folder / "runs" / identity(places(made)[0])
        content = read_json(run / "run.json")
        write_json(run / "run.json", {**content, "model_config": {"hidden_size": width}})
        logit = 0.5 * width**2
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [re.sub(r'(max_logit": \[\[)[\d.]+', rf"\g<1>{logit}", line) for line in lines]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        folders.append(folder)
    write_report(folders, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(f"## Study width-{width}" in text for width in (32, 64, 128))
    (row,) = markdown_tables(text.split("## Logit growth")[1])["Logits by width"]
    assert (row["widths"], row["exponent"]) == ("32, 64, 128", "2.00")
    assert float(row["width at 10,000"]) == pytest.approx(math.sqrt(2e4), rel=1e-3)


def test_warnings_are_of_what_models_were_and_not_of_their_names(tmp_path: Path) -> None:
    limits = {
        "baseline": 0.03,
        "plain": 0.1,
        "narrow": 0.1,
        "not_mup": 0.1,
        "no_sigma_reparam": 0.1,
    }
    configs = {
        "plain": {"sigma_reparam": True},
        "narrow": {"mup_base_width": 256},
        "not_mup": {"mup_base_width": 64},  # the width of these models
        "no_sigma_reparam": {"sigma_reparam": False},
    }
    made = Made(limits=limits, configs=configs)
    write_report([write_study(tmp_path / "study", made)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for words, method in (("Sigma-Reparam divides", "plain"), ("Layers have factors", "narrow")):
        assert re.findall(rf"^- no variant, (.*): {words}", text, re.MULTILINE) == [method]


def test_text_without_marks_is_warned_of_and_can_be_reported(tmp_path: Path) -> None:
    made = Made(bigram=UNIGRAM + 0.1)
    study = read_study(write_study(tmp_path / "study", made))
    write_report([study.folder], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"Warning: {len(study.results)} of them ran on text" in text
    assert judged(study, "middle") == judged(study, "bigram") == recorded(study)
    assert not unmarked(read_study(write_study(tmp_path / "other")))
