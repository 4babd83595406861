"""One report for the tests that look at it."""

from pathlib import Path

import pytest

from hf_stable.sweep.report import write_report

from .reports import MADE, Row, markdown_tables
from .studies import write_study


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("study"), MADE)
    output = tmp_path_factory.mktemp("report") / "new"
    write_report([folder], output)
    return output


@pytest.fixture(scope="session")
def tables(written: Path) -> dict[str, list[Row]]:
    return markdown_tables((written / "report.md").read_text(encoding="utf-8"))
