"""Paths as users write them. Standard library only."""

import os
from pathlib import Path

from .errors import UserError


def expand_home(path: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by the home directory.

    A shell does not do it behind an equals sign or in a YAML file.

    Raises:
        UserError: nobody has that name, so the home directory is not known.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        name = Path(path).parts[0]
        raise UserError(
            f"{path}: {name} is no known home directory; write ./{path} for a file of that name"
        )
    return expanded


def check_file_to_write(path: str) -> None:
    """Check that a file can be written, before the work whose result it gets.

    Raises:
        UserError: the path is a folder, or its folder cannot be made or written to.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    _check_parents(Path(path).absolute())


def check_folder_to_write(path: str) -> None:
    """Check that a folder can be made or written to, before the work whose result it gets.

    Raises:
        UserError: the path is a file, or the folder cannot be made or written to.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    _check_parents(Path(path).absolute() / "file")


def _check_parents(path: Path) -> None:
    """Check the nearest folder above that exists."""
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {nearest} cannot be written to; choose another place")
