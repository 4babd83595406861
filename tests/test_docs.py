"""Laws of README and docs: generated pages are current, links lead somewhere, README is short."""

import re
import sys
from pathlib import Path

import pytest

from hf_stable.recipes.model_fields import model_defaults, presets
from hf_stable.recipes.suggestions import all_keys

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import docs  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page: those of headings, as GitHub makes them, and of `id=`."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
    return slugs | set(re.findall(r'id="([^"]+)"', text))


def test_generated_pages_are_current() -> None:
    assert docs.stale() == [], "run python scripts/docs.py"


def test_reference_has_every_key_and_field() -> None:
    keys = docs.recipe_keys()
    sources = ("data.train.", "data.validation.")
    assert not [
        each
        for each in all_keys()
        if f"| `{each.removeprefix(sources[0]).removeprefix(sources[1])}` |" not in keys
    ]
    fields = docs.config_fields()
    assert all(f"| `{each}` |" in fields for each in [*model_defaults(), *presets()])


@pytest.mark.parametrize("page", PAGES, ids=[str(each.relative_to(ROOT)) for each in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target.read_text(encoding="utf-8")), link


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [str(each.relative_to(ROOT / "docs")) for each in PAGES[1:]]
    assert [each for each in pages if f"]({each})" not in index] == ["README.md"]


def test_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
