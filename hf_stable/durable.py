"""Files and folders that appear whole and survive a crash: the one way in which they are written.

A reader, and a process that starts after a crash, finds the old content or the new one. The order
is always the same: the content is brought to the disk, it is renamed, and the rename is brought to
the disk. Standard library only.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all that is below it to the disk; links are not followed."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                sync(Path(place) / name)
        sync(Path(place))


def rename(source: Path, target: Path) -> None:
    """Give what is on the disk another name in the same folder, and bring the name to the disk.

    Raises:
        OSError: when `target` is a folder with something in it.
    """
    source.replace(target)
    sync(target.parent)


def write_file(path: Path, content: bytes, *, survives_crash: bool = True) -> None:
    """Write a file whole or not at all; its folder is made where it is missing.

    Args:
        survives_crash: False saves the wait for the disk where the content is worth nothing after
            a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if survives_crash:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if survives_crash:
        sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new folder beside `path`, which takes its place when the block ends without an error.

    A process that is killed at any moment loses neither the old folder nor a finished new one: in
    the moment in which neither has the name `path`, the old one is `.old-NAME`, and the next call
    for the same path puts it back.

    Args:
        replace: False refuses to take the place of a folder that holds something.

    Raises:
        OSError: when a folder with something in it may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".old-{path.name}")
    _settle(path, old)
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if replace and path.exists():
            path.rename(old)  # the next rename brings both to the disk, with no wait between them
        try:
            rename(temporary, path)
        except OSError:
            _settle(path, old)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(path: Path, old: Path) -> None:
    """Put back, or remove, the old folder that a killed replacement left."""
    if old.exists() and not path.exists():
        rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_remains(path: Path) -> None:
    """Remove what killed calls of `whole_folder` left; only where no other process writes it."""
    for temporary in path.parent.glob(f".tmp-{path.name}-????????"):
        shutil.rmtree(temporary, ignore_errors=True)
