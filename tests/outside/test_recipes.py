"""Every shipped recipe with every technique, from the wheel, as a user's process loads them."""

import re
from pathlib import Path

import pytest

from hf_stable.recipes import shipped

from .conftest import Installed

TECHNIQUES = [name for name in shipped.names() if name.startswith("techniques/")]
BASES = [
    name
    for name in shipped.names()
    if name.startswith(("base/", "demonstrations/")) or name == "quickstart"
]
# One process does them all: it knows only what the command line imports.
_PROGRAM = """\
import shutil, sys
from hf_stable.cli import main
command, bases, techniques, options = (word.split(",") for word in sys.argv[1:])
for base in bases:
    for technique in techniques:
        print("with", base, technique, flush=True)
        shutil.rmtree("runs/tiny", ignore_errors=True)
        assert main([*command, base, technique, *filter(None, options)]) == 0
"""


def _run(
    installed: Installed, folder: Path, command: str, bases: list[str], options: str = ""
) -> str:
    (folder / "program.py").write_text(_PROGRAM)
    words = f"{command} {','.join(bases)} {','.join(TECHNIQUES)} '{options}'"
    return installed.run(f"python -W ignore program.py {words}", folder)


def test_recipes_and_techniques_are_found() -> None:
    assert len(BASES) >= 9
    assert len(TECHNIQUES) >= 16


@pytest.mark.parametrize("bases", [BASES[:3], BASES[3:6], BASES[6:]], ids=",".join)
def test_check_accepts_every_technique(
    installed: Installed, tmp_path: Path, bases: list[str]
) -> None:
    output = _run(installed, tmp_path, "check", bases)
    assert output.count("this recipe works") == len(bases) * len(TECHNIQUES)


@pytest.mark.parametrize(
    "bases", [["base/830m"], pytest.param(BASES, marks=pytest.mark.slow)], ids=["830m", "all"]
)
def test_plan_accepts_every_technique(
    installed: Installed, tmp_path: Path, bases: list[str]
) -> None:
    output = _run(installed, tmp_path, "plan", bases, "--gpus,8")
    tables = re.split("^with ", output, flags=re.M)[1:]
    assert len(tables) == len(bases) * len(TECHNIQUES)
    assert all("|    8 |" in table for table in tables)


def test_plan_accepts_packed_documents(installed: Installed, tmp_path: Path) -> None:
    packed = "--set data.separate_documents=true model.preset=baseline"
    output = installed.run(f"hf-stable plan quickstart --gpus 8 {packed}", tmp_path)
    assert "|    8 |" in output


def test_training_accepts_every_technique(installed: Installed, folder: Path) -> None:
    settings = "data.train=[more.jsonl],training.steps=2,training.checkpoint_every=0"
    output = _run(installed, folder, "train", ["base/tiny"], f"--set,{settings}")
    assert output.count("after 2 steps") == len(TECHNIQUES)
