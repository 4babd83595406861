"""Laws of the two set-up commands: what they install, whom they refuse, where they look."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
BOOTSTRAP = ROOT / "scripts" / "bootstrap.py"

# Folders that stand for somebody's own machine, and hosts that packages come from.
MACHINE_PATHS = re.compile(r"(?<![\w.$}<>*-])/(work|root|home|opt|Users|mnt)/\w")
REGISTRY_HOSTS = re.compile(r"(pypi|pythonhosted|npmjs|anaconda|download\.pytorch)\.(org|com)\b")


def load_bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", BOOTSTRAP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load_bootstrap()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two files; bootstrap works in it, and installing is a list of extras."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.*\n")
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "CONSTRAINTS": tmp_path / "constraints.txt",
        "LOG": venv / "install.log",
        "HOME_FILE": venv / ".hf_stable-home",
    }.items():
        monkeypatch.setattr(bootstrap, name, value)
    return tmp_path


@pytest.fixture
def installed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The extras that were installed so far, in order."""
    extras: list[str] = []
    monkeypatch.setattr(bootstrap, "install_everything", extras.append)
    return extras


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_started(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


def test_bootstrap_needs_only_the_standard_library() -> None:
    names = set()
    for node in ast.walk(ast.parse(BOOTSTRAP.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_an_old_python_can_read_the_file_that_refuses_it() -> None:
    ast.parse(BOOTSTRAP.read_text(), feature_version=(3, 8))
    with pytest.raises(bootstrap.InstallError, match=r"3\.11 or newer, found 3\.8\.18 \(old\)"):
        bootstrap.check_python((3, 8, 18), "old")


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 1), (4, 0, 0)])
def test_a_new_enough_python_is_taken(version: tuple[int, ...]) -> None:
    bootstrap.check_python(version, "python")


@pytest.mark.parametrize("arguments", [[], ["all"], ["test", "quickstart"], ["--help"]])
def test_other_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bootstrap.main(arguments) == 1
    assert "quickstart or test" in capsys.readouterr().err


@given(st.lists(st.binary(max_size=5), min_size=3, max_size=3).map(tuple), st.data())
def test_a_stamp_tells_all_inputs_apart(parts: tuple[bytes, bytes, bytes], data: st.DataObject):
    """Also a byte that moves from the end of one file to the start of the next."""
    other = data.draw(st.sampled_from([parts, (parts[0] + parts[1], b"", parts[2]), parts[::-1]]))

    def digest(pyproject: bytes, constraints: bytes, version: bytes) -> str:
        return bootstrap.stamp(pyproject, constraints, version.decode("latin-1"))

    assert (digest(*parts) == digest(*other)) == (parts == other)


