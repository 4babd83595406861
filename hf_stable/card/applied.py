"""Techniques that a run had switched on, with their papers and the rows that test them."""

from typing import Any
from urllib.parse import quote

from .facts import Facts
from .markdown import Made, block, escape, link
from .papers import ANCHOR, BASELINE_PAPER, PAPERS, STUDIES, TECHNIQUES, Technique


def applied(facts: Facts) -> list[tuple[Technique, Any]]:
    """Return the techniques whose field is not neutral, with its value, in config order."""
    found = []
    for technique in TECHNIQUES:
        if "." in technique.field:
            value = facts.of(technique.field)
            value = technique.neutral if value is None else value
        else:
            value = facts.config.get(technique.field, technique.neutral)
        if value != technique.neutral:
            found.append((technique, value))
    return found


def rows(facts: Facts, repository: str | None) -> list[dict[str, Made]]:
    """Return the rows of the table of techniques.

    Args:
        facts: Records of the run.
        repository: Address of the sources with the reports; None names reports without a link.
    """
    return [
        {
            "name": escape(technique.name),
            "field": escape(technique.field),
            "value": escape(value),
            "papers": Made(
                ", ".join(link(PAPERS[key].short, PAPERS[key].address) for key in technique.papers)
                or "–"
            ),
            "evidence": _evidence(technique.row, repository),
        }
        for technique, value in applied(facts)
    ]


def _evidence(row: str | None, repository: str | None) -> Made:
    study = next((study for study, methods in STUDIES.items() if row in methods), None)
    if row is None or study is None:
        return Made("no study yet")
    file = f"scripts/studies/{study}/report.md"
    if repository is None:
        return Made(f"row `{row}` of `{file}` in hf\\_stable's sources")
    base = quote(repository.rstrip("/"), safe=":/")
    return Made(f"[row `{row}` of {escape(study)}]({base}/{file}#{ANCHOR})")


def none_applied(facts: Facts) -> Made:
    """Return the text that replaces an empty table."""
    if not facts.config:
        return Made(
            "The records hold no model config. `hf-stable train RECIPE` records it in run.json."
        )
    return Made(f"None: every field of the config is that of the baseline ({baseline_paper()}).")


def baseline_paper() -> Made:
    """Return a link to the paper whose baseline the model is."""
    return link(PAPERS[BASELINE_PAPER].short, PAPERS[BASELINE_PAPER].address)


def bibtex(facts: Facts) -> Made:
    """Return the entries of the baseline and of the active techniques, without duplicates."""
    keys = [key for technique, _ in applied(facts) for key in technique.papers]
    entries = [PAPERS[key].bibtex for key in dict.fromkeys([BASELINE_PAPER, *keys])]
    return block("\n\n".join(entries), "bibtex")


def tags(facts: Facts) -> list[str]:
    """Return the techniques' fields and the papers, as tags for the Hub."""
    found = applied(facts)
    papers = [BASELINE_PAPER, *(key for technique, _ in found for key in technique.papers)]
    fields = [technique.field for technique, _ in found if technique.papers]
    return [*fields, *(f"arxiv:{PAPERS[key].arxiv}" for key in dict.fromkeys(papers))]
