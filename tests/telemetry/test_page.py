"""Laws of the page: it is whole, alone and safe, and a browser can draw it."""

import math
import re
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.telemetry.reading.page import page, write_page

from .browser import find_browser
from .drawn import only, small, write_pair
from .runs import Plan, write_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[History]:
    return write_pair(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def written(pair: list[History], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(pair, file)
    return file


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, Plan(steps=1, finished=False, log_every=10))
    (tmp_path / "metrics.jsonl").write_text('{"event": "started", "step": 0}\n')
    (tmp_path / "run.json").unlink()
    assert 'id="left-out"' in page([read_history(tmp_path)])


def test_the_page_is_alone(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'")
    assert "script" not in text
    loads = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', text)
    assert loads
    assert all((one or other).startswith(("#", "data:image/png;base64,")) for one, other in loads)


def test_the_tables_say_that_they_are_of_the_second_block(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    assert "Table 1, second block" in html and "block 1, counted from 0" in html


def test_ids_are_unique_and_references_lead_somewhere(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    found = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert {one or other for one, other in found} <= set(ids)


def test_names_are_only_read(tmp_path: Path) -> None:
    name = '_$x^{2$ & "<script>alert(1)</script><img src=x>'
    with only("loss"):
        html = page([small(tmp_path / "run", name=name)])
    assert "<script" not in html and "<img" not in html
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert f"\u200b{shown}</text>" in svgs
    assert f"<h3>{escape(name)}</h3>" in html


def test_the_page_says_what_alarmed_and_when(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    assert "layer 1: the largest attention logit" in html
    assert "attention/max_logit" in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)[0]


def test_equal_records_give_equal_bytes_and_a_small_page(
    pair: list[History], written: Path, tmp_path: Path
) -> None:
    write_page(pair, tmp_path / "new" / "again.html")
    assert (tmp_path / "new" / "again.html").read_bytes() == written.read_bytes()
    assert written.stat().st_size < 3_000_000
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_a_page_that_fails_leaves_the_old_one(
    pair: list[History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hf_stable\[figures\]'"):
        write_page(pair, file)
    assert file.read_text() == "old"


def test_what_cannot_be_a_page_is_refused(pair: list[History], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        write_page([], tmp_path / "page.html")
    with pytest.raises(UserError, match="is a folder"):
        write_page(pair, tmp_path)


@pytest.mark.parametrize("width", [1200, 700])
def test_a_browser_draws_every_figure(width: int, written: Path, tmp_path: Path) -> None:
    browser = find_browser(tmp_path)
    measured, console = browser.measure(written, width)
    assert not console
    assert not measured["twice"] and not measured["broken"] and not measured["loads"]
    assert measured["overflow"] <= 0
    assert not measured["hidden"]
    keys = re.findall(r'<figure id="([^"]*)"', written.read_text(encoding="utf-8"))
    assert len(keys) == 15
    assert [each["key"] for each in measured["figures"]] == keys
    shot = tmp_path / "page.png"
    assert not browser.screenshot(written, width, measured["height"], shot)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    for each in measured["figures"]:
        assert each["width"] > 600 and each["height"] > 100
        assert all(image["width"] > 0 and image["height"] > 0 for image in each["images"])
        top, left = int(each["top"]), int(each["left"])
        seen = pixels[top : top + int(each["height"]), left : left + int(each["width"])]
        ink = (seen.min(axis=2) < 200).mean(), len(np.unique(seen.reshape(-1, 3), axis=0))
        assert ink[0] > 0.01 and ink[1] > 20, each["key"]
        for image in each["images"]:
            _assert_drawn(pixels, image)


def test_a_run_can_be_hidden_without_a_script(written: Path, tmp_path: Path) -> None:
    text = written.read_text(encoding="utf-8")
    unchecked = tmp_path / "unchecked.html"
    unchecked.write_text(text.replace('id="show-run-0" checked', 'id="show-run-0"'))
    measured, _ = find_browser(tmp_path).measure(unchecked, 1200)
    assert measured["hidden"] == ["run-0"] * text.count('<g class="run-0">')


def _assert_drawn(pixels: np.ndarray, image: dict[str, float]) -> None:
    """A heat map hides the white of its figure, but for the marks in a colour bar."""
    bottom, right = image["top"] + image["height"], image["left"] + image["width"]
    rows = slice(math.ceil(image["top"]) + 1, math.floor(bottom) - 1)
    columns = slice(math.ceil(image["left"]), math.floor(right))
    assert (pixels[rows, columns].min(axis=2) < 250).mean() > 0.9
