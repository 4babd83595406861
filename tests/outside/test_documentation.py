"""Commands of README, docs and `--help` work from the wheel, in an empty folder."""

import re
from pathlib import Path

import pytest

from .conftest import ROOT, Installed
from .documented import (
    CLAIMS,
    INSTEAD,
    Block,
    Elsewhere,
    blocks_of_documents,
    blocks_of_help,
)

BLOCKS = [*blocks_of_documents(), *blocks_of_help()]


def _runnable() -> list[Block]:
    """Return the blocks with a line that runs here and stands in no block before."""
    seen: set[str] = set()
    found = []
    for block in BLOCKS:
        here = {line for line in block.lines if not isinstance(INSTEAD.get(line), Elsewhere)}
        if here - seen:
            found.append(block)
        seen |= here
    return found


RUNNABLE = _runnable()


def test_every_command_is_found() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    lines = [line for block in blocks_of_documents() for line in block.lines]
    written = re.sub(r"^```text\n.*?^```", "", text, flags=re.M | re.S).count("\nhf-stable ")
    assert written == sum(line.startswith("hf-stable ") for line in lines)
    assert len(lines) > 30
    assert len(blocks_of_help()) > 3


def test_no_command_of_the_documents_runs_twice() -> None:
    lines = [line for block in blocks_of_documents() for line in block.lines]
    assert sorted(lines) == sorted(set(lines))


def test_the_tables_name_documented_commands() -> None:
    lines = {line for block in BLOCKS for line in block.lines}
    assert not set(INSTEAD) - lines
    assert not set(CLAIMS) - lines
    for instead in INSTEAD.values():
        assert isinstance(instead, str) or (ROOT / instead.file).is_file()


@pytest.mark.parametrize(
    "block", RUNNABLE, ids=[f"{block.place}-{at}" for at, block in enumerate(RUNNABLE)]
)
def test_documented_commands_run(block: Block, installed: Installed, folder: Path) -> None:
    adapted = [INSTEAD.get(line, line) for line in block.lines]
    output = installed.run("\n".join(line for line in adapted if isinstance(line, str)), folder)
    for line in block.lines:
        for claim in CLAIMS.get(line, []):
            assert re.search(claim, output), f"{line}: {claim!r} is not in\n{output}"


def test_console_scripts_start(installed: Installed, tmp_path: Path) -> None:
    said = installed.run("hf-stable --version; hf-stable-lm-eval --help", tmp_path)
    assert re.match(r"hf-stable \d", said)
    assert "usage: lm-eval" in said
