"""Laws of what a report claims: it says no more than its records show."""

import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from hf_stable.sweep.report import write_report
from hf_stable.sweep.study import read_study
from hf_stable.sweep.withheld import idle_caps, largest_logit, other_geometry

from .reports import Row, by_method, markdown_tables
from .studies import LIMITS, STEPS, Made, is_beyond, max_logit, places, write_study

STUDIES = Path(__file__).parents[2] / "scripts/studies"
CAP = {"attn_logit_softcapping": 50.0}
# As in the paper, except for the width.
GEOMETRY = {"initializer": "normal", "initializer_range": 0.02, "embedding_std": None}


def reported(made: Made, folder: Path) -> tuple[str, dict[str, list[Row]]]:
    write_report([write_study(folder / "study", made)], folder / "out")
    text = (folder / "out" / "report.md").read_text(encoding="utf-8")
    return text, markdown_tables(text)


def test_a_run_that_never_rose_is_not_called_diverged(tmp_path: Path) -> None:
    made = Made(statuses={("baseline", "", 0.3, 0): "failed"})
    text, _ = reported(made, tmp_path)
    ended = [place for place in places(made) if place not in made.statuses]
    beyond = sum(is_beyond(made, place) for place in ended)
    words = f"{len(ended) - beyond} stable, 0 diverged, {beyond} collapsed or not learned, 1 failed"
    assert beyond and words in text
    assert f"in any of {len(ended)} runs was 0.00 nats." in text


def test_the_paper_is_named_only_by_a_study_that_reproduces_it(tmp_path: Path) -> None:
    plain, _ = reported(Made(documents=6), tmp_path / "plain")
    assert "Rybakov" not in plain and "Paper against ours" not in plain
    assert "methods of the paper" not in plain
    third, tables = reported(Made(reproduces=("table_3",)), tmp_path / "third")
    assert "no variant: Table 3" in tables and "no variant: Table 4" not in tables
    assert "Against the paper, ratio: " in third and "Table 4: " not in third


