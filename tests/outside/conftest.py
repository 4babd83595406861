"""A fresh environment with the built wheel, and a folder with a short quickstart run."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.convert.sources import save
from tests.sharing import shared_folder

from .documented import INSTEAD, QUICKSTART

ROOT = Path(__file__).parents[2]
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
# With the name of the plan that the documentation runs, so that its report is found.
_PLAN = """\
name: table3_cpu
base: [base/tiny]
methods: [techniques/qk_norm]
learning_rates: [0.001]
seeds: [0]
settings: ["data.train=[more.jsonl]", training.steps=2, schedule.warmup=1]
"""
_SCRIPT = """\
#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


class Installed:
    """An environment that has the wheel, and the other packages of the test environment."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"

    def run(self, line: str, folder: Path, status: int = 0) -> str:
        """Run one line of a shell in a folder.

        Returns:
            Its output and errors; the exit code must be `status`.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        settings = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HF_HOME": str(self.bin.parent / "huggingface"),
            "HF_HUB_OFFLINE": "1",
        }
        answer = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=folder,
            env={**kept, **settings, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert answer.returncode == status, f"{line}\n{answer.stdout}"
        return answer.stdout


def _install(folder: Path) -> None:
    """Build the wheel from tracked files, and unpack it into an environment without pip."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    source = folder / "source"
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    build = [sys.executable, "-c", _BUILD, str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    # A path file of the test environment in turn, its link to the checkout, is not followed.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    scripts = importlib.metadata.entry_points(group="console_scripts")
    ours = importlib.metadata.Distribution.at(next(site.glob("hf_stable-*.dist-info")))
    for script in (*scripts, *ours.entry_points):
        file = python.with_name(script.name)
        file.write_text(_SCRIPT.format(python=python, module=script.module, function=script.attr))
        file.chmod(0o755)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The environment; `hf_stable` in it is the wheel's, not the checkout's."""
    folder = shared_folder(tmp_path_factory, "installed", _install)
    environment = Installed(folder / "env")
    found = environment.run('python -c "import hf_stable; print(hf_stable.__file__)"', folder)
    assert found.startswith(str(folder))
    return environment


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, installed: Installed) -> Path:
    """A folder where the quickstart's text was written and its recipe trained, shortened."""

    def make(folder: Path) -> None:
        for line in (QUICKSTART[0], QUICKSTART[2]):
            instead = INSTEAD[line]
            assert isinstance(instead, str)
            installed.run(instead, folder)

    return shared_folder(tmp_path_factory, "trained", make)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` with what the documentation's commands read beside it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "runs" / "quickstart-text.jsonl").read_text()
    (tmp_path / "my" / "texts").mkdir(parents=True)
    (tmp_path / "my" / "texts" / "a.jsonl").write_text(text)
    (tmp_path / "more.jsonl").write_text(text.replace("the", "a"))
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 20)
    save(tmp_path / "path" / "to" / "llama", "llama")
    (tmp_path / "small.yaml").write_text(_PLAN)
    for name in ("a", "b"):
        shutil.copytree(tmp_path / "runs" / "quickstart", tmp_path / "runs" / name)
    return tmp_path
