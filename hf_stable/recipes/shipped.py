"""Files that ship with the package, by name: `base/10m` works wherever a recipe's path does."""

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from hf_stable.errors import RecipeError
from hf_stable.paths import expand_home

# A link to the repository's `recipes/`, which becomes a folder of the wheel.
ROOT = Path(__file__).parent / "files"


def names() -> list[str]:
    """Return the names of all shipped files: YAML files without their ending, others with it."""
    files = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [_name(file) for file in files if "__pycache__" not in file.parts]


def find(name: str | Path) -> Path | None:
    """Return the shipped file of a name, or None.

    Args:
        name: Name of the file, such as `base/10m`. A leading `recipes/` and the ending `.yaml` are
            allowed, so that paths of a checkout work where only the wheel is installed.
    """
    wanted = Path(name)
    if wanted.parts[:1] == ("recipes",):
        wanted = wanted.relative_to("recipes")
    wanted_name = _name(wanted)
    return ROOT / _file(wanted_name) if wanted_name in names() else None


def resolve(name: str | Path, folder: Path = Path()) -> Path:
    """Return the file for a path or a name; an existing file takes precedence.

    Args:
        name: Path of a file, in which `~` is the home directory, or name of a shipped file.
        folder: Folder that a relative path starts at.

    Raises:
        RecipeError: If there is no such file; suggests the nearest name.
    """
    path = folder / expand_home(str(name))
    if path.is_file():
        return path
    found = find(name)
    if found is None:
        raise RecipeError(
            f"{path}: there is no such file (current directory: {Path.cwd()}), and no recipe of "
            f"that name ships with hf_stable{_nearest(str(name))}"
        )
    return found


def show(path: Path) -> str:
    """Return the name of a file for messages: a shipped file's name, or another file's path."""
    return _name(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def summary(name: str) -> str:
    """Return the first sentence of a file's leading comment, without text in parentheses."""
    comment = re.sub(r" \([^)]*\)", "", " ".join(_comment(ROOT / _file(name))))
    sentence = re.split(r"[.:](?:\s|$)", comment, maxsplit=1)[0]
    return textwrap.shorten(sentence, 100, placeholder=" ...")


def copy(name: str, output: Path | None = None) -> list[Path]:
    """Copy a shipped file, or all files of a shipped folder such as `slurm`.

    Args:
        name: Name of a file or of a folder of files.
        output: File (or folder, for a folder) to write; `recipes/NAME` in the current directory
            unless given, which matches the paths in the documentation.

    Returns:
        The written files.

    Raises:
        RecipeError: If the name is unknown, or a file exists already. Nothing is overwritten.
    """
    members = [each for each in names() if each.startswith(f"{name.rstrip('/')}/")]
    target = output or Path("recipes") / (name if members else _file(_known(name)))
    files = {target / _file(each).relative_to(name): _file(each) for each in members}
    files = files or {target: _file(_known(name))}
    for path in files:
        if path.exists():
            raise RecipeError(f"{path} exists; remove it, or choose another path by --output")
    for path, source in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, path)
    return list(files)


def read(name: str) -> str:
    """Return the text of a shipped file.

    Args:
        name: Name of the file.

    Raises:
        RecipeError: If the name is unknown.
    """
    return (ROOT / _file(_known(name))).read_text(encoding="utf-8")


def _known(name: str) -> str:
    found = find(name)
    if found is None:
        raise RecipeError(f"no recipe {name!r} ships with hf_stable{_nearest(name)}")
    return show(found)


def _nearest(name: str) -> str:
    end = _name(Path(*Path(name).parts[-2:]))
    close = difflib.get_close_matches(end, names(), n=1)
    suggestion = f"; did you mean {close[0]}? " if close else "; "
    return f"{suggestion}`hf-stable recipes list` names all"


def _name(file: Path) -> str:
    return str(file.with_suffix("") if file.suffix == ".yaml" else file)


def _file(name: str) -> Path:
    return Path(name if Path(name).suffix else f"{name}.yaml")


def _comment(path: Path) -> Iterator[str]:
    """Yield the first comment block; a shebang and #SBATCH lines have no space after the #."""
    begun = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            begun = True
            yield line[2:]
        elif begun:
            return