def test_the_second_start_installs_nothing(tree: Path, installed: list[str]) -> None:
    bootstrap.bootstrap("test")
    bootstrap.bootstrap("test")
    assert installed == ["test"]
    bootstrap.bootstrap("quickstart")
    assert installed == ["test", "quickstart"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(
    tree: Path, installed: list[str], changed: str
) -> None:
    bootstrap.bootstrap("test")
    (tree / changed).write_text("# changed\n")
    bootstrap.bootstrap("test")
    assert installed == ["test", "test"]


def test_an_installation_that_failed_is_redone(
    tree: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    def fail(extra: str) -> None:
        raise bootstrap.InstallError("no network")

    bootstrap.bootstrap("test")
    (tree / "constraints.txt").write_text("# changed\n")
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "install_everything", fail)
        with pytest.raises(bootstrap.InstallError):
            bootstrap.bootstrap("test")
    (tree / "constraints.txt").write_text("torch==2.*\n")  # as it was when the stamp was written
    bootstrap.bootstrap("test")
    assert installed == ["test", "test"]


def test_an_environment_that_moved_or_broke_is_made_anew(
    tree: Path, installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.bootstrap("test")
    assert bootstrap.venv_version() == "{}.{}.{}".format(*sys.version_info)
    bootstrap.HOME_FILE.write_text("elsewhere")
    assert bootstrap.venv_version() is None
    bootstrap.bootstrap("test")
    bootstrap.PYTHON.unlink()
    assert bootstrap.venv_version() is None
    bootstrap.bootstrap("test")
    assert installed == ["test"] * 3
    assert capsys.readouterr().out.count("making it anew") == 2


def test_a_failing_step_shows_its_last_lines_and_what_to_do(tree: Path) -> None:
    bootstrap.VENV.mkdir()
    command = ["bash", "-c", "echo before; echo no space left on device >&2; exit 3"]
    with pytest.raises(bootstrap.InstallError) as error:
        bootstrap.run_phase("torch", command, dict(os.environ))
    for part in ("exit code 3: torch", "| no space left on device", "rm -r .venv", "install.log"):
        assert part in str(error.value)


def test_torch_comes_first_and_everything_is_constrained() -> None:
    steps = [command for _, command in bootstrap.phases(["pip", "install"], "test", "", uv=False)]
    assert "torch" in steps[0] and steps[-1][-1].endswith("[test]")
    for command in steps:
        assert command[command.index("-c") + 1] == str(bootstrap.CONSTRAINTS)


@pytest.mark.parametrize(
    ("extra", "has_triton", "platform", "installs"),
    [
        ("test", False, "linux", True),
        ("test", True, "linux", False),  # a CUDA build of torch brings the one it works with
        ("test", False, "darwin", False),  # no builds
        ("quickstart", False, "linux", False),
    ],
)
def test_triton_is_installed_where_the_tests_need_it_and_torch_has_none(
    extra: str, has_triton: bool, platform: str, installs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "run_phase", lambda _, command, __: commands.append(command))
    monkeypatch.setattr(bootstrap, "imports", lambda module: has_triton)
    monkeypatch.setattr(bootstrap, "ensure_pip", lambda _: None)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HF_STABLE_UV", "0")
    bootstrap.install_everything(extra)
    assert any(bootstrap.TRITON in command for command in commands) is installs


@pytest.mark.parametrize(("uv", "option"), [(False, "--index-url"), (True, "--default-index")])
def test_a_torch_index_is_used_for_torch_alone(uv: bool, option: str) -> None:
    index = "https://index.invalid/gpu"
    steps = [command for _, command in bootstrap.phases(["install"], "test", index, uv=uv)]
    assert steps[0][-4:] == ["--no-deps", option, index, "torch"]
    assert not any(index in command for command in steps[1:])


def test_pip_settings_follow_its_order_of_precedence() -> None:
    listing = (
        "global.index-url='https://global.invalid'\n"
        "install.index-url='https://install.invalid'\n"
        "global.find-links='one two'\n"
        "global.timeout='60'\n"
        ":env:.find-links='three'\n"
    )
    assert bootstrap.pip_settings({}, listing) == {
        "index-url": "https://install.invalid",
        "find-links": "one two",
    }
    environment = {"PIP_FIND_LINKS": "three", "PIP_INDEX_URL": ""}
    assert bootstrap.pip_settings(environment, listing) == {
        "index-url": "https://install.invalid",
        "find-links": "three",
    }


def test_uv_looks_where_pip_would() -> None:
    settings = {"find-links": "one\ntwo", "extra-index-url": "a b", "index-url": "c"}
    found = bootstrap.uv_environment(settings, {"UV_DEFAULT_INDEX": "mine", "PATH": "p"})
    assert found == {
        "UV_FIND_LINKS": "one,two",
        "UV_INDEX": "a b",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "mine",  # uv's own setting wins
        "PATH": "p",
    }
    assert bootstrap.uv_environment({}, {"PATH": "p"}) == {"PATH": "p"}


def test_every_requirement_is_constrained() -> None:
    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(name for names in extras.values() for name in names),
    ]
    required = {normal(requirement) for requirement in wanted} - {"hf-stable"}
    lines = bootstrap.CONSTRAINTS.read_text().splitlines()
    assert required <= {normal(line) for line in lines if not line.startswith("#")}


def project_files() -> list[Path]:
    git = shutil.which("git")
    listing = [str(git), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        pytest.skip("not a git work tree: nothing says which files are the project's")
    return [ROOT / name for name in answer.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_of_one_machine() -> None:
    """Neither its folders nor the hosts that it gets packages from."""
    here = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}(?!\w)")
    found = []
    for file in project_files():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # pictures and the like
        for number, line in enumerate(lines, start=1):
            if any(pattern.search(line) for pattern in (MACHINE_PATHS, REGISTRY_HOSTS, here)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
