"""Laws of the report's files: they say the same, are alone and safe, and need no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_stable.errors import UserError
from hf_stable.sweep.report import write_report

from ..telemetry.browser import find_browser
from .reports import MADE, Row, by_method, html_tables, markdown_tables
from .studies import Made, write_study


def test_both_files_say_the_same(written: Path, tables: dict[str, list[Row]]) -> None:
    shown = html_tables((written / "report.html").read_text(encoding="utf-8"))
    assert shown == {title: [list(row.values()) for row in rows] for title, rows in tables.items()}


def test_the_page_is_alone(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'")
    assert "<script" not in text
    loads = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', text)
    assert loads and all((one or other).startswith("#") for one, other in loads)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {one or other for one, other in loads} <= {f"#{each}" for each in ids}


def test_names_are_only_read(tmp_path: Path) -> None:
    name = '_$x^{2$ & "<script>alert(1)</script>| `b` [c](http://d)'
    folder = write_study(tmp_path / "study", Made(name=name, limits={"baseline": 0.03, name: 0.1}))
    write_report([folder], tmp_path / "out")
    for file in ("report.html", "report.md"):
        text = (tmp_path / "out" / file).read_text(encoding="utf-8")
        assert "<script" not in text
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html_tables(html)["no variant"][1][0] == name
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "](http" not in markdown.replace("\\]", "")
    assert name in by_method(markdown_tables(markdown)["no variant"])


def test_equal_records_give_equal_bytes(written: Path, tmp_path: Path) -> None:
    write_report([write_study(tmp_path / "other", MADE)], tmp_path / "out")
    files = sorted(file.relative_to(written) for file in written.rglob("*") if file.is_file())
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (written / file).read_bytes(), file
    assert sum((written / file).stat().st_size for file in files) < 2_000_000


def test_a_machine_without_torch_makes_the_same_report(tmp_path: Path, written: Path) -> None:
    folder = write_study(tmp_path / "study", MADE)
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "sys.argv = ['hf-stable']\n"
        "from pathlib import Path\n"
        "from hf_stable.sweep.report import write_report\n"
        f"write_report([Path({str(folder)!r})], Path({str(tmp_path / 'out')!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("report.md", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (written / name).read_bytes()


def test_what_cannot_be_a_report_is_refused_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="at least one study"):
        write_report([], tmp_path)
    folder = write_study(tmp_path / "study", Made(limits={"baseline": 0.03}))
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(UserError, match="is a file"):
        write_report([folder], file)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("old")
    with pytest.raises(UserError, match=r"hf_stable\[figures\]"):
        write_report([folder], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.md"]
    assert (tmp_path / "out" / "report.md").read_text() == "old"


@pytest.mark.parametrize("width", [1200, 700])
def test_a_browser_draws_every_figure(width: int, written: Path, tmp_path: Path) -> None:
    page = written / "report.html"
    measured, console = find_browser(tmp_path).measure(page, width)
    assert not console
    assert not measured["twice"] and not measured["broken"] and not measured["loads"]
    assert measured["overflow"] <= 0
    keys = re.findall(r'<figure id="([^"]*)"', page.read_text(encoding="utf-8"))
    assert len(keys) == 4 and [each["key"] for each in measured["figures"]] == keys
    assert all(each["height"] > 100 and each["paths"] > 10 for each in measured["figures"])
    assert {f"{key}.svg" for key in keys} == {file.name for file in written.glob("figures/*")}
