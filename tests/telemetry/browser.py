"""A headless Chromium for tests of pages; without one they are skipped."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
)
# Counted by the page itself, after it is laid out; ids of a page must be unique over all figures.
_MEASURE = """
const box = element => { const at = element.getBoundingClientRect();
  return {left: at.left, top: at.top, width: at.width, height: at.height} };
const ids = [...document.querySelectorAll('[id]')].map(element => element.id);
const broken = [...document.querySelectorAll('*')].flatMap(element =>
  [...element.attributes].flatMap(attribute =>
    [...attribute.value.matchAll(/url\\(["']?#([^"')]+)|^#(.+)$/g)]
      .map(found => found[1] || found[2])
      .filter(id => /href$|path|fill|style|mask/.test(attribute.name)
        && !document.getElementById(id))));
document.documentElement.dataset.measured = JSON.stringify({
  height: document.documentElement.scrollHeight,
  overflow: document.documentElement.scrollWidth - innerWidth,
  figures: [...document.querySelectorAll('figure')].map(each =>
    ({key: each.id, ...box(each.querySelector('svg')), paths: each.querySelectorAll('path').length,
      images: [...each.querySelectorAll('image')].map(box)})),
  hidden: [...document.querySelectorAll('svg [class^=run-]')]
    .filter(each => !each.getClientRects().length).map(each => each.className.baseVal),
  twice: ids.filter((id, at) => ids.indexOf(id) !== at),
  broken, loads: performance.getEntriesByType('resource').map(entry => entry.name)});
"""


@dataclass(frozen=True)
class Browser:
    """A browser with an empty profile.

    Args:
        folder: an empty folder for what it writes.
    """

    program: str
    folder: Path

    def measure(self, page: Path, width: int) -> tuple[dict[str, Any], list[str]]:
        """What a page is once laid out (see _MEASURE), and its console's lines.

        The page is opened as a copy that is allowed one script, which measures.
        """
        text = page.read_text(encoding="utf-8")
        copy = self.folder / "measured.html"
        allowed = text.replace(
            "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
        )
        copy.write_text(allowed.replace("</body>", f"<script>{_MEASURE}</script></body>"))
        done = self._run(copy, f"--window-size={width},900", "--dump-dom")
        found = re.search(r'data-measured="([^"]*)"', done.stdout)
        assert found is not None, done.stderr
        return json.loads(unescape(found[1])), console(done.stderr)

    def screenshot(self, page: Path, width: int, height: int, file: Path) -> list[str]:
        """Write a PNG of the page's first `height` pixels; returns the console's lines."""
        done = self._run(page, f"--window-size={width},{height}", f"--screenshot={file}")
        assert file.is_file(), done.stderr
        return console(done.stderr)

    def _run(self, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={self.folder / 'profile'}"
        command = [self.program, *_FLAGS, profile, *flags, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(log: str) -> list[str]:
    """Lines that a page left on the console: its errors, and loads that were refused."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def find_browser(folder: Path) -> Browser:
    """A browser that writes to `folder`; skips the test where none is installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if program := shutil.which(name):
            return Browser(program, folder)
    pytest.skip("needs Chromium: `apt-get install chromium`")