def test_the_summary_counts_the_answers_of_the_tables(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    found = {title: rows for title, rows in markdown_tables(text).items() if "Table 3" in title}
    answers = [row["above baseline"] for title, rows in found.items() for row in rows
               if "claims" not in title]  # fmt: skip
    (line,) = re.findall(r"Against the paper, above the baseline: (.*)\.", text)
    counted = dict(reversed(part.split(" ", 1)) for part in line.split(", "))
    assert counted == {answer: str(answers.count(answer)) for answer in set(answers)}


def test_one_seed_has_no_interval_in_a_report(tmp_path: Path) -> None:
    text, tables = reported(Made(seeds=(0,), documents=6), tmp_path)
    for row in tables["no variant: sensitivity"]:
        assert row["over seeds"] == row["over seeds 5"] == "one seed"
    rows = by_method(tables["no variant, learning rate 0.01"])
    assert rows["qk_norm"]["over seeds"] == rows["qk_norm"]["verdict"] == "one seed"
    assert "One seed has no interval." in text


def test_a_sensitivity_that_is_one_sided_is_counted(tmp_path: Path) -> None:
    """The parabola's best is the second of four rates."""
    inner, tables = reported(Made(), tmp_path / "inner")
    assert "one-sided" not in inner
    rates = (0.03, 0.1, 0.3)
    edge, _ = reported(Made(rates=rates), tmp_path / "edge")
    assert "4 of 4 methods have their best learning rate at the grid's lowest" in edge
    single, tables = reported(Made(rates=(0.03,)), tmp_path / "single")
    assert "one learning rate has no sensitivity" in single and "one-sided" not in single
    assert "no variant: sensitivity" not in tables


def test_a_cap_that_no_logit_reached_is_vacuous(tmp_path: Path) -> None:
    """Logits go to 17 in a stable run, and beyond 1e4 in one that breaks."""
    configs = {"soft_cap": CAP, "qk_norm": CAP}
    limits = {**LIMITS, "soft_cap": 0.3, "qk_norm": 0.1}
    made = Made(limits=limits, configs=configs, reproduces=("table_3",))
    text, tables = reported(made, tmp_path)
    rows = by_method(tables["no variant: Table 3"])
    assert rows["soft_cap"]["above baseline"] == rows["soft_cap"]["ratio"] == "vacuous"
    assert rows["qk_norm"]["above baseline"] == "agree"
    largest = max(max_logit(made, place, STEPS) for place in places(made) if place[0] == "soft_cap")
    words = f"the largest attention logit of any run was {largest:.3g}, the cap is 50"
    assert f"soft_cap is vacuous: the cap never acted: {words}" in text
    assert "qk_norm is vacuous" not in text


def test_nothing_is_said_of_a_cap_where_logits_were_not_recorded(tmp_path: Path) -> None:
    made = Made(limits={"baseline": 0.3, "soft_cap": 0.3}, configs={"soft_cap": CAP})
    study = read_study(write_study(tmp_path / "one", made))
    assert set(idle_caps(study, study.results)) == {"soft_cap"}
    assert largest_logit(study.results[0]) == max_logit(made, places(made)[0], STEPS)
    blind = read_study(write_study(tmp_path / "two", replace(made, telemetry=False)))
    assert not idle_caps(blind, blind.results)


@pytest.mark.parametrize(
    ("config", "held"),
    [
        ({}, True),  # 0.02 at 64 channels, where 0.079 is matched
        ({"hidden_size": 1024}, False),
        ({"initializer": "small"}, False),
        ({"initializer_range": 0.079}, False),
        ({"initializer": "small", "embedding_std": 0.63}, True),
        ({"initializer": "fan_in"}, True),
    ],
)
def test_a_norm_of_outputs_away_from_the_papers_geometry_is_withdrawn(
    config: dict[str, object], held: bool, tmp_path: Path
) -> None:
    norms = {"qkv_norm": {"v_norm": "head"}, "qk_norm": {"qk_norm": "head"}}
    configs = {name: {**GEOMETRY, **config, **norms.get(name, {})} for name in LIMITS}
    made = Made(configs=configs, rates=(0.01,), documents=40, reproduces=("table_4",))
    study = read_study(write_study(tmp_path / "study", made))
    assert set(other_geometry(study, study.results)) == ({"qkv_norm"} if held else set())
    write_report([study.folder], tmp_path / "out")
    found = markdown_tables((tmp_path / "out" / "report.md").read_text(encoding="utf-8"))
    answers = {name: row["answer"] for name, row in by_method(found["no variant: Table 4"]).items()}
    assert (answers["qkv_norm"] == "withdrawn") == held
    assert answers["qk_norm"] == "agree"


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        (None, "nothing here shows that they were written before the runs"),
        ("12ab-dirty", "differed from commit 12ab, so nothing here shows"),
        ("12ab", "the claims and their rules were those of commit 12ab."),
    ],
)
def test_a_report_says_what_shows_that_claims_were_first(
    revision: str | None, words: str, tmp_path: Path
) -> None:
    made = Made(rates=(0.01,), reproduces=("table_3",), claims_revision=revision)
    assert words in reported(made, tmp_path)[0]


@pytest.mark.parametrize("name", sorted(file.parent.name for file in STUDIES.glob("*/records.*")))
def test_a_published_report_is_that_of_its_records(name: str, tmp_path: Path) -> None:
    with tarfile.open(STUDIES / name / "records.tar.xz") as packed:
        packed.extractall(tmp_path / "study", filter="data")
    write_report([tmp_path / "study"], tmp_path / "out")
    made = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert made == (STUDIES / name / "report.md").read_text(encoding="utf-8")
    drawn = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert drawn == {file.name for file in (STUDIES / name / "figures").iterdir()}
    # Figures' bytes depend on matplotlib's version; the page around them does not.
    pages = [re.sub(r"<svg.*?</svg>", "", (folder / "report.html").read_text("utf-8"), flags=re.S)
             for folder in (tmp_path / "out", STUDIES / name)]  # fmt: skip
    assert pages[0] == pages[1]
