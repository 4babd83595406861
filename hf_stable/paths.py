"""Paths as users write them. Standard library only."""

import os
from pathlib import Path

from .errors import UserError


def expand_home(path: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by the home directory.

    A shell does not do this after an equals sign or in a YAML file.

    Args:
        path: Path as the user wrote it.

    Raises:
        UserError: If there is no user of that name.
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
    """Check that a file can be written, before the work that produces its content.

    Args:
        path: File to write.

    Raises:
        UserError: If the path is a folder, or its folder cannot be created or written to.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    _check_parents(Path(path).absolute())


def check_folder_to_write(path: str) -> None:
    """Check that a folder can be created or written to, before the work that fills it.

    Args:
        path: Folder to write.

    Raises:
        UserError: If the path is a file, or the folder cannot be created or written to.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    _check_parents(Path(path).absolute() / "file")


def _check_parents(path: Path) -> None:
    """Check the nearest existing parent folder."""
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {nearest} cannot be written to; choose another path")
